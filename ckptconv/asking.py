"""The two questions of whoever is stuck, answered: why does it not load, and which rule would make it. What :mod:`ckptconv.api` calls."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.compare import compare
from ckptconv.errors import CkptconvError, FitError, Problem, UsageError, named, printable
from ckptconv.execute.small_files import write_text
from ckptconv.explain import pasted as messages
from ckptconv.explain.commands import output_of
from ckptconv.explain.findings import explained
from ckptconv.explain.sides import Cause, count_of
from ckptconv.explain.trying import Question
from ckptconv.names import collapse
from ckptconv.places.visiting import near
from ckptconv.plan import as_it_is
from ckptconv.report.explaining import Drawn, Explanation, Row, SuggestReport, drawn, explanation, rows, sureness
from ckptconv.report.model import RunReport
from ckptconv.ruleset import builtin
from ckptconv.ruleset.model import RuleFile
from ckptconv.stage.explaining import open_for_explaining
from ckptconv.stage.opening import manifest_of_word, open_source, variables
from ckptconv.stage.suggesting import Asked, asked, equal_values, rule_of_text, selecting, settled_by_running, tried
from ckptconv.suggest import Suggestion
from ckptconv.suggest import suggest as find_rule
from ckptconv.verify import Ladder

#: :func:`ckptconv.api.run`, which stands a floor above.
Run = Callable[..., RunReport]


class Words(Struct, frozen=True):
    """How a rule is asked for: hints, what the models' outputs are compared with, which state_dict, how long, how many workers."""

    pairs: Sequence[str] = ()
    parity: Any = ()
    select: Sequence[str] = ()
    timeout: float = 300.0
    threads: int = 2


def explain(
    source: str | Path | None, target: str | None, *, error: str, select: Sequence[str], given: Any, config: str | Path | None, timeout: float,
) -> Explanation:  # fmt: skip
    """As :func:`ckptconv.api.explain`."""
    pasted = messages.parse(error)
    if source is None and pasted.empty:
        what = "there is no message in the text that is known" if error else "give a checkpoint, or the text of an error with --error"
        raise UsageError(Problem("CK107", what, found=printable(error.strip(), 120), try_="ckptconv explain SRC --target T"))
    opened = open_for_explaining(near(source), select, Path(config) if config is not None else None) if source is not None else None
    question = replace(opened.question if opened is not None else Question((), None), given=variables(given))
    if target is not None:
        question = replace(question, wanted=manifest_of_word(target, (), timeout))
    if pasted.missing or pasted.unexpected or pasted.sizes:
        question = messages.told(pasted, question)
    file = opened.file if opened is not None else None
    found = explained(
        file,
        question,
        map(builtin.find, builtin.names()),
        source=named(source) if source is not None else "SRC",
        target=target or "",
        ask=lambda here, there: find_rule(here, there, name="suggested"),
    )
    known = tuple(Cause(each.kind, each.sentence, try_=each.try_) for each in pasted.known)
    notes = ["the message was cut off: what it left out is not looked at"] if pasted.cut and (source is None or target is None) else []
    if pasted.unexpected and found.part is not None and not any(name in found.part.manifest for name in pasted.unexpected):
        notes.append("the message is not about this file: none of the keys that it calls unexpected is in it")
    return explanation(
        replace(found, causes=(*known, *found.causes)), target=target or pasted.model, notes=tuple(notes),
        problems=opened.problems if opened is not None else (),
    )  # fmt: skip


def suggest(
    run: Run, source: str | Path, target: str, out: str | Path | None, words: Words, *, apply: str | Path | None, accept_ambiguous: bool, force: bool,
) -> SuggestReport:  # fmt: skip
    """As :func:`ckptconv.api.suggest`; ``run`` is its :func:`~ckptconv.api.run`."""
    path = near(source)
    ask = asked(path, target, Path(out) if out is not None else None, words.pairs, words.select, words.timeout)
    options = {
        "target": target,
        "select": [ask.source.container.path],
        "parity": words.parity,
        "timeout": words.timeout,
        "threads": words.threads,
    }
    found = ask.suggestion()
    settled: list[str] = []
    problems: tuple[Problem, ...] = ()
    ladder, applied = Ladder(), {}
    if found.text:
        found, ladder, settled, problems = _proved(run, ask, found, path, target, options)
    open_rows = [row for row in rows(found) if row.confidence == "ambiguous"]
    text = selecting(found.text, ask.source) if found.text else ""
    if out is not None and text:
        write_text(Path(out), text, force=force)
    if apply is not None and text and not problems:
        if open_rows and not settled and not accept_ambiguous:
            problems = (_still_open(open_rows, str(out or ask.name)),)
        else:
            done = run(rule_of_text(text, ask.name), path, apply, force=force, **options)
            ladder, applied = done.ladder, dict(done.destination)
    return SuggestReport(
        {"path": named(source), "format": ask.source.contents.format, "container": ask.source.container.path, "tensors": len(ask.here),
         "parameters": ask.here.numel}, {"text": target, "tensors": len(ask.wanted), "parameters": ask.wanted.numel},
        found.verdict, found.reason, text, str(out) if out is not None and text else "", sureness(found, ask.wanted), rows(found), found.missing,
        found.unexpected, tuple(Cause(each.kind, each.sentence, each.templates) for each in found.causes), tuple(settled), ladder, applied,
        () if problems else _next(text, named(source), named(target), out, applied), problems=problems,
        draw=lambda: (drawn(rule_of_text(text, ask.name), ask.here, ask.wanted, found) if text
                      else Drawn("", as_it_is(ask.here), compare(ask.here, ask.wanted))),
    )  # fmt: skip


def _proved(
    run: Run, ask: Asked, found: Suggestion, source: Path, target_word: str, options: dict[str, Any]
) -> tuple[Suggestion, Ladder, list[str], tuple[Problem, ...]]:
    """The suggestion tried without its output being kept: how far it is verified, what values or the models settled, and what is wrong."""
    settled: list[str] = []
    kind = "safetensors" if ask.source.contents.format == "safetensors" else "torch"

    def trial(rule: RuleFile, destination: Path) -> Ladder:
        ladder = run(rule, source, destination, sync=False, **options).ladder
        there = near(target_word)
        if there.exists() and not target_word.endswith(".json"):
            same, differ = equal_values(open_source(destination), open_source(there))
            if not differ:
                settled.append(f"values: all {same:,} tensors are those of {printable(target_word)}, bit by bit")
            elif len(differ) < same:
                names = ", ".join(map(printable, collapse(differ)[:4]))
                raise FitError(Problem("CK409", f"most tensors are those of the target, bit by bit, and {len(differ):,} are not: {names}",
                                       where=printable(target_word), try_="--pair says which belongs to which"))  # fmt: skip
        return ladder

    try:
        if options["parity"]:
            result = settled_by_running(ask, found, trial, kind, ask.wanted.nbytes)
            if result is None:
                what = "the models give different outputs, with this rule and with every alternative that was tried"
                return found, Ladder(), settled, (Problem("CK412", what, try_="--pair says which belongs to which"),)
            found, ladder, runs = result
            if ladder is not None:
                settled.append("parity: the models give equal outputs" + (f" with mapping {runs} of those tried" if runs > 1 else ""))
        else:
            ladder = tried(rule_of_text(found.text, ask.name), trial, kind, ask.wanted.nbytes)
        return found, ladder or Ladder(), settled, ()
    except CkptconvError as error:
        return found, Ladder(), settled, error.problems


def _still_open(open_rows: Sequence[Row], where: str) -> Problem:
    tensors = sum(row.tensors for row in open_rows)
    first = open_rows[0]
    may = f": {printable(first.target)} may also come from {printable(', '.join(first.alternatives[:2]))}" if first.alternatives else ""
    return Problem("CK415", f"{count_of(tensors, 'tensor', 'be')} ambiguous, and nothing was written to DST{may}", where=where,
                   try_="--parity source=…, --pair SOURCE=TARGET, or --accept-ambiguous after reading the rule")  # fmt: skip


def _next(text: str, source: str, target_word: str, out: str | Path | None, applied: Mapping[str, Any]) -> tuple[str, ...]:
    """What to type next."""
    if not text or applied:
        return ()
    rule = "rules/mine.yaml" if out is None else str(out)
    words = [f"ckptconv run {shlex.quote(rule)} {shlex.quote(source)} {output_of(source)} --target {shlex.quote(target_word)}"]
    return tuple(words)
