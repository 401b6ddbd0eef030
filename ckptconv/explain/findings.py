"""The whole explanation as data: a file's facts, a target and rules in; causes, tried rules, a verdict and commands out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field

from ckptconv.explain import judging
from ckptconv.explain.causes import of_file, of_sides
from ckptconv.explain.commands import commands, of_other_copy, run_of, with_words
from ckptconv.explain.judging import ENOUGH, Verdict, judge
from ckptconv.explain.sides import Cause, FileFacts, Part, Sides, sides
from ckptconv.explain.trying import PLAIN, Question, Tried, try_rules
from ckptconv.ruleset.model import RuleFile
from ckptconv.spec import Manifest


class Suggested(Protocol):
    """What is asked of a suggestion; :class:`ckptconv.suggest.Suggestion` has it, on a floor above."""

    @property
    def text(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def mapping(self) -> Mapping[str, tuple[tuple[str, ...], str]]: ...
    @property
    def confidence(self) -> Mapping[str, str]: ...
    @property
    def unexpected(self) -> tuple[str, ...]: ...
    @property
    def alternatives(self) -> Mapping[str, tuple[str, ...]]: ...


#: (source, target) -> a suggestion; asked only where no rule that is there does it.
Ask = Callable[[Manifest, Manifest], Suggested]
#: A rule is meant for a checkpoint of which it makes at least this much; without a target nothing else tells.
MEANT = 0.3
#: Causes of which a rule that does better shows that they only seemed so, and what every rule leaves to say.
_SEEMED = frozenset({"blocks", "depth", "family", "width", "parallel", "unexpected", "missing", "size"})


class Findings(Struct, frozen=True):
    """What was found out about one file and one target."""

    file: FileFacts | None
    part: Part | None = None  #: the state_dict that was looked at
    raw: Sides | None = None  #: as it is
    causes: tuple[Cause, ...] = ()
    tried: tuple[Tried, ...] = ()
    verdict: Verdict = field(default_factory=lambda: Verdict(judging.UNKNOWN, ""))
    commands: tuple[str, ...] = ()
    suggestion: Suggested | None = None
    left_out: tuple[str, ...] = ()  #: tensors of the file that a verdict's rule does not use
    meant: tuple[Tried, ...] = ()  #: without a target: the rules that are meant for this file


def explained(
    file: FileFacts | None, question: Question, rules: Iterable[RuleFile], *, source: str, target: str, ask: Ask | None = None
) -> Findings:
    """The explanation. ``source`` and ``target`` are what the user calls them, for the commands; ``question.wanted`` may be None."""
    if not question.parts:
        causes = of_file(file, None, question.wanted) if file is not None else []
        dead = next((cause for cause in causes if cause.fatal), None)
        verdict = (
            Verdict(judging.NOT, f"because {dead.sentence}")
            if dead
            else Verdict(judging.UNREADABLE if file is not None else judging.MESSAGE, "")
        )
        return Findings(file, causes=tuple(causes), verdict=verdict)
    tried = try_rules(rules, question)
    if question.wanted is None:
        return _without_target(file, question, tried, source)
    best = _best(tried)
    raws = [(part, sides(part.manifest, question.wanted, question.unknown)) for part in question.parts]
    part, raw = _looked_at(raws, best)
    best = _best([each for each in tried if each.part.path == part.path])
    if best is not None and not best.fits and best.coverage <= max(raw.comparison.coverage, ENOUGH):
        best = None
    waiting = next((each for each in tried if each.waits and each.part.path == part.path), None)
    packed = of_file(file, part, question.wanted) if file is not None else []
    alone = any(cause.fatal for cause in packed)
    causes = [*packed, *(() if alone else of_sides(raw, packed, without=_SEEMED if best is not None else frozenset()))]
    after: list[Cause] = of_sides(best.both) if best is not None and best.both is not None and not best.fits else []
    if best is not None:
        causes = _merged(causes, after)
    suggestion: Suggested | None = None
    if ask is not None and not (raw.comparison.fits or (best is not None and best.fits) or question.unknown or alone):
        suggestion = ask(part.manifest, question.wanted)
    verdict = judge(
        raw, packed, best, causes if best is None else after, (suggestion.verdict, suggestion.reason) if suggestion else None, waiting
    )
    causes = sorted(causes, key=lambda cause: cause.kind in judging.NOTES)
    typed = (*commands(verdict, part, question, source, target), *of_other_copy(tried, part, source, target, question.paths))
    return Findings(
        file, part, raw, tuple(with_words(causes, source)), tuple(tried), verdict, typed, suggestion, _left_out(verdict, suggestion)
    )


def _left_out(verdict: Verdict, suggestion: Suggested | None) -> tuple[str, ...]:
    if verdict.rule is not None and verdict.rule.plan is not None and len(verdict.rule.rules) == 1:
        return tuple(drop.name for drop in verdict.rule.plan.dropped)
    return suggestion.unexpected if verdict.suggested and suggestion is not None else ()


def _best(tried: Sequence[Tried]) -> Tried | None:
    return next((each for each in tried if each.plan is not None), None)


def _looked_at(raws: Sequence[tuple[Part, Sides]], best: Tried | None) -> tuple[Part, Sides]:
    """The state_dict to explain: the one that fits as it is, else that of the best rule, else the one that covers most; the first where equal."""
    fitting = next((each for each in raws if each[1].comparison.fits), None)
    if fitting is not None:
        return fitting
    if best is not None and best.coverage >= ENOUGH:
        return next(each for each in raws if each[0] is best.part or each[0].path == best.part.path)
    return max(raws, key=lambda each: (each[1].comparison.coverage, -raws.index(each)))


def _merged(causes: Sequence[Cause], more: Sequence[Cause]) -> list[Cause]:
    """Causes of the file as it is, and those of what a rule leaves of them, which know more."""
    kinds = {cause.kind for cause in more}
    return [*(cause for cause in causes if cause.kind not in kinds), *more]


def _without_target(file: FileFacts | None, question: Question, tried: Sequence[Tried], source: str) -> Findings:
    """What the file is, and which rules are meant for it."""
    part = question.parts[0]
    causes = of_file(file, part, None) if file is not None else []
    made = [each for each in tried if each.plan is not None and each.touched >= MEANT and each.names != (PLAIN,)]
    # A rule that says by `when` or `select` what it is for is a better answer than one that strips anything.
    meant = sorted(made, key=lambda each: (each.rules[0].header.when is None, -each.touched, len(each.rules[0].steps)))
    typed = tuple(dict.fromkeys(run_of(each, source, "", question.paths) for each in meant[:3] if each.part is part))
    if not typed and any(cause.kind in judging.PACKED for cause in causes):
        plain = next((each for each in tried if each.names == (PLAIN,) and each.plan is not None and each.part is part), None)
        typed = (run_of(plain, source, "", question.paths),) if plain is not None else ()
    dead = next((cause for cause in causes if cause.fatal), None)
    verdict = (
        Verdict(judging.NOT, f"because {dead.sentence}")
        if dead
        else Verdict(judging.UNKNOWN, "name what it should load into with --target")
    )
    return Findings(file, part, None, tuple(with_words(causes, source)), tuple(tried), verdict, typed, meant=tuple(meant))
