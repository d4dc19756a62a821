"""Hooks of the schemathesis runs: models that exist, answers that fit in the time, no state that only OpenAI keeps."""

import json
import os
from pathlib import Path

import schemathesis

MODELS = json.loads(os.environ["TROUPE_MODELS"])  # the model for paths that end so; "" for all others
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
STATE = ("conversation", "previous_response_id", "background", "context_management", "suffix")
AUDIO_OPTIONS = ("chunking_strategy", "keywords", "languages", "known_speaker_names", "known_speaker_references")


@schemathesis.hook
def before_call(context, case, kwargs):
    path = case.operation.path
    model = next(name for ending, name in MODELS.items() if path.endswith(ending))
    for name in ("model", "name"):
        if name in (case.path_parameters or {}):
            case.path_parameters[name] = model
    if not isinstance(case.body, dict):
        return
    case.body["model"] = model
    if path.endswith("/drain"):
        case.body["drain"] = False
    if "/audio/" in path:
        case.body["file"] = Path(os.environ["TROUPE_RECORDING"]).read_bytes()
        for name in (*AUDIO_OPTIONS, "stream"):
            case.body.pop(name, None)
    else:
        shorten(case.body, path)


def shorten(body, path):
    """Few tokens and choices, and a conversation that the route can answer where the drawn one is not.

    No stream: OpenAPI describes an event's data, schemathesis checks its frame.
    """
    for name in (*STATE, "stream"):
        body.pop(name, None)
    for limit in LIMITS:
        if isinstance(body.get(limit), int):
            body[limit] = min(body[limit], 4)
    if path.endswith("/responses"):
        body.pop("prompt", None)
        body.setdefault("input", "hi")
        body.setdefault("max_output_tokens", 4)
    if path.endswith("/completions"):
        body.setdefault("max_tokens", 4)
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 2)
