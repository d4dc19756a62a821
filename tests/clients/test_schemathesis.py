"""Generated requests over OpenAI's published schema and over our own: no 5xx, and responses conform."""

from __future__ import annotations

import base64
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.clients.conftest import client_python, run_shell
from tests.conftest import DEMO
from tests.serving import serving
from tests.whisper import as_file, recording, save_whisper

CHECKS = "not_a_server_error,response_schema_conformance,content_type_conformance"
KEY = "a-key"
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


@pytest.fixture(scope="module")
def url(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL, without /v1, of an application with a model for text and one for speech, open to KEY."""
    whisper = {
        "id": "whisper",
        "loader": "model_loaders.auto:load_model",
        "kwargs": {"model_name": str(save_whisper(tmp_path_factory.mktemp("whisper")))},
    }
    api = {"api_keys": [KEY], "admin_keys": [KEY], "record_dir": str(tmp_path_factory.mktemp("records"))}
    args: dict[str, Any] = {"models": [DEMO, whisper], "max_models_per_replica": 2, "api": api}
    args["state_dir"] = str(tmp_path_factory.mktemp("state"))
    with serving(cluster, args) as address:
        yield address


def run(spec: dict[str, Any], url: str, folder: Path, examples: int) -> Counter[tuple[str, int]]:
    """Run schemathesis; how often each path was answered with each status."""
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / "short.wav").write_bytes(as_file(recording(1)))
    command = [
        *("schemathesis", "run", "spec.json", "--url", url, "--header", f"Authorization: Bearer {KEY}"),
        *("--checks", CHECKS, "--mode", "positive", "--phases", "examples,fuzzing", "--max-examples", str(examples)),
        *("--seed", "1", "--request-timeout", "120", "--suppress-health-check", "all"),
        *("--report", "ndjson", "--report-dir", "report"),
    ]
    models = {"/audio/transcriptions": "whisper", "/audio/translations": "whisper", "": "demo"}
    environment = {
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
        "PYTHONPATH": str(Path(__file__).parent),
        "TROUPE_MODELS": json.dumps(models),
        "TROUPE_RECORDING": str(folder / "short.wav"),
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    python = client_python("schemathesis", ["schemathesis==4.32.5"])
    run_shell(python, "\n".join([*lines, shlex.join(command)]), folder, timeout=1200)
    (report,) = folder.glob("report/*.ndjson")
    found: Counter[tuple[str, int]] = Counter()
    for line in report.read_text().splitlines():
        for request, response in exchanges(json.loads(line)):
            path = request["uri"].removeprefix(url).partition("?")[0]
            found[path, response["status_code"]] += 1
            if response["status_code"] != 200:
                print(path, response["status_code"], base64.b64decode(response["content"]["$base64"])[:160])
    return found


def exchanges(event: Any) -> Iterator[tuple[Any, Any]]:
    """The pairs of request and response anywhere in an event of the report."""
    if isinstance(event, dict):
        if isinstance(event.get("response"), dict) and isinstance(event.get("request"), dict):
            yield event["request"], event["response"]
        event = list(event.values())
    if isinstance(event, list):
        for part in event:
            yield from exchanges(part)


def as_we_read_it(spec: dict[str, Any]) -> dict[str, Any]:
    """The specification with what it leaves out: responses of errors, vectors as base64, recordings as plain text."""
    for operations in spec["paths"].values():
        for operation in operations.values():
            if isinstance(operation, dict) and "responses" in operation:
                operation["responses"]["4XX"] = {
                    "description": "An error",
                    "content": {"application/json": {"schema": ERROR}},
                }
    for path in ("/audio/transcriptions", "/audio/translations"):
        content = spec["paths"][path]["post"]["responses"]["200"]["content"]
        content.update({kind: {"schema": {"type": "string"}} for kind in ("text/plain", "text/vtt")})
    # Its text has any media type in fact.
    content = spec["paths"]["/files/{file_id}/content"]["get"]["responses"]["200"]["content"]
    content["application/octet-stream"] = {"schema": {"type": "string"}}
    vector = spec["components"]["schemas"]["Embedding"]["properties"]
    vector["embedding"] = {"anyOf": [vector["embedding"], {"type": "string"}]}
    return spec


def routes(url: str) -> Any:
    return requests.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}, timeout=30).json()


@pytest.mark.skipif("OPENAI_SPEC" not in os.environ, reason="not run: OPENAI_SPEC names no copy of OpenAI's schema")
def test_openais_schema(url: str, tmp_path: Path) -> None:
    spec = as_we_read_it(json.loads(Path(os.environ["OPENAI_SPEC"]).read_text()))
    known = {path.removeprefix("/v1") for path in routes(url)["paths"]}
    spec["paths"] = {path: item for path, item in spec["paths"].items() if path.replace("{model}", "{name}") in known}
    found = run(spec, f"{url}/v1", tmp_path, examples=20)
    for path in ("chat/completions", "completions", "embeddings", "responses", "models", "models/demo"):
        assert found[f"/{path}", 200] > 0, found
    assert found["/audio/transcriptions", 200] > 0, found


def test_our_own_schema(url: str, tmp_path: Path) -> None:
    spec = routes(url)
    found = run(spec, url, tmp_path, examples=12)
    answered = {path for path, status in found if status == 200}
    # A drawn name is not a record, a capture, a file or a batch, a drawn text not a vector; a configured model stays.
    kept = {"/v1/records/{record}", "/v1/captures/{capture}", "/v1/vectors", "/v1/admin/models/{name}"}
    kept |= {path for path in spec["paths"] if path.startswith(("/v1/files/", "/v1/batches/"))}
    assert {path.replace("{name}", "demo") for path in set(spec["paths"]) - kept} - answered == set(), found
    assert found["/v1/admin/models/demo", 409] > 0, found
