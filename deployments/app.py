"""build_app: from the `args` of serve_config.yaml to a Ray Serve application."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from deployments.config import AppArgs, parse_args
from deployments.ingress import OpenAIIngress
from deployments.replica import ModelReplica

ROUTER = "deployments.routing:ModelAffinityRouter"


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application of a configuration file; its `deployments` section overrides what is chosen here.

    Raises:
        ConfigError: the arguments are wrong.
    """
    return application(parse_args(args))


def application(args: AppArgs, **replica_options: Any) -> serve.Application:
    """An OpenAI ingress before model replicas: one per GPU of the cluster, one on CPU where there is none.

    Args:
        args: the models, and how they are served.
        replica_options: of `serve.deployment`, for the model replicas.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0
    model_replica: Any = ModelReplica
    ingress: Any = OpenAIIngress
    router = RequestRouterConfig(
        request_router_class=ROUTER,
        request_router_kwargs={
            "max_models": args.max_models_per_replica,
            "spill_at": 2 * max(entry.engine.max_rows for entry in args.models),
        },
    )
    defaults = {"num_replicas": max(gpus, 1), "ray_actor_options": {"num_gpus": 1 if gpus else 0}}
    replicas = model_replica.options(request_router_config=router, **(defaults | replica_options)).bind(args)
    return ingress.bind(args, replicas)
