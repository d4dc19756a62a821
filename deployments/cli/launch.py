"""`troupe serve`: check a configuration, serve it with Ray Serve, and print the address when the API answers.

Exit status: 2 if the configuration is wrong or the port is taken, 1 if the application cannot be deployed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from deployments.cli import ports
from deployments.cli.banner import announce
from deployments.cli.fast_mode import fast_environment
from deployments.cli.own_ray import OWN, TOKEN_PATH, use_own_ray, write_settings
from deployments.cli.serve_file import PORT, ServeConfig, check_config


def serve(written: ServeConfig, *, fast: bool) -> int:
    """Serve until a signal and return the exit status.

    Raises:
        ConfigError: the configuration is wrong, or the port is taken.
    """
    address = os.environ.get("RAY_ADDRESS") or OWN
    folder = use_own_ray() if address == OWN else None
    settings = fast_environment(os.environ) if fast else {}
    try:
        os.environ.update(settings)
        config, _ = check_config(written)  # imports Ray, which reads the environment then
        http = config["http_options"]
        place = (http["host"], http.get("port", PORT))
        if address == OWN:
            ports.claim(*place)
    finally:
        if fast:
            _reap_fast_mode(address, keep=not settings)
    # Loaders, and the paths that their arguments name, are relative to the file: Ray's workers start in this folder.
    os.chdir(written.folder)
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


if __name__ == "__main__":
    from deployments.cli.main import main

    main(["serve", *sys.argv[1:]])
