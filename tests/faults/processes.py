"""The processes of a Ray Serve: which they are, what they hold, and their end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import ray
from ray.util import list_named_actors

INGRESS = "#OpenAIIngress#"
REPLICA = "#ModelReplica#"
PROXY = "SERVE_PROXY_ACTOR"
CONTROLLER = "SERVE_CONTROLLER_ACTOR"


def pids(*kinds: str) -> list[int]:
    """The processes of the actors whose name has one of these in it."""
    names = [actor for actor in list_named_actors(all_namespaces=True) if any(kind in actor["name"] for kind in kinds)]
    actors = [ray.get_actor(actor["name"], namespace=actor["namespace"]) for actor in names]
    return [int(pid) for pid in ray.get([actor.__ray_call__.remote(_pid) for actor in actors], timeout=30)]


def kill(kind: str) -> int:
    """End the only process of a kind at once; its id."""
    (pid,) = pids(kind)
    os.kill(pid, signal.SIGKILL)
    return pid


def memory(*kinds: str) -> dict[int, int]:
    """Resident bytes of the processes of some kinds, by id."""
    pages = {pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids(*kinds)}
    return {pid: count * os.sysconf("SC_PAGE_SIZE") for pid, count in pages.items()}


def _pid(actor: Any) -> int:
    return os.getpid()
