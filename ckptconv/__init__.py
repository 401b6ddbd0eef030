"""ckptconv: a declarative, rule-driven converter for PyTorch checkpoints. It makes them load, and proves it.

>>> import ckptconv, torch
>>> state = ckptconv.convert({"module.fc.weight": torch.ones(2, 3)}, "dataparallel")
>>> list(state)
['fc.weight']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptconv._version import __version__

if TYPE_CHECKING:
    from ckptconv.api import check, convert, diff, inspect, load, plan, run, verify
    from ckptconv.errors import CkptconvError, FitError, InputError, OutputError, Problem, UsageError

__all__ = [
    "CkptconvError", "FitError", "InputError", "OutputError", "Problem", "UsageError",
    "__version__", "check", "convert", "diff", "inspect", "load", "plan", "run", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for, so that ``import ckptconv`` and ``ckptconv --help`` cost nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'ckptconv' has no attribute {name!r}")
    from importlib import import_module

    home = "ckptconv.errors" if name[0].isupper() else "ckptconv.api"
    return getattr(import_module(home), name)
