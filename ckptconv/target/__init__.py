"""What a checkpoint must load into, said as one word: a model, a checkpoint, or a saved manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptconv.lazy import exports

if TYPE_CHECKING:
    from ckptconv.target.building import Builder, manifest_of, strict_load
    from ckptconv.target.loading import StrictResult, load_into
    from ckptconv.target.words import Target, parse

__all__ = ["Builder", "StrictResult", "Target", "load_into", "manifest_of", "parse", "strict_load"]
__getattr__ = exports(__name__, {
    "Builder": "building", "manifest_of": "building", "strict_load": "building", "StrictResult": "loading", "load_into": "loading", "Target": "words", "parse": "words",
})  # fmt: skip
