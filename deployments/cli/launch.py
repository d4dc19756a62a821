"""`scripts/serve`: check the configuration, start it on Ray Serve, and print the address when the API answers.

python -m deployments.cli.launch serve_config.yaml             # serve
python -m deployments.cli.launch --fast serve_config.yaml      # with HAProxy and fewer hops, see docs/scaling.md
python -m deployments.cli.launch --check serve_config.yaml     # only check
python -m deployments.cli.launch --fast-environment            # Ray's settings of the fast mode, for `eval`

Exit status: 2 if the configuration is wrong or the port is taken, 1 if the application cannot be deployed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

from deployments.cli import ports
from deployments.cli.fast_mode import fast_environment
from deployments.cli.own_ray import OWN, TOKEN_PATH, use_own_ray, write_settings
from deployments.cli.serve_file import PORT, base_url, read_config, troupe_applications
from deployments.config.app import AppArgs, parse_args
from deployments.core.errors import ConfigError


def main() -> None:
    """Command line; see the module's docstring."""
    given = _arguments()
    try:
        if given.fast_environment:
            for name, value in fast_environment(os.environ).items():
                print(f"export {name}={shlex.quote(value)}")
            return
        if given.check:
            read_config(given.config)
        else:
            sys.exit(_serve(given.config, fast=given.fast))
    except ConfigError as error:
        _refuse(str(error))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments.cli.launch")
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--fast", action="store_true", help="serve in Ray Serve's fast mode")
    parser.add_argument(
        "--fast-environment", action="store_true", help="print the settings of the fast mode as export lines"
    )
    given = parser.parse_args()
    if given.config is None and not given.fast_environment:
        parser.error("give a configuration file")
    return given


def _refuse(message: str) -> NoReturn:
    print(f"troupe: {message}", file=sys.stderr)
    sys.exit(2)


def _serve(file: Path, *, fast: bool) -> int:
    """Serve until a signal and return the exit status."""
    address = os.environ.get("RAY_ADDRESS") or OWN
    folder = use_own_ray() if address == OWN else None
    settings = fast_environment(os.environ) if fast else {}
    try:
        os.environ.update(settings)
        config, _ = read_config(file)  # imports Ray, which reads the environment then
        http = config["http_options"]
        place = (http["host"], http.get("port", PORT))
        if address == OWN:
            ports.claim(*place)
    finally:
        if fast:
            _reap_fast_mode(address, keep=not settings)
    # Loaders, and the paths that their arguments name, are relative to the file: Ray's workers start in this folder.
    os.chdir(file.resolve().parent)
    from deployments.cli.server import run

    def ready() -> None:
        if folder is None:
            announce(config, None)
            return
        _refuse_a_shared_port(*place)
        announce(config, write_settings(folder, _ray_addresses()))

    return run(config, address, ready)


def _refuse_a_shared_port(host: str, port: int) -> None:
    other = ports.intruder(host, port, (TOKEN_PATH, os.environ[TOKEN_PATH]))
    if other is not None:
        raise ports.taken(port, other)


def _reap_fast_mode(address: str, *, keep: bool) -> None:
    """Start the process that ends what HAProxy leaves behind; in a session of its own, to be the last."""
    if address != OWN:
        print(
            f"The Ray at {address} must have been started with the same settings (docs/scaling.md, Several nodes).",
            file=sys.stderr,
        )
    reap = [sys.executable, "-m", "deployments.cli.fast_mode", str(os.getpid()), *(["--keep"] if keep else [])]
    subprocess.Popen(reap, start_new_session=True)


def _ray_addresses() -> dict[str, str]:
    import ray

    from deployments.ray_internals import dashboard

    context: Any = ray.get_runtime_context()
    place = dashboard()
    return {"RAY_ADDRESS": context.gcs_address} | ({"RAY_DASHBOARD_ADDRESS": f"http://{place}"} if place else {})


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


if __name__ == "__main__":
    main()
