"""What a loader's file imports from its own folder, kept apart from modules of the same name in other loaders' folders.

Modules of a loader's folder are imported as they always are, under their own names, as long as nobody else has the
name. If `helper` is already another folder's, this folder's `helper` is imported as `troupe_folder_<digest>.helper`:
modules find each other, pickle and `importlib.reload` by that name.

Each module of such a folder has an `__import__` of its own among its builtins, which Python calls for every import
statement in it, also for those in functions that run later. No other code of the process is concerned.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_FOLDERS: dict[str, LoaderImports] = {}
"""By path."""

_PRIVATE = "troupe_folder_"
_OURS = frozenset({"deployments", "model_loaders"})
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def imports_of(folder: Path) -> LoaderImports:
    """The imports of a loader's folder, which is put on Python's path unless it is a package."""
    if str(folder) not in _FOLDERS:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        # A package's own modules must not pass for top-level ones.
        if not (folder / "__init__.py").exists() and str(folder) not in sys.path:
            sys.path.append(str(folder))
        _FOLDERS[str(folder)] = LoaderImports(folder)
    return _FOLDERS[str(folder)]


class LoaderImports:
    """Imports of the modules of one folder.

    Args:
        folder: absolute.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_package = (folder / "__init__.py").exists()
        self._prefix = f"{_PRIVATE}{hashlib.sha1(str(folder).encode()).hexdigest()[:8]}"
        self._names: dict[str, str] = {}
        self._builtins = {**vars(builtins), "__import__": self._import}

    def enter(self, module: ModuleType) -> None:
        """Let a module that has not run yet import from this folder."""
        vars(module)["__builtins__"] = self._builtins

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """Python's `__import__` for the modules of this folder."""
        top, dot, rest = name.partition(".")
        full = top if level else self._full_name(top, globals)
        found = builtins.__import__(f"{full}{dot}{rest}", globals, locals, fromlist or (), level)
        return found if fromlist or full == top else sys.modules[full]

    def _full_name(self, top: str, importer: Mapping[str, object] | None) -> str:
        """The name in `sys.modules` of what a module of this folder calls `top`."""
        if top not in self._names:
            own, found = PathFinder.find_spec(top, [str(self._folder)]), _found(top)
            if found is None or (own is not None and own.origin == (importer or {}).get("__file__")):
                return top
            theirs = own is None or not self._is_meant(own, found) or _places(found) == _places(own)
            self._names[top] = top if theirs else f"{self._private_package()}.{top}"
        return self._names[top]

    def _is_meant(self, own: ModuleSpec, found: ModuleSpec) -> bool:
        """Whether a name means a module of this folder, and not what Python's path has by this name.

        Raises:
            ModuleNotFoundError: this folder is a package, and Python's path has another loader's module.
        """
        top = own.name
        if top in sys.stdlib_module_names or top in _OURS:
            return False
        places = _places(found)
        if any(_INSTALLED.intersection(place.parts) for place in places):
            return False
        foreign = any(str(place.parent) in _FOLDERS for place in places)
        if self._is_package:
            if foreign and places != _places(own):
                raise ModuleNotFoundError(
                    f"No module named {top!r}: {self._folder} is a package, and {min(places)} is another loader's. "
                    f"Import {top} by its full name, or remove {self._folder / '__init__.py'}.",
                    name=top,
                )
            return False
        # A folder without __init__.py gives way to a module, as everywhere on Python's path.
        return own.origin is not None or found.origin is None or foreign

    def _private_package(self) -> str:
        """The package of the modules whose names somebody else has."""
        if self._prefix not in sys.modules:
            package = ModuleType(self._prefix)
            package.__path__ = [str(self._folder)]
            sys.modules[self._prefix] = package
        return self._prefix


class _Loader(SourceFileLoader):
    """Loads a module of a loader's folder."""

    def __init__(self, imports: LoaderImports, name: str, path: str) -> None:
        super().__init__(name, path)
        self._imports = imports

    def exec_module(self, module: ModuleType) -> None:
        self._imports.enter(module)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds what Python's own finder does; a module of a loader's folder is entered when it is loaded."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path)
        owner = None if spec is None else _owner(spec)
        if spec is None or owner is None:
            return None
        if type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(owner, spec.loader.name, spec.loader.path)
        elif spec.loader is None:
            # Python would later add the folders of this name in other loaders' folders.
            spec.submodule_search_locations = list(spec.submodule_search_locations or ())
        return spec


def _owner(spec: ModuleSpec) -> LoaderImports | None:
    """The loader's folder that a module is in, at the depth that its name says."""
    places = _places(spec)
    depth = spec.name.count(".") - spec.name.startswith(_PRIVATE)
    if len(places) != 1 or depth >= len((place := min(places)).parents):
        return None
    return _FOLDERS.get(str(place.parents[depth]))


def _found(top: str) -> ModuleSpec | None:
    """What an import elsewhere in the process finds."""
    try:
        return importlib.util.find_spec(top)
    except ValueError:  # a module without a spec, such as __main__
        return None


def _places(spec: ModuleSpec) -> set[Path]:
    """The file of a module, or the folders of a package without one."""
    if spec.has_location and spec.origin is not None:
        file = Path(spec.origin).resolve()
        return {file.parent if spec.submodule_search_locations is not None else file}
    return {Path(place).resolve() for place in spec.submodule_search_locations or ()}
