"""Blocks that a reader cannot run from top to bottom, and the tests that run or check them instead."""

from __future__ import annotations

from tests.docs.pages import Block

CLAIMED: dict[tuple[str, str], str] = {
    ("README.md", "scripts/serve  "): "tests/e2e/test_serve_run.py",
    ("README.md", "curl "): "tests/test_readme.py::test_the_curl_line",
    ("README.md", "from openai import OpenAI"): "tests/test_readme.py::test_the_openai_snippet",
    ("README.md", "troupe serve my-checkpoint"): "tests/docs/test_pages.py::test_the_tutorial",
    ("README.md", "from transformers import"): "tests/test_readme.py::test_the_loader",
    ("README.md", "troupe check"): "tests/docs/test_pages.py::test_writing_a_loader",
    ("README.md", "my-checkpoint:"): "tests/test_readme.py::test_the_agentbench_configuration_names_our_route",
    ("docs/tutorial.md", "python3.11 -m venv .venv"): "tests/test_dockerfile.py",
    ("docs/tutorial.md", "python3.11 -m venv lm-eval-env"): "tests/clients/test_tutorial.py::test_the_score",
    ("docs/tutorial.md", "task: sums"): "tests/clients/test_tutorial.py::test_the_score",
    ("docs/tutorial.md", "lm-eval-env/bin/lm_eval"): "tests/clients/test_tutorial.py::test_the_score",
    ("docs/loaders.md", "from deployments.local import start"): "tests/test_local.py",
    ("docs/inside.md", "task: choices"): "tests/clients/test_inside.py::test_a_benchmark_under_steering",
    ("docs/inside.md", "for model in demo"): "tests/clients/test_inside.py::test_a_benchmark_under_steering",
    ("docs/check.md", "troupe check"): "tests/cli/test_check.py",
    (
        "docs/performance.md",
        "scripts/bench_model",
    ): "tests/cli/bench/test_bench.py::test_a_peer_is_started_measured_and_stopped",
    ("docs/cookbook.md", "rm -f troupe-url.txt"): "tests/docs/test_pages.py::test_waiting_for_the_slurm_job",
    ("docs/cookbook.md", "docker build"): "tests/test_dockerfile.py",
    ("docs/clients.md", "git clone --branch v0.2"): "tests/clients/test_agentbench.py",
    ("docs/clients.md", 'pip install "lm_eval'): "tests/clients/test_lm_eval.py",
    ("docs/clients.md", 'pip install "inspect_ai'): "tests/clients/test_inspect_ai.py",
    ("docs/clients.md", 'pip install "litellm'): "tests/clients/test_litellm.py",
    ("docs/clients.md", "import litellm"): "tests/clients/test_litellm.py",
    ("docs/clients.md", 'pip install "mini_swe_agent'): "tests/clients/test_mini_swe_agent.py",
    ("docs/clients.md", "from minisweagent"): "tests/clients/test_mini_swe_agent.py",
    ("docs/clients.md", 'pip install "evalplus'): "tests/clients/test_evalplus.py",
    ("docs/clients.md", 'pip install "aiperf'): "tests/clients/test_aiperf.py",
    ("docs/clients.md", "from bfcl_eval"): "tests/clients/test_bfcl.py",
    ("docs/clients.md", "pip install bfcl-eval"): "tests/clients/test_bfcl.py",
    ("docs/clients.md", "git clone --branch v1.0.1"): "tests/clients/test_tau2_bench.py",
    ("docs/clients/messages.md", "npm install"): "tests/clients/test_claude_code.py",
    ("docs/reference/cli.md", "python -m deployments.local"): "tests/seeds/test_troapis.py",
    ("docs/reference/parsers.md", "response_template ="): (
        "tests/openai/parsing/test_response_template.py::test_the_description_that_the_page_teaches"
    ),
    ("docs/reference/parsers.md", "{%- for m in"): (
        "tests/openai/parsing/test_formats.py::test_the_template_that_the_page_teaches"
    ),
    ("docs/scaling.md", "troupe serve --fast"): "tests/e2e/test_fast.py",
    ("docs/scaling.md", 'eval "$(troupe fast-environment)"'): "tests/e2e/test_cluster.py",
    ("docs/scaling.md", "# on the first node"): "tests/e2e/test_cluster.py::test_two_nodes_and_the_loss_of_one",
    ("docs/scaling.md", "kubectl create secret"): "tests/test_scale.py::test_the_keys_of_the_kubernetes_manifest",
    ("docs/scaling.md", "apiVersion: ray.io/v1"): "tests/test_scale.py::test_the_kubernetes_manifest",
    ("docs/from/ctranslate2-fastapi.md", "scripts/convert_ctranslate2"): (
        "tests/model_loaders/backends/test_ctranslate2.py::test_the_whole_api_over_it"
    ),
    ("docs/from/ctranslate2-fastapi.md", "LLM_ARTIFACT_DIR"): (
        "tests/test_dockerfile.py::test_a_fresh_image_serves_a_model_of_ctranslate2"
    ),
    ("docs/from/fastapi_tritonserver.md", "docker build"): (
        "tests/test_dockerfile.py::test_a_fresh_image_serves_a_model_of_triton"
    ),
    ("docs/from/transformers-openai-api.md", "scripts/serve --hf-model"): (
        "tests/compat/test_flags.py::test_the_readmes_example"
    ),
    ("docs/from/troapis.md", "from troapis.app"): "tests/test_package.py::test_programs_for_troapis_find_run_app",
}
"""The test of a block, by its page and the beginning of its text."""

FIGURES = (
    "docs/check.md",
    "docs/structure.md",
    "docs/reference/cli.md",
    "docs/from/alternatives.md",
    "docs/from/ctranslate2-fastapi.md",
    "docs/from/fastapi_tritonserver.md",
    "docs/from/transformers-openai-api.md",
    "docs/from/troapis.md",
)
"""Pages with blocks that are drawings, synopses, or what was once printed, and not commands."""


def claim(block: Block) -> str | None:
    """The test that a block is claimed for; None if there is none."""
    found = (test for (page, text), test in CLAIMED.items() if page == block.page and block.text.startswith(text))
    return next(found, None)
