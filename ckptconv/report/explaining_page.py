"""Explanations and suggestions as pages: the verdict and why, what to type, and both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptconv.explain.judging import CONVERTIBLE, LOADS, NOT, UNREADABLE
from ckptconv.explain.sides import Cause
from ckptconv.names import collapse
from ckptconv.report.explaining import Drawn, Explanation, SuggestReport
from ckptconv.report.links import Lineage, in_doubt, lineage_of
from ckptconv.report.page import Block, Page, Verdict, whole_ladder
from ckptconv.report.text import nbytes_text

_STATES: Mapping[str, str] = {LOADS: "good", CONVERTIBLE: "good", NOT: "bad", UNREADABLE: "bad"}


def page_of_explanation(report: Explanation) -> Page:
    """The page of ``explain``: what was tried that fits best on both sides, or the file as it is."""
    lineage = _lineage(report.drawn)
    differences = () if lineage is not None else _block("differences", [
        (each.kind, f"{each.template}{f' ×{each.tensors:,}' if each.tensors > 1 else ''}", " against ".join(filter(None, (each.found, each.wanted))))
        for each in report.differences
    ])  # fmt: skip
    return Page(
        "explain", Verdict(_STATES.get(report.verdict, "open"), _capital(report.verdict), report.sentence), tuple(_facts(report)),
        problems=report.problems,
        blocks=_causes(report.causes) + Block.of("what to type", report.commands, code=True)
        + _block("rules tried", [(", then ".join(each.rules), each.outcome, _share(each.coverage), each.reason) for each in report.tried])
        + differences + Block.of("beside the weights", report.beside) + Block.of("notes", report.notes),
        left=str(report.source.get("path", "the checkpoint")), right=str(report.target.get("text") or "the model"), lineage=lineage,
        rule_texts=report.drawn.rule_texts if report.drawn is not None else {},
    )  # fmt: skip


def page_of_suggestion(report: SuggestReport) -> Page:
    """The page of ``suggest``: the mapping that its rule makes, what is ambiguous marked as such."""
    lineage = _lineage(report.drawn)
    unsure = [row for row in report.mapping if row.confidence != "certain"]
    facts = [
        ("source", _side(report.source, "path")), ("target", _side(report.target, "text")),
        ("sure", ", ".join(f"{level} {share:.1%}" for level, share in report.sure.items())), ("rule", report.rule),
        ("written", str(report.applied.get("path", ""))),
    ]  # fmt: skip
    return Page(
        "suggest", Verdict(_STATES.get(report.verdict, "open"), _capital(report.verdict), report.sentence),
        tuple(fact for fact in facts if fact[1]), whole_ladder([rung.to_json() for rung in report.ladder.rungs]), report.problems,
        _causes(report.causes) + Block.of("what to type", report.commands, code=True) + Block.of("settled", report.settled)
        + _block("not certain", [
            (row.confidence, f"{', '.join(row.sources)} → {row.target}", f"or {', '.join(row.alternatives)}" if row.alternatives else "")
            for row in unsure
        ])
        + Block.of("no source", map(str, collapse(report.missing))) + Block.of("left out", map(str, collapse(report.unexpected)))
        + Block.of("the rule file", [report.text] if report.text else [], code=True),
        left=str(report.source["path"]), right=str(report.target["text"]), lineage=lineage, rule_texts=report.drawn.rule_texts if report.drawn is not None else {},
    )  # fmt: skip


def _lineage(drawn: Drawn | None) -> Lineage | None:
    return None if drawn is None else in_doubt(lineage_of(drawn.plan, drawn.comparison), drawn.doubts)


def _facts(report: Explanation) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if report.source:
        found.append(("file", f"{report.source['path']} ({report.source['format']}, {nbytes_text(report.source['nbytes'])})"))
    for each in report.state_dicts:
        place = "" if each.path == "." else f"{each.path}: "
        looked_at = ", looked at" if each.looked_at and len(report.state_dicts) > 1 else ""
        kind = f": {each.kind}" if each.kind else ""
        found.append(("", f"{place}{each.tensors:,} tensors, {each.parameters:,} parameters{kind}{looked_at}"))
    if report.target:
        found.append(("target", _side(report.target, "text") + (f": {report.target['kind']}" if report.target["kind"] else "")))
    if report.as_it_is:
        found.append(("as it is", ", ".join(filter(None, (_share(report.coverage), report.as_it_is)))))
    if report.drawn is not None:
        found.append(("drawn", f"what {report.drawn.by} makes of it" if report.drawn.by else "the file as it is"))
    return found


def _causes(causes: tuple[Cause, ...]) -> tuple[Block, ...]:
    return _block("why", [(cause.kind, cause.sentence, cause.try_) for cause in causes])


def _block(title: str, rows: list[tuple[str, ...]]) -> tuple[Block, ...]:
    return (Block(title, tuple(rows)),) if rows else ()


def _side(side: Mapping[str, Any], name: str) -> str:
    parameters = f", {side['parameters']:,} parameters" if side["parameters"] is not None else ""
    return f"{side[name] or 'the model of the message'}, {side['tensors']:,} tensors{parameters}"


def _share(coverage: float | None) -> str:
    return "" if coverage is None else f"{coverage:.1%} of the model's parameters"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
