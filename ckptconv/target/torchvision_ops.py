"""Libraries that import torchvision, where its compiled part does not fit the installed torch.

torchvision from PyPI is built for one build of torch. Beside another (the CPU build, say) its import stops at "operator
torchvision::nms does not exist". Building a model, and running a classifier, never calls that operator: declaring it is enough.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_kept: list[Any] = []


def import_with_torchvision(name: str) -> ModuleType:
    """``import name``; where only torchvision's missing operators stand in the way, with these declared."""
    try:
        _first_torchvision()
        return importlib.import_module(name)
    except (RuntimeError, ImportError, OSError) as error:
        if "torchvision::" not in str(error) or _kept:
            raise
    import torch

    for module in [each for each in sys.modules if each.split(".")[0] in ("torchvision", name.split(".", maxsplit=1)[0])]:
        del sys.modules[module]
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # an operator lives as long as its library
    return importlib.import_module(name)


def _first_torchvision() -> None:
    """torchvision by itself: a library on top of it may swallow the error and go on with half of itself."""
    if importlib.util.find_spec("torchvision") is not None and "torchvision" not in sys.modules:
        importlib.import_module("torchvision")
