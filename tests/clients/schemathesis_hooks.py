"""Hooks of the schemathesis runs: a model that exists, and answers that fit in the time."""

import json
import os

import schemathesis

MODEL = os.environ["TROUPE_MODEL"]


@schemathesis.hook
def before_call(context, case, kwargs):
    if isinstance(case.body, dict):
        case.body["model"] = MODEL
        case.body["stream"] = False
        for limit in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(case.body.get(limit), int):
                case.body[limit] = min(case.body[limit], 4)
        if "messages" in case.body or "prompt" in case.body:
            case.body.setdefault("max_tokens", 4)
        if isinstance(case.body.get("n"), int):
            case.body["n"] = min(case.body["n"], 2)
        json.dumps(case.body)
    if case.path_parameters and "model" in case.path_parameters:
        case.path_parameters["model"] = MODEL
