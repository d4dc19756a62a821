"""`from troapis.app import run_app`, for programs that were written for troapis.

Installed as the module `troapis` too. A troapis that is installed itself wins: Python takes a package before a module
of the same folder, and one that lies in another folder of the path is loaded here in the place of this module.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def _themselves() -> ModuleSpec | None:
    """The troapis that lies elsewhere on the path."""
    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec("troapis", [folder for folder in sys.path if Path(folder or ".").resolve() != here])
    return spec if spec is not None and spec.loader is not None else None


if __name__ == "troapis" and (_theirs := _themselves()) is not None:
    assert _theirs.loader is not None
    sys.modules[__name__] = module_from_spec(_theirs)
    _theirs.loader.exec_module(sys.modules[__name__])
else:
    from deployments.local import run_app
    from model_loaders.contract import ModelInfo

    __all__ = ["ModelInfo", "run_app"]
    # Python looks here before it looks for a file.
    app = sys.modules[f"{__name__}.app"] = sys.modules[__name__]
