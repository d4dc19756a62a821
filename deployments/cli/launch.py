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
from deployments.cli.own_ray import OWN, use_own_ray, write_settings
from deployments.cli.serve_file import PORT, base_url, read_config
from deployments.config.app import AppArgs
from deployments.core.errors import ConfigError


def main() -> None:
    """Command line; see the module's docstring."""
    given = _arguments()
    try:
        if given.fast_environment:
            for name, value in fast_environment(os.environ).items():
                print(f"export {name}={shlex.quote(value)}")
            return
        config, args = read_config(given.config)
        if not given.check:
            sys.exit(_serve(config, args, given.config, fast=given.fast))
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


def _serve(config: dict[str, Any], args: AppArgs, file: Path, *, fast: bool) -> int:
    """Serve until a signal and return the exit status."""
    address = os.environ.get("RAY_ADDRESS") or OWN
    folder = None
    if address == OWN:
        _refuse_a_taken_port(config["http_options"])
        folder = use_own_ray()
    if fast:
        _prepare_fast_mode(address)
    # Loaders, and the paths that their arguments name, are relative to the file: Ray's workers start in this folder.
    os.chdir(file.resolve().parent)
    from deployments.cli.server import run  # imports Ray, which reads the environment then

    def ready() -> None:
        settings = None if folder is None else write_settings(folder, _ray_addresses())
        announce(config, args, settings)

    return run(config, address, ready)


def _refuse_a_taken_port(http: dict[str, Any]) -> None:
    port = http.get("port", PORT)
    holder = ports.holder(http["host"], port)
    if holder is not None:
        raise ConfigError(f"port {port} is taken by {holder}. End it, or set http_options.port.")


def _prepare_fast_mode(address: str) -> None:
    settings = fast_environment(os.environ)
    os.environ.update(settings)
    if address != OWN:
        print(
            f"The Ray at {address} must have been started with the same settings (docs/scaling.md, Several nodes).",
            file=sys.stderr,
        )
    # In a session of its own, to be the last.
    reap = [sys.executable, "-m", "deployments.cli.fast_mode", str(os.getpid()), *([] if settings else ["--keep"])]
    subprocess.Popen(reap, start_new_session=True)


def _ray_addresses() -> dict[str, str]:
    import ray

    context: Any = ray.get_runtime_context()
    dashboard = ray._private.worker.get_dashboard_url()
    return {"RAY_ADDRESS": context.gcs_address} | (
        {"RAY_DASHBOARD_ADDRESS": f"http://{dashboard}"} if dashboard else {}
    )


def announce(config: dict[str, Any], args: AppArgs, settings: Path | None) -> None:
    """Wait until the API answers, then print its address, its models and an example.

    Args:
        settings: a file for shells that are to reach its Ray.
    """
    url = base_url(config)
    while not _answers(f"{url}/health"):
        time.sleep(0.2)
    model = args.models[0].id
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Repeat exactly: k7Qp2x"}]})
    names = ", ".join(
        entry.id + (f" (also {', '.join(entry.aliases)})" if entry.aliases else "") for entry in args.models
    )
    lines = [
        f"\nTroupe answers at {url}/v1",
        f"  models: {names}",
        f"  try:    curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        "  stop:   Ctrl-C",
    ]
    if settings is not None:
        lines.append(f"  status: source {settings}; ray status; serve status")
    if warning := _exposure(config, args):
        lines.append(f"  {warning}")
    print("\n".join(lines) + "\n", flush=True)


def _exposure(config: dict[str, Any], args: AppArgs) -> str | None:
    """A warning if others reach the API without a key; asks the sockets and not the configuration."""
    open_at = [a for a in ports.listeners(config["http_options"].get("port", PORT)) if not ports.is_loopback(a)]
    if not open_at or args.api.api_keys or args.api.api_keys_file:
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
