"""A controller that knows its workers."""

from typing import Any


class TaskController:
    def __init__(self, router: Any, heart_rate: int = 11, session_expire_time: int = 240) -> None:
        self._tasks: dict[str, Any] = {}
        router.get("/list_workers")(self.list_workers)
        router.post("/receive_heartbeat")(self.receive_heartbeat)

    async def list_workers(self) -> dict[str, Any]:
        return self._tasks

    async def receive_heartbeat(self, data: dict[str, Any]) -> None:
        task = self._tasks.setdefault(data["name"], {"indices": data["indices"], "workers": {}})
        task["workers"][data["address"]] = {}
