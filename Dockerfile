# Troupe for the GPUs of one node. No model is inside: checkpoints come from a mounted folder or the Hugging Face cache.
#
#   docker build -t troupe .
#   docker run --gpus all --shm-size 8g -p 127.0.0.1:8000:8000 -v ~/.cache/huggingface:/cache troupe
#   docker run --gpus all --shm-size 8g -p 127.0.0.1:8000:8000 -v ~/.cache/huggingface:/cache troupe org/name
#   docker run --gpus all --shm-size 8g -p 127.0.0.1:7088:7088 -v ~/.cache/huggingface:/cache troupe --hf-model org/name
#   docker run --shm-size 8g -p 127.0.0.1:9900:9900 -e TRITON_SERVER_HOST=… -e TOKENIZER_PATH=org/name troupe
#   docker build --target with-model --build-context model=./my-checkpoint -t my-image .     a checkpoint, or a CTranslate2 folder
#
# The arguments are those of `troupe serve`. Ports: 8000; for the flags and variables of other servers 7088 with
# --hf-model or HF_MODEL, 9900 with Triton, 8000 with CTranslate2. PORT chooses another one for flags and variables,
# TROUPE_PORT and --port for anything.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS troupe
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# torch brings its own CUDA libraries; the compiler is for Triton's kernels and for torch.compile.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates curl gcc libc6-dev python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 troupe \
 && install -d -o troupe -g troupe /app /cache
USER 10001
WORKDIR /app

COPY --chown=troupe:troupe pyproject.toml README.md LICENSE serve_config.yaml ./
COPY --chown=troupe:troupe scripts scripts
COPY --chown=troupe:troupe deployments deployments
COPY --chown=troupe:troupe model_loaders model_loaders
# scripts/env takes an environment with this stamp as it is. An editable install, so that files mounted over /app count.
RUN python3 -m venv .venv \
 && .venv/bin/pip install --no-cache-dir --editable '.[bitsandbytes,ctranslate2,peft,triton]' \
 && touch ".venv/.troupe-serve-$(sha256sum pyproject.toml | cut -c1-16)"

# A container is reached from outside of it, so it listens on every address of its own.
ENV HF_HOME=/cache \
    TROUPE_HOST=0.0.0.0
VOLUME /cache
EXPOSE 8000 7088 9900
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
  CMD ["sh", "-c", "for port in ${TROUPE_PORT:-${PORT:-8000 7088 9900}}; do curl --fail --silent http://127.0.0.1:$port/health && exit; done; exit 1"]
ENTRYPOINT ["scripts/serve"]

# The same with a checkpoint inside, from the folder given as --build-context model=FOLDER.
FROM troupe AS with-model
# hadolint ignore=DL3022
COPY --from=model --chown=troupe:troupe . /model
ENV HF_MODEL=/model HF_HUB_OFFLINE=1

# What `docker build` makes without a --target: no model.
FROM troupe
