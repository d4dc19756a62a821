"""What the engines with threads of their own have in common: live requests, cancellation, closing, a dead thread."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import ClassVar

from deployments.core.errors import BadRequest, ModelError, TroupeError, Unavailable
from deployments.engine.base.admission import check_request
from deployments.engine.base.failures import unloading
from deployments.engine.base.hook_watch import HookWatch
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import Emit, EngineRequest, EngineStats

logger = logging.getLogger(__name__)


class ThreadedEngine:
    """An engine but for its work. See `protocol.Engine`.

    A subclass admits requests in `submit`, starts its threads with `_start`, and computes in `_work`, which returns
    when `_closing` is set and nothing runs. `_changed` is notified when either is set. Nothing may be emitted while
    `_changed` is held.

    Attributes:
        kind: name of the engine, for `stats`.
        hook_watch: of the loader's functions that its thread calls.
        encodes_prompts: an encoder reads the prompt, which takes no positions of the answer.
    """

    kind: ClassVar[str]
    finishes_waiting: ClassVar[bool] = False
    """Whether requests that wait when the engine closes are still computed, as far as the time allows."""
    last_step_s: ClassVar[float] = 5.0
    """How long `close` waits for the threads after the last request has ended."""

    max_model_len: int
    supports: frozenset[str]
    encodes_prompts: bool = False

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._live: dict[str, LiveRequest] = {}
        self._counts: Counter[str] = Counter()
        self._closing = False
        self._death: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self.hook_watch = HookWatch(self._hang)

    def _check_request(self, request: EngineRequest, context: int, vocab: int | None) -> None:
        """Refuse what can never be served; see `check_request`.

        Args:
            context: positions of the model.
            vocab: how many token ids it has.
        """
        check_request(request, max_model_len=context, supports=self.supports, vocab=vocab, encoded=self.encodes_prompts)

    def cancel(self, request_id: str) -> None:
        """See `protocol.Engine`."""
        with self._changed:
            live = self._live.get(request_id)
        if live is not None:
            live.cancel()
            self._drop(live)

    def stats(self) -> EngineStats:
        """See `protocol.Engine`."""
        live = list(self._live.values())
        running = sum(each.running for each in live)
        return EngineStats(kind=self.kind, sequences=running, waiting=len(live) - running, **self._counts)

    def check(self) -> None:
        """See `protocol.Engine`."""
        if self._death is not None or not (self._closing or all(thread.is_alive() for thread in self._threads)):
            raise ModelError(f"The engine's thread has died: {self._death}")
        if (late := self.hook_watch.error) is not None:
            raise late

    def close(self, timeout: float = 30.0) -> None:
        """See `protocol.Engine`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            live = list(self._live.values())
        if not self.finishes_waiting:
            self._fail([each for each in live if not each.running])
        with self._changed:
            self._changed.wait_for(lambda: not self._live, timeout)
            live = list(self._live.values())
        self._fail(live)
        self.hook_watch.close()
        self._stop()
        for thread in self._threads:
            thread.join(self.last_step_s)
        self._release()

    @property
    def ended(self) -> bool:
        """Whether no thread of it computes any more."""
        return not any(thread.is_alive() for thread in self._threads)

    def _start(self, *names: str) -> None:
        """Start a thread of each name, which does `_work`."""
        self._threads = [threading.Thread(target=self._run_thread, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def _admit(self, request: EngineRequest, emit: Emit, *, counted: bool = True) -> LiveRequest:
        """Note a request as live.

        Args:
            counted: its tokens are counted when they are emitted.

        Raises:
            Unavailable: the engine closes, or its thread has died.
            BadRequest: a request with this id is live.
            ModelError: the thread does not come back from a hook.
        """
        if (late := self.hook_watch.error) is not None:
            raise late
        live = LiveRequest(request, emit, self._counts if counted else None, self._forget)
        with self._changed:
            if self._closing:
                raise unloading()
            if self._death is not None:
                raise Unavailable(f"The engine has stopped: {self._death}")
            if request.request_id in self._live:
                raise BadRequest(f"Request {request.request_id!r} is already running.")
            self._live[request.request_id] = live
        return live

    # What subclasses do.

    def _work(self) -> None:
        """Compute requests until the engine closes."""
        raise NotImplementedError

    def _drop(self, live: LiveRequest) -> None:
        """Forget a request that was canceled, or failed because the engine closes; it may be running."""

    def _stop(self) -> None:
        """End what the threads are at, when no request is live any more."""

    def _release(self) -> None:
        """Free what belongs to the model; the threads have ended, or do not end in time."""

    def _hang(self, error: ModelError) -> None:
        with self._changed:
            live = list(self._live.values())
        self._fail(live, error)

    def _fail(self, requests: list[LiveRequest], error: TroupeError | None = None) -> None:
        for live in requests:
            live.fail(error or unloading())
            self._drop(live)

    def _forget(self, live: LiveRequest) -> None:
        with self._changed:
            if self._live.get(live.request.request_id) is live:
                del self._live[live.request.request_id]
            if self._closing:
                self._changed.notify_all()

    def _run_thread(self) -> None:
        try:
            self._work()
        except BaseException as error:
            logger.exception("The engine's thread %s has died.", threading.current_thread().name)
            with self._changed:
                self._death = error
                left = list(self._live.values())
            for live in left:
                live.fail(Unavailable(f"The engine has stopped: {error}"))
