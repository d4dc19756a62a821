"""How the adapters over a model would be served, and why one is refused."""

from __future__ import annotations

from typing import Any

from deployments.adapters.refused import AdapterRefused
from deployments.cli.doctor.finding import Finding, NotApplicable, fault, fine
from deployments.cli.doctor.subject import Subject


async def adapters(subject: Subject) -> Finding:
    """Every adapter of the configuration over the model, placed beside it as for a request."""
    over = [entry for entry in subject.host.args.models if entry.base == subject.entry.id]
    if not over:
        raise NotApplicable("The configuration has no adapter over this model.")
    refused, served = [], []
    for entry in over:
        try:
            await subject.host.load(entry.id)
        except AdapterRefused as reason:
            refused.append(reason.message)
        else:
            served.append(_served(subject.host.snapshot()["models"], entry.id))
    lines = [*refused, *map(_line, served)]
    if refused:
        return fault("adapter-refused", lines[0], *lines[1:], refused=len(refused), adapters=served)
    return fine(lines[0], *lines[1:], refused=0, adapters=served)


def _served(models: list[dict[str, Any]], adapter: str) -> dict[str, Any]:
    """What is loaded for an adapter."""
    return next(each for model in models for each in (model, *model["adapters"]) if each["id"] == adapter)


def _line(adapter: dict[str, Any]) -> str:
    """How an adapter is served."""
    if "rank" not in adapter:
        return f"Adapter {adapter['id']}: a merged copy of its base, because {adapter['merged']}."
    shape = f"Adapter {adapter['id']}: LoRA of rank {adapter['rank']} on {adapter['modules']} modules"
    if adapter["apart"] is None:
        return f"{shape}; its requests share batches with those of the base and of other adapters."
    return f"{shape}; its requests run in batches of their own, because {adapter['apart']}."
