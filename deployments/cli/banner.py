"""What is printed once the API answers."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from deployments.cli import ports
from deployments.cli.own_ray import SETTINGS
from deployments.cli.serve_file import PORT, base_url, troupe_applications
from deployments.config.app import AppArgs, parse_args


def banner(config: dict[str, Any], logs: Path) -> list[str]:
    """Wait until the API of every Troupe application answers. Then its address, its page and its models, a line each.

    Args:
        logs: the folder of this run's logs.
    """
    applications = [(base_url(config, app), parse_args(app.get("args") or {})) for app in troupe_applications(config)]
    for url, _ in applications:
        while not _answers(f"{url}/health"):
            time.sleep(0.1)
    lines = [line for url, args in applications for line in _introduction(url, args)]
    status = f"; `source {SETTINGS}` there, then `ray status`" if (logs / SETTINGS).exists() else ""
    lines += [f"  logs:      {logs}{status}", f"  stop:      Ctrl-C, or kill {os.getpid()}"]
    return [*lines, *_exposure(config, [args for _, args in applications])]


def _introduction(url: str, args: AppArgs) -> list[str]:
    """Where an application is, and what it serves."""
    models = ", ".join(
        first + (f" (also {', '.join(others)})" if others else "") for first, *others in (e.names for e in args.models)
    )
    later = [source.glob for source in args.folders] + (args.hub.allow if args.hub else [])
    joining = [f"  later:     what matches {', '.join(later)}"] if later else []
    return [f"Troupe answers at {url}/v1, its page is {url}/", f"  models:    {models}", *joining]


def _exposure(config: dict[str, Any], applications: list[AppArgs]) -> list[str]:
    """Whether others reach the API, and a warning if they need no key; asks the sockets and not the configuration."""
    open_at = [a for a in ports.listeners(config["http_options"].get("port", PORT)) if not ports.is_loopback(a)]
    if not open_at:
        return []
    place = f"listens on {', '.join(sorted(open_at))}"
    if all(args.api.api_keys or args.api.api_keys_file for args in applications):
        return [f"  network:   {place}"]
    return [f"  WARNING: {place} and does not require a key. Set args.api.api_keys, or http_options.host to 127.0.0.1."]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
