"""Explanations and suggestions on one screen: sentences first, names as templates, and what to type last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from ckptconv.explain.codes import CodeHelp
from ckptconv.explain.sides import Cause, count_of
from ckptconv.names import collapse
from ckptconv.report.explaining import Difference, Explanation, StateDict, SuggestReport
from ckptconv.report.text import nbytes_text, print_beside, print_ladder, printable_lines, safe

MAX_CAUSES, MAX_STATE_DICTS, MAX_BESIDE, MAX_UNSURE, MAX_LEFT = 8, 6, 8, 8, 5
_LEVELS = {"certain": "green", "likely": "cyan", "ambiguous": "bold yellow"}
_STYLES = {"loads as it is": "bold green", "convertible": "bold green", "convertible with loss": "bold yellow"}
_MARKS = {"missing": "only in the model", "unexpected": "only in the checkpoint", "size": "another size"}


def print_explanation(report: Explanation, console: Console, verbose: int = 0) -> None:
    """What the file is, what would load, why not more, the verdict, the command."""
    _print_source(report, console, verbose)
    target = report.target
    if target:
        known = (
            f"{target['tensors']:,} names known"
            if target["parameters"] is None
            else f"{target['tensors']:,} tensors, {target['parameters']:,} parameters"
        )
        kind = f": {target['kind']}" if target["kind"] else ""
        _say(console, "target", safe(target["text"] or "the model of the message").append(f"  {known}{kind}"))
    if report.as_it_is:
        share = "" if report.coverage is None else f"{report.coverage:.1%} of the model's parameters would load"
        joint = "" if not share else " " if report.as_it_is.startswith("once") else "; "
        _say(console, "as it is", Text(share + joint).append_text(safe(report.as_it_is, 400)))
    _print_causes([cause for cause in report.causes if verbose or cause.sentence not in report.sentence], console, verbose)
    if verbose and report.differences:
        _print_differences(report.differences, console)
    if verbose and report.tried:
        _print_tried(report, console)
    for problem in report.problems:
        console.print(Text(printable_lines(problem, "")))
    for note in report.notes[: None if verbose else 4]:
        _say(console, "note", safe(note, 400), "yellow")
    _print_verdict(report, console, verbose)
    print_commands(report.commands, console)


def _say(console: Console, label: str, text: Text, style: str = "dim", width: int = 10) -> None:
    """A label and a sentence beside it."""
    print_beside(console, Text.assemble((f"{label:<{width}}", style)), text)


def _print_source(report: Explanation, console: Console, verbose: int) -> None:
    source = report.source
    if not source:
        return
    files = f"{source['files']} files" if source["files"] > 1 else ""
    head = safe(source["path"]).append("  " + ", ".join(part for part in (source["format"], nbytes_text(source["nbytes"]), files) if part))
    several = len(report.state_dicts) > 1
    if several:
        head.append(f": {len(report.state_dicts)} state_dicts")
    elif report.state_dicts:
        only = report.state_dicts[0]
        head.append_text(safe(f": {_size(only)}" + (f", in {only.path!r}" if only.path != "." else ""))).append(
            f": {only.kind}" if only.kind else ""
        )
    _say(console, "file", head)
    for each in report.state_dicts[: None if verbose else MAX_STATE_DICTS] if several else ():
        line = safe(f"{each.path}  {_size(each)}").append(f": {each.kind}" if each.kind else "")
        _say(console, "", line.append("   ← looked at" if each.looked_at else "", "bold"))
    if several and not verbose and len(report.state_dicts) > MAX_STATE_DICTS:
        _say(console, "", Text(f"and {len(report.state_dicts) - MAX_STATE_DICTS} more (-v lists them)", "dim"))
    if report.beside:
        most = len(report.beside) if verbose else MAX_BESIDE
        more = f" and {len(report.beside) - most} more" if len(report.beside) > most else ""
        _say(console, "", Text.assemble(("beside: ", "dim")).append_text(safe(", ".join(report.beside[:most]), 2000)).append(more))


def _size(each: StateDict) -> str:
    return f"{count_of(each.tensors, 'tensor')}, {count_of(each.parameters, 'parameter')}"


def _print_causes(causes: Sequence[Cause], console: Console, verbose: int) -> None:
    if not causes:
        return
    console.print(Text("why", "bold"))
    for cause in causes[: None if verbose else MAX_CAUSES]:
        _say(console, f"  {cause.kind}", safe(cause.sentence, 700), "cyan", width=16)
        if cause.try_:
            _say(console, "", Text.assemble(("→ ", "dim")).append_text(safe(cause.try_, 400)), width=16)
        for template in cause.templates if verbose else ():
            _say(console, "", safe(template, 400), width=18)
    if not verbose and len(causes) > MAX_CAUSES:
        console.print(Text(f"  and {len(causes) - MAX_CAUSES} more causes (-v lists them)", "dim"))


def _print_differences(rows: Sequence[Difference], console: Console) -> None:
    console.print(Text("differences", "bold"))
    for row in rows:
        shapes = " against ".join(part for part in (row.found, row.wanted) if part)
        many = f" ×{row.tensors}" if row.tensors > 1 else ""
        _say(console, f"  {_MARKS[row.kind]}", safe(f"{row.template}{many}", 400).append(f"  {shapes}", "dim"), "yellow", width=26)


def _print_tried(report: Explanation, console: Console) -> None:
    console.print(Text("rules tried", "bold"))
    for each in report.tried:
        share = "" if each.coverage is None else f", {each.coverage:.1%} of the model"
        _say(
            console,
            "",
            Text(f"{', then '.join(each.rules)}: {each.outcome}{share}").append(f": {each.reason}" if each.reason else ""),
            width=2,
        )


def _print_verdict(report: Explanation, console: Console, verbose: int) -> None:
    line = Text.assemble((report.verdict, _style(report.verdict)))
    if report.problems:  # they were said
        _say(console, "verdict", line)
        return
    if report.verdict == "no target" and report.tried:
        _say(
            console,
            "rules",
            Text("meant for it: ").append_text(
                safe(", ".join(f"{' then '.join(each.rules)} ({each.reason})" for each in report.tried[:4]), 600)
            ),
        )
    joint = ", " if report.sentence.startswith(("because ", "by ", "with ")) else ": "
    _say(console, "verdict", line.append(joint if report.sentence else "").append_text(safe(report.sentence, 900)))
    reason = next((cause for cause in report.causes if cause.try_ and cause.sentence in report.sentence), None)
    if reason is not None and not verbose:
        _say(console, "", Text.assemble(("→ ", "dim")).append_text(safe(reason.try_, 400)))


def print_commands(commands: Iterable[str], console: Console) -> None:
    """What to type, each on a line of its own that can be copied."""
    for command in commands:
        console.print(Text("  ").append_text(safe(command, 2000)), soft_wrap=True)


def print_code(help_: CodeHelp, console: Console) -> None:
    """An error code: its sentence, what it means, an example, what to do."""
    console.print(Text.assemble((help_.code, "bold"), f"  {help_.sentence}"))
    console.print(Text(f"\n{help_.meaning}"))
    console.print(Text("\nFor example:", "dim"))
    for line in help_.example.split("\n"):
        console.print(Text(f"  {line}"), soft_wrap=True)
    console.print(Text("\nWhat to do:", "dim"))
    for line in help_.todo:
        console.print(Text(f"  · {line}"))


def print_suggestion(report: SuggestReport, console: Console, verbose: int = 0) -> None:
    """How sure the rule is, what stays open, how far it is proved, and what to type."""
    for label, side, name in (("source", report.source, report.source["path"]), ("target", report.target, report.target["text"])):
        _say(console, label, safe(name).append(f"  {side['tensors']:,} tensors, {side['parameters']:,} parameters"))
    joint = ", because " if report.verdict == "not convertible" else ": "
    line = Text.assemble((report.verdict, _style(report.verdict)))
    _say(console, "verdict", line.append(joint if report.sentence else "").append_text(safe(report.sentence, 900)))
    for cause in report.causes[: None if verbose else MAX_CAUSES]:
        if cause.sentence not in report.sentence:
            _say(console, f"  {cause.kind}", safe(cause.sentence, 700), "cyan", width=16)
    if report.verdict != "not convertible" or verbose:  # of a mapping that leads nowhere, nobody asks how sure it is
        _print_mapping(report, console, verbose)
    print_ladder(report.ladder, console)
    for sentence in report.settled:
        _say(console, "settled", safe(sentence, 400))
    for problem in report.problems:
        console.print(Text(printable_lines(problem)))
    if report.rule:
        _say(console, "written", safe(report.rule))
    if report.applied:
        _say(console, "written", safe(report.applied["path"]).append(f"  {report.applied['tensors']:,} tensors"))
    print_commands(report.commands, console)


def _print_mapping(report: SuggestReport, console: Console, verbose: int) -> None:
    """How sure it is, by parameters; what is not; and what either side has alone."""
    if report.sure:
        shares = ", ".join(f"{level} {share:.1%}" for level, share in report.sure.items())
        _say(console, "sure", Text(f"{shares} of the model's parameters"))
    _print_rows(report, console, verbose)
    for title, names in (("no source", report.missing), ("left out", report.unexpected)):
        if names:
            templates = [str(each) for each in collapse(names)]
            most = len(templates) if verbose else MAX_LEFT
            more = f" and {len(templates) - most} more templates" if len(templates) > most else ""
            _say(console, title, safe(", ".join(templates[:most]), 2000).append(more))


def _print_rows(report: SuggestReport, console: Console, verbose: int) -> None:
    """What is not certain, the least certain first; with ``verbose`` everything."""
    unsure = sorted((row for row in report.mapping if row.confidence != "certain"), key=lambda row: row.confidence)
    shown = report.mapping if verbose else unsure[:MAX_UNSURE]
    for row in shown:
        many = f" ×{row.tensors}" if row.tensors > 1 else ""
        text = safe(f"{', '.join(row.sources[:3])} → {row.target}{many} ({row.how})", 600)
        _say(console, f"  {row.confidence}", text, _LEVELS.get(row.confidence, "cyan"), width=16)
        if row.alternatives:
            _say(console, "", Text("or ").append_text(safe(", ".join(row.alternatives[:3]), 400)), width=16)
    if not verbose and len(unsure) > MAX_UNSURE:
        console.print(Text(f"  and {len(unsure) - MAX_UNSURE} more templates that are not certain (-v lists all)", "dim"))


def _style(verdict: str) -> str:
    return _STYLES.get(verdict, "bold red" if verdict.startswith(("not", "cannot")) else "bold")
