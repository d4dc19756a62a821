"""OpenAIIngress: the OpenAI API over HTTP, on CPU, without torch. Forwards calls to the model replicas."""

from __future__ import annotations

from fastapi import FastAPI
from ray import serve

from deployments.compat.legacy import add_legacy_routes
from deployments.config.app import AppArgs
from deployments.handle_client import Handle, HandleClient
from deployments.logs import enter_folder, log_like_serve, write_access_log
from deployments.openai.app import build_api
from deployments.openai.http.middleware import ACCESS
from deployments.ray_internals import keep_replica_port_local, name_receiver


@serve.deployment(
    name="OpenAIIngress",
    max_ongoing_requests=10_000,
    graceful_shutdown_timeout_s=60,
    ray_actor_options={"num_cpus": 0},  # two replicas on the CPU fit on two cores
)
@serve.ingress()
class OpenAIIngress:
    """Serves the OpenAI routes.

    Args:
        args: the application's configuration.
        pools: a handle of each deployment of model replicas, by the pool's name.
        registry: a handle of the registry, if models can come while the server runs.
    """

    def __init__(self, args: AppArgs, pools: dict[str, Handle], registry: Handle | None = None) -> None:
        log_like_serve()
        write_access_log(ACCESS)
        enter_folder(args.folder)
        keep_replica_port_local()
        name_receiver()
        self._args = args
        self._client = HandleClient(args, pools, registry)

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve adds x-request-id itself.
        app = build_api(self._client, self._args.api, names_requests=False, more=add_legacy_routes)
        app.router.add_event_handler("startup", self._client.start)
        return app
