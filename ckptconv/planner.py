"""From a rule file and a source's manifest to a plan: the steps are folded over the table, and every problem is collected.

Pure: no file is opened, no weight is read, torch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from ckptconv.errors import CkptconvError, FitError, Problem, Refusal, UsageError, printable
from ckptconv.formats.base import Composite
from ckptconv.names import collapse
from ckptconv.plan import Dropped, Expr, Fill, Origin, Output, Plan, Read, apply, walk
from ckptconv.ruleset import expressions
from ckptconv.ruleset.model import RuleFile, RuleStep
from ckptconv.ruleset.steps import Context, Entry, Include, KeyCondition, Scope, Table
from ckptconv.ruleset.steps.base import replaced
from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.tiling import Piece, Untiled, tile
from ckptconv.transforms import Concat, Decode, Dense, Reshape

#: Problems of the checkpoint rather than of the rule file: they end with exit code 4 instead of 2.
_ABOUT_THE_SOURCE = frozenset({"CK207", "CK208", "CK210", "CK413"})
_MAX_PROBLEMS = 40


def make_plan(
    rules: RuleFile,
    source: Manifest,
    *,
    given: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    shown_source: str = "SRC",
    untie: bool = False,
    composites: Mapping[str, Composite] | None = None,
) -> Plan:
    """The plan of ``rules`` for a checkpoint with this manifest.

    ``given`` are the variables of ``--set``, ``config`` the model's config.json. Raises :class:`~ckptconv.errors.UsageError` (the rule
    does not work on these names and shapes) or :class:`~ckptconv.errors.FitError` (the rule says itself that this checkpoint is not for
    it), with every problem found.
    """
    scope = Scope(given or {}, rules.header.vars, config)
    table: Table = initial_table(source, composites or {})
    refusal = _unmet(rules, scope, table)
    if refusal:
        raise FitError(Problem("CK208", f"the rule {rules.label} is not for this checkpoint: {refusal}", where=f"{rules.file}  when"))
    run = Run(shown_source)
    table = run.steps(rules, table, scope)
    problems, notes, dropped = run.problems, run.notes, run.dropped
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


class Run:
    """The steps of a rule file, and of those that it includes, folded over a table; what they find is collected."""

    def __init__(self, shown_source: str) -> None:
        self.shown_source = shown_source
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.dropped: list[Dropped] = []

    def steps(self, rules: RuleFile, table: Table, scope: Scope) -> Table:
        for rule_step in rules.steps:
            origin = Origin(rules.file, rule_step.line, rule_step.number, rule_step.step.op)
            context = Context(origin, rule_step.where, scope, self.shown_source)
            if _wanted(rule_step, table, context):
                table = self.step(rule_step, table, context)
            # After a step that failed, a later one may find nothing only because of that: saying so twice would hide the cause.
            failed = any(problem.code != "CK201" for problem in self.problems)
            self.problems += [problem for problem in context.problems if not (failed and problem.code == "CK201")]
            self.notes += context.notes
            self.dropped += context.dropped
        return table

    def step(self, rule_step: RuleStep, table: Table, context: Context) -> Table:
        """The table after one step that is wanted."""
        if isinstance(rule_step.step, Include):
            return self._include(rule_step.step, rule_step.included, table, context)
        return rule_step.step.lower(table, context)

    def _include(self, step: Include, rules: RuleFile | None, table: Table, context: Context) -> Table:
        assert rules is not None, "the loader found it"
        inside = {name.removeprefix(step.scope): entry for name, entry in table.items() if name.startswith(step.scope)}
        if not inside:
            if not step.optional:
                context.problem("CK201", f"no name starts with {printable(step.scope)!r}", try_="add optional: true")
            return table
        lookup = context.scope.lookup({}, table)
        try:
            config = context.scope.config if step.config is None else expressions.evaluate(step.config, lookup)
            given = {name: expressions.evaluate(expressions.parse(value), lookup) if isinstance(value, str) else value
                     for name, value in step.set.items()}  # fmt: skip
        except Refusal as refusal:
            context.refused(refusal, "include")
            return table
        scope = Scope({**context.scope.given, **given}, rules.header.vars, config)
        refusal_text = _unmet(rules, scope, inside)
        if refusal_text:
            if not step.optional:
                context.problem("CK208", f"the rule {rules.label} is not for {printable(step.scope) or 'this checkpoint'}: {refusal_text}")
            return table
        before, problems = len(self.dropped), len(self.problems)
        made = self.steps(rules, inside, scope)
        new = self.problems[problems:]
        if step.optional and new and all(problem.code == "CK201" for problem in new):  # it is not for these names: leave them as they are
            del self.problems[problems:], self.dropped[before:]
            return table
        self.dropped[before:] = [replace(drop, name=step.scope + drop.name) for drop in self.dropped[before:]]
        first = step.scope + next(iter(inside))
        results: dict[str, list[tuple[str, Entry]]] = {step.scope + name: [] for name in inside}
        results[first] = [(step.scope + name, entry) for name, entry in made.items()]
        return replaced(table, results, context)


def initial_table(source: Manifest, composites: Mapping[str, Composite] | None = None) -> dict[str, Entry]:
    """Every name of the source as itself; the names of a tie are one read, so that they stay one tensor.

    The parts of a composite are no names that a rule sees: it sees the whole.
    """
    aliases, wholes = source.aliases, _wholes(source, composites or {})
    parts = {node.name for entry in wholes.values() for node in walk([entry.expr]) if isinstance(node, Read)}
    plain = {name: Entry(Read(aliases.get(name, name), spec)) for name, spec in source.tensors.items() if name not in parts}
    return {**plain, **wholes}


def _wholes(source: Manifest, composites: Mapping[str, Composite]) -> dict[str, Entry]:
    made: dict[int, Expr] = {}
    for name, composite in composites.items():
        if id(composite) not in made:  # one object under two names is one tensor
            made[id(composite)] = _whole(name, composite, source)
    return {name: Entry(made[id(composite)]) for name, composite in composites.items()}


def _whole(name: str, composite: Composite, source: Manifest) -> Expr:
    """The tensor that the parts make up."""

    def part(key: str) -> Expr:
        value = composite.parts[key]
        if isinstance(value, (int, float)):
            return Fill("constant", value, 0, TensorSpec((), DType.float32))
        return Read(f"{name}::{key}", source[f"{name}::{key}"])

    parts = [part(key) for key in composite.parts]
    if composite.kind in ("coo", "csr"):
        return apply(Dense(layout="coo" if composite.kind == "coo" else "csr", shape=composite.spec.shape), *parts)
    if composite.kind == "int8":
        return apply(Decode(layout="int8", dtype=composite.spec.dtype, axis=composite.axis), *parts)
    if composite.kind == "flat":
        row = parts[0] if len(parts) == 1 else apply(Concat(axis=0), *parts)
        return row if row.spec.shape == composite.spec.shape else apply(Reshape(shape=composite.spec.shape), row)
    try:
        return tile(composite.spec.shape, [Piece(box, expr) for box, expr in zip(composite.boxes, parts, strict=True)])
    except Untiled as reason:
        raise Refusal(f"the chunks of {printable(name)} do not make it up: {reason}", code="CK305") from None


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
    firsts: dict[tuple[Expr, str], str] = {}
    ties: dict[str, list[str]] = {}
    for name, entry in table.items():
        first = firsts.setdefault((entry.expr, entry.identity), name)
        if first is not name and entry.expr.spec.numel:
            ties.setdefault(first, [first]).append(name)
    return tuple(map(tuple, ties.values()))


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
