"""Code that imports torchvision, where its compiled part does not fit the installed torch.

torchvision from PyPI is built for one build of torch. Beside another (the CPU build, say) its import stops at "operator
torchvision::nms does not exist". Building a model, and running a classifier, never calls that operator: declaring it is enough.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
_MARK = "torchvision::"
_USERS = ("timm", "transformers")  #: libraries on top of torchvision that are left half-imported when it fails
_kept: list[Any] = []


def import_with_torchvision(name: str) -> ModuleType:
    """``import name``; where only torchvision's missing operators stand in the way, with these declared, and once more."""

    def load() -> ModuleType:
        if name in _USERS and importlib.util.find_spec("torchvision") is not None:
            # By itself, first: a library on top of it may swallow the error and go on with half of itself.
            try:
                importlib.import_module("torchvision")
            except Exception as error:
                if _operators_are_missing(error):
                    raise
                # Any other fault is the library's to judge: transformers can do without torchvision.
        return importlib.import_module(name)

    return with_torchvision(load, name)


def with_torchvision(action: Callable[[], T], importing: str = "") -> T:
    """What ``action`` gives; where it fails for want of torchvision's operators, they are declared and it is tried once more.

    ``importing`` is a module whose package ``action`` imports, to be forgotten in between.
    """
    try:
        return action()
    except Exception as error:
        if _kept or not _operators_are_missing(error):
            raise
    import torch

    half_imported = {"torchvision", *_USERS, importing.partition(".")[0]}
    for module in [each for each in sys.modules if each.partition(".")[0] in half_imported]:
        del sys.modules[module]
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # an operator lives as long as its library
    return action()


def _operators_are_missing(error: BaseException | None) -> bool:
    while error is not None:
        if _MARK in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
