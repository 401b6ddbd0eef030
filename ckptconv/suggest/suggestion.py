"""From two manifests to a suggestion: the steps in order, and the proof that what is suggested fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ckptconv.compare import Allow, compare
from ckptconv.plan import Plan, reads
from ckptconv.ruleset.patterns import Pattern
from ckptconv.spec import Manifest
from ckptconv.suggest.changes import Outcome, is_buffer, outcome, without_lone_buffers
from ckptconv.suggest.joining import coarsened
from ckptconv.suggest.matching import matched
from ckptconv.suggest.ranks import gathered
from ckptconv.suggest.units import Side, side_of
from ckptconv.suggest.verdict import CONVERTIBLE, LOADS, LOSSY, NOT, Cause, judged
from ckptconv.suggest.writing import Rule, Unwritten, written


@dataclass(frozen=True)
class Suggestion:
    """What is suggested, how sure it is tensor by tensor, and what was found."""

    verdict: str  #: loads as it is, convertible, convertible with loss, not convertible
    reason: str = ""  #: one sentence: why not, or what is lost
    text: str = ""  #: the rule file; empty where there is none
    mapping: Mapping[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)  #: target name -> source names, and how
    confidence: Mapping[str, str] = field(default_factory=dict)  #: target name -> certain, likely, ambiguous
    alternatives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  #: target name -> source names that would do as well
    missing: tuple[str, ...] = ()  #: target names without a source
    unexpected: tuple[str, ...] = ()  #: source names without use
    causes: tuple[Cause, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mapping", "confidence", "alternatives"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


def suggest(
    source: Manifest,
    target: Manifest,
    *,
    name: str,
    hints: Sequence[tuple[str, str]] = (),
    values: Mapping[str, Any] | None = None,
) -> Suggestion:
    """The rule file ``name`` that makes ``source`` load into ``target``, as far as their names, shapes and order tell.

    >>> from ckptconv.spec import DType, TensorSpec
    >>> spec = TensorSpec((6, 4), DType.float32)
    >>> found = suggest(Manifest({"module.fc.weight": spec}), Manifest({"fc.weight": spec}), name="mine")
    >>> found.verdict, found.mapping["fc.weight"]
    ('convertible', (('module.fc.weight',), 'renamed'))
    """
    if len(source) and compare(source, target).fits:
        same = {each: ((each,), "as it is") for each in target if each in source}
        return Suggestion(LOADS, mapping=same, confidence=dict.fromkeys(same, "certain"))
    one, other = side_of(source, aliases=not target.ties), side_of(target, aliases=False)
    one, other, lone, theirs = without_lone_buffers(one, other)
    one, other = coarsened(gathered(one, other), other)
    found = outcome(matched(one, other), one, other)
    found.unused += lone
    found.missing += theirs
    verdict, reason, causes = judged(found, one, other)
    rule: Rule | None = None
    if verdict != NOT:
        try:
            rule = _proved(name, _summary(source, target, verdict), found, source, target)
        except Unwritten as why:
            verdict, reason = NOT, f"no rule file was found that fits: {why}"
            causes = [Cause("unwritten", reason), *causes]
    return _suggestion(verdict, reason, causes, rule, found, source, target)


def _summary(source: Manifest, target: Manifest, verdict: str) -> str:
    return f"suggested from names and shapes: {len(source):,} tensors to {len(target):,}"


def _proved(name: str, summary: str, found: Outcome, source: Manifest, target: Manifest) -> Rule:
    """The rule, parsed, planned and compared; spelled out name by name where patterns do not say what is meant."""
    reasons = []
    for plain in (False, True):
        try:
            rule = written(name, summary, found, source, target, plain=plain)
        except Unwritten as why:
            reasons.append(str(why))
            continue
        fault = _fault(rule.plan, found, rule, target)
        if not fault:
            return rule
        reasons.append(fault)
    raise Unwritten("; ".join(reasons))


def _fault(plan: Plan, found: Outcome, rule: Rule, target: Manifest) -> str:
    """Where the plan is not what was meant, or does not fit the target; empty text where all is well."""
    patterns: tuple[Pattern, ...] = rule.parsed.header.target.allow.missing or () if rule.parsed.header.target else ()
    problems = compare(plan.manifest, target, Allow(missing=lambda each: any(pattern.match(each) is not None for pattern in patterns))).problems()
    if problems:
        return problems[0].what
    made = {output.name: set(reads(output.expr)) for output in plan.outputs}
    aliases = plan.source.aliases
    for each in found.made:
        wanted = {aliases.get(one, one) for one in each.names}
        for one in each.target.names:
            if {aliases.get(other, other) for other in made.get(one, ())} != wanted:
                return f"{one} would be made of {sorted(made.get(one, ()))[:3]}, not of {sorted(wanted)[:3]}"
    return ""


def _suggestion(
    verdict: str, reason: str, causes: Sequence[Cause], rule: Rule | None, found: Outcome, source: Manifest, target: Manifest
) -> Suggestion:  # fmt: skip
    mapping: dict[str, tuple[tuple[str, ...], str]] = {}
    confidence: dict[str, str] = {}
    alternatives: dict[str, tuple[str, ...]] = {}
    for made in found.made:
        for each in made.target.names:
            mapping[each] = made.names, _how(made.source, made.target, made.change)
            confidence[each] = made.level
            if made.others:
                alternatives[each] = tuple(other.name for other in made.others)
    used = {each for sources, _ in mapping.values() for each in sources}
    return Suggestion(
        verdict, reason, rule.text if rule else "", mapping, confidence, alternatives,
        tuple(each for each in target if each not in mapping), tuple(each for each in source if each not in used), tuple(causes),
    )  # fmt: skip


def _how(one: Any, other: Any, change: str) -> str:
    words = [change] if change else []
    if one.joined:
        words.append(("stacked" if one.count else "") + (" and " if one.count and one.sizes else "") + ("joined" if one.sizes else ""))
    if other.joined:
        words.append("cut")
    if one.turned != other.turned:
        words.append("transposed")
    elif not one.joined and not other.joined and one.shape != other.shape and not change:
        words.append("reshaped")
    if not words:
        words = ["as it is" if one.names == other.names else "renamed"]
    return ", ".join(words)


__all__ = ["CONVERTIBLE", "LOADS", "LOSSY", "NOT", "Side", "Suggestion", "is_buffer", "suggest"]
