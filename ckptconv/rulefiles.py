"""What is done to rule files, without a checkpoint: check, test, import and lock them. The command line calls these as it calls the functions of
:mod:`ckptconv.api`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckptconv import ruletests
from ckptconv.errors import CkptconvError, FitError, OutputError, Problem, Refusal, UsageError, printable
from ckptconv.execute.small_files import write_text
from ckptconv.report.model import LockReport, RuleReport
from ckptconv.ruleset import builtin, testfile
from ckptconv.ruleset.model import RuleFile
from ckptconv.stage.opening import rule_file


def check(rules: Sequence[str | Path]) -> list[tuple[str, tuple[Problem, ...]]]:
    """Validates rule files and the test files beside them: (file, its problems) for each, no problems where it is right.

    Names of built-in rules work too, and a test file stands for its rule.
    """
    found: list[tuple[str, tuple[Problem, ...]]] = []
    for word, parsed in _each_rule(rules):
        if isinstance(parsed, RuleFile):
            try:
                testfile.tests_of(parsed)
            except CkptconvError as error:
                found.append((word, error.problems))
            else:
                found.append((word, ()))
        else:
            found.append((word, parsed.problems))
    return found


def rule_tests(rules: Sequence[str | Path] | None = None, *, update: bool = False) -> list[RuleReport]:
    """Runs the tests of rule files, of all built-in rules where none is named.

    With ``update``, the `expect` of a failing test becomes what the rule makes, in its file; all else of the file stays as it is.
    """
    if update and rules is None:
        raise UsageError(Problem("CK107", "--update rewrites files, and none is named", try_="ckptconv test rules/mine.yaml --update"))
    found: list[RuleReport] = []
    for word, parsed in _each_rule(rules if rules is not None else builtin.names()):
        if not isinstance(parsed, RuleFile):
            found.append(RuleReport(word, problems=parsed.problems))
            continue
        try:
            found.append(_tested(word, parsed, update))
        except CkptconvError as error:
            found.append(RuleReport(word, problems=error.problems))
    return found


def import_rule(word: str, out: str | Path | None = None, *, prove: bool = False, force: bool = False) -> str:
    """The rule file of ``transformers:MODEL_TYPE``: the installed transformers' own mapping from published checkpoints, as rules.

    ``out`` writes it; the rule is then called as the file is. ``prove`` runs it on the model's own key set, there and back. Raises
    :class:`~ckptconv.errors.UsageError` for a mapping that rules cannot say, and where the proof fails.
    """
    library, colon, model_type = word.partition(":")
    if library != "transformers" or not colon:
        raise UsageError(Problem("CK107", f"rules are imported from transformers, not from {printable(word)}", try_="transformers:mixtral"))
    if importlib.util.find_spec("transformers") is None:
        raise OutputError(Problem("CK505", "transformers is not installed", try_="pip install transformers"))
    from ckptconv.importing import proving, transformers_mapping

    try:
        text = transformers_mapping.rule_for(model_type, "" if out is None else Path(out).stem)
    except Refusal as refusal:
        raise UsageError(refusal.at(printable(word))) from None
    if prove:
        reason = proving.prove(model_type)
        if reason:
            raise FitError(Problem("CK110", f"the imported rule is not proved: {printable(reason, 1000)}", where=printable(word)))
    if out is not None:
        write_text(Path(out), text, force=force)
    return text


def lock_rules(folder: str | Path | None = None, *, check: bool = False) -> LockReport:
    """Locks what every revision of the rules in a folder means (of the built-in rules, where none is named), or ``check``s the lock.

    Nothing is written where a rule changed its meaning under the same revision. ``check`` finds the rules that the lock does not know
    too, and never writes.
    """
    from ckptconv.ruleset import lock

    where = Path(folder) if folder is not None else builtin.folder()
    path = where / lock.NAME
    rules, known = lock.rules_in(where), lock.read(where)
    problems = tuple(lock.reused(known, rules) + (lock.stale(known, rules) if check else []))
    text = lock.renewed(known, rules)
    if problems or check or (path.is_file() and path.read_text(encoding="utf-8") == text):
        return LockReport(str(path), len(rules), problems=problems)
    if builtin.is_installed(path):
        raise UsageError(Problem("CK107", "the lock of an installed package is not rewritten", where=printable(path), try_="name a folder"))
    write_text(path, text, force=True)
    return LockReport(str(path), len(rules), written=True)


def _tested(word: str, rules: RuleFile, update: bool) -> RuleReport:
    outcomes = ruletests.run_tests(rules)
    changed = _updated(rules, outcomes) if update else ()
    if changed:
        outcomes = ruletests.run_tests(rule_file(word))
    todo = tuple(f"{outcome.name}: {outcome.failures[0]}" for outcome in outcomes if outcome.todo and outcome.failures)
    failed = sum(not outcome.passed for outcome in outcomes)
    count = sum(outcome.placed is not None for outcome in outcomes)
    return RuleReport(word, count, failed, tuple(ruletests.problems(rules, outcomes)), todo, changed)


def _updated(rules: RuleFile, outcomes: Sequence[ruletests.Outcome]) -> tuple[str, ...]:
    """Rewrites the `expect` of failing tests in their files; all of them or, where one cannot be mended, none. Gives back their names."""
    from ckptconv.ruleset.rewriting import rewritten

    if rules.path is None or rules.builtin or builtin.is_installed(rules.path):
        raise UsageError(
            Problem("CK107", "--update leaves built-in rules as they are", where=printable(rules.file), try_="name a file by its path")
        )
    failing = [outcome for outcome in outcomes if not outcome.passed and not outcome.todo and outcome.placed is not None]
    unplanned = [outcome for outcome in failing if outcome.made is None]
    if unplanned:
        raise UsageError([
            Problem("CK108", f"test {printable(outcome.name)!r}: nothing is rewritten, because it cannot be planned: {outcome.failures[0]}",
                    where=outcome.placed.where if outcome.placed else "")
            for outcome in unplanned
        ])  # fmt: skip
    by_file: dict[Path, list[ruletests.Outcome]] = {}
    for outcome in failing:
        if (
            outcome.placed is not None
            and outcome.placed.file is not None
            and any(each.kind in ruletests.MENDABLE for each in outcome.failures)
        ):
            by_file.setdefault(outcome.placed.file, []).append(outcome)
    written = {
        path: rewritten(path, {each.placed.at: each.made for each in group if each.placed is not None and each.made is not None})
        for path, group in by_file.items()
    }
    for path, text in written.items():
        write_text(path, text, force=True)
    return tuple(outcome.name for group in by_file.values() for outcome in group)


def _each_rule(words: Sequence[str | Path]) -> Iterator[tuple[str, RuleFile | CkptconvError]]:
    """Every rule that the words mean, once, or why it is none. A test file stands for its rule."""
    seen: set[str] = set()
    for word in map(str, words):
        try:
            meant = str(testfile.rule_of(Path(word))) if testfile.is_test_file(Path(word)) else word
            if meant in seen:
                continue
            seen.add(meant)
            yield meant, rule_file(meant)
        except CkptconvError as error:
            yield word, error
