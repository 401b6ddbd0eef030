"""Every rule tried on a checkpoint: by its `select`, its `when`, and by planning it. Metadata only, a second for all of them together.

A large checkpoint is thinned first: a rule that makes nothing of its first blocks makes nothing of all. What does best is planned in full.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isqrt
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv.compare import allowed_by
from ckptconv.errors import CkptconvError, Refusal
from ckptconv.explain.sides import Part, Sides, sides
from ckptconv.formats.base import Composite
from ckptconv.plan import Plan, Read
from ckptconv.planner import make_plan
from ckptconv.ruleset.model import RuleFile
from ckptconv.spec import Manifest

#: Checkpoints with more tensors are thinned to the first blocks of every stack.
LARGE, BLOCKS = 400, 3
#: Plans in full of what did best on the thinned checkpoint, and steps after which a second rule is tried.
MAX_FULL, MAX_FIRST = 4, 6
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
#: Values that a variable may have, to see whether a rule would fit if it had one.
PROBES = (1, 2, 4, 8, 16)
#: The rule that renames nothing: it takes weights out of containers, folders and pickles.
PLAIN = "plain-tensors"


class Tried(Struct, frozen=True):
    """A rule (or one after another) and what came of it."""

    rules: tuple[RuleFile, ...]
    part: Part
    set: Mapping[str, Any] = field(default_factory=dict)  #: variables that it was given, beside the config's
    plan: Plan | None = None  #: of the last rule, on what the ones before made
    both: Sides | None = None  #: what it makes, against the target
    reason: str = ""  #: why it is not for this checkpoint
    waits: bool = False  #: it only wants the model's config; else it is for this checkpoint and target, as it seems

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(rule.header.name for rule in self.rules)

    @property
    def fits(self) -> bool:
        return self.both is not None and self.both.comparison.fits

    @property
    def complete(self) -> bool:
        """Fits, and nothing of the model stays at its initial values."""
        return self.fits and self.both is not None and not self.both.comparison.allowed_missing

    @property
    def coverage(self) -> float:
        return self.both.comparison.coverage if self.both is not None else 0.0

    @property
    def touched(self) -> float:
        """The share of outputs that a step of the (last) rule made or renamed."""
        if self.plan is None or not self.plan.outputs:
            return 0.0
        done = sum(not isinstance(output.expr, Read) or output.expr.name != output.name for output in self.plan.outputs) + len(
            self.plan.dropped
        )
        return done / (len(self.plan.outputs) + len(self.plan.dropped))


class Question(Struct, frozen=True):
    """What the rules are tried on."""

    parts: Sequence[Part]
    wanted: Manifest | None
    composites: Mapping[str, Mapping[str, Composite]] = field(default_factory=dict)  #: by part
    stored: Mapping[str, Manifest] = field(default_factory=dict)  #: by part, what a plan reads (parts of composites apart)
    config: Mapping[str, Any] | None = None
    unknown: frozenset[str] = frozenset()
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the state_dicts stand in the file."""
        return tuple(part.path for part in self.parts)

    def manifest(self, part: Part) -> Manifest:
        """What a plan reads of a part."""
        return self.stored.get(part.path, part.manifest)


def try_rules(rules: Iterable[RuleFile], question: Question) -> list[Tried]:
    """What came of every rule, the best first: fits, then how much of the target it fills, then the simplest.

    Where no single rule fits, one is tried after another: a wrapper's first, then a model's.
    """
    known = list(rules)
    if all(len(question.manifest(part)) <= LARGE for part in question.parts):
        return _tried(known, question)
    whole = {part.path: part for part in question.parts}
    found = _tried(known, _thinned(question))
    worked: list[Tried] = []
    for each in [each for each in found if each.plan is not None][:MAX_FULL]:
        worked.append(_again(each, whole[each.part.path], question))
        if worked[-1].complete:
            break
    return [*sorted(worked, key=_rank), *(each for each in found if each.plan is None)]


def _tried(rules: Sequence[RuleFile], question: Question) -> list[Tried]:
    first = [tried for part in question.parts for rule in rules for tried in _each(rule, part, question)]
    worked = sorted((each for each in first if each.plan is not None), key=_rank)
    if question.wanted is not None and not any(each.complete for each in worked):
        worked = sorted([*worked, *_second(worked, rules, question)], key=_rank)
    return [*worked, *(each for each in first if each.plan is None)]


def _again(tried: Tried, part: Part, question: Question) -> Tried:
    """The same rules on the whole checkpoint."""
    made = Tried((), part)
    manifest = question.manifest(part)
    for at in range(len(tried.rules)):
        made = _planned(tried.rules[: at + 1], part, manifest, question, tried.set)
        if made.plan is None:
            return made
        manifest = made.plan.manifest
    return made


def _each(rule: RuleFile, part: Part, question: Question) -> Iterator[Tried]:
    """The rule on one state_dict, with every value that its variable may have."""
    select = rule.header.select
    if select and part.path not in select and rule.header.name != PLAIN:
        yield Tried((rule,), part, reason=f"it is for {' or '.join(select)}, not for {part.path}")
        return
    manifest = question.manifest(part)
    choices = _CHOICES.get(rule.header.name)
    for value in (choices(manifest, question.wanted) if choices is not None else []) or [{}]:
        yield _planned((rule,), part, manifest, question, {name: each for name, each in value.items() if name not in question.given})


def _planned(rules: tuple[RuleFile, ...], part: Part, manifest: Manifest, question: Question, value: Mapping[str, Any]) -> Tried:
    """The last of ``rules`` on ``manifest``, which is what the others made."""
    rule = rules[-1]
    composites = question.composites.get(part.path, {}) if len(rules) == 1 else {}
    try:
        made = make_plan(rule, manifest, given={**question.given, **value}, config=question.config, composites=composites)
    except CkptconvError as error:
        codes = {problem.code for problem in error.problems}
        open_ = _open_variables(rule, {**question.given, **value}) if "CK104" in codes and codes <= {"CK104", "CK210"} else ()
        probes = [_planned(rules, part, manifest, question, {**value, **dict.fromkeys(open_, size)}) for size in PROBES] if open_ else []
        # Shapes seldom depend on the value: where any makes the rule fit, it is the right rule, and a person has to say the value.
        waits = any(probe.fits for probe in probes) or (codes == {"CK104"} and any("::" in name for name in manifest))
        return Tried(rules, part, value, reason=error.problems[0].what, waits=waits)
    except Refusal as refusal:
        return Tried(rules, part, value, reason=refusal.what)
    both = None
    if question.wanted is not None:
        both = sides(made.manifest, question.wanted, question.unknown, allowed_by(rule.header.target.allow))
    tried = Tried(rules, part, value, made, both)
    return tried if tried.touched or rule.header.name == PLAIN else Tried(rules, part, value, reason="it changes nothing")


def _open_variables(rule: RuleFile, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Variables that only the model's config gives.

    >>> from ckptconv.ruleset.builtin import find
    >>> _open_variables(find("hf-llama-to-torchtune-llama"), {})
    ('H',)
    """
    found = []
    for name, text in rule.header.vars.items():
        words = re.split(r"[(),\s]+", text.removeprefix("first")) if isinstance(text, str) else []
        if name not in given and any(words) and all(word.startswith("config.") for word in words if word):
            found.append(name)
    return tuple(found)


def _second(worked: Sequence[Tried], rules: Sequence[RuleFile], question: Question) -> Iterator[Tried]:
    """Rules after a rule: each different result of a first one, given to all others."""
    seen: set[frozenset[str]] = {frozenset(part.manifest) for part in question.parts}
    for before in worked:
        if before.plan is None or len(seen) > MAX_FIRST:
            break
        names = frozenset(output.name for output in before.plan.outputs)
        if names in seen or len(before.rules) > 1:
            continue
        seen.add(names)
        for rule in rules:
            if rule is not before.rules[0] and rule.header.name != PLAIN:
                after = _planned((*before.rules, rule), before.part, before.plan.manifest, question, before.set)
                if after.plan is not None and after.touched and after.coverage > before.coverage:
                    yield after


def _thinned(question: Question) -> Question:
    return Question(
        [replace(part, manifest=thinned(part.manifest)) for part in question.parts],
        thinned(question.wanted) if question.wanted is not None else None,
        {path: {name: each for name, each in found.items() if _early(name)} for path, found in question.composites.items()},
        {path: thinned(manifest) for path, manifest in question.stored.items()}, question.config, question.unknown, question.given,
    )  # fmt: skip


def thinned(manifest: Manifest) -> Manifest:
    """The first blocks of every stack, by the first number in each name, and everything without a number.

    >>> from ckptconv.spec import DType, TensorSpec
    >>> list(thinned(Manifest({f"blocks.{i}.w": TensorSpec((1,), DType.float32) for i in range(99)})))
    ['blocks.0.w', 'blocks.1.w', 'blocks.2.w']
    """
    kept = {name: spec for name, spec in manifest.tensors.items() if _early(name)}
    return Manifest(kept, tuple(group for group in manifest.ties if all(name in kept for name in group)), manifest.buffers)


def _early(name: str) -> bool:
    match = _BLOCK.search(name)
    return match is None or int(match[1]) < BLOCKS


def _rank(tried: Tried) -> tuple[Any, ...]:
    wrong = 0 if tried.both is None else len(tried.both.unexpected)
    return (
        not tried.complete, not tried.fits, -round(tried.coverage, 6), wrong, tried.names != (PLAIN,), len(tried.rules), sum(len(rule.steps) for rule in tried.rules),
        bool(tried.rules[-1].header.select), tried.names,
    )  # fmt: skip


def _network(manifest: Manifest, _wanted: Manifest | None) -> list[dict[str, Any]]:
    """What may be the network of a LightningModule: first parts of names, the largest first."""
    sizes: dict[str, int] = {}
    for name, spec in manifest.stored.items():
        head, dot, _ = name.partition(".")
        if dot and head.isidentifier():
            sizes[head] = sizes.get(head, 0) + spec.numel
    return [{"network": head} for head in sorted(sizes, key=lambda head: -sizes[head])[:4]]


def _classes(_manifest: Manifest, wanted: Manifest | None) -> list[dict[str, Any]]:
    """The rows of the target's classifier."""
    names = ("head", "head.fc", "heads.head", "fc", "classifier")
    rows = [
        spec.shape[0]
        for name, spec in (wanted.tensors if wanted is not None else {}).items()
        if name.rpartition(".")[0] in names and spec.shape
    ]
    return [{"classes": rows[0]}] if rows else []


def _grid(manifest: Manifest, wanted: Manifest | None) -> list[dict[str, Any]]:
    """The patches of the target, where its position embeddings are others than the file's."""
    theirs = wanted.tensors.get("pos_embed") if wanted is not None else None
    ours = next((spec for name, spec in manifest.tensors.items() if name.endswith("pos_embed")), None)
    if theirs is None or ours is None or theirs.shape == ours.shape or len(theirs.shape) != 3:
        return []
    side = isqrt(theirs.shape[1] - 1)
    return [{"grid": [side, side]}] if side * side == theirs.shape[1] - 1 else []


def _blocks(manifest: Manifest, _wanted: Manifest | None) -> list[dict[str, Any]]:
    """Sizes of the blocks that have a scale each, where all pairs of weight and scale agree with them and the usual ones do not."""
    pairs = [
        (manifest[name.removesuffix("_scale_inv")].shape, spec.shape) for name, spec in manifest.tensors.items()
        if name.endswith(".weight_scale_inv") and name.removesuffix("_scale_inv") in manifest
    ]  # fmt: skip
    fitting = [
        size for size in (128, 64, 32, 16, 256)
        if pairs and all(len(scale) == len(weight) and all(-(-a // size) == b for a, b in zip(weight, scale, strict=True)) for weight, scale in pairs)
    ]  # fmt: skip
    return [{"rows": fitting[0], "columns": fitting[0]}] if fitting and fitting[0] != 128 else []


#: Rules with a variable that a person says, and what it may be for these two sides.
_CHOICES: Mapping[str, Callable[[Manifest, Manifest | None], list[dict[str, Any]]]] = {
    "lightning-network": _network,
    "new-classes": _classes,
    "dino-to-timm-vit": _grid,
    "fp8-blocks-to-float": _blocks,
}
