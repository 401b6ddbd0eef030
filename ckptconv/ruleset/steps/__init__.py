"""Every step of the rule language, by the word that rule files use."""

from __future__ import annotations

from collections.abc import Mapping

from ckptconv.lazy import Lazy
from ckptconv.ruleset.steps.base import Context, Entry, KeyCondition, Scope, Step, Table
from ckptconv.ruleset.steps.including import Include

_HOMES: Mapping[str, Mapping[str, str]] = {
    "naming": {"strip_prefix": "StripPrefix", "add_prefix": "AddPrefix", "strip_infix": "StripInfix", "rename": "Rename"},
    "choosing": {"drop": "Drop", "keep": "Keep", "copy": "Copy", "tie": "Tie", "check": "Check"},
    "shaping": {
        "reshape": "ReshapeStep", "rearrange": "RearrangeStep", "slice": "SliceStep", "index": "IndexStep", "pad": "PadStep",
        "repeat": "RepeatStep", "cast": "CastStep", "affine": "AffineStep",
    },
    "joining": {"split": "Split", "concat": "ConcatStep", "stack": "Stack", "unstack": "Unstack"},
    "filling": {"fill": "FillStep"},
    "resizing": {"resize": "ResizeStep", "adapt_channels": "AdaptChannels", "resize_rows": "ResizeRows"},
    "combining": {
        "combine": "CombineStep", "merge_lora": "MergeLora", "weight_norm": "WeightNorm", "fold_batchnorm": "FoldBatchnorm",
        "apply_mask": "ApplyMask", "decode": "DecodeStep",
    },
    "converting": {"convert": "Convert"},
    "including": {"include": "Include"},
}  # fmt: skip

ALL: Mapping[str, type[Step]] = Lazy({
    op: f"ckptconv.ruleset.steps.{module}:{name}" for module, names in _HOMES.items() for op, name in names.items()
})  # fmt: skip

__all__ = ["ALL", "Context", "Entry", "Include", "KeyCondition", "Scope", "Step", "Table"]
