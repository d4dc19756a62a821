"""The metrics of the replicas, through Ray's: every node of a cluster exports them with the prefix `ray_`.

Every metric has Serve's tags `deployment`, `replica` and `application` besides its own. The port of a node is the one
given to `ray start --metrics-export-port`, or a free one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import ray
from httpx2 import AsyncClient, HTTPError
from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.core.errors import Unavailable
from deployments.host.metrics.meters import PREFIX, CounterMeter, GaugeMeter, HistogramMeter

_PATIENCE_S = 5.0
_OURS = f"{PREFIX}_troupe_"


class RayMeters:
    """Meters that Ray exports."""

    def counter(self, name: str, text: str, tags: Sequence[str]) -> CounterMeter:
        """A new counter."""
        made: CounterMeter = Counter(name, description=text, tag_keys=tuple(tags))
        return made

    def gauge(self, name: str, text: str, tags: Sequence[str]) -> GaugeMeter:
        """A new gauge."""
        made: GaugeMeter = Gauge(name, description=text, tag_keys=tuple(tags))
        return made

    def histogram(self, name: str, text: str, tags: Sequence[str], boundaries: Sequence[float]) -> HistogramMeter:
        """A new histogram."""
        made: HistogramMeter = Histogram(name, description=text, boundaries=list(boundaries), tag_keys=tuple(tags))
        return made


async def exported(application: str) -> str:
    """The metrics of an application as all nodes of the cluster export them, in Prometheus' text format.

    Raises:
        Unavailable: no node answers.
    """
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    async with AsyncClient(timeout=_PATIENCE_S, trust_env=False) as client:
        texts = await asyncio.gather(*(_exported(client, node) for node in nodes))
    found = [text for text in texts if text is not None]
    if not found:
        raise Unavailable("No node of the cluster exports metrics at this moment.", retry_after=5)
    return merged(found, application)


async def _exported(client: AsyncClient, node: Mapping[str, object]) -> str | None:
    host = str(node["NodeManagerAddress"])
    try:
        answer = await client.get(f"http://{f'[{host}]' if ':' in host else host}:{node['MetricsExportPort']}/metrics")
    except HTTPError:
        return None
    return answer.text if answer.status_code == 200 else None


def merged(texts: Iterable[str], application: str) -> str:
    """Troupe's metrics of one application in texts of several nodes: each family once, as the format wants it."""
    families: dict[str, list[str]] = {}
    tag = f'application="{application}"'
    for text in texts:
        family: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP "):
                head = line.split(" ", 3)[2]
                family = families.setdefault(head, []) if head.startswith(_OURS) else []
                if not family:
                    family.append(line)
            elif line.startswith("# TYPE "):
                if len(family) == 1:
                    family.append(line)
            elif line.startswith(_OURS) and tag in line:
                family.append(line)
    return "".join(f"{line}\n" for family in families.values() if len(family) > 2 for line in family)
