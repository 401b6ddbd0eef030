"""From two manifests to a suggestion: the steps in order, and the proof that what is suggested fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from msgspec import Struct, field
from msgspec.structs import force_setattr, replace

from ckptconv.compare import Allow, compare
from ckptconv.errors import CkptconvError
from ckptconv.plan import Plan, reads
from ckptconv.planner import make_plan
from ckptconv.spec import Manifest
from ckptconv.suggest.changes import Made, Outcome, outcome, tie_twins, without_lone_buffers
from ckptconv.suggest.findings import findings
from ckptconv.suggest.joining import coarsened
from ckptconv.suggest.matching import matched
from ckptconv.suggest.ranks import gathered
from ckptconv.suggest.telling import Fingerprints, Told
from ckptconv.suggest.thinning import Thinned, thinned
from ckptconv.suggest.units import side_of
from ckptconv.suggest.verdict import LOADS, NOT, Cause, judged
from ckptconv.suggest.writing import Rule, Unwritten, written


class Suggestion(Struct, frozen=True):
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
            force_setattr(self, name, MappingProxyType(dict(getattr(self, name))))


def suggest(
    source: Manifest,
    target: Manifest,
    *,
    name: str,
    hints: Sequence[tuple[str, str]] = (),
    values: Mapping[str, Fingerprints] | None = None,
) -> Suggestion:
    """The rule file ``name`` that makes ``source`` load into ``target``, as far as their names, shapes and order tell.

    ``hints``: fragments of source and target names that belong together. ``values``: under ``source`` and ``target`` something that gives
    fingerprints by name, equal for equal values in any order, for a target that is a checkpoint with the same weights. A rule is given only
    if it parses, can be planned on the source, does what was meant, and fits the target; of large manifests, on members of every list.

    >>> from ckptconv.spec import DType, TensorSpec
    >>> spec = TensorSpec((6, 4), DType.float32)
    >>> found = suggest(Manifest({"module.fc.weight": spec}), Manifest({"fc.weight": spec}), name="mine")
    >>> found.verdict, found.mapping["fc.weight"]
    ('convertible', (('module.fc.weight',), 'renamed'))
    """
    if len(source) and source.tensors.keys() <= target.tensors.keys() and compare(source, target).fits:
        same = {each: ((each,), "as it is") for each in target if each in source}
        return Suggestion(LOADS, mapping=same, confidence=dict.fromkeys(same, "certain"))
    told = Told(tuple(hints), *((values or {}).get(side) for side in ("source", "target")))
    task = _Task(name, f"suggested from names and shapes: {_tensors(source)} to {_tensors(target)}", told)
    thin = thinned(source, target)
    if thin is not None:
        found, rule = _found(task, thin.source, thin.target)
        if rule is None or _holds(rule, thin):
            return _carried(found, thin, source, target)
    return _found(task, source, target)[0]


def _tensors(manifest: Manifest) -> str:
    return f"{len(manifest):,} tensor{'' if len(manifest) == 1 else 's'}"


class _Task(Struct, frozen=True):
    name: str
    summary: str
    told: Told


def _found(task: _Task, source: Manifest, target: Manifest) -> tuple[Suggestion, Rule | None]:
    """The suggestion for these manifests as they are."""
    one, other = side_of(source, aliases=not target.ties), side_of(target, aliases=False)
    one, other, *lone = without_lone_buffers(one, other)
    stored = one, other
    one, other = coarsened(gathered(one, other), other)
    found = outcome(matched(one, other, None if task.told.silent else task.told), one, other)
    task.told.settle(found)
    tie_twins(found, source, target)
    found.unused += lone[0]
    found.missing += lone[1]
    verdict, reason, causes = judged(found, one, other, stored)
    rule: Rule | None = None
    if verdict != NOT:
        try:
            rule = _proved(task.name, task.summary, found, source, target)
        except Unwritten as why:
            verdict, reason = NOT, f"no rule file was found that fits: {why}"
            causes = [Cause("unwritten", reason), *causes]
    return _suggestion(verdict, reason, [*causes, *findings(found)], rule, found, source, target), rule


def _holds(rule: Rule, thin: Thinned) -> bool:
    """Whether the rule fits other members of the lists as well as those that it was made for."""
    source, target = thin.again
    try:
        return not compare(make_plan(rule.parsed, source).manifest, target, allowed(rule)).problems()
    except CkptconvError:
        return False


def _carried(found: Suggestion, thin: Thinned, source: Manifest, target: Manifest) -> Suggestion:
    """What was found for few members, said of all."""
    all_ = thin.carried({name: sources for name, (sources, _) in found.mapping.items()})
    used = {each for _, sources in all_.values() for each in sources}
    return replace(
        found, reason=thin.said(found.reason), text=thin.said_in_comments(found.text),
        mapping={name: (sources, found.mapping[like][1]) for name, (like, sources) in all_.items()},
        confidence={name: found.confidence[like] for name, (like, _) in all_.items()},
        alternatives={name: found.alternatives[like] for name, (like, _) in all_.items() if like in found.alternatives},
        missing=tuple(name for name in target if name not in all_), unexpected=tuple(name for name in source if name not in used),
        causes=tuple(Cause(each.kind, thin.said(each.sentence), tuple(map(thin.said, each.templates))) for each in found.causes),
    )  # fmt: skip


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


def allowed(rule: Rule) -> Allow:
    """The differences that the rule itself allows."""
    header = rule.parsed.header.target
    patterns = header.allow.missing or () if header else ()
    return Allow(missing=lambda each: any(pattern.match(each) is not None for pattern in patterns))


def _fault(plan: Plan, found: Outcome, rule: Rule, target: Manifest) -> str:
    """Where the plan is not what was meant, or does not fit the target; empty text where all is well."""
    problems = compare(plan.manifest, target, allowed(rule)).problems()
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
            mapping[each] = made.names, _how(made)
            confidence[each] = made.level
            if made.others:
                alternatives[each] = tuple(other.name for other in made.others)
    for first, others in found.tied.items():
        for each in others:
            mapping.setdefault(each, (mapping[first][0], "tied"))
            confidence.setdefault(each, confidence[first])
    used = {each for sources, _ in mapping.values() for each in sources}
    return Suggestion(
        verdict, reason, rule.text if rule else "", mapping, confidence, alternatives,
        tuple(each for each in target if each not in mapping), tuple(each for each in source if each not in used), tuple(causes),
    )  # fmt: skip


def _how(made: Made) -> str:
    """How it is made, in few words."""
    one, other = made.source, made.target
    done = [_CHANGES[made.change]] if made.change else []
    done += ["stacked"] * bool(one.count) + ["joined"] * bool(one.sizes) + ["the same on all ranks"] * one.same
    done += ["transposed"] * (one.turned != other.turned)
    done += ["cut"] * bool(other.sizes) + ["unstacked"] * bool(other.count) + ["its position added"] * bool(made.added)
    if not done:
        done = ["reshaped" if one.shape != other.shape else "as it is" if one.names == other.names else "renamed"]
    return ", ".join(done)


_CHANGES = {
    "rows": "other rows", "positions": "resized", "line": "resized", "prefix": "first positions cut off", "channels": "other channels", "tie": "tied",
}  # fmt: skip
