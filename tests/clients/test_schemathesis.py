"""Generated requests over OpenAI's published schema and over our own: no 5xx, and responses conform."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.clients.conftest import client_python

CHECKS = "not_a_server_error,response_schema_conformance,content_type_conformance"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def run(spec: dict[str, Any], url: str, folder: Path, examples: int) -> str:
    python = client_python("schemathesis", "schemathesis==4.32.5")
    (folder / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [
            str(python.parent / "schemathesis"),
            *("run", str(folder / "spec.json"), "--url", url, "--checks", CHECKS, "--mode", "positive"),
            *(
                "--max-examples",
                str(examples),
                "--phases",
                "examples,fuzzing",
                "--seed",
                "1",
                "--request-timeout",
                "60",
            ),
            *("--suppress-health-check", "all"),
        ],
        cwd=folder,
        env={
            **os.environ,
            "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
            "PYTHONPATH": str(Path(__file__).parent),
            "TROUPE_MODEL": "demo",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def with_errors(spec: dict[str, Any]) -> dict[str, Any]:
    """The specification with the error responses that it leaves out."""
    for operations in spec["paths"].values():
        for operation in operations.values():
            if isinstance(operation, dict) and "responses" in operation:
                operation["responses"]["4XX"] = {
                    "description": "An error",
                    "content": {"application/json": {"schema": ERROR}},
                }
    return spec


@pytest.mark.skipif("OPENAI_SPEC" not in os.environ, reason="OPENAI_SPEC names no copy of OpenAI's specification")
def test_openais_schema(demo: str, tmp_path: Path) -> None:
    spec = with_errors(json.loads(Path(os.environ["OPENAI_SPEC"]).read_text()))
    served = requests.get(f"{demo}/openapi.json", timeout=30).json()["paths"]
    known = {path.removeprefix("/v1") for path in served}
    spec["paths"] = {path: item for path, item in spec["paths"].items() if path.replace("{model}", "{name}") in known}
    assert "/chat/completions" in spec["paths"]
    print(run(spec, f"{demo}/v1", tmp_path, examples=20)[-1500:])


def test_our_own_schema(demo: str, tmp_path: Path) -> None:
    spec = requests.get(f"{demo}/openapi.json", timeout=30).json()
    print(run(spec, demo, tmp_path, examples=20)[-1500:])
