"""Runs a part of AgentBench, in the Python that has its requirements; nothing of Troupe is imported here.

    bootstrap.py run MODULE ARGUMENTS…    the module as `python -m` would run it
    bootstrap.py controller               the controller
    bootstrap.py missing MODULE…          JSON: which of these cannot be imported, and the version of pydantic
    bootstrap.py classify                 JSON: for each text of the JSON on standard input, whether it is an overflow

The current folder is AgentBench's. Two packages have stand-ins: `fastchat`, of which AgentBench imports one function
for agents that are not used here, and `docker`, whose container of MySQL is a MariaDB of this machine.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any


def add_stand_ins() -> None:
    """Put both stand-ins in the place of the packages; an installed fastchat stays."""
    try:
        importlib.import_module("fastchat.model.model_adapter")
    except ImportError:
        _module("fastchat.model.model_adapter", get_conversation_template=_no_template)
    _module("docker.models.containers", Container=MariaDB)
    sys.modules["docker"].from_env = lambda: types.SimpleNamespace(containers=MariaDB)  # type: ignore[attr-defined]


def _module(path: str, **contents: Any) -> None:
    """A module with these contents, and the packages around it."""
    names = path.split(".")
    for depth in range(1, len(names) + 1):
        module = types.ModuleType(".".join(names[:depth]))
        module.__path__ = []
        sys.modules[module.__name__] = module
        if depth > 1:
            setattr(sys.modules[".".join(names[: depth - 1])], names[depth - 1], module)
    vars(sys.modules[path]).update(contents)


def _no_template(name: str) -> None:
    raise RuntimeError(f"FastChat is not installed, so there is no conversation template for {name}.")


LIKE_MYSQL = [
    # The tables of the benchmark are not all Latin 1, and its answers are hashes of at most 1024 bytes.
    "--character-set-server=utf8mb4",
    "--group-concat-max-len=1024",
    "--sql-mode=ONLY_FULL_GROUP_BY,STRICT_TRANS_TABLES,NO_ZERO_IN_DATE,NO_ZERO_DATE,ERROR_FOR_DIVISION_BY_ZERO",
]
"""The defaults of MySQL 8 with which the answers of dbbench were computed, where those of MariaDB differ."""


class MariaDB:
    """A server of MariaDB in the place of a container: its own data, any password, this machine alone."""

    def __init__(self, port: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="troupe-mariadb-")
        server = os.environ["TROUPE_MARIADBD"]
        base = os.path.dirname(os.path.dirname(server))
        options = ["--no-defaults", f"--basedir={base}", f"--datadir={self._folder}/data"]
        options += ["--user=root"] if os.geteuid() == 0 else []
        install = [os.environ["TROUPE_MARIADB_INSTALL"], *options, "--skip-test-db"]
        # A MariaDB that starts removes the temporary tables in its folder for them, whosever they are.
        environment = {**os.environ, "TMPDIR": self._folder}
        subprocess.run(install, check=True, stdout=sys.stderr, env=environment)
        files = [f"--socket={self._folder}/socket", f"--pid-file={self._folder}/pid"]
        listening = [f"--port={port}", "--bind-address=127.0.0.1", "--skip-grant-tables", *LIKE_MYSQL]
        self._process = subprocess.Popen([server, *options, *files, *listening], stdout=sys.stderr, env=environment)
        atexit.register(self.stop)

    @classmethod
    def run(cls, image: str, *, ports: dict[str, int], **_: Any) -> MariaDB:
        """Start what `containers.run` starts."""
        return cls(ports["3306"])

    @staticmethod
    def get(name: str) -> MariaDB:
        """No container of any name runs."""
        raise KeyError(name)

    def stop(self) -> None:
        """End the server and remove its data."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _listen(app: Any, **_: Any) -> None:
    """In the place of `uvicorn.run`: serve on the socket that the parent has opened."""
    listener = socket.socket(fileno=int(os.environ["TROUPE_LISTENER"]))
    uvicorn = importlib.import_module("uvicorn")
    uvicorn.Server(uvicorn.Config(app=app)).run(sockets=[listener])


def run(module: str, *arguments: str) -> None:
    """Run a module. An agent waits for an answer as long as the parent says, not 120 s."""
    requests, uvicorn = (importlib.import_module(name) for name in ("requests", "uvicorn"))
    post = requests.post

    def patient(*given: Any, **options: Any) -> Any:
        if "timeout" in options:
            options["timeout"] = float(os.environ["TROUPE_TIMEOUT_S"])
        return post(*given, **options)

    requests.post, uvicorn.run = patient, _listen  # type: ignore[attr-defined]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def controller() -> None:
    """Run the controller; it keeps a sample as long as its agent may wait, and a worker that is busy."""
    part, fastapi = (importlib.import_module(name) for name in ("src.server.task_controller", "fastapi"))
    app, router = fastapi.FastAPI(), fastapi.APIRouter()
    # An agent asks three times.
    part.TaskController(router, heart_rate=60, session_expire_time=int(4 * float(os.environ["TROUPE_TIMEOUT_S"])))
    app.include_router(router, prefix="/api")
    _listen(app)


def missing(*modules: str) -> None:
    """Print which modules cannot be imported."""
    found = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            found[module] = f"{type(error).__name__}: {error}"
    pydantic = getattr(sys.modules.get("pydantic"), "VERSION", None)
    print(json.dumps({"missing": found, "pydantic": pydantic}))


def classify() -> None:
    """Print what AgentBench takes for an overflow of the context."""
    agents = importlib.import_module("src.client.agents.http_agent")
    print(json.dumps([bool(agents.check_context_limit(text)) for text in json.load(sys.stdin)]))


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    add_stand_ins()
    commands: dict[str, Callable[..., None]] = {
        "run": run,
        "controller": controller,
        "missing": missing,
        "classify": classify,
    }
    commands[sys.argv[1]](*sys.argv[2:])
