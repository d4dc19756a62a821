"""A real Triton server for the tests: NVIDIA's binaries from PyPI, on the CPU, with `triton_model` in it.

The wheel of nvidia-pytriton carries them. They need numpy 1 in the interpreter that runs a model, so they live in an
environment of their own, `.venv/pytriton`, made by `scripts/test`, or on first use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import Any

import numpy

HOME = Path(sys.prefix) / "pytriton"
WHEELS = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
_STARTS = 3
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_SITE = Path("lib") / f"python{_VERSION}" / "site-packages"

_INPUTS = {
    "ids": {"input_ids": "INT32 -1", "input_lengths": "INT32", "request_output_len": "INT32"},
    "text": {"text_input": "STRING", "max_tokens": "INT32", "stop_words": "STRING -1", "bad_words": "STRING -1"},
}
_LISTS = {"stop_words_list": "INT32 2,-1", "bad_words_list": "INT32 2,-1"}
_SAMPLING = {
    "end_id": "INT32",
    "pad_id": "INT32",
    "temperature": "FP32",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "beam_width": "INT32",
}
_IDS = {"runtime_top_k": "INT32", "runtime_top_p": "FP32", "return_log_probs": "BOOL", "len_penalty": "FP32"}
_TEXT = {"top_k": "INT32", "top_p": "FP32", "min_tokens": "INT32", "seed": "UINT64", "stream": "BOOL"}
_NEW = {"min_tokens": "INT32", "seed": "UINT64", "streaming": "BOOL", "exclude_input_in_output": "BOOL"}
_OLD = {"random_seed": "UINT64", "streaming": "BOOL"}

MODELS: dict[str, dict[str, Any]] = {
    "tensorrt_llm": {"inputs": {**_INPUTS["ids"], **_LISTS, **_SAMPLING, **_IDS, **_NEW, "image_input": "FP16 3,-1"}},
    "older": {"inputs": {**_INPUTS["ids"], **_SAMPLING, **_IDS, **_OLD}, "decoupled": False},
    "accumulating": {"inputs": {**_INPUTS["ids"], **_SAMPLING, **_IDS, **_NEW}, "accumulated": "true"},
    "slow": {"inputs": {**_INPUTS["ids"], **_SAMPLING, **_IDS, **_NEW}, "delay": "0.05"},
    "ensemble": {"inputs": {**_INPUTS["text"], **_SAMPLING, **_TEXT}},
    "ensemble_whole": {"inputs": {**_INPUTS["text"], **_SAMPLING, **_TEXT}, "decoupled": False},
    "other": {"inputs": {"x": "FP32"}},
}
_OUTPUTS = {
    "ids": {"output_ids": "INT32 -1,-1", "sequence_length": "INT32 -1", "output_log_probs": "FP32 -1,-1"},
    "text": {"text_output": "STRING -1"},
}


def site_packages() -> Path:
    """Where the server and its numpy are; installed if they are not."""
    site = HOME / _SITE
    if not (site / "pytriton").is_dir() or not (site / "numpy").is_dir():
        print("Installing a Triton server for the tests (224 MB, once) ...", file=sys.stderr, flush=True)
        venv.create(HOME, with_pip=False, clear=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *WHEELS]
        subprocess.run(command, check=True)
    # What else a model imports comes from the environment the tests run in.
    (site / "tests.pth").write_text(str(Path(numpy.__file__).parents[1]) + "\n")
    return site


def make_repository(root: Path, folder: Path) -> Path:
    """Triton's model repository: a folder per model, all of them over the Llama in `folder`."""
    for name, model in MODELS.items():
        version = root / name / "1"
        version.mkdir(parents=True)
        shutil.copy(Path(__file__).parent / "triton_model.py", version / "model.py")
        kind = "text" if "text_input" in model["inputs"] else "ids"
        parameters = {"folder": folder, "record": root / f"{name}.jsonl"}
        parameters.update({key: model[key] for key in ("accumulated", "delay") if key in model})
        lines = [
            f'name: "{name}"',
            'backend: "python"',
            "max_batch_size: 8",
            f"model_transaction_policy {{ decoupled: {str(model.get('decoupled', True)).lower()} }}",
            *(_tensor("input", *each) for each in model["inputs"].items()),
            *(_tensor("output", *each) for each in _OUTPUTS[kind].items()),
            "instance_group [ { count: 1 kind: KIND_CPU } ]",
            *(
                f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}'
                for key, value in parameters.items()
            ),
        ]
        (root / name / "config.pbtxt").write_text("\n".join(lines) + "\n")
    return root


def _tensor(kind: str, name: str, described: str) -> str:
    datatype, _, dims = described.partition(" ")
    optional = "optional: true" if kind == "input" and name not in ("input_ids", "text_input", "x") else ""
    ragged = "allow_ragged_batch: true" if kind == "input" else ""
    return f'{kind} [ {{ name: "{name}" data_type: TYPE_{datatype} dims: [ {dims or 1} ] {optional} {ragged} }} ]'


class TritonServer:
    """A server process on a port of its own; it can be stopped and started again.

    Args:
        repository: of models.
        port: for gRPC.
        models: the names of those to load.
    """

    def __init__(self, repository: Path, port: int, *models: str) -> None:
        self.url = f"127.0.0.1:{port}"
        self.repository = repository
        self._port = port
        self._models = models
        self._log = repository / f"server{port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until its models are ready.

        Its backend for Python sometimes dies of a lock (`boost::interprocess::lock_exception`) while it loads several
        models; then it is started again.
        """
        for _ in range(_STARTS):
            if self._started():
                return
        raise RuntimeError(f"Triton has not started:\n{self._log.read_text(errors='replace')[-4000:]}")

    def _started(self) -> bool:
        site = site_packages()
        home = site / "pytriton" / "tritonserver"
        stub = home / "python_backend_stubs" / _VERSION / "triton_python_backend_stub"
        backend = home / "backends" / "python"
        if not (backend / stub.name).exists():
            shutil.copy(stub, backend / stub.name)
        for program in (backend / stub.name, home / "bin" / "tritonserver"):
            program.chmod(0o755)
        # An embedded interpreter finds its packages by the first python3 on the path.
        environment = {
            **os.environ,
            "PATH": f"{HOME / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR")),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [
            str(home / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={home / 'backends'}",
            "--backend-config=python,shm-default-byte-size=1048576",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self._models),
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self._port}",
            "--allow-http=false",
            "--allow-metrics=false",
            "--exit-timeout-secs=1",
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 60
        while b"Started GRPC" not in self._log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                return False
            time.sleep(0.1)
        return True

    def start_again_if_it_died(self) -> None:
        """Start a server that has crashed once more, on the same port."""
        if self._process is not None and self._process.poll() is not None:
            self.start()

    def stop(self) -> None:
        """End it and the processes of its models."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):  # One that has crashed leaves the processes of its models.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        self._process = None


if __name__ == "__main__":
    site_packages()
