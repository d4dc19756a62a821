"""What scripts/serve does beside `serve run`: check the configuration first, say where the API is once it answers.

python -m deployments.launch serve_config.yaml                  # check
python -m deployments.launch --announce PID serve_config.yaml   # wait until it answers, print how to call it
python -m deployments.launch --announce PID --reap serve_config.yaml    # and in the end, that no HAProxy is left
python -m deployments.launch --fast-environment                 # Ray's settings of the fast mode, for `eval`
python -m deployments.launch --fast-config serve_config.yaml    # the configuration as the fast mode needs it
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from deployments.config import AppArgs, parse_args
from deployments.errors import ConfigError
from deployments.fast_mode import fast_config, fast_environment, is_alive, reap_haproxy

IMPORT_PATH = "deployments.app:build_app"


def read_config(path: Path) -> tuple[dict[str, Any], AppArgs]:
    """A Serve configuration file and the checked arguments of its Troupe application.

    Raises:
        ConfigError: the file is no such configuration; every fault is listed.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    applications = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(applications, list):
        raise ConfigError(f"{path}: expected a mapping with the key 'applications'.")
    ours = [app for app in applications if isinstance(app, dict) and app.get("import_path") == IMPORT_PATH]
    if not ours:
        raise ConfigError(f"{path}: no application has import_path {IMPORT_PATH}.")
    args = parse_args(ours[0].get("args") or {})
    for entry in args.models:
        _find_loader(entry.loader)
    return config, args


def base_url(config: dict[str, Any]) -> str:
    """Where the application of a configuration answers."""
    http = config.get("http_options") or {}
    host = http.get("host", "127.0.0.1")
    prefix = next(a for a in config["applications"] if a.get("import_path") == IMPORT_PATH).get("route_prefix", "/")
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{http.get('port', 8000)}{prefix.rstrip('/')}"


def announce(config: dict[str, Any], args: AppArgs, server: int) -> None:
    """Wait until the API answers, then print its address, its models and a line to try.

    Args:
        server: process id of the server; without it there is nothing to wait for.
    """
    url = base_url(config)
    while not _answers(f"{url}/health"):
        if not is_alive(server):
            return
        time.sleep(0.3)
    model = args.models[0].id
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Repeat exactly: k7Qp2x"}]})
    names = ", ".join(
        entry.id + (f" (also {', '.join(entry.aliases)})" if entry.aliases else "") for entry in args.models
    )
    print(
        f"\nTroupe answers at {url}/v1\n"
        f"  models: {names}\n"
        f"  try:    curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
        "  stop:   Ctrl-C\n",
        flush=True,
    )


def _find_loader(loader: str) -> None:
    place = loader.rpartition(":")[0] or loader
    if place.endswith(".py") or "/" in place:
        if not Path(place).expanduser().is_file():
            raise ConfigError(f"Loader file {place} does not exist (looked in {Path.cwd()}).")
    elif importlib.util.find_spec(place.split(".")[0]) is None:
        raise ConfigError(f"Loader {loader}: no module named {place!r}.")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m deployments.launch")
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--announce", type=int, metavar="PID", help="process id of the server to wait for")
    parser.add_argument("--reap", action="store_true", help="then wait for its end, and end its HAProxy")
    parser.add_argument("--fast-environment", action="store_true", help="print export lines")
    parser.add_argument("--fast-config", action="store_true", help="print the configuration for the fast mode")
    given = parser.parse_args()
    sys.path.insert(0, str(Path.cwd()))
    try:
        if given.fast_environment:
            for name, value in fast_environment(os.environ).items():
                print(f"export {name}={shlex.quote(value)}")
        if given.config is None:
            return
        config, args = read_config(given.config)
    except ConfigError as error:
        sys.exit(f"troupe: {error}")
    if given.fast_config:
        print(yaml.safe_dump(fast_config(config, os.environ), sort_keys=False), end="")
    if given.announce is not None:
        announce(config, args, given.announce)
    if given.reap:
        reap_haproxy(given.announce, os.environ)


if __name__ == "__main__":
    main()
