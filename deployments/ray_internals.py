"""All that Troupe uses of Ray's private parts; tests/test_ray_internals.py pins the version they belong to."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray import serve
from ray._common.tls_utils import add_port_to_grpc_server
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import jobs
from ray.serve._private import replica
from ray.serve._private.api import serve_start
from ray.serve._private.common import RequestMetadata as RequestMetadata
from ray.serve._private.constants import SERVE_NAMESPACE, SERVE_PROXY_NAME
from ray.serve._private.proxy import HTTPProxy
from ray.serve._private.request_router import replica_wrapper
from ray.serve.config import gRPCOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeDeploySchema

logger = logging.getLogger("ray.serve")

LOOPBACK = "127.0.0.1"
_ANY_PORT = "[::]:0"
_WANTED = re.compile(
    r"has (\d+) replicas? that .*to be scheduled.*for each replica: (.*), total resources available: (.*?)\. ",
    re.DOTALL,
)

_PROCESS = uuid4().hex
_PLAIN_RECEIVE, _PLAIN_PROXY_RECEIVE = HTTPProxy.receive_asgi_messages, HTTPProxy.proxy_asgi_receive
_LEFT = {"type": "http.disconnect"}
_LARGEST_MESSAGE = 2**31 - 1
# Serve's limit of 4 MiB fails a call after its answer is computed. Replicas and callers read it after this is imported.
replica.RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH = _LARGEST_MESSAGE
replica_wrapper.RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH = _LARGEST_MESSAGE


def deploy(config: Mapping[str, Any], logging: Mapping[str, Any] | None = None) -> None:
    """Start Serve with a configuration's options, and its applications; return before they run. As `serve run` does.

    Args:
        logging: a `logging_config` for the controller and the proxies.
    """
    schema = ServeDeploySchema.model_validate(config)
    client = serve_start(
        http_options=schema.http_options.model_dump(),
        global_logging_config=None if logging is None else dict(logging),
        proxy_location=schema.proxy_location,
        grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
        controller_options=schema.controller_options,
    )
    client.deploy_apps(schema, _blocking=False)


def unreachable(address: str, seconds: float) -> str | None:
    """Why nobody can join the Ray at an address; Ray itself would try for minutes before it says so."""
    if "://" in address:
        return None
    place = address
    try:
        place = canonicalize_bootstrap_address(address) or address
        host, _, port = place.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except (OSError, ValueError) as error:
        return (
            f"no Ray answers at {place} ({error}). Start it with `ray start`, or unset RAY_ADDRESS to serve on a Ray "
            "of its own."
        )
    return None


def unscheduled(message: str) -> str | None:
    """What a deployment's replicas wait for, if Serve's message says so and there is too little of it.

    A replica whose process is slow to start has the same message, and all that it needs.
    """
    found = _WANTED.search(message)
    if found is None:
        return None
    count, wanted, free = found.groups()
    try:
        needs, left = json.loads(wanted), json.loads(free)
    except ValueError:
        return None
    if isinstance(needs, dict) and all(left.get(name, 0) >= amount for name, amount in needs.items()):
        return None
    return f"{count} of its replicas wait for {wanted} each, and {free} is left"


def keep_replica_port_local() -> None:
    """Let this replica's port for other deployments' calls listen on 127.0.0.1 if its node does; before it opens.

    Serve opens it on every interface. It takes pickled calls, so whoever reaches it runs code as this user.
    """
    if ray.util.get_node_ip_address() == LOOPBACK:
        replica.add_port_to_grpc_server = _add_local_port


def _add_local_port(server: Any, address: str) -> Any:
    return add_port_to_grpc_server(server, f"{LOOPBACK}:0" if address == _ANY_PORT else address)


def session_folder() -> Path | None:
    """The folder of this Ray's session, with the logs of its processes; None if it is on another machine."""
    node = ray._private.worker._global_node
    return None if node is None else Path(node.get_session_dir_path())


def outside_handle(deployment: str, app: str) -> DeploymentHandle:
    """The handle of a deployment for code that no event loop runs, which Serve's fast mode otherwise requires."""
    handle = serve.get_deployment_handle(deployment, app)
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return handle


def dashboard() -> str | None:
    """Host and port of the dashboard of the Ray that this process has joined; None if there is none."""
    url: str | None = ray._private.worker.get_dashboard_url()
    return url


class _NamedReceive(replica.ASGIReceiveProxy):  # type: ignore[misc]  # Ray has no types
    """What a replica gets of a request: tells the proxy which process asks for it."""

    def __init__(self, scope: Any, request_metadata: Any, receive_asgi_messages: Any) -> None:
        super().__init__(scope, request_metadata, receive_asgi_messages)
        request_metadata.troupe_process = _PROCESS


def name_receiver() -> None:
    """Let the proxy know which process takes a request's body, see `wrap_http_proxy`."""
    replica.ASGIReceiveProxy = _NamedReceive


async def _receive_asgi_messages(proxy: Any, request_metadata: Any) -> list[Any]:
    """The next messages of a request's client, for the process that has the request.

    A process that is killed early may have taken the body along, and Serve sends the request to another, which would
    wait for it: that one is told that the client has left, and the middleware that the request is lost.
    """
    queue = proxy.asgi_receive_queues.get(request_metadata.internal_request_id)
    process = getattr(request_metadata, "troupe_process", None)
    if queue is None or process is None:
        return list(await _PLAIN_RECEIVE(proxy, request_metadata))
    if process != getattr(queue, "troupe_process", process) and queue.troupe_taken:
        getattr(getattr(queue, "troupe_receive", None), "lose", lambda: None)()
        return [_LEFT]
    queue.troupe_process, queue.troupe_taken = process, getattr(queue, "troupe_taken", False)
    getattr(getattr(queue, "troupe_receive", None), "take", lambda: None)()
    await queue.wait_for_message()
    if queue.troupe_process != process:
        return [_LEFT]
    queue.troupe_taken = True
    return list(queue.get_messages_nowait())


async def _proxy_asgi_receive(proxy: Any, receive: Any, queue: Any) -> Any:
    queue.troupe_receive = receive
    return await _PLAIN_PROXY_RECEIVE(proxy, receive, queue)


def wrap_http_proxy(wrap: Callable[[Any, Any], Any]) -> None:
    """Put an ASGI middleware around the HTTP proxy of this process; once, whoever asks again.

    If the `receive` that the middleware passes on has a method `take`, it is called when a process asks for the body;
    if it has a method `lose`, once a request was sent to a second process after the first has taken its body.

    Args:
        wrap: the middleware around an ASGI application, which is the proxy given second.
    """
    plain = HTTPProxy.__call__
    if hasattr(plain, "wrapped"):
        return

    async def call(self: Any, scope: Any, receive: Any, send: Any) -> None:
        if not hasattr(self, "troupe_app"):
            self.troupe_app = wrap(functools.partial(plain, self), self)
        await self.troupe_app(scope, receive, send)

    call.wrapped = plain  # type: ignore[attr-defined]
    HTTPProxy.__call__ = call
    HTTPProxy.receive_asgi_messages = _receive_asgi_messages
    HTTPProxy.proxy_asgi_receive = _proxy_asgi_receive


def destination(proxy: Any, path: str) -> tuple[str, str, bool] | None:
    """The application and the deployment that a proxy sends a path to, and whether it has ever seen a replica of it.

    None if it knows no application for the path.
    """
    found = proxy.proxy_router.match_route(path)
    return (
        None if found is None else (found[1].app_name, found[1].deployment_name, found[1].running_replicas_populated())
    )


def in_running_proxies(function: Callable[[Any], None]) -> None:
    """Let every HTTP proxy that runs on this Ray call a function with itself; not waited for."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == SERVE_NAMESPACE and actor["name"].startswith(SERVE_PROXY_NAME):
            ray.get_actor(actor["name"], SERVE_NAMESPACE).__ray_call__.remote(function)


def serve_run_folder() -> str | None:
    """The folder of the configuration file that `serve run` was given on this machine; None if that is not known."""
    for job in reversed(jobs()):
        if job["IsDead"] or job["DriverIPAddress"] != ray.util.get_node_ip_address():
            continue
        try:
            process = Path("/proc") / str(job["DriverPid"])
            words = process.joinpath("cmdline").read_text().split("\0")
            place = process.joinpath("cwd").readlink()
        except OSError:
            continue
        files = [place / word for word in words if word.endswith((".yaml", ".yml"))]
        # A working directory that Ray carries to its nodes is where paths begin then.
        if "run" in words and files and not any(word.startswith(("--working-dir", "--runtime-env")) for word in words):
            return str(files[0].resolve().parent)
    return None


def warn_of_open_node() -> None:
    """Log what to set if this Ray, which somebody else has started, takes code from whoever reaches its ports."""
    has_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    alone = sum(bool(node["Alive"]) for node in ray.nodes()) == 1
    address = ray.util.get_node_ip_address()
    if has_token and (address == LOOPBACK or not alone):
        return
    settings = ([] if has_token else ["RAY_AUTH_MODE=token"]) + (
        ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"] if alone and address != LOOPBACK else []
    )
    logger.warning(
        "This Ray listens on %s %s authentication: anyone who reaches its ports can run code here. Start it with %s in "
        "the environment, or use troupe serve.",
        address,
        "with" if has_token else "without",
        " ".join(settings),
    )
