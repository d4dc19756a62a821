"""A loader that ends the process of the check, which would leave a report without its end and without a reason."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn


@contextlib.contextmanager
def named_end(step: Callable[[], str]) -> Iterator[None]:
    """While the block runs: `os._exit` says who calls it, and a crash of native code where Python was.

    Args:
        step: the name of the step that is being made.
    """
    leave, check = os._exit, os.getpid()

    def say_and_leave(status: int) -> NoReturn:
        if os.getpid() == check:  # a forked child ends in this way
            caller = sys._getframe(1)
            place = f"{Path(caller.f_code.co_filename).name}, line {caller.f_lineno} in {caller.f_code.co_name}"
            print(
                f"\ntroupe: the check ended in step {step()!r}: os._exit({status}) was called at {place}. "
                "Raise an exception there instead; in the server it would end the replica.",
                file=sys.stderr,
                flush=True,
            )
            status = 1
        leave(status)

    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    os._exit = say_and_leave
    try:
        yield
    finally:
        os._exit = leave
