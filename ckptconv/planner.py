"""From a rule file and a source's manifest to a plan: the steps are folded over the table, and every problem is collected.

Pure: no file is opened, no weight is read, torch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptconv.errors import CkptconvError, FitError, Problem, Refusal, UsageError, printable
from ckptconv.names import collapse
from ckptconv.plan import Expr, Origin, Output, Plan, Read, walk
from ckptconv.ruleset import expressions
from ckptconv.ruleset.model import RuleFile, RuleStep
from ckptconv.ruleset.steps import Context, Entry, KeyCondition, Scope, Table
from ckptconv.spec import Manifest

#: Problems of the checkpoint rather than of the rule file: they end with exit code 4 instead of 2.
_ABOUT_THE_SOURCE = frozenset({"CK207", "CK208", "CK210"})
_MAX_PROBLEMS = 40


def make_plan(
    rules: RuleFile,
    source: Manifest,
    *,
    given: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    shown_source: str = "SRC",
    untie: bool = False,
) -> Plan:
    """The plan of ``rules`` for a checkpoint with this manifest.

    ``given`` are the variables of ``--set``, ``config`` the model's config.json. Raises :class:`~ckptconv.errors.UsageError` (the rule
    does not work on these names and shapes) or :class:`~ckptconv.errors.FitError` (the rule says itself that this checkpoint is not for
    it), with every problem found.
    """
    scope = Scope(given or {}, rules.header.vars, config)
    table: Table = initial_table(source)
    problems: list[Problem] = []
    notes: list[str] = []
    dropped = []
    refusal = _unmet(rules, scope, table)
    if refusal:
        raise FitError(Problem("CK208", f"the rule {rules.label} is not for this checkpoint: {refusal}", where=f"{rules.file}  when"))
    for rule_step in rules.steps:
        context = Context(Origin(rules.file, rule_step.line, rule_step.number, rule_step.step.op), rule_step.where, scope, shown_source)
        if _wanted(rule_step, table, context):
            table = rule_step.step.lower(table, context)
        # After a step that failed, a later one may find nothing only because of that: saying so twice would hide the cause.
        failed = any(problem.code != "CK201" for problem in problems)
        problems += [problem for problem in context.problems if not (failed and problem.code == "CK201")]
        notes += context.notes
        dropped += context.dropped
    outputs = tuple(Output(name, entry.expr, entry.origin) for name, entry in table.items())
    if rules.header.expect_all:
        idle = [output.name for output in outputs if not output.origin.step]
        for template in collapse(idle)[:10]:
            problems.append(
                Problem(
                    "CK210", f"no step touches {printable(template)}", where=rules.file, try_="rename or drop it, or leave expect_all out"
                )
            )
    if not outputs and not problems:
        problems.append(Problem("CK207", "nothing is left: every tensor was dropped", where=rules.file))
    if problems:
        raise _error(problems)
    ties = () if untie else _ties(table)
    notes += _undone_ties(source, outputs, ties)
    return Plan(source, outputs, ties, tuple(dropped), tuple(notes))


def initial_table(source: Manifest) -> dict[str, Entry]:
    """Every name of the source as itself; the names of a tie are one read, so that they stay one tensor."""
    aliases = source.aliases
    return {name: Entry(Read(aliases.get(name, name), spec)) for name, spec in source.tensors.items()}


def _unmet(rules: RuleFile, scope: Scope, table: Table) -> str:
    condition = rules.header.when
    if condition is None:
        return ""
    if isinstance(condition, KeyCondition):
        return condition.failure(table)
    try:
        holds = expressions.evaluate(condition, scope.lookup({}, table))
    except Refusal as refusal:
        raise UsageError(refusal.at(f"{rules.file}  when")) from None
    return "" if holds else "its `when` does not hold"


def _wanted(rule_step: RuleStep, table: Table, context: Context) -> bool:
    condition = rule_step.step.when
    if condition is None:
        return True
    if isinstance(condition, KeyCondition):
        failure = condition.failure(table)
        if failure:
            context.notes.append(f"{context.where}: left out: {failure}")
        return not failure
    try:
        return bool(expressions.evaluate(condition, context.scope.lookup({}, table)))
    except Refusal as refusal:
        context.refused(refusal, "when")
        return False


def _error(problems: Sequence[Problem]) -> CkptconvError:
    shown = [*problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        shown.append(Problem(problems[-1].code, f"and {len(problems) - _MAX_PROBLEMS} more problems"))
    kind = FitError if all(problem.code in _ABOUT_THE_SOURCE for problem in problems) else UsageError
    return kind(shown)


def _ties(table: Table) -> tuple[tuple[str, ...], ...]:
    """Outputs that are one tensor: the same expression and the same identity. Empty tensors have nothing to share."""
    groups: dict[tuple[Expr, str], list[str]] = {}
    for name, entry in table.items():
        if entry.expr.spec.numel:
            groups.setdefault((entry.expr, entry.identity), []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _undone_ties(source: Manifest, outputs: Sequence[Output], ties: Sequence[Sequence[str]]) -> list[str]:
    if not source.ties:
        return []
    group_of = {name: at for at, group in enumerate(ties) for name in group}
    readers: dict[str, list[str]] = {group[0]: [] for group in source.ties}
    for output in outputs:
        for node in walk([output.expr]):
            if isinstance(node, Read) and node.name in readers:
                readers[node.name].append(output.name)
    return [
        f"{printable(', '.join(names))} come from one tied tensor ({printable(first)}) and are written as separate tensors"
        for first, names in readers.items()
        if len(names) > 1 and len({group_of.get(name, name) for name in names}) > 1
    ]
