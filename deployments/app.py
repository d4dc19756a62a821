"""build_app: from the `args` of serve_config.yaml to a Ray Serve application."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from deployments.config import parse_args
from deployments.ingress import OpenAIIngress
from deployments.replica import ModelReplica

ROUTER = "deployments.routing:ModelAffinityRouter"


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application: an OpenAI ingress before model replicas, one per GPU of the cluster, one on CPU without GPUs.

    The `deployments` section of the configuration overrides what is chosen here.

    Raises:
        ConfigError: the arguments are wrong.
    """
    checked = parse_args(args)
    gpus = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0
    model_replica: Any = ModelReplica
    ingress: Any = OpenAIIngress
    replicas = model_replica.options(
        num_replicas=max(gpus, 1),
        ray_actor_options={"num_gpus": 1 if gpus else 0},
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,
            request_router_kwargs={
                "max_models": checked.max_models_per_replica,
                "spill_at": 2 * max(entry.engine.max_rows for entry in checked.models),
            },
        ),
    ).bind(checked)
    return ingress.bind(checked, replicas)
