"""Runs a program, and ends it when standard input closes: `python -I guard.py STOP_S PROGRAM ARGUMENTS…`.

Standard input is a pipe of the process that has started this one: it closes however that process ends. The process
group of this process, to which the program belongs, gets SIGTERM then (after SIGCONT, if it was held). What is left of
its session after `STOP_S` seconds, or when the program has ended, gets SIGKILL. Otherwise this process ends with the
program, and with its exit status.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable


def main(stop_s: float, command: list[str]) -> int:
    """Run the program; its exit status."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # not SIG_IGN, which the program would inherit
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    left = threading.Event()

    def wait() -> None:
        while os.read(0, 1):
            pass
        left.set()
        send(started(os.getpid()), signal.SIGCONT)
        os.killpg(0, signal.SIGTERM)
        time.sleep(stop_s)
        kill()

    threading.Thread(target=wait, daemon=True).start()
    status = program.wait()
    if left.is_set():
        kill()
    return status if status >= 0 else 128 - status


def kill() -> None:
    """End this process and its session; without /proc, its process group."""
    send(started(os.getpid()), signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


def started(guard: int) -> set[int]:
    """What runs in the session of a guard, but the guard itself. Ray's workers have process groups of their own."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError):
            if os.getsid(int(name)) == guard != int(name):
                found.add(int(name))
    return found


def send(processes: Iterable[int], number: int) -> None:
    """Send a signal to those of the processes that have not ended."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
