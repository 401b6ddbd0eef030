"""ckptconv: a declarative, rule-driven converter for PyTorch checkpoints. It makes them load, and proves it.

>>> import ckptconv, torch
>>> state = ckptconv.convert({"module.fc.weight": torch.ones(2, 3)}, "dataparallel")
>>> list(state)
['fc.weight']
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ckptconv._version import __version__

if TYPE_CHECKING:
    from ckptconv.api import batch, convert, diff, explain, finish, inspect, load, plan, run, status, suggest, verify, work
    from ckptconv.errors import CkptconvError, FitError, InputError, OutputError, Problem, UsageError
    from ckptconv.rulefiles import check

__all__ = [
    "CkptconvError", "FitError", "InputError", "OutputError", "Problem", "UsageError",
    "__version__", "batch", "check", "convert", "diff", "explain", "finish", "inspect", "load", "plan", "run", "status", "suggest", "verify", "work",
]  # fmt: skip


class _Package(ModuleType):
    """`plan`, `explain` and `suggest` are functions here and modules below; importing a module must not put it in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for, so that ``import ckptconv`` and ``ckptconv --help`` cost nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'ckptconv' has no attribute {name!r}")
    from importlib import import_module

    home = "ckptconv.errors" if name[0].isupper() else "ckptconv.rulefiles" if name == "check" else "ckptconv.api"
    return getattr(import_module(home), name)
