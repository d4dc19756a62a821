"""Chromium for the tests of the page: Debian's package, since Playwright's own is not available everywhere.

`python -m tests.chromium` installs it if it is missing and the user is root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

MISSING = "There is no Chromium: install the package `chromium`, or run the tests as root, which installs it."


def find() -> str | None:
    """The path of Chromium; installed if it can be."""
    if (found := shutil.which("chromium")) is not None:
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return None
    print("Installing Chromium for the tests of the page (once) ...", file=sys.stderr, flush=True)
    for command in (["update", "--quiet"], ["install", "--quiet", "--yes", "--no-install-recommends", "chromium"]):
        if subprocess.run(["apt-get", *command], stdout=sys.stderr, check=False).returncode != 0:
            return None
    return shutil.which("chromium")


if __name__ == "__main__" and find() is None:
    sys.exit(MISSING)
