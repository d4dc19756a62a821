"""`troupe serve`: check a configuration, serve it with Ray Serve, and print the address when the API answers.

Exit status: 2 if the configuration is wrong or the port is taken, 1 if the application cannot be deployed.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deployments.cli import ports
from deployments.cli.banner import banner
from deployments.cli.fast_mode import fast_environment
from deployments.cli.output.log_folder import SERVER_LOG, link_session, new_log_folder, with_logs
from deployments.cli.output.terminal import Terminal
from deployments.cli.own_ray import OWN, TOKEN_PATH, use_own_ray, write_settings
from deployments.cli.serve_file import PORT, ServeConfig, check_config
from deployments.core.errors import ConfigError, last_line


def serve(written: ServeConfig, *, fast: bool, verbose: bool) -> int:
    """Serve until a signal and return the exit status.

    Raises:
        ConfigError: the configuration is wrong, or the port is taken.
    """
    terminal = Terminal()
    with terminal.stage("environment") as stage:
        address = os.environ.get("RAY_ADDRESS") or OWN
        folder = use_own_ray() if address == OWN else None
        if not verbose:
            os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
        config = _checked(written, address, fast=fast)
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "ray"))
        stage.result = f"Python {platform.python_version()}, {packages}"
    # Loaders, and the paths that their arguments name, are relative to the file: Ray's workers start in this folder.
    os.chdir(written.folder)
    logs = new_log_folder()
    if not verbose:
        terminal.redirect(logs / SERVER_LOG)
    try:
        return _serve(config, terminal, folder, logs)
    except ConfigError as error:
        terminal.complain(str(error))
        return 2
    except Exception as error:
        traceback.print_exc()
        terminal.complain(f"{last_line(error)}. {logs / SERVER_LOG} has more.")
        return 1


def _checked(written: ServeConfig, address: str, *, fast: bool) -> dict[str, Any]:
    """The configuration to serve, and its port, which is claimed."""
    settings = fast_environment(os.environ) if fast else {}
    try:
        os.environ.update(settings)
        config, _ = check_config(written)  # imports Ray, which reads the environment then
        if address == OWN:
            ports.claim(*_place(config))
    finally:
        if fast:
            _reap_fast_mode(address, keep=not settings)
    return config


def _place(config: dict[str, Any]) -> tuple[str, int]:
    http = config["http_options"]
    return http["host"], http.get("port", PORT)


def _serve(config: dict[str, Any], terminal: Terminal, own: Path | None, logs: Path) -> int:
    """Serve until a signal.

    Args:
        own: the folder of the private Ray that is to start; None joins the one at RAY_ADDRESS.
    """
    from deployments.cli.server import Server

    config, logging = with_logs(config, logs) if own is not None else (config, None)
    server = Server(config, os.environ.get("RAY_ADDRESS") or OWN, terminal)

    def ready() -> None:
        if own is not None:
            _refuse_a_shared_port(*_place(config))
            write_settings(logs, _ray_addresses())
        terminal.say("\n".join(banner(config, logs)))

    def started() -> None:
        from deployments.ray_internals import session_folder

        if (session := session_folder()) is not None:
            link_session(logs, session)

    return server.run(started, ready, logging)


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
