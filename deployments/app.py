"""build_app: from the `args` of serve_config.yaml to a Ray Serve application."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from deployments.args import read_args
from deployments.config.app import AppArgs, Pool
from deployments.ingress import BatchOwner, OpenAIIngress
from deployments.model_registry import RegistryReplica
from deployments.openai.http.keys import is_plain
from deployments.proxy import shape_running_proxies
from deployments.ray_internals import serve_run_folder, warn_of_open_node
from deployments.registry.catalogue import date_models
from deployments.replica import ModelReplica

logger = logging.getLogger("ray.serve")

ROUTER = "deployments.router:ModelAffinityRouter"


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application of a configuration file; its `deployments` section overrides what is chosen here.

    Raises:
        ConfigError: the arguments are wrong.
    """
    warn_of_open_node()
    shape_running_proxies()
    checked = read_args(args)
    warn_of_plain_keys(checked)
    return application(checked.model_copy(update={"folder": checked.folder or serve_run_folder()}))


def warn_of_plain_keys(args: AppArgs) -> None:
    """Log that Ray has logged keys, which it does before `build_app` runs; scripts/serve gives it only digests."""
    if any(map(is_plain, (*args.api.api_keys, *args.api.admin_keys))):
        logger.warning(
            "Ray logs this application's API keys in clear text under `serve run` and `serve deploy`. Write digests "
            "(sha256:<hex digest>) or use api_keys_file, or start with troupe serve."
        )


def application(args: AppArgs, **replica_options: Any) -> serve.Application:
    """An OpenAI ingress before model replicas: one per GPU of the cluster, one on CPU where there is none.

    Args:
        args: the models, and how they are served.
        replica_options: of `serve.deployment`, for the model replicas.
    """
    ingress: Any = OpenAIIngress
    date_models(args)
    pools = {name: _replicas(name, pool, args, replica_options) for name, pool in args.all_pools().items()}
    model_registry: Any = RegistryReplica
    registry = model_registry.bind(args) if args.has_registry else None
    batch_owner: Any = BatchOwner
    batches = batch_owner.bind(args, pools, registry) if args.batches_dir is not None else None
    return ingress.bind(args, pools, registry, batches)


def _replicas(name: str, pool: Pool, args: AppArgs, options: dict[str, Any]) -> Any:
    """The deployment of a pool."""
    own = args.of_pool(pool)
    router = RequestRouterConfig(
        request_router_class=ROUTER,
        request_router_kwargs={
            "max_models": own.max_models_per_replica,
            "full_at": max(entry.engine.max_batch_size for entry in own.models),
        },
    )
    gpus = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0
    each = pool.gpus_per_replica if pool.gpus_per_replica is not None else min(gpus, 1)
    defaults = {
        "name": f"ModelReplica-{name}" if args.pools else "ModelReplica",
        "num_replicas": pool.replicas or max(1, int(gpus / each) if each else 1),
        "ray_actor_options": {"num_gpus": each},
    }
    model_replica: Any = ModelReplica
    return model_replica.options(request_router_config=router, **(defaults | options)).bind(own)
