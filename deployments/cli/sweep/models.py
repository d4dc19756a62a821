"""Which of a server's models a sweep measures, and what each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote

from deployments.cli.endpoint.server import Endpoint, as_json
from deployments.core.errors import ConfigError


def matching(server: Endpoint, patterns: Sequence[str]) -> list[str]:
    """The ids that patterns name, in the order of the patterns and of `/v1/models`.

    Args:
        patterns: ids (models, versions, variants, adapters, aliases), or globs over all of these but aliases.

    Raises:
        ConfigError: a pattern names no model.
    """
    listed = server.models()
    return list(dict.fromkeys(name for pattern in patterns for name in _matching(server, listed, pattern)))


def _matching(server: Endpoint, listed: Sequence[dict[str, Any]], pattern: str) -> list[str]:
    if any(each["id"] == pattern for each in listed):
        return [pattern]
    # An alias would be the same model a second time; the parent of a variant is its root.
    names = [each["id"] for each in listed if each.get("root") in (None, each["id"], each.get("parent"))]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if found:
        return found
    if not set("*?[") & set(pattern) and server.request("GET", f"/v1/models/{quoted(pattern)}").status_code == 200:
        return [pattern]
    raise ConfigError(f"--models {pattern!r} matches none of {server.url}: {', '.join(names)}.")


def quoted(model: str) -> str:
    """A model's id as a part of a path."""
    return quote(model, safe="/@+:")


def fingerprint(server: Endpoint, model: str) -> dict[str, Any] | None:
    """The fingerprint of a model and its parts; None for a server that has none."""
    answer = server.request("GET", "/v1/fingerprint", parameters={"model": model})
    if answer.status_code in (404, 405, 501) and "model_not_found" not in answer.text:
        return None
    if answer.status_code != 200:
        raise ConfigError(f"{model}: status {answer.status_code}: {answer.text[:1000].strip()}")
    found: dict[str, Any] = answer.json()
    return found


def resume_headers(server: Endpoint, model: str) -> dict[str, str]:
    """The header that lets a server answer from its record; none if it refuses the header because it has no record."""
    headers = {"x-troupe-resume": "true"}
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 1}
    answer = server.request("POST", "/v1/chat/completions", as_json(body), headers=headers)
    return {} if answer.status_code == 400 and "x-troupe-resume" in answer.text else headers
