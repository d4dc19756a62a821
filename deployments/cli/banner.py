"""What is printed once the API answers."""

from __future__ import annotations

import json
import shlex
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from deployments.cli import ports
from deployments.cli.serve_file import PORT, base_url, troupe_applications
from deployments.config.app import AppArgs, parse_args


def announce(config: dict[str, Any], settings: Path | None) -> None:
    """Wait until the API of every Troupe application answers, then print its address, its models and an example.

    Args:
        settings: a file for shells that are to reach its Ray.
    """
    applications = [(base_url(config, app), parse_args(app.get("args") or {})) for app in troupe_applications(config)]
    for url, _ in applications:
        while not _answers(f"{url}/health"):
            time.sleep(0.2)
    lines = [line for url, args in applications for line in _introduction(url, args)]
    lines.append("  stop:   Ctrl-C")
    if settings is not None:
        lines.append(f"  status: source {settings}; ray status; serve status")
    if warning := _exposure(config, [args for _, args in applications]):
        lines.append(f"  {warning}")
    print("\n".join(lines) + "\n", flush=True)


def _introduction(url: str, args: AppArgs) -> list[str]:
    """Where an application is, what it serves, and how to try it."""
    names = ", ".join(
        entry.id + (f" (also {', '.join(entry.aliases)})" if entry.aliases else "") for entry in args.models
    )
    body = json.dumps({"model": args.models[0].id, "messages": [{"role": "user", "content": "Repeat exactly: k7Qp2x"}]})
    headers = "-H 'Content-Type: application/json'"
    if _wants_key(args):
        headers += ' -H "Authorization: Bearer $API_KEY"'
    return [
        f"\nTroupe answers at {url}/v1",
        f"  models: {names}",
        f"  try:    curl {url}/v1/chat/completions {headers} -d {shlex.quote(body)}",
    ]


def _wants_key(args: AppArgs) -> bool:
    return bool(args.api.api_keys or args.api.api_keys_file)


def _exposure(config: dict[str, Any], applications: list[AppArgs]) -> str | None:
    """A warning if others reach an API without a key; asks the sockets and not the configuration."""
    open_at = [a for a in ports.listeners(config["http_options"].get("port", PORT)) if not ports.is_loopback(a)]
    if not open_at or all(map(_wants_key, applications)):
        return None
    return (
        f"WARNING: listens on {', '.join(sorted(open_at))} and does not require a key. Set args.api.api_keys, or "
        "http_options.host to 127.0.0.1."
    )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
