"""Runs a program, and ends it when standard input closes: `python -I guard.py STOP_S PROGRAM ARGUMENTS…`.

Standard input is a pipe of the process that has started this one: it closes however that process ends. The program and
all that it has started, which are in the process group of this process, get SIGTERM then, and what is left after
`STOP_S` seconds, or when the program has ended, SIGKILL. Otherwise this process ends with the program, and with its
exit status.
"""

import os
import signal
import subprocess
import sys
import threading
import time


def main(stop_s: float, command: list[str]) -> int:
    """Run the program; its exit status."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # not SIG_IGN, which the program would inherit
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    left = threading.Event()

    def wait() -> None:
        while os.read(0, 1):
            pass
        left.set()
        os.killpg(0, signal.SIGTERM)
        time.sleep(stop_s)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
    status = program.wait()
    if left.is_set():
        os.killpg(0, signal.SIGKILL)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
