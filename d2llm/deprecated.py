"""Old names of the last release. They work for one more release, with a warning that names the new one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "d2llm.data": ["d2llm.readers", "d2llm.corpus", "d2llm.beir", "d2llm.pairs", "d2llm.files"],
    "d2llm.lexical": ["d2llm.bm25"],
    "d2llm.modeling": ["d2llm.student", "d2llm.heads", "d2llm.backbone"],
    "d2llm.query_encoder": ["d2llm.small_encoder"],
}
"""The modules that now hold the content of each module of the last release."""

NAMES = {
    "QueryEncoder": "SmallEncoder",
    "QueryEncoderConfig": "SmallEncoderConfig",
    "StaticQueryEncoder": "StaticTable",
    "TransformerQueryEncoder": "SmallTransformer",
}
"""The new names of classes in these modules."""


class RenamedWarning(FutureWarning):
    """A warning that code uses an old name. Python shows it by default, since it is a `FutureWarning`."""


def message(old: str, new: str) -> str:
    """Return the text of the warning that `old` is called `new` now."""
    return f"{old} is called {new} now. The old name will stop working in the next release."


def warn(old: str, new: str) -> None:
    """Warn that `old` is called `new` now. The warning points at the line outside of d2llm that used `old`."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] in ("d2llm", "importlib"):
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    place = (frame.f_code.co_filename, frame.f_lineno, frame.f_globals["__name__"])
    warnings.warn_explicit(message(old, new), RenamedWarning, *place, registry)


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return `values` with each old key replaced by its new name, and warn about each.

    `names` is `{old: new}`.

    Raises:
        TypeError: `values` has both the old and the new name.
    """
    current = dict(values)
    for old, new in names.items():
        if old in current:
            if new in current:
                raise TypeError(f"{old} is the old name of {new}: give {new} alone")
            warn(old, new)
            current[new] = current.pop(old)
    return current


def attributes(module: str, names: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """Make a `__getattr__` that finds the old attributes of `module`.

    `names` is `{old name: (module that has it now, new name)}`.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new_module, new = names[name]
        warn(f"{module}.{name}", f"{new_module}.{new}")
        return getattr(import_module(new_module), new)

    return __getattr__


class _OldModules(MetaPathFinder, Loader):
    """An import hook that builds a module of `MODULES` when it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        for new in MODULES[module.__name__]:
            names = vars(import_module(new))
            vars(module).update({name: value for name, value in names.items() if not name.startswith("_")})
            vars(module).update({old: names[new] for old, new in NAMES.items() if new in names})
        warn(module.__name__, " and ".join(MODULES[module.__name__]))


def find_old_modules() -> None:
    """Install the import hook for the modules of `MODULES`."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
