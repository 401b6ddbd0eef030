"""What one page shows, whatever command it is of: the verdict, how it was proved, what is to be said, and the lineage.

A view with something of its own to say adds a function that makes a :class:`Page`; the page itself knows no command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv.errors import FINDINGS, FIT, INPUT, OUTPUT, USAGE, CkptconvError, Problem
from ckptconv.report.links import KINDS, Lineage, lineage_of, lineage_of_difference
from ckptconv.report.model import Difference, RunReport
from ckptconv.report.text import nbytes_text
from ckptconv.spec import Manifest
from ckptconv.verify import LEVELS

_REFUSED: Mapping[int, str] = {
    FINDINGS: "Findings", USAGE: "The rules or the command's words are wrong", INPUT: "The source is refused", FIT: "It does not fit",
    OUTPUT: "It could not be written",
}  # fmt: skip


class Verdict(Struct, frozen=True):
    """The one thing that is read first."""

    state: str  #: good, bad or open
    headline: str
    sentence: str = ""


class Block(Struct, frozen=True):
    """What is said beside: notes, what was left behind, rules that were tried, commands to copy."""

    title: str
    rows: tuple[tuple[str, ...], ...]  #: cells of each row; most blocks have one column
    code: bool = False  #: commands, or a rule file: to be copied

    @property
    def long(self) -> bool:
        """Several lines in one cell: a whole file, not to be in the way of what is read first."""
        return any("\n" in cell for row in self.rows for cell in row)

    @staticmethod
    def of(title: str, lines: Iterable[str], *, code: bool = False) -> tuple[Block, ...]:
        """One block of one column, or none where there is nothing to say."""
        rows = tuple((line,) for line in lines)
        return (Block(title, rows, code),) if rows else ()


class Page(Struct, frozen=True):
    """Plain data; everything in it may be of a stranger's making."""

    command: str
    verdict: Verdict
    facts: tuple[tuple[str, str], ...] = ()  #: label, value
    rungs: tuple[Mapping[str, Any], ...] = ()  #: as Rung.to_json gives them
    problems: tuple[Problem, ...] = ()
    blocks: tuple[Block, ...] = ()
    left: str = ""  #: what the left side is
    right: str = ""
    lineage: Lineage | None = None
    rule_texts: Mapping[str, str] = field(default_factory=dict)  #: file -> its text, to show the lines that made something


def page_of_run(report: RunReport) -> Page:
    """The page of ``run``, ``plan`` and ``verify``."""
    climbed = [rung.to_json() for rung in report.ladder.rungs]
    return _page(report, _verdict(report), whole_ladder(climbed), tuple(report.ladder.problems))


def page_of_difference(report: Difference) -> Page:
    """The page of ``diff``."""
    counts = (len(report.only_left), "only on the left"), (len(report.only_right), "only on the right"), (len(report.changed), "different")
    differs = ", ".join(f"{count:,} {what}" for count, what in counts if count)
    same = "The same names, shapes, dtypes and ties"
    verdict = Verdict("good", same) if report.equal else Verdict("open", "They differ", differs or "in their ties only")
    facts = (("left", _size(report.a)), ("right", _size(report.b)))
    return Page(
        "diff",
        verdict,
        facts,
        blocks=Block.of("ties", report.ties),
        left=report.left,
        right=report.right,
        lineage=lineage_of_difference(report),
    )


def page_of_failure(command: str, error: CkptconvError) -> Page:
    """The page of a command that ended in problems: with both sides, where the error says in a report how far it came."""
    headline = "Not verified" if error.verification is not None else _REFUSED.get(error.exit_code, "It failed")
    rungs = whole_ladder(error.verification["rungs"]) if error.verification is not None else ()
    report = error.about
    if not isinstance(report, RunReport):
        return Page(command, Verdict("bad", headline), rungs=rungs, problems=error.problems)
    if report.comparison is not None and not report.comparison.fits:
        headline = f"It does not fit {report.target}"
    return _page(report, Verdict("bad", headline, "Nothing was written."), rungs, error.problems)


def _page(report: RunReport, verdict: Verdict, rungs: tuple[Mapping[str, Any], ...], problems: tuple[Problem, ...]) -> Page:
    lineage = lineage_of(report.plan, report.comparison) if report.plan is not None else None
    sentences = [verdict.sentence, _summary(lineage) if lineage is not None else "", report.allowed]
    verdict = replace(verdict, sentence="\n".join(filter(None, sentences)))
    skipped = [f"{path} ({kind})" for path, kind in report.skipped.items()]
    return Page(
        report.command,
        verdict,
        tuple(_facts(report)),
        rungs,
        problems,
        Block.of("notes", report.notes) + Block.of("left behind", skipped),
        *_sides(report),
        lineage,
        report.rule_texts,
    )


def _summary(lineage: Lineage) -> str:
    """What became of how many tensors, in one sentence."""
    counts = Counter(link.kind for link in lineage.links)
    said = ", ".join(
        f"{counts[kind]:,} {KINDS[kind].word}" for kind in sorted(counts, key=lambda kind: (KINDS[kind].tone != "bad", -counts[kind]))
    )
    return f"{len(lineage.left):,} tensors on the left, {len(lineage.right):,} on the right: {said}."


def _verdict(report: RunReport) -> Verdict:
    reached, fits = report.ladder.reached, f"fits {report.target}" if report.comparison is not None and report.comparison.fits else ""
    if report.ladder.failed is not None:
        return Verdict("bad", "Not verified", report.ladder.failed.sentence)
    if report.command == "plan":
        return Verdict("good" if fits else "open", f"It {fits}" if fits else "This is the plan", "Nothing was written.")
    what = "Converted" if report.command == "run" else ""
    if reached == "none":
        return Verdict("open", f"{what}, not verified" if what else "Nothing was verified")
    verified = f"{what} and verified" if what else "Verified"
    return Verdict("good", f"{verified}{f': it {fits}' if fits else ''}")


def whole_ladder(climbed: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Every rung that there is, those that nobody tried too; none where there was no climb."""
    if not climbed:
        return ()
    known = {rung["level"] for rung in climbed}
    above = [
        {"level": level, "name": name, "status": "", "sentence": "not tried", "problems": [], "notes": []}
        for level, name in LEVELS.items()
        if level not in known
    ]
    return tuple(sorted([*climbed, *above], key=lambda rung: int(rung["level"])))


def _facts(report: RunReport) -> list[tuple[str, str]]:
    source, destination, cost = report.source, report.destination, report.cost
    found = [("rules", str(report.rules["rules"]))] if report.rules else []
    if source:
        container = "" if source["container"] == "." else f", {source['container']}"
        found.append(("from", f"{source['path']} ({source['format']}{container})"))
        found.append(("", f"{source['tensors']:,} tensors, {source['parameters']:,} parameters, {nbytes_text(source['nbytes'])}"))
    label = "to" if source else "checkpoint"
    if destination.get("path"):
        found.append((label, str(destination["path"])))
        label = ""
    if "nbytes" in destination:
        files = len(destination.get("files", ()))
        found.append(
            (label, f"{destination['tensors']:,} tensors, {nbytes_text(destination['nbytes'])}{f', {files} files' if files > 1 else ''}")
        )
    if report.target:
        found.append(("target", report.target))
    if report.comparison is not None:
        found.append(("coverage", f"{report.comparison.coverage:.1%} of the target's parameters are filled"))
    if cost:
        peak = f", peak memory about {nbytes_text(cost['peak_nbytes'])}" if "peak_nbytes" in cost else ""
        found.append(("cost", f"{nbytes_text(cost['copied_nbytes'])} copied, {nbytes_text(cost['computed_nbytes'])} computed{peak}"))
    return [*found, ("time", f"{report.seconds:.1f} s")] if report.seconds else found


def _sides(report: RunReport) -> tuple[str, str]:
    if not report.rules:
        return str(report.destination["path"]), report.target
    return str(report.source["path"]), report.target or str(report.destination.get("path") or "result")


def _size(side: Manifest) -> str:
    return f"{len(side):,} tensors, {side.numel:,} parameters, {nbytes_text(side.nbytes)}"
