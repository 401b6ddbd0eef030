"""Rule files turned round step by step: each step of the way back is the table before its forward step, written as a step.

Every step that is written is planned at once on the names that are there, and must give back the names and shapes from before, each from
the right ones; what does not is a reason (:class:`Unturned`) to derive the whole way back from the plan instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv.backnames import (
    Entry,
    Formula,
    Parts,
    Row,
    Shape,
    Slot,
    Unfit,
    Want,
    Word,
    escaped,
    fit,
    guessed,
    matched_text,
    opened,
    parts_of,
    text_of,
    texts_of,
)  # fmt: skip
from ckptconv.backplan import Unturned, Written, derived
from ckptconv.errors import Refusal
from ckptconv.invert import invert
from ckptconv.plan import Apply, Expr, Fill, Origin, Output, Plan, Read, reads
from ckptconv.planner import Run
from ckptconv.ruleset import expressions, steps
from ckptconv.ruleset.expressions import Node
from ckptconv.ruleset.model import RuleFile, RuleStep
from ckptconv.ruleset.patterns import Capture, Pattern, Template
from ckptconv.ruleset.steps.base import Context, Scope, Step, Table, integer, with_captures
from ckptconv.ruleset.steps.base import Entry as Line
from ckptconv.ruleset.steps.choosing import Check, Copy, Drop, Keep
from ckptconv.ruleset.steps.combining import NamedStep
from ckptconv.ruleset.steps.fan import fan_out, grouped
from ckptconv.ruleset.steps.filling import FillStep
from ckptconv.ruleset.steps.including import Include
from ckptconv.ruleset.steps.joining import AlongStep, ConcatStep, Split, Stack, Unstack
from ckptconv.ruleset.steps.naming import AddPrefix, Rename, StripInfix, StripPrefix
from ckptconv.ruleset.steps.shaping import AffineStep, MapStep, RearrangeStep
from ckptconv.spec import Box, Manifest, TensorSpec
from ckptconv.transforms import Affine, Cast, Guard, Index, Rearrange, Reshape, Slice, Transform
from ckptconv.transforms.rearrange import sides


class Loss(Struct, frozen=True):
    """Source tensors that a step lost, or, where ``rounded``, gives back only nearly."""

    step: str
    names: tuple[str, ...]
    reason: str
    rounded: bool = False


class Walk(Struct):
    """The way back so far: what is written, which names are there, and what was lost."""

    scope: Scope
    back: Scope
    have: list[str]
    written: list[Written] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  #: variables that the written steps mention
    file: str = ""  #: the rule file whose lines need no name


class Turn(Struct):
    """One forward step that is being undone."""

    walk: Walk
    rule: RuleStep
    context: Context
    before: Table
    after: Table
    written: list[Written] = field(default_factory=list)
    made: dict[str, tuple[str, ...]] = field(default_factory=dict)  #: name before -> the names that it comes back from
    gone: set[str] = field(default_factory=set)  #: names after the step that are needed no more

    @property
    def have(self) -> list[str]:
        return self.walk.have

    @property
    def label(self) -> str:
        file = self.context.origin.file
        return f"{f'{Path(file).stem} ' if file != self.walk.file else ''}line {self.rule.line}: {self.rule.step.op}"

    def write(self, op: str, body: Any) -> None:
        self.written.append(Written(op, body, f"undoes {self.label}"))

    def lose(self, names: Iterable[str], reason: str, *, rounded: bool = False) -> None:
        """``names`` are of the table before the step; what is reported are the source tensors in them."""
        sources = tuple(dict.fromkeys(name for each in names for name in reads(self.before[each].expr)))
        if sources:
            self.walk.losses.append(Loss(self.label, sources, reason, rounded))

    def renamed(self, rows: Sequence[Row], shape: Shape | None = None) -> list[Entry]:
        """Entries for rows of one step that sees the names as they are."""
        return fit(rows, shape, self.have) if shape is not None else guessed(rows, self.have)

    @property
    def universe(self) -> list[str]:
        """What a step may see that is one of several: what is there, and what those before it made."""
        return list(dict.fromkeys([*self.have, *self.made]))


class Done(Struct, frozen=True):
    """One forward step that was done; of an include, with the steps that it was."""

    rule: RuleStep
    context: Context
    before: Table
    after: Table
    inner: tuple[Done, ...] = ()


class _Recording(Run):
    """The steps of a rule file, each noted with the tables before and after it."""

    def __init__(self) -> None:
        super().__init__("SRC")
        self.done: list[Done] = []

    def step(self, rule_step: RuleStep, table: Table, context: Context) -> Table:
        outer, self.done = self.done, []
        after = super().step(rule_step, table, context)
        if not isinstance(rule_step.step, Include) or after is not table:
            outer.append(Done(rule_step, context, table, after, tuple(self.done)))
        self.done = outer
        return after


def turned(rules: RuleFile, source: Table, scope: Scope, back: Scope) -> Walk:
    """The steps of the way back, last to first. Raises :class:`Unturned` where one cannot be turned round on its own."""
    recording = _Recording()
    table = recording.steps(rules, source, scope)
    walk = Walk(scope, back, list(table), file=rules.file)
    _back_through(walk, recording.done)
    return walk


def _back_through(walk: Walk, done: Sequence[Done]) -> None:
    back = walk.back
    for each in reversed(done):
        walk.scope, walk.back = each.context.scope, _seen(each.context.scope, back)
        turn = Turn(walk, each.rule, each.context, each.before, each.after)
        if isinstance(each.rule.step, Include):
            _undo_include(turn, each.rule.step, each.inner, back)
        else:
            _undo(turn)
    walk.back = back


def _seen(scope: Scope, back: Scope) -> Scope:
    """What the way back of a step sees: nothing, where the step's rule file was included with variables that mean something else."""
    alike = all(back.declared.get(name, value) == value for name, value in scope.declared.items())
    return back if alike and scope.given == back.given and scope.config == back.config else Scope()


def _undo_include(turn: Turn, step: Include, inner: Sequence[Done], back: Scope) -> None:
    """The steps of an included rule file, each turned round, in the place of the include; under its scope, with that before every name."""
    walk = turn.walk
    losses = len(walk.losses)
    names = [name for name in walk.have if name.startswith(step.scope)]
    inside = Walk(walk.scope, back, [name.removeprefix(step.scope) for name in names], file=walk.file)
    try:
        _back_through(inside, inner)
        written = [under(each, step.scope) for each in inside.written] if step.scope else inside.written
        have = [name for name in walk.have if not name.startswith(step.scope)] + [step.scope + name for name in inside.have]
        _same_names(turn, written, have)
    except Unturned as first:
        del walk.losses[losses:]
        try:
            _undone_by(_general, turn)
        except Unturned as second:
            raise Unturned(f"{turn.label}: {first}; {second}") from None
        return
    walk.have = have
    walk.written += written
    walk.losses += inside.losses
    walk.used |= inside.used


def _same_names(turn: Turn, written: Sequence[Written], wanted: Sequence[str]) -> None:
    table: Table = {name: Line(Read(name, turn.after[name].expr.spec)) for name in turn.have}
    for each in written:
        table = lowered(each, table, turn.walk.back)
    if set(table) != set(wanted):
        raise Unturned(f"the way back gives other names ({', '.join(sorted(set(table) ^ set(wanted))[:3])})")


def under(written: Written, scope: str) -> Written:
    """A step for the names under ``scope``.

    >>> under(Written("rename", {"a.{p}": "b.{p}"}), "m.").body, under(Written("add_prefix", "x."), "m.").body
    ({'m.a.{p}': 'm.b.{p}'}, {'m.{r:**}': 'm.x.{r}'})
    """
    before = escaped(scope)
    if written.op == "rename":
        return replace(written, body={before + pattern: before + template for pattern, template in written.body.items()})
    if written.op in ("add_prefix", "strip_prefix"):
        body = {"prefix": written.body} if isinstance(written.body, str) else written.body
        if "keys" in body or not body["prefix"].endswith("."):
            raise Unturned(f"{written.op} of some names has no word for it under {scope}")
        prefix = escaped(body["prefix"])
        names = (f"{before}{{r:**}}", f"{before}{prefix}{{r:**}}")
        old, new = names if written.op == "add_prefix" else names[::-1]
        return replace(written, op="rename", body={old: new.replace(":**", "")})
    body = {
        key: _each(value, before) if key in ("keys", "from", "to") else value
        for key, value in (written.body if isinstance(written.body, Mapping) else {"keys": written.body}).items()
    }
    return replace(written, body=body)


def _each(texts: Any, before: str) -> Any:
    return before + texts if isinstance(texts, str) else [before + text for text in texts]


def _undo(turn: Turn) -> None:
    """Undoes one step, by its own rule or from what it did, and plans what was written for it."""
    handler = next((handler for kind, handler in _HANDLERS if isinstance(turn.rule.step, kind)), None)
    known = len(turn.walk.losses)
    try:
        if handler is None:
            raise Unturned("no step undoes it")
        _undone_by(handler, turn)
    except Unturned as first:
        del turn.walk.losses[known:]
        try:
            _undone_by(_general, replace(turn, written=[], made={}, gone=set()))
        except Unturned as second:
            raise Unturned(f"{turn.label}: {first}; {second}") from None


def _undone_by(handler: Callable[[Turn], None], turn: Turn) -> None:
    try:
        handler(turn)
    except (Unfit, Refusal) as reason:
        raise Unturned(str(reason)) from None
    touched = {name for names in turn.made.values() for name in names} | turn.gone
    for name in turn.have:
        if name not in touched:
            if name not in turn.before:
                raise Unturned(f"nothing says what {name} was")
            turn.made.setdefault(name, (name,))
    turn.walk.have = _planned(turn)
    turn.walk.written += turn.written


def _general(turn: Turn) -> None:
    """Any step, from the inverse of the plan of this step alone."""
    context = Context(turn.context.origin, turn.context.where, turn.walk.scope)
    before: Table = {name: Line(Read(name, line.expr.spec)) for name, line in turn.before.items()}
    after = Run("SRC").step(turn.rule, before, context)
    same = {name for name, line in after.items() if before.get(name) is not None and before[name].expr == line.expr}
    have = set(turn.have)
    there = tuple(Output(name, line.expr) for name, line in after.items() if name in have and name not in same)
    source = Manifest({name: line.expr.spec for name, line in before.items() if name not in same})
    inversion = invert(Plan(source, there))
    for lost in inversion.lost:
        turn.lose([lost.name], lost.reason)
    turn.made.update({output.name: reads(output.expr) for output in inversion.plan.outputs})
    turn.gone.update(name for drop in inversion.plan.dropped for name in drop.sources)
    turn.written += derived(inversion.plan, turn.universe, f"undoes {turn.label}")


def _planned(turn: Turn) -> list[str]:
    """The names after the written steps, which must be those from before the forward step, each from the right ones."""
    table: Table = {name: Line(Read(name, turn.after[name].expr.spec)) for name in turn.have}
    for written in turn.written:
        table = lowered(written, table, turn.walk.back)
    wanted = turn.made
    if set(table) != set(wanted):
        odd = sorted(set(table) ^ set(wanted))
        raise Unturned(f"the way back gives other names ({', '.join(odd[:3])})")
    for name, sources in wanted.items():
        expr = table[name].expr
        if expr.spec != turn.before[name].expr.spec or reads(expr) != sources:
            raise Unturned(f"{name} does not come back as it was")
    return list(table)


def lowered(written: Written, table: Table, scope: Scope) -> Table:
    """The table after a written step. Raises :class:`Unturned` with its first problem."""
    kind = steps.ALL[written.op]
    try:
        step = kind.validated(kind.short(written.body))
    except ValueError as error:
        raise Unturned(f"{written.op}: {error}") from None
    context = Context(Origin("back", 0, 0, written.op), written.op, scope)
    table = step.lower(table, context)
    if context.problems:
        raise Unturned(f"{written.op}: {context.problems[0].what}")
    return table


# --- names ---------------------------------------------------------------------------------------------------------------------------


def _rename(turn: Turn) -> None:
    step = turn.rule.step
    assert isinstance(step, Rename)
    rows: dict[int, list[tuple[str, str]]] = {}
    have = set(turn.have)
    for old, at, captures in step.claims(turn.before, turn.context):
        new = step.entries[at][1].render(turn.walk.scope.lookup(captures, turn.before, old))
        if new in have:
            rows.setdefault(at, []).append((new, old))
            turn.made[old] = (new,)
    if not rows:
        return
    table: dict[str, str] = {}
    learnt: dict[str, tuple[str, ...]] = {}
    for last in (False, True):  # what one entry's names tell of a placeholder is tried for the others
        table.clear()
        for at, pairs in sorted(rows.items()):
            pattern, template = step.entries[at]
            for entry in named(turn.have, pattern, [(template, {})], [((new,), old) for new, old in pairs], learnt):
                table[text_of(entry.keys[0])] = text_of(entry.values[0])
                if not last and not pattern.is_regex:
                    _learn(learnt, parts_of(pattern.text), entry)
    turn.write("rename", table)


def _learn(learnt: dict[str, tuple[str, ...]], parts: Parts, entry: Entry) -> None:
    """Notes what the entry gives for each placeholder of the forward pattern."""
    if len(parts) != len(entry.values[0]):
        return
    for part, value in zip(parts, entry.values[0], strict=True):
        if isinstance(part, Slot) and isinstance(value, Formula):
            learnt[part.name] = tuple(dict.fromkeys([*learnt.get(part.name, ()), value.text]))


def named(
    universe: Sequence[str], pattern: Pattern, templates: Sequence[tuple[Template, Mapping[str, Capture]]],
    pairs: Sequence[tuple[tuple[str, ...], str]], learnt: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Entry]:  # fmt: skip
    """Entries that lead from what ``templates`` made back to the names that ``pattern`` matched."""
    if pattern.is_regex:
        return guessed([Row(news, (old,)) for news, old in pairs], universe)
    parts = parts_of(pattern.text)
    rows = [Row(news, (old,), matched_text(parts, old)) for news, old in pairs]
    shape = _shape_of(parts, templates, rows, [_wants(parts)])
    hints = {name: (*shape.hints.get(name, ()), *more) for name, more in (learnt or {}).items()}
    return fit(rows, replace(shape, hints={**shape.hints, **hints}), universe)


def _shape_of(
    parts: Parts, templates: Sequence[tuple[Template, Mapping[str, Capture]]], rows: Sequence[Row], values: Sequence[Parts]
) -> Shape:
    slots = {part.name: part for part in parts if isinstance(part, Slot)}
    observed = {name: {row.wants[name] for row in rows if name in row.wants} for name in slots}
    shapes = [opened(template, slots, {key: str(word) for key, word in extra.items()}, observed) for template, extra in templates]
    return Shape(tuple(shape.keys[0] for shape in shapes), tuple(values), shapes[0].hints)


def _wants(parts: Parts) -> Parts:
    return tuple(Want(part.name) if isinstance(part, Slot) else part for part in parts)


def _prefix(turn: Turn) -> None:
    """Whatever took a prefix off, at once or again and again: it goes on again, before all names or those that carried it."""
    changed = _moved(turn)
    groups: dict[str, list[tuple[str, str]]] = {}
    for old, new in changed:
        if not old.endswith(new):
            raise Unturned(f"{new} is no end of {old}")
        groups.setdefault(old.removesuffix(new), []).append((new, old))
    if len(groups) == 1 and len(changed) == len(turn.have):
        turn.write("add_prefix", next(iter(groups)))
        return
    for prefix, pairs in groups.items():
        keys = _modules([new for new, _ in pairs], turn.universe if len(groups) > 1 else turn.have)
        turn.write("add_prefix", {"prefix": prefix, "keys": _listed(keys)})


def _modules(names: Sequence[str], universe: Sequence[str]) -> list[str]:
    """Patterns of names: whole modules where all of a module is meant."""
    firsts = dict.fromkeys(name.partition(".")[0] for name in names)
    if not any(name.partition(".")[0] in firsts for name in set(universe) - set(names)):
        return [escaped(first) if first in names else f"{escaped(first)}.**" for first in firsts]
    return [text_of(entry.keys[0]) for entry in guessed([Row((name,), ()) for name in names], universe)]


def _moved(turn: Turn) -> list[tuple[str, str]]:
    """(old, new) of a step that only renames, for the names that are there: both tables have one order."""
    have = set(turn.have)
    pairs = [(old, new) for old, new in zip(turn.before, turn.after, strict=True) if new in have]
    turn.made.update({old: (new,) for old, new in pairs})
    return [(old, new) for old, new in pairs if old != new]


def _add_prefix(turn: Turn) -> None:
    step = turn.rule.step
    assert isinstance(step, AddPrefix)
    changed = _moved(turn)
    if not changed:
        return
    if sum(name.startswith(step.prefix) for name in turn.have) == len(changed):
        where = {} if len(changed) == len(turn.have) else {"where": "some"}
        turn.write("strip_prefix", {"prefix": step.prefix, **where} if where else step.prefix)
    else:
        turn.write("rename", _table(guessed([Row((new,), (old,)) for old, new in changed], turn.have)))


def _table(entries: Sequence[Entry]) -> dict[str, str]:
    return {text_of(entry.keys[0]): text_of(entry.values[0]) for entry in entries}


def _strip_infix(turn: Turn) -> None:
    """Segments that were taken out go in again where they stood: before the rest of a name that needs no saying."""
    changed = _moved(turn)
    if not changed:
        return
    fronts = {old.removesuffix(new) for old, new in changed if old.endswith(new)}
    if len(fronts) == 1 and len(changed) == len(turn.have) and all(old.endswith(new) for old, new in changed):
        turn.write("add_prefix", next(iter(fronts)))
        return
    now = dict(changed)
    insertions = {old: _insertions(old.split("."), new.split(".")) for old, new in changed}
    names = list(turn.have)
    for place in sorted({at for each in insertions.values() for at in each}, reverse=True):
        rows = []
        for old, each in insertions.items():
            if place in each:
                parts = now[old].split(".")
                longer = ".".join([*parts[:place], each[place], *parts[place:]])
                rows.append((longer, now[old], place))
                now[old] = longer
        texts = {each[place] for old, each in insertions.items() if place in each}
        if not place and len(texts) == 1 and len(rows) == len(names):
            turn.write("add_prefix", f"{texts.pop()}.")
        else:
            turn.write("rename", _table(_with_rest(rows, names)))
        names = [longer for longer, _, _ in rows] + [name for name in names if name not in {short for _, short, _ in rows}]


def _insertions(before: Sequence[str], after: Sequence[str]) -> dict[int, str]:
    """Place in the short name -> the segments that stood there in the long one."""
    found: dict[int, str] = {}
    at = 0
    for place, part in enumerate(after):
        start = at
        while before[at] != part or len(before) - at < len(after) - place:
            at += 1
        if at > start:
            found[place] = ".".join(before[start:at])
        at += 1
    return found


def _with_rest(rows: Sequence[tuple[str, str, int]], universe: Sequence[str]) -> list[Entry]:
    """Entries ``head.{r:**}`` for (long, short, where they part); from the whole names where others have the head too."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for long, short, place in rows:
        head = ".".join(short.split(".")[:place])
        rest = ".".join(short.split(".")[place:])
        groups.setdefault((head, long.removesuffix(f".{rest}")), []).append(Row((short,), (long,)))
    found: list[Entry] = []
    for entry in guessed([Row((head,), (longer,)) for head, longer in groups if head], [head for head, _ in groups]):
        mine = tuple(row for head in entry.rows for row in groups[(head.keys[0], head.values[0])])
        found.append(Entry(((*entry.keys[0], ".", Slot("r", "deep")),), ((*entry.values[0], ".", Formula("r")),), mine))
    for entry in found:
        pattern, claimed = Pattern.parse(text_of(entry.keys[0])), {row.keys[0] for row in entry.rows}
        if any(name not in claimed and pattern.match(name) is not None for name in universe):
            break
    else:
        if all(head for head, _ in groups):
            return found
    return guessed([Row((short,), (long,)) for long, short, _ in rows], universe)


# --- one to many, many to one ----------------------------------------------------------------------------------------------------------


def _split(turn: Turn) -> None:
    step = turn.rule.step
    assert isinstance(step, Split)
    have = set(turn.have)
    for at, claims in _by_entry(step, turn).items():
        pattern = step.source[at]
        targets = list(fan_out(step.to, pattern.names))
        pairs: list[tuple[tuple[str, ...], str]] = []
        known: dict[str, Mapping[str, Capture]] = {}
        for old, captures in claims:
            lookup = turn.walk.scope.lookup(captures, turn.before, old)
            news = tuple(template.render(with_captures(lookup, extra)) for template, extra in targets)
            if not have.issuperset(news):
                _lost(turn, [old], "a part of it is not there", [new for new in news if new in have])
                continue
            pairs.append((news, old))
            known[old] = captures
            turn.made[old] = news
        for entry in named(turn.universe, pattern, targets, pairs) if pairs else ():
            for sub, axes in _with_axes(turn, step, entry, [known[row.values[0]] for row in entry.rows], _inner(step)):
                turn.write("concat", {"from": _one(texts_of(sub.keys)), "to": text_of(sub.values[0]), **_along(step), **axes})


def _by_entry(step: Step, turn: Turn) -> dict[int, list[tuple[str, dict[str, Capture]]]]:
    found: dict[int, list[tuple[str, dict[str, Capture]]]] = {}
    for old, at, captures in step.claims(turn.before, turn.context):
        found.setdefault(at, []).append((old, captures))
    return dict(sorted(found.items()))


def _along(step: AlongStep) -> dict[str, Any]:
    return {"dim": step.dim} if step.layout is None else {"layout": step.layout, "along": step.along}


def _inner(step: AlongStep) -> tuple[str, ...]:
    """The axes that a piece is opened by: those beside ``along``, which a piece has less of."""
    if step.layout is None or step.along is None:
        return ()
    group = next(group for group in sides(f"{step.layout} -> {step.layout}")[0] if group is not None and step.along in group)
    others = [axis for axis in group if axis != step.along]
    return (*(axis for axis in step.axes if axis != step.along), *(axis for axis in others if axis not in step.axes))


def _with_axes(
    turn: Turn, step: AlongStep | RearrangeStep, entry: Entry, known: Sequence[Mapping[str, Capture]], wanted: Sequence[str] | None = None
) -> list[tuple[Entry, dict[str, Any]]]:
    """The entry with the sizes of axes (the step's own, or ``wanted``): as they are written where that means the same on the way back,
    else their values."""
    given = step.axes if isinstance(step, AlongStep) else step.sizes
    wanted = tuple(given) if wanted is None else wanted
    axes = {name: _kept(turn, given[name], entry, known) if name in given else None for name in wanted}
    if None not in axes.values():
        for name in wanted:
            turn.walk.used |= given[name].names()
        return [(entry, axes)]
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row, captures in zip(entry.rows, known, strict=True):
        old = (row.values or row.keys)[0]
        lookup = turn.walk.scope.lookup(captures, turn.before, old)
        seen = _measured(step, turn.before[old].expr, lookup) if isinstance(step, AlongStep) and not set(wanted) <= set(given) else {}
        sizes = tuple(expressions.evaluate(given[name], lookup) if name in given else seen[name] for name in wanted)
        groups.setdefault(sizes, []).append(row)
    if len(groups) == 1:
        numbers = dict(zip(wanted, next(iter(groups)), strict=True))
        said = {name: numbers[name] if text is None else text for name, text in axes.items()}
        for name in wanted:
            turn.walk.used |= given[name].names() if axes[name] is not None else set()
        return [(entry, said)]
    return [
        (part, dict(zip(wanted, sizes, strict=True)))
        for sizes, rows in groups.items()
        for part in guessed([replace(row, wants={}) for row in rows], turn.universe)
    ]


def _measured(step: AlongStep, expr: Expr, lookup: expressions.Lookup) -> dict[str, int]:
    """The sizes of all axes of a layout, as a tensor that was cut has them."""
    assert step.layout is not None
    assert step.along is not None
    total = sum(integer(size, lookup, "a size", 0) for size in step.sizes) if isinstance(step, Split) and step.sizes is not None else None
    opened, axis = step.opened(expr, lookup, total)
    group = next(group for group in sides(f"{step.layout} -> {step.layout}")[0] if group is not None and step.along in group)
    first = axis - group.index(step.along)
    return dict(zip(group, opened.spec.shape[first : first + len(group)], strict=True))


def _kept(turn: Turn, node: Node, entry: Entry, known: Sequence[Mapping[str, Capture]]) -> Any:
    """An expression as text, if its value on the way back is the same for every row; None where it is not."""
    if node.kind == "literal":
        return node.value
    if _asks_the_table(node, turn.walk.scope):
        return None
    for captures, back in zip(known, entry.captures, strict=True):
        try:
            wanted = expressions.evaluate(node, turn.walk.scope.lookup(captures, turn.before))
            found = expressions.evaluate(node, turn.walk.back.lookup(back, {}))
        except Refusal:
            return None
        if wanted != found:
            return None
    return spelled(node)


def _asks_the_table(node: Node, scope: Scope, depth: int = 0) -> bool:
    """True where an expression's value depends on tensors, itself or through its variables."""
    if node.kind == "call" and node.value in ("shape", "has"):
        return True
    if any(_asks_the_table(part, scope, depth) for part in node.parts):
        return True
    value = scope.declared.get(node.value) if node.kind == "name" and node.value not in scope.given else None
    return isinstance(value, str) and (depth > 20 or _asks_the_table(expressions.parse(value), scope, depth + 1))


def spelled(node: Node) -> str:
    """An expression as text, which parses to the same.

    >>> spelled(expressions.parse("{'q': H, 'k': G}[x] * (a + 1)"))
    "{'q': H, 'k': G}[x] * (a + 1)"
    """
    parts = [spelled(part) for part in node.parts]
    inner = [f"({text})" if part.kind in ("op", "if", "and", "or", "not", "minus") else text for part, text in zip(node.parts, parts, strict=True)]  # fmt: skip
    if node.kind == "literal":
        if isinstance(node.value, str):
            return f"'{node.value}'" if "'" not in node.value else f'"{node.value}"'
        return (
            {True: "true", False: "false", None: "null"}[node.value]
            if node.value is None or isinstance(node.value, bool)
            else str(node.value)
        )
    if node.kind == "name":
        return str(node.value)
    if node.kind == "op":
        return f"{inner[0]} {node.value} {inner[1]}"
    if node.kind in ("and", "or"):
        return f"{inner[0]} {node.kind} {inner[1]}"
    if node.kind == "if":
        return f"{inner[1]} if {inner[0]} else {inner[2]}"
    if node.kind in ("not", "minus"):
        return f"{'not ' if node.kind == 'not' else '-'}{inner[0]}"
    if node.kind == "list":
        return f"[{', '.join(parts)}]"
    if node.kind == "table":
        return "{" + ", ".join(f"{key}: {value}" for key, value in zip(parts[::2], parts[1::2], strict=True)) + "}"
    if node.kind == "field":
        return f"{inner[0]}.{node.value}"
    if node.kind == "item":
        return f"{inner[0]}[{parts[1]}]"
    return f"{node.value}({', '.join(parts)})"


def _joined(turn: Turn) -> None:
    """Concat and stack: what was gathered is cut again."""
    step = turn.rule.step
    assert isinstance(step, (ConcatStep, Stack))
    patterns = list(step.matched())
    over = step.over if isinstance(step, ConcatStep) else (step.over,)
    have = set(turn.have)
    groups: dict[tuple[Any, ...], list[tuple[Row, Mapping[str, Capture]]]] = {}
    shapes: dict[tuple[Any, ...], Shape] = {}
    plain = [parts_of(pattern.text) for pattern in patterns]
    for group in grouped(step.claims(turn.before, turn.context), patterns, over, turn.context):
        members = [(at, name) for at, member in enumerate(group.members) for name in member.values()]
        names = [name for _, name in members]
        new = step.to.render(turn.walk.scope.lookup(group.captures, turn.before))
        if new not in have:
            turn.lose(names, "what they were joined to is not there")
            continue
        values = tuple(_member(plain[at], name, over) for at, name in members)
        row = Row((new,), tuple(names), {k: v for k, v in matched_text(plain[members[0][0]], names[0]).items() if k not in over})
        key = (values, _sizes(turn, step, names, group.captures))
        groups.setdefault(key, []).append((row, group.captures))
        shapes[key] = _shape_of(plain[0], [(step.to, {})], [row for row, _ in groups[key]], values)
        turn.made.update(dict.fromkeys(names, (new,)))
    for key, found in groups.items():
        known = {row.keys[0]: captures for row, captures in found}
        for entry in fit([row for row, _ in found], shapes[key], turn.universe):
            _write_cut(turn, step, entry, key[1], known)


def _member(parts: Parts, name: str, over: Sequence[str]) -> Parts:
    """A gathered name with its own words written out, everything else still wanted."""
    words = matched_text(parts, name)
    return tuple(
        (Word(words[part.name], part.name) if part.name in over else Want(part.name)) if isinstance(part, Slot) else part for part in parts
    )


def _sizes(turn: Turn, step: ConcatStep | Stack, names: Sequence[str], captures: Mapping[str, Capture]) -> tuple[int, ...]:
    """How much of the axis each piece has; nothing where all have the same."""
    if isinstance(step, Stack):
        return ()
    lookup = turn.walk.scope.lookup(captures, turn.before)
    pieces = [step.opened(turn.before[name].expr, lookup) for name in names]
    sizes = tuple(piece.spec.shape[axis] for piece, axis in pieces)
    return sizes if len(set(sizes)) > 1 else ()


def _write_cut(
    turn: Turn, step: ConcatStep | Stack, entry: Entry, sizes: tuple[int, ...], known: Mapping[str, Mapping[str, Capture]]
) -> None:
    source = text_of(entry.keys[0])
    if isinstance(step, Stack):
        to = texts_of(entry.values, "part")
        numbers = [next((part.text for part in parts if isinstance(part, Word)), "") for parts in entry.values]
        if len(to) == 1 and numbers == [str(at) for at in range(len(numbers))] and len(numbers) > 1:
            over = next(name for name in Template.parse(to[0]).mentions if name not in Pattern.parse(source).names)
            turn.write("unstack", {"from": source, "over": over, "to": to[0], "dim": step.dim})
        else:
            turn.write(
                "convert", {"from": source, "to": _listed([text_of(parts) for parts in entry.values]), "do": [{"unstack": step.dim}]}
            )
        return
    for sub, axes in _with_axes(turn, step, entry, [known[row.keys[0]] for row in entry.rows]):
        body = {"from": text_of(sub.keys[0]), "to": _one(texts_of(sub.values)), **_along(step), **({"sizes": list(sizes)} if sizes else {})}
        turn.write("split", {**body, **axes})


def _unstack(turn: Turn) -> None:
    step = turn.rule.step
    assert isinstance(step, Unstack)
    have = set(turn.have)
    for at, claims in _by_entry(step, turn).items():
        pattern = step.source[at]
        counts: dict[int, list[tuple[tuple[str, ...], str]]] = {}
        for old, captures in claims:
            spec = turn.before[old].expr.spec
            count = spec.shape[step.dim % len(spec.shape)]
            lookup = turn.walk.scope.lookup(captures, turn.before, old)
            news = tuple(step.to.render(with_captures(lookup, {step.over: _index(number)})) for number in range(count))
            if not have.issuperset(news) or not news:
                _lost(turn, [old], "a part of it is not there", [new for new in news if new in have])
                continue
            counts.setdefault(count, []).append((news, old))
            turn.made[old] = news
        for count, pairs in counts.items():
            targets: list[tuple[Template, Mapping[str, Capture]]] = [(step.to, {step.over: str(number)}) for number in range(count)]
            for entry in named(turn.universe, pattern, targets, pairs):
                _write_stack(turn, entry, step, count)


def _index(number: int) -> Capture:
    from ckptconv.ruleset.patterns import Index as Number

    return Number(str(number))


def _write_stack(turn: Turn, entry: Entry, step: Unstack, count: int) -> None:
    source = texts_of(entry.keys, "int")
    to = text_of(entry.values[0])
    if len(source) == 1 and count > 1:
        over = next(name for name in Pattern.parse(source[0]).names if name not in Template.parse(to).mentions)
        turn.write("stack", {"from": source[0], "over": over, "to": to, "dim": step.dim})
    else:
        raise Unturned("its parts are not counted from 0")


# --- one to one ------------------------------------------------------------------------------------------------------------------------


def _mapped(turn: Turn) -> None:
    step = turn.rule.step
    assert isinstance(step, MapStep)
    have = set(turn.have)
    groups: dict[tuple[Any, ...], list[tuple[str, str, Mapping[str, Capture]]]] = {}
    for old, at, captures in step.claims(turn.before, turn.context):
        new = old if step.to is None else step.to.render(turn.walk.scope.lookup(captures, turn.before, old))
        if new not in have:
            turn.lose([old], "what it became is not there")
            continue
        back = _way_back(turn, step, old, new)
        if back is None:
            _lost(turn, [old], f"{step.op} cannot be undone", [new])
            continue
        turn.made[old] = (new,)
        groups.setdefault((at, _key(back)), []).append((old, new, captures))
    for (at, key), found in _one_open(groups).items():
        _write_mapped(turn, step, step.matched()[at], key, found)


def _one_open(groups: dict[tuple[Any, ...], list[Any]]) -> dict[tuple[Any, ...], list[Any]]:
    """Shapes that differ at one place only are one step, with -1 there."""
    shapes = [key[1][1][0][1] for key in groups if key[1][0] == "reshape"]
    places = [at for at in range(len(shapes[0])) if len({shape[at] for shape in shapes}) > 1] if len({len(s) for s in shapes}) == 1 else []
    if len(places) != 1 or any(0 in shape or -1 in shape for shape in shapes):
        return groups
    merged: dict[tuple[Any, ...], list[Any]] = {}
    for (at, back), found in groups.items():
        if back[0] == "reshape":
            shape = tuple(-1 if place == places[0] else size for place, size in enumerate(back[1][0][1]))
            back = ("reshape", (("shape", shape),))  # noqa: PLW2901  (the same key, opened)
        merged.setdefault((at, back), []).extend(found)
    return merged


def _key(back: tuple[str, Mapping[str, Any]]) -> tuple[Any, ...]:
    return (back[0], tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in back[1].items()))


def _way_back(turn: Turn, step: MapStep, old: str, new: str) -> tuple[str, Mapping[str, Any]] | None:
    """(step, fields) that makes one tensor again; an empty step where nothing was done; None where nothing can be."""
    before, after = turn.before[old].expr, turn.after[new].expr
    if before == after:
        return "rename", {}
    if not isinstance(after, Apply) or [each for each in after.arguments if not isinstance(each, Fill)] != [before]:
        return None  # what was filled in beside it needs no way back; another tensor does
    transform, spec = after.transform, before.spec
    if isinstance(transform, Affine) and isinstance(step, AffineStep):
        if not transform.mul:
            return None
        turn.lose([old], "approximate: the numbers are rounded", rounded=True)
        return "affine", {"mul": 1 / transform.mul, "add": -transform.add / transform.mul}
    mine = after.arguments.index(before)
    pieces = [piece for piece in transform.recover(*(each.spec for each in after.arguments)) if piece.argument == mine]
    if not pieces and isinstance(transform, Cast):
        turn.lose([old], f"approximate: {after.spec.dtype.value} holds less than {spec.dtype.value}", rounded=True)
        return "cast", {"dtype": spec.dtype.value}
    if len(pieces) != 1 or pieces[0].box != Box.whole(spec.shape):
        return None
    back = pieces[0].back
    return _as_step(back, transform, spec, after.spec) if back is not None else ("rename", {})


def _as_step(back: Transform, transform: Transform, spec: TensorSpec, there: TensorSpec) -> tuple[str, Mapping[str, Any]] | None:
    if isinstance(back, Rearrange) and isinstance(transform, Rearrange):
        return "rearrange", {"pattern": back.pattern, **_needed(back, dict(transform.sizes))}
    if isinstance(back, Reshape):
        return "reshape", {"shape": _open_shape(spec.shape)}
    if isinstance(back, Cast):
        return "cast", {"dtype": back.dtype.value}
    if isinstance(back, Slice):
        whole = back.stop == there.shape[back.axis]
        return "slice", {"dim": back.axis, **({"start": back.start} if back.start else {}), **({} if whole else {"stop": back.stop})}
    if isinstance(back, Index):
        return "index", {"dim": back.axis, "take": list(back.take)}
    return None


def _open_shape(shape: Sequence[int]) -> list[int]:
    """``[-1, 1, 1]`` for ``[16, 1, 1]``: the one size that is not 1 need not be said."""
    large = [size for size in shape if size != 1]
    return [size if size == 1 else -1 for size in shape] if len(large) == 1 and large[0] else list(shape)


def _needed(back: Rearrange, given: Mapping[str, int]) -> dict[str, int]:
    """The sizes that the turned arrow wants beside those that were given: of every group all but one."""
    known = dict(back.sizes)
    return {axis: known[axis] for group in sides(back.pattern)[0] for axis in [axis for axis in group or () if axis not in given][1:]}


def _write_mapped(
    turn: Turn, step: MapStep, pattern: Pattern, key: tuple[Any, ...], found: Sequence[tuple[str, str, Mapping[str, Capture]]]
) -> None:
    op, fields = key[0], {name: list(value) if isinstance(value, tuple) else value for name, value in key[1]}
    known = {old: captures for old, _, captures in found}
    in_place = all(old == new for old, new, _ in found)
    if op == "rename" and in_place:
        return
    if in_place and not pattern.is_regex:
        entries = fit([Row((old,), ()) for old in known], Shape((parts_of(pattern.text),), ()), turn.universe)
    elif step.to is None:
        entries = guessed([Row((old,), ()) for old in known], turn.universe)
    else:
        entries = named(turn.universe, pattern, [(step.to, {})], [((new,), old) for old, new, _ in found])
    if op == "rename":
        turn.write("rename", _table(entries))
        return
    bodies: list[tuple[Entry, dict[str, Any]]] = []
    for entry in entries:
        if isinstance(step, RearrangeStep):
            captures = [known[(row.values or row.keys)[0]] for row in entry.rows]
            bodies += [(sub, {**fields, **axes}) for sub, axes in _with_axes(turn, step, entry, captures)]
        else:
            bodies.append((entry, fields))
    _write_bodies(turn, op, bodies, in_place)


def _write_bodies(turn: Turn, op: str, bodies: Sequence[tuple[Entry, dict[str, Any]]], in_place: bool) -> None:
    if not in_place:
        for entry, body in bodies:
            turn.write(op, {"from": text_of(entry.keys[0]), "to": text_of(entry.values[0]), **body})
        return
    # Entries that say the same of several names are one step: also with those that the step before was written for.
    for entry, body in bodies:
        last = turn.written[-1] if turn.written else None
        text = _unnamed(text_of(entry.keys[0]))
        if last is not None and last.op == op and {k: v for k, v in last.body.items() if k != "keys"} == body:
            turn.written[-1] = replace(last, body={"keys": _listed([*_many(last.body["keys"]), text]), **body})
        else:
            turn.write(op, {"keys": text, **body})


# --- there and not there ---------------------------------------------------------------------------------------------------------------


def _lost(turn: Turn, olds: Sequence[str], reason: str, rest: Sequence[str]) -> None:
    """``olds`` do not come back, and what is left of them goes."""
    turn.lose(olds, reason)
    turn.gone.update(rest)
    if rest:
        _drop_names(turn, rest, "a part of what cannot be made again")


def _drop_names(turn: Turn, names: Sequence[str], reason: str) -> None:
    entries = guessed([Row((name,), ()) for name in names], turn.have)
    texts = [text_of(entry.keys[0]) for entry in entries]
    last = turn.written[-1] if turn.written else None
    if last is not None and last.op == "drop" and last.body["reason"] == reason:
        turn.written[-1] = replace(last, body={"keys": _listed([*_many(last.body["keys"]), *texts]), "reason": reason})
    else:
        turn.write("drop", {"keys": _listed(texts), "reason": reason})


def _fewer(turn: Turn) -> None:
    """Drop and keep: lost, but for what is there under another name."""
    kept: dict[Expr, str] = {}
    for name in turn.have:
        kept.setdefault(turn.after[name].expr, name)
    for name in turn.have:
        for expr in _equals(turn.after[name].expr):
            kept.setdefault(expr, name)
    lost = []
    for old in turn.before:
        if old in turn.after:
            continue
        twin = next((kept[expr] for expr in _equals(turn.before[old].expr) if expr in kept), None)
        if twin is None:
            lost.append(old)
        else:
            was, now = turn.before[old], turn.after[twin]
            tied = was.expr == now.expr and was.identity == now.identity  # what was only checked to be equal had bytes of its own
            turn.write("tie" if tied else "copy", {"from": twin, "to": old})
            turn.made[old] = (twin,)
            turn.made.setdefault(twin, (twin,))
    step = turn.rule.step
    reason = step.reason if isinstance(step, (Drop, Keep)) else ""
    turn.lose(lost, f"dropped: {reason}" if reason else "dropped")


def _equals(expr: Expr) -> list[Expr]:
    """The expression, and what it was checked to be equal to."""
    found = [expr]
    for each in found:
        if isinstance(each, Apply) and isinstance(each.transform, Guard):
            found += each.arguments
    return found


def _copied(turn: Turn) -> None:
    """Copy and tie: the second names go; where only they are left, one of them is the first again."""
    step = turn.rule.step
    assert isinstance(step, Copy)
    have = set(turn.have)
    seconds: list[str] = []
    firsts: list[tuple[str, str]] = []
    for old, at, captures in step.claims(turn.before, turn.context):
        lookup = turn.walk.scope.lookup(captures, turn.before, old)
        news = [template.render(with_captures(lookup, extra)) for template, extra in fan_out(step.to, step.source[at].names)]
        there = [new for new in news if new in have]
        if old not in have and there:
            firsts.append((there.pop(0), old))
        seconds += there
        turn.gone.update(there)
    if seconds:
        _drop_names(turn, seconds, "a copy")
    if firsts:
        turn.write("rename", _table(guessed([Row((new,), (old,)) for new, old in firsts], turn.have)))
        turn.made.update({old: (new,) for new, old in firsts})


def _filled(turn: Turn) -> None:
    added = [name for name in turn.have if name not in turn.before]
    turn.gone.update(added)
    if added:
        _drop_names(turn, added, "not part of the source")


def _combined(turn: Turn) -> None:
    """Formulas have no way back; a tensor that only went along under another name has."""
    there = {turn.after[name].expr: name for name in turn.have}
    renamed: list[Row] = []
    for old, line in turn.before.items():
        twin = there.get(line.expr)
        if old in turn.after and turn.after[old].expr == line.expr:
            continue
        if twin is None or twin in turn.before:
            turn.lose([old], f"{turn.rule.step.op} cannot be undone")
        else:
            renamed.append(Row((twin,), (old,)))
            turn.made[old] = (twin,)
    kept = {row.keys[0] for row in renamed}
    rest = [n for n in turn.have if n not in kept and (n not in turn.before or turn.before[n].expr != turn.after[n].expr)]
    turn.gone.update(rest)
    if rest:
        _drop_names(turn, rest, f"made by {turn.rule.step.op}")
    if renamed:
        turn.write("rename", _table(guessed(renamed, turn.have)))


def _nothing(turn: Turn) -> None:
    """A check changes nothing."""


def _one(texts: list[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else texts


def _listed(texts: Sequence[str]) -> str | list[str]:
    return _one(list(dict.fromkeys(texts)))


def _unnamed(pattern: str) -> str:
    """A pattern of names that stay, where a bare ``**`` needed a name for a while only."""
    return re.sub(r"\{rest[0-9]*:\*\*\}", "**", pattern)


def _many(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


_HANDLERS: tuple[tuple[type[Step], Callable[[Turn], None]], ...] = (
    (Rename, _rename), (StripPrefix, _prefix), (AddPrefix, _add_prefix), (StripInfix, _strip_infix), (Drop, _fewer), (Keep, _fewer),
    (Copy, _copied), (Check, _nothing), (Split, _split), (ConcatStep, _joined), (Stack, _joined), (Unstack, _unstack),
    (FillStep, _filled), (MapStep, _mapped), (NamedStep, _combined),
)  # fmt: skip
