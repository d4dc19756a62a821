"""Converts values of other servers' fields to values of Troupe's fields.

Each function takes the value and the whole request and returns fields of ours that ask for the same. It raises
ValueError, with the reason, if none do.
"""

from __future__ import annotations

from typing import Any

from deployments.openai.fields.other_servers import Given

_SWITCHES = ("enable_thinking", "thinking")


def _penalty_asked(given: Given) -> bool:
    neutral = {"repeat_penalty": 1, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    return any(given.get(name, value) != value for name, value in neutral.items())


def repeat_penalty(value: Any, given: Given) -> Given:
    if value == 1:
        return {}
    if given.get("repeat_last_n") != -1:
        raise ValueError(
            "it counts the last repeat_last_n tokens, 64 by default; send repeat_last_n -1 beside it, or "
            "'repetition_penalty', which counts all tokens"
        )
    return {"repetition_penalty": value}


def repeat_last_n(value: Any, given: Given) -> Given:
    if value != -1 and _penalty_asked(given):
        raise ValueError("penalties count all tokens here; send -1")
    return {}


def penalize_newline(value: Any, given: Given) -> Given:
    if value is not True and _penalty_asked(given):
        raise ValueError("penalties count line ends like other tokens here; send true")
    return {}


def do_sample(value: Any, given: Given) -> Given:
    if value is False:
        return {"temperature": 0}
    if value is not True:
        raise ValueError("it should be a boolean")
    if "temperature" not in given:
        return {"temperature": 1.0}
    if given["temperature"] == 0:
        raise ValueError("temperature 0 is greedy; send a temperature above 0")
    return {}


def constraint_of_format(value: Any, _: Given) -> Given:
    if value == "":
        return {}
    if value == "json":
        return {"response_format": {"type": "json_object"}}
    if not isinstance(value, dict):
        raise ValueError("it should be json or a JSON schema")
    return {"guided_json": value}


def constraint_of_grammar(value: Any, _: Given) -> Given:
    """TGI's objects; llama.cpp's texts are in a language that no library here reads exactly."""
    if value == "":
        return {}
    kind, source = (value.get("type"), value.get("value")) if isinstance(value, dict) else (None, None)
    if kind in ("json", "json_object"):
        return {"guided_json": source}
    if kind == "json_schema" and isinstance(source, dict):
        return {"guided_json": source.get("schema")}
    if kind == "regex":
        return {"guided_regex": source}
    raise ValueError("GBNF grammars are not read; send a Lark grammar as structured_outputs.grammar")


def truncate(value: Any, _: Given) -> Given:
    if value is False:
        return {}
    if value is True:
        raise ValueError("prompts are truncated only on request; send the length as 'truncate_prompt_tokens'")
    return {"truncate_prompt_tokens": value}


def chat_logprobs(value: Any, _: Given) -> Given:
    return {} if value == 0 else {"logprobs": True, "top_logprobs": value}


def _switched(value: bool) -> Given:
    """Both variables by which templates know whether to think; the templates that read neither are refused later."""
    return {f"chat_template_kwargs.{name}": value for name in _SWITCHES}


def think(value: Any, _: Given) -> Given:
    if isinstance(value, bool):
        return _switched(value)
    if value in ("low", "medium", "high", "max"):
        return {"reasoning_effort": value}
    raise ValueError("it should be a boolean, low, medium or high")


def thinking(value: Any, _: Given) -> Given:
    kind = value.get("type") if isinstance(value, dict) and value.keys() <= {"type"} else value
    if kind in ("enabled", "disabled") or isinstance(kind, bool):
        return _switched(kind in ("enabled", True))
    raise ValueError('it should be a boolean, {"type": "enabled"} or {"type": "disabled"}')


def reasoning(value: Any, _: Given) -> Given:
    if not isinstance(value, dict) or not value.keys() <= {"effort", "enabled", "exclude", "summary"}:
        raise ValueError("it should be an object with effort, enabled or exclude")
    read: dict[str, Any] = {}
    if value.get("effort") is not None:
        read["reasoning_effort"] = value["effort"]
    if isinstance(value.get("enabled"), bool):
        read |= _switched(value["enabled"])
    if isinstance(value.get("exclude"), bool):
        read["include_reasoning"] = not value["exclude"]
    return read


def truncated_embedding(value: Any, _: Given) -> Given:
    """Ollama and TEI cut the end; NIM names the side."""
    sides = {True: "right", "END": "right", "START": "left"}
    if value in (False, "NONE"):
        return {}
    if not isinstance(value, bool | str) or value not in sides:
        raise ValueError("it should be a boolean, NONE, START or END")
    return {"truncate_prompt_tokens": -1, "truncation_side": sides[value]}


def embedding_norm(value: Any, _: Given) -> Given:
    if value not in (-1, 2):
        raise ValueError("vectors are brought to a Euclidean length of 1 (2) or left as they are (-1)")
    return {"normalize": value == 2}
