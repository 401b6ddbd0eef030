"""Every step of the rule language, by the word that rule files use."""

from __future__ import annotations

from collections.abc import Mapping

from ckptconv.ruleset.steps.base import Context, Entry, KeyCondition, Scope, Step, Table
from ckptconv.ruleset.steps.choosing import Check, Copy, Drop, Keep, Tie
from ckptconv.ruleset.steps.combining import ApplyMask, CombineStep, DecodeStep, FoldBatchnorm, MergeLora, WeightNorm
from ckptconv.ruleset.steps.converting import Convert
from ckptconv.ruleset.steps.filling import FillStep
from ckptconv.ruleset.steps.including import Include
from ckptconv.ruleset.steps.joining import ConcatStep, Split, Stack, Unstack
from ckptconv.ruleset.steps.naming import AddPrefix, Rename, StripInfix, StripPrefix
from ckptconv.ruleset.steps.resizing import AdaptChannels, ResizeRows, ResizeStep
from ckptconv.ruleset.steps.shaping import (
    AffineStep,
    CastStep,
    IndexStep,
    PadStep,
    RearrangeStep,
    RepeatStep,
    ReshapeStep,
    SliceStep,
)  # fmt: skip

ALL: Mapping[str, type[Step]] = {
    step.op: step
    for step in (
        StripPrefix, AddPrefix, StripInfix, Rename, Drop, Keep, Copy, Tie, Check,
        ReshapeStep, RearrangeStep, SliceStep, IndexStep, PadStep, RepeatStep, CastStep, AffineStep, Split, ConcatStep, Stack, Unstack, FillStep,
        ResizeStep, AdaptChannels, ResizeRows, CombineStep, MergeLora, WeightNorm, FoldBatchnorm, ApplyMask, DecodeStep, Convert, Include,
    )
}  # fmt: skip

__all__ = ["ALL", "Context", "Entry", "Include", "KeyCondition", "Scope", "Step", "Table"]
