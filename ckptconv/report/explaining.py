"""What ``explain`` and ``suggest`` say, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from msgspec import Struct, field

from ckptconv._version import __version__
from ckptconv.compare import Allow, Comparison, allowed_by, compare
from ckptconv.errors import CkptconvError, Problem, printable
from ckptconv.explain.findings import Findings, Suggested
from ckptconv.explain.judging import CONVERTIBLE, LOADS, LOSS, MESSAGE, NOT, UNREADABLE, Verdict
from ckptconv.explain.sides import Cause, Part, Sides, count_of
from ckptconv.explain.trying import Tried
from ckptconv.explain.variants import kind_of
from ckptconv.names import collapse
from ckptconv.plan import Plan, as_it_is
from ckptconv.planner import make_plan
from ckptconv.ruleset.model import RuleFile, parse
from ckptconv.spec import Manifest
from ckptconv.verify import Ladder

#: Rules that were tried and did something; more are counted.
MAX_TRIED = 8
_DIGITS = re.compile(r"\d+")


class StateDict(Struct, frozen=True):
    """One state_dict of a file."""

    path: str
    tensors: int
    parameters: int
    kind: str = ""  #: what it looks like: a ViT (12 blocks)
    looked_at: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "tensors": self.tensors, "parameters": self.parameters, "kind": self.kind, "looked_at": self.looked_at}


class Difference(Struct, frozen=True):
    """Names that differ in one way, as a template."""

    kind: str  #: missing, unexpected, size
    template: str
    tensors: int
    found: str = ""
    wanted: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "template": self.template, "tensors": self.tensors, "found": self.found, "wanted": self.wanted}


class Attempt(Struct, frozen=True):
    """A rule that was tried."""

    rules: tuple[str, ...]
    outcome: str  #: fits, fits with loss, does not fit, makes something of it, is not for it
    coverage: float | None = None  #: of the target's parameters
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"rules": list(self.rules), "outcome": self.outcome, "coverage": self.coverage, "reason": self.reason}


class Row(Struct, frozen=True):
    """One line of a suggested mapping: template to template, and how sure."""

    target: str
    sources: tuple[str, ...]
    how: str
    confidence: str  #: certain, likely, ambiguous
    tensors: int
    alternatives: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target, "sources": list(self.sources), "how": self.how, "confidence": self.confidence, "tensors": self.tensors,
            "alternatives": list(self.alternatives),
        }  # fmt: skip


class Drawn(Struct, frozen=True):
    """Both sides and what is between them, for views that show it."""

    by: str  #: the rule; empty: as the file is
    plan: Plan
    comparison: Comparison
    rule_texts: Mapping[str, str] = field(default_factory=dict)  #: file -> text, for the lines that origins name
    doubts: Mapping[str, str] = field(default_factory=dict)  #: ambiguous name of the target -> what else it may be


#: Asked for a picture only: planning and comparing a large checkpoint once more is not for nothing.
Draw = Callable[[], Drawn | None]


def drawn(rule: RuleFile, here: Manifest, wanted: Manifest, suggestion: Suggested | None = None) -> Drawn | None:
    """What ``rule`` makes of ``here`` against ``wanted``; None where it cannot be planned."""
    try:
        plan = make_plan(rule, here)
    except CkptconvError:
        return None
    allow = allowed_by(rule.header.target.allow) if rule.header.target is not None else Allow()
    return Drawn(
        rule.header.name, plan, compare(plan.manifest, wanted, allow), rule.texts, _doubts(suggestion) if suggestion is not None else {}
    )


def _doubts(suggestion: Suggested) -> dict[str, str]:
    return {
        name: f"may also come from {', '.join(map(printable, suggestion.alternatives.get(name, ())[:8]))}".removesuffix(" from ")
        for name, level in suggestion.confidence.items()
        if level == "ambiguous"
    }


class Explanation(Struct, frozen=True, dict=True):
    """What ``explain`` says."""

    source: Mapping[str, Any] = field(default_factory=dict)  #: path, format, files, nbytes; empty where only an error was pasted
    state_dicts: tuple[StateDict, ...] = ()
    beside: tuple[str, ...] = ()  #: what else the file holds
    target: Mapping[str, Any] = field(default_factory=dict)  #: what the user named, tensors, parameters, kind
    coverage: float | None = None  #: of the target's parameters that load as the file is
    as_it_is: str = ""  #: what strict=True and strict=False would do
    verdict: str = ""
    sentence: str = ""
    causes: tuple[Cause, ...] = ()
    differences: tuple[Difference, ...] = ()
    tried: tuple[Attempt, ...] = ()
    mapping: tuple[Row, ...] = ()  #: of the suggestion, where there is one
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()  #: why the source cannot be read
    draw: Draw = lambda: None  #: by the rule that does it, or as it is

    @cached_property
    def drawn(self) -> Drawn | None:
        """Both sides, where names and shapes of both are known; worked out for who looks."""
        return self.draw()

    @property
    def exit_code(self) -> int:
        """0: nothing is to be done. 1: something is. 3: the source cannot be read."""
        return 3 if self.verdict == UNREADABLE else 1 if self.verdict in (CONVERTIBLE, LOSS, NOT, MESSAGE) else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "ckptconv_explanation": 1, "ckptconv": __version__, "source": dict(self.source),
            "state_dicts": [each.to_json() for each in self.state_dicts], "beside": list(self.beside), "target": dict(self.target),
            "coverage": self.coverage, "as_it_is": self.as_it_is, "verdict": self.verdict, "sentence": self.sentence,
            "causes": [cause.to_json() for cause in self.causes], "differences": [each.to_json() for each in self.differences],
            "tried": [each.to_json() for each in self.tried], "mapping": [row.to_json() for row in self.mapping], "commands": list(self.commands), "notes": list(self.notes),
            "problems": [problem.to_json() for problem in self.problems],
        }  # fmt: skip


def explanation(findings: Findings, *, target: str = "", notes: tuple[str, ...] = (), problems: tuple[Problem, ...] = ()) -> Explanation:
    """The report of what was found; ``target`` is what the user called it."""
    file, raw = findings.file, findings.raw
    wanted: dict[str, Any] = {}
    if raw is not None:
        kind = kind_of(raw.wanted)
        wanted = {
            "text": target,
            "tensors": len(raw.wanted),
            "parameters": None if raw.unknown else raw.wanted.numel,
            "kind": str(kind or ""),
        }
    verdict = Verdict(UNREADABLE, problems[0].what) if problems else findings.verdict
    if findings.left_out:
        templates = collapse(findings.left_out)
        more = f" and {len(templates) - 4} more templates" if len(templates) > 4 else ""
        notes = (
            *notes,
            f"the rule leaves out {count_of(len(findings.left_out), 'tensor')} of the file: {', '.join(map(str, templates[:4]))}{more}",
        )
    return Explanation(
        {"path": file.path, "format": file.format, "files": file.files, "nbytes": file.nbytes} if file is not None else {},
        tuple(_state_dict(part, findings.part) for part in file.parts) if file is not None else (),
        file.beside if file is not None else (), wanted, raw.comparison.coverage if raw is not None and not raw.unknown else None,
        _as_it_is(raw, findings) if raw is not None else "", verdict.word, verdict.sentence, findings.causes,
        _differences(raw) if raw is not None else (), _attempts(findings), rows(findings.suggestion) if findings.suggestion is not None else (), findings.commands, notes, problems,
        lambda: _drawn(findings),
    )  # fmt: skip


def _drawn(findings: Findings) -> Drawn | None:
    """Both sides by the suggestion, by the one rule that fills most, or as they are; None where only names are known."""
    raw, suggestion = findings.raw, findings.suggestion
    if raw is None or raw.unknown:
        return None
    by_suggestion = None
    if suggestion is not None and suggestion.text:
        by_suggestion = drawn(parse(suggestion.text.encode(), "suggested.yaml"), raw.found, raw.wanted, suggestion)
    alone = [each for each in findings.tried if len(each.rules) == 1 and each.coverage > raw.comparison.coverage]
    best = max(alone, key=lambda each: (each.fits, each.coverage), default=None)
    if by_suggestion is not None or best is None or best.plan is None or best.both is None:
        return by_suggestion or Drawn("", as_it_is(raw.found), raw.comparison)
    return Drawn(best.names[0], best.plan, best.both.comparison, best.rules[0].texts)


def _state_dict(part: Part, looked_at: Part | None) -> StateDict:
    kind = kind_of(part.manifest)
    return StateDict(part.path, len(part.manifest), part.manifest.numel, str(kind or ""), part is looked_at)


def _as_it_is(raw: Sides, findings: Findings) -> str:
    """What load_state_dict would say, and what it would not say."""
    if raw.comparison.fits and raw.comparison.tied:
        return f"strict=True raises: {len(raw.comparison.tied):,} missing, all of them aliases"
    if raw.comparison.fits:
        return "strict=True loads it" if findings.verdict.word == LOADS else "once its weights are taken out of the file"
    counts = [
        f"{len(names):,} {what}"
        for names, what in ((raw.missing, "missing"), (raw.unexpected, "unexpected"), (raw.sizes, "of another size"))
        if names
    ]
    strict = f"strict=True raises: {', '.join(counts)}" if counts else "strict=True rounds dtypes silently"
    if raw.sizes:
        return f"{strict}; strict=False raises too, because of the sizes"
    if not raw.missing:
        return f"{strict}; strict=False would drop what is unexpected, silently"
    lost = "" if raw.unknown else f" {1 - raw.comparison.coverage:.1%} of the parameters"
    return f"{strict}; strict=False would say nothing and leave{lost or ' what is missing'} random"


def _differences(raw: Sides) -> tuple[Difference, ...]:
    """Every difference as a template."""
    rows = [
        Difference("missing", each.text, len(each.names), wanted=_spec(raw, each.names[0], wanted=True)) for each in collapse(raw.missing)
    ]
    rows += [
        Difference("unexpected", each.text, len(each.names), found=_spec(raw, each.names[0], wanted=False))
        for each in collapse(raw.unexpected)
    ]
    groups: dict[tuple[str, str], list[str]] = {}
    for name, found, wanted in raw.comparison.shapes:
        groups.setdefault((str(list(found.shape)), str(list(wanted.shape))), []).append(name)
    rows += [
        Difference("size", each.text, len(each.names), found, wanted)
        for (found, wanted), names in groups.items()
        for each in collapse(names)
    ]
    return tuple(rows)


def _spec(raw: Sides, name: str, *, wanted: bool) -> str:
    manifest = raw.wanted if wanted else raw.found
    return "" if name in raw.unknown else str(manifest[name])


def _attempts(findings: Findings) -> tuple[Attempt, ...]:
    """The rules that made something of the file, the best first."""
    if findings.raw is None:
        return tuple(
            Attempt(each.names, "makes something of it", reason=f"{each.touched:.0%} of the tensors") for each in findings.meant[:MAX_TRIED]
        )
    rows = []
    for each in [tried for tried in findings.tried if tried.plan is not None][:MAX_TRIED]:
        rows.append(Attempt(each.names, _outcome(each), each.coverage))
    return tuple(rows)


def _outcome(tried: Tried) -> str:
    return "fits" if tried.complete else "fits with loss" if tried.fits else "does not fit"


def rows(suggestion: Suggested) -> tuple[Row, ...]:
    """A mapping as templates: what goes the same way, with the same confidence, is one line."""
    groups: dict[tuple[str, str, str, tuple[str, ...]], list[str]] = {}
    for name, (sources, how) in suggestion.mapping.items():
        kind = how, suggestion.confidence.get(name, ""), _DIGITS.sub("#", name), tuple(_DIGITS.sub("#", source) for source in sources[:4])
        groups.setdefault(kind, []).append(name)
    found = []
    for (how, level, _, _), names in groups.items():
        made_of = dict.fromkeys(source for name in names for source in suggestion.mapping[name][0])
        others = dict.fromkeys(other for name in names for other in suggestion.alternatives.get(name, ()))
        found.append(Row(", ".join(_templates(names)), _templates(list(made_of)), how, level, len(names), _templates(list(others))))
    return tuple(found)


def sureness(suggestion: Suggested, wanted: Manifest) -> dict[str, float]:
    """Level of confidence -> share of the target's parameters, the surest first."""
    elements: dict[str, int] = {}
    for name, spec in wanted.stored.items():
        level = suggestion.confidence.get(name, "")
        if level:
            elements[level] = elements.get(level, 0) + spec.numel
    return {level: elements[level] / max(wanted.numel, 1) for level in ("certain", "likely", "ambiguous") if level in elements}


def _templates(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(each.text for each in collapse(names))


class SuggestReport(Struct, frozen=True, dict=True):
    """What ``suggest`` says."""

    source: Mapping[str, Any]
    target: Mapping[str, Any]
    verdict: str
    sentence: str
    text: str = ""  #: the rule file
    rule: str = ""  #: where it was written; empty: nowhere
    sure: Mapping[str, float] = field(default_factory=dict)  #: level -> share of the target's parameters
    mapping: tuple[Row, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()
    settled: tuple[str, ...] = ()  #: what values or parity decided, in sentences
    ladder: Ladder = field(default_factory=Ladder)
    applied: Mapping[str, Any] = field(default_factory=dict)  #: what was written: path, tensors, nbytes
    commands: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()  #: why the rule does not plan, fit or verify
    draw: Draw = lambda: None

    @cached_property
    def drawn(self) -> Drawn | None:
        """Both sides, as for an explanation."""
        return self.draw()

    @property
    def ambiguous(self) -> tuple[Row, ...]:
        return tuple(row for row in self.mapping if row.confidence == "ambiguous")

    @property
    def exit_code(self) -> int:
        """0: a rule that fits and is unambiguous. 1: findings. 4: there is none, or it does not fit."""
        if self.verdict == NOT or self.problems:
            return 4
        return 1 if (self.ambiguous and not self.settled) or self.verdict == LOSS else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "ckptconv_suggestion": 1, "ckptconv": __version__, "source": dict(self.source), "target": dict(self.target), "verdict": self.verdict,
            "sentence": self.sentence, "text": self.text, "rule": self.rule, "sure": dict(self.sure), "mapping": [row.to_json() for row in self.mapping],
            "missing": list(self.missing), "unexpected": list(self.unexpected), "causes": [cause.to_json() for cause in self.causes],
            "settled": list(self.settled), "verification": self.ladder.to_json(), "applied": dict(self.applied),
            "commands": list(self.commands), "problems": [problem.to_json() for problem in self.problems],
        }  # fmt: skip
