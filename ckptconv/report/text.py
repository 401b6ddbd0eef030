"""Reports as text for people: one screen, names as templates, readable without colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from msgspec.structs import replace
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ckptconv._version import __version__
from ckptconv.errors import Problem, printable
from ckptconv.names import Template, collapse
from ckptconv.report.changes import FEW, Change
from ckptconv.report.model import Candidate, Difference, Inspection, RunReport
from ckptconv.verify import Ladder

MAX_ROWS = 40
PADDED = 80  #: names that are longer stand out of their column, rather than widen it for all
_MARKS: Mapping[str, tuple[str, str]] = {"passed": ("ok", "green"), "failed": ("FAILED", "bold red"), "skipped": ("–", "dim")}
_SHOWN_LAST = ("unchanged", "dropped")


def nbytes_text(nbytes: float) -> str:
    """Bytes as people say them, decimal.

    >>> nbytes_text(999), nbytes_text(2_300_000_000)
    ('999 B', '2.3 GB')
    """
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def safe(text: object, limit: int = 200) -> Text:
    """Text of a stranger's making: no markup, no control characters."""
    return Text(printable(text, limit))


def print_run(report: RunReport, console: Console, verbose: int = 0) -> None:
    """One screen for ``run``, ``plan`` and ``verify``."""
    if report.rules:
        head = Text.assemble((report.rules["rules"], "bold"), "  ")
        head.append_text(safe(report.source["path"])).append(f" ({_place(report.source)})")
        if report.destination["path"]:
            head.append(" → ").append_text(safe(report.destination["path"]))
            head.append(f" ({report.destination['format']})" if report.destination["format"] else "")
        console.print(head)
    if report.changes and report.command != "verify":
        _print_changes(report.changes, console, verbose)
    for path, kind in list(report.skipped.items())[: None if verbose else 6]:
        print_beside(console, Text("  left behind: ", "dim"), safe(f"{path} ({kind})"))
    if not verbose and len(report.skipped) > 6:
        console.print(Text(f"  left behind: and {len(report.skipped) - 6} more entries", "dim"))
    for note in report.notes[: None if verbose else 8]:
        print_beside(console, Text("  note: ", "yellow"), safe(note, 400))
    if report.comparison is not None and report.command == "plan":
        console.print(
            Text("  fits ", "green")
            .append_text(safe(report.target))
            .append(f": {report.comparison.coverage:.1%} of its parameters are filled")
        )
    if report.allowed:
        console.print(Text("  ").append_text(safe(report.allowed, 600)))
    print_ladder(report.ladder, console)
    if verbose:
        for worker in report.workers:
            console.print(Text(f"  {_work_of(worker)}", "dim"))
    console.print(_closing(report))


def print_beside(console: Console, head: Text, body: Text) -> None:
    """``head``, and ``body`` beside it: on a terminal wrapped under itself, in a pipe one whole line."""
    if console.soft_wrap:
        console.print(head.append_text(body))
        return
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(head, body)
    console.print(grid)


def _work_of(worker: Mapping[str, Any]) -> str:
    """What one thread did, and by which path."""
    cloned, passed, computed = worker["cloned_nbytes"], worker["kernel_nbytes"], worker["computed_nbytes"]
    buffered = worker["copied_nbytes"] - cloned - passed
    done = []
    if buffered:
        done.append(f"{nbytes_text(buffered)} copied through a buffer")
    if passed:
        done.append(f"{nbytes_text(passed)} copied by the kernel")
    if cloned:
        done.append(f"{nbytes_text(cloned)} shared with the source by the filesystem")
    if computed:
        done.append(f"{nbytes_text(computed)} computed")
    return f"worker {worker['number']}: {', '.join(done) or 'nothing'}, {worker['seconds']:.2f} s"


def _place(source: Mapping[str, Any]) -> str:
    container = source["container"]
    return str(source["format"]) + ("" if container == "." else f", {printable(container)}")


def _print_changes(changes: Sequence[Change], console: Console, verbose: int) -> None:
    """One line a change: what was done, to how many tensors, and their names before and after."""
    rows = sorted(changes, key=lambda change: _SHOWN_LAST.index(change.verb) if change.verb in _SHOWN_LAST else -1)
    width = max(len(change.verb) for change in rows)
    digits = max(len(f"{change.count:,}") for change in rows)
    for change in rows[: None if verbose else MAX_ROWS]:
        style = {"dropped": "yellow", "unchanged": "dim"}.get(change.verb, "cyan")
        line = Text().append_text(safe(_joined(change.sources, verbose), 2000))
        if change.outputs and change.verb != "unchanged":
            line.append(" → " if change.sources else "").append_text(safe(_joined(change.outputs, verbose), 2000))
        if change.detail:
            line.append(f"   {printable(change.detail)}", "dim")
        if verbose and change.origin.step:
            line.append(f"   {change.origin}", "dim")
        print_beside(console, Text(f"  {change.verb:<{width}}  {change.count:>{digits},}  ", style), line)
    if len(rows) > MAX_ROWS and not verbose:
        console.print(Text(f"  and {len(rows) - MAX_ROWS} more changes (-v shows all)", "dim"))


def _joined(templates: Sequence[Template], verbose: int) -> str:
    most = len(templates) if verbose else FEW
    shown = ", ".join(template.text for template in templates[:most])
    return shown + (f", … {len(templates)} templates" if len(templates) > most else "")


def print_ladder(ladder: Ladder, console: Console) -> None:
    """One line a rung, with what failed and what should be known below it."""
    for rung in ladder.rungs:
        mark, style = _MARKS[rung.status]
        head = Text.assemble(f"  L{rung.level} ", (f"{mark:<6} ", style))
        print_beside(console, head, Text(f"{rung.name}: ").append_text(safe(rung.sentence, 400)))
        for problem in rung.problems[:10]:
            console.print(Text(printable_lines(problem, "     ")))
        for note in rung.notes:
            print_beside(console, Text("     note: ", "yellow"), safe(note, 1200))


def _closing(report: RunReport) -> Text:
    where = report.destination
    size, seconds = nbytes_text(where["nbytes"]) if "nbytes" in where else "", f"{report.seconds:.1f} s"
    if report.command == "run":
        files = where["files"]
        what = f"{len(files)} files" if len(files) > 1 else ""
        return (
            Text("written ", "bold green")
            .append_text(safe(where["path"]))
            .append(f"  {where['tensors']:,} tensors, {what + ', ' if what else ''}{size}, {seconds}")
        )
    if report.command == "plan":
        cost = report.cost
        tasks = f"; {cost['tasks']:,} tasks, which read the source {cost['read_amplification']:.2f} times" if "tasks" in cost else ""
        return Text.assemble(
            ("nothing written: this is the plan  ", "bold"),
            f"{where['tensors']:,} tensors, {size}: {nbytes_text(cost['copied_nbytes'])} copied, {nbytes_text(cost['computed_nbytes'])} computed, "
            f"peak memory about {nbytes_text(cost['peak_nbytes'])}{tasks}{_on_paper(report.on_paper)}",
        )  # fmt: skip
    failed = report.ladder.failed
    verdict = Text("not verified", "bold red") if failed else Text(f"verified {report.ladder.reached}", "bold green")
    return verdict.append(f"  {where['tensors']:,} tensors, {size}, {seconds}")


def _on_paper(cost: Mapping[str, Any]) -> str:
    if not cost:
        return ""
    return (
        f"\non paper, {cost['workers']:,} workers at {cost['store']}: {nbytes_text(cost['read_nbytes'])} and {nbytes_text(cost['proved_nbytes'])} for the "
        f"proof read in {cost['reads']:,} requests, {nbytes_text(cost['written_nbytes'])} written in {cost['writes']:,}; {cost['tasks_seconds']:,.0f} s, "
        f"and {cost['alone_seconds']:,.0f} s that no further worker makes shorter"
    )


def printable_lines(problem: Problem, indent: str = "") -> str:
    """A problem on several lines, each of them safe for a terminal."""
    return "\n".join(indent + printable(line, 1200) for line in str(problem).split("\n"))


def print_problems(problems: Iterable[Problem], console: Console) -> None:
    """Every problem, as an error on the terminal. What is wrong in one way at one place, with one thing to try, stands together."""
    for _, alike in groupby(problems, key=lambda problem: (problem.where, problem.code, problem.try_)):
        members = list(alike)
        texts = [str(problem if problem is members[-1] else replace(problem, try_="")).split("\n") for problem in members]
        console.print(Text("error: ", "bold red").append_text(safe(texts[0][0], 1200)), soft_wrap=True)
        for line in (line for _head, *rest in texts for line in rest):
            console.print(Text(printable(line, 1200)), soft_wrap=True)


def print_inspection(report: Inspection, console: Console, *, flat: bool, match: Sequence[str], tree: bool) -> None:
    """A checkpoint's candidates, names collapsed to templates, one a line (``flat``), or as a tree."""
    head = safe(report.path)
    head.append(f"  {report.format}, {nbytes_text(sum(size for _, size in report.files))}")
    head.append(f" in {len(report.files)} files" if len(report.files) > 1 else "")
    console.print(head)
    for warning in report.warnings:
        console.print(Text("  warning: ", "yellow").append_text(safe(warning)))
    if not report.candidates:
        console.print(Text("  no state_dict was found in it", "bold red"))
    for candidate in report.candidates:
        _print_candidate(candidate, console, flat=flat, match=match, tree=tree)
    for path, kind in list(report.skipped.items())[:12]:
        console.print(Text("  skipped: ", "dim").append_text(safe(f"{path} ({kind})")))
    if len(report.skipped) > 12:
        console.print(Text(f"  skipped: and {len(report.skipped) - 12} more", "dim"))
    for key, value in report.metadata.items():
        console.print(Text("  metadata: ", "dim").append_text(safe(f"{key} = {value.strip()}")))


def _print_candidate(candidate: Candidate, console: Console, *, flat: bool, match: Sequence[str], tree: bool) -> None:
    from ckptconv.ruleset.patterns import Pattern

    manifest = candidate.manifest
    dtypes = ", ".join(f"{dtype.value} {nbytes_text(nbytes)}" for dtype, (_, nbytes) in candidate.dtypes.items())
    title = Text.assemble(
        (f"  {printable(candidate.path)}", "bold"), f"  {len(manifest):,} tensors, {manifest.numel:,} parameters: {dtypes}"
    )
    console.print(title)
    patterns = [Pattern.parse(text) for text in match]
    if tree and not match:
        console.print(Padding(_tree(candidate), (0, 0, 0, 4)))
        return
    if flat or patterns:
        rows = [
            (name, str(spec), spec.nbytes)
            for name, spec in manifest.tensors.items()
            if not patterns or any(pattern.match(name) is not None for pattern in patterns)
        ]
    else:
        rows = candidate.templates()
    _print_columns([(printable(text, 1024), spec, nbytes_text(nbytes)) for text, spec, nbytes in rows], console)
    for group in manifest.ties:
        console.print(Text("    tied: ", "cyan").append_text(safe(" = ".join(group))))
    for name, kind in [*candidate.unsupported.items(), *candidate.skipped.items()][:12]:
        console.print(Text("    skipped: ", "dim").append_text(safe(f"{name} ({kind})")))


def _print_columns(rows: Sequence[tuple[str, str, str]], console: Console) -> None:
    """Names, specs and sizes under each other. Long names go on below themselves on a terminal, and stay whole in a pipe."""
    if console.soft_wrap:
        widths = [min(max((len(row[at]) for row in rows), default=0), PADDED) for at in range(2)]
        for name, spec, size in rows:
            console.print(Text(f"    {name:<{widths[0]}}  {spec:<{widths[1]}}  {size}"))
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for name, spec, size in rows:
        table.add_row(Text(name), Text(spec), size)
    console.print(Padding(table, (0, 0, 0, 4)))


def _tree(candidate: Candidate) -> Tree:
    """Modules as branches, templates as leaves; numbered modules of one kind are one branch."""
    root = Tree(Text(printable(candidate.path)), guide_style="dim")
    branches: dict[str, Tree] = {"": root}
    for text, spec, nbytes in candidate.templates():
        parts = printable(text, 1024).split(".")
        path = ""
        for part in parts[:-1]:
            parent, path = branches[path], f"{path}.{part}"
            if path not in branches:
                branches[path] = parent.add(Text(part))
        branches[path].add(Text(parts[-1]).append(f"  {spec}  {nbytes_text(nbytes)}", "dim"))
    return root


def print_difference(report: Difference, console: Console) -> None:
    """What differs, as templates; a sentence where nothing does."""
    if report.equal:
        console.print("the same names, shapes, dtypes and ties")
        return
    for title, names in (
        (f"only in {printable(report.left)}", report.only_left),
        (f"only in {printable(report.right)}", report.only_right),
    ):
        for template in collapse(names)[:MAX_ROWS]:
            console.print(Text(f"{title}: ", "yellow").append_text(safe(template)))
    groups: dict[tuple[str, str], list[str]] = {}
    for name, left, right in report.changed:
        groups.setdefault((left, right), []).append(name)
    for (left, right), members in list(groups.items())[:MAX_ROWS]:
        for template in collapse(members):
            console.print(Text("different: ", "yellow").append_text(safe(template)).append(f"  {left} against {right}"))
    for tie in report.ties:
        console.print(safe(tie, 400))


def version_line() -> str:
    """``ckptconv 0.1.0``."""
    return f"ckptconv {__version__}"
