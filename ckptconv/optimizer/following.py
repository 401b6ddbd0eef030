"""The moments of every output, as expressions over the source's moments: the parameter's own, with its state in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from msgspec import Struct, field

from ckptconv.errors import Problem, Refusal, printable
from ckptconv.formats.base import Composite, Placed
from ckptconv.names import collapse
from ckptconv.optimizer.reading import COUNTERS, DROP, SCALARS, Member, OptimizerState, dotted
from ckptconv.plan import Apply, Dropped, Expr, Fill, Origin, Output, Plan, Read, apply, walk
from ckptconv.planner import initial_table
from ckptconv.spec import Box, Manifest
from ckptconv.transforms import Cast, Guard
from ckptconv.transforms.base import Transform

MAX_PROBLEMS = 20


class Trained(Struct, frozen=True):
    """An output that the optimizer trains: its group, and its entries: expressions for tensors, everything else as it is."""

    name: str
    group: int
    entries: Mapping[str, Any]
    parts: tuple[str, ...]  #: the source's parameters that it is made of


class Moments(Struct, frozen=True):
    """What follows the weights of one plan."""

    placed: Mapping[str, Placed]  #: by the names that the plan reads
    outputs: tuple[Output, ...]
    dropped: tuple[Dropped, ...]
    trained: tuple[Trained, ...]  #: in the plan's order
    idle: tuple[str, ...]  #: outputs that are made of nothing that was there: new parameters, or buffers
    counts: Mapping[str, int]  #: moments, counters, parameters, dropped


def follow(
    plan: Plan, state: OptimizerState, parameter_of: Mapping[Member, str], composites: Mapping[str, Composite] | None = None
) -> tuple[Moments, list[Problem]]:
    """The moments of the plan's outputs, and what stops them: problems CK417, names as templates, with the step's place."""
    return _Follower(plan, state, parameter_of, composites or {}).follow()


def slot(state: OptimizerState, parameter: str, entry: str) -> str:
    """The name under which an entry is read, and written: never one of a state_dict's names, where ``::`` follows a source's name."""
    return f"::{dotted(state.path) or 'optimizer'}.state.{parameter}.{entry}"


class _Follower(Struct, dict=True):
    plan: Plan
    state: OptimizerState
    parameter_of: Mapping[Member, str]
    composites: Mapping[str, Composite]
    refused: dict[tuple[str, str], list[str]] = field(default_factory=dict)  #: (reason, where) -> outputs
    refusals: int = 0
    moments: int = 0
    counters: int = 0

    def follow(self) -> tuple[Moments, list[Problem]]:
        self.table = {name: entry.expr for name, entry in initial_table(self.plan.source, self.composites).items()}
        self.group_of = {self.parameter_of[member]: at for at, group in enumerate(self.state.groups) for member in group.members}
        self.entries = {self.parameter_of[member]: dict(entries) for member, entries in self.state.state.items()}
        placed = self._read_entries()
        node_of = {self.table[name]: name for name in self.group_of}
        trained: list[Trained] = []
        outputs: list[Output] = []
        used: set[str] = set()
        idle: list[str] = []
        aliases = self.plan.manifest.aliases
        mine: list[Output] = []
        for output in self.plan.outputs:
            if output.name in aliases:
                continue
            parts, rest = _leaves(output.expr, node_of)
            if not parts:
                if not any(isinstance(leaf, Read) for leaf in rest):
                    idle.append(output.name)
                continue
            mine.append(output)
            used.update(parts)
            found = self._one(output, parts, rest, node_of)
            if found is not None:
                trained.append(found)
                outputs += [
                    Output(slot(self.state, output.name, key), value, output.origin)
                    for key, value in found.entries.items() if isinstance(value, (Read, Apply))
                ]  # fmt: skip
        for name, where in _taken_twice(mine, node_of):
            self._refuse("one parameter would become two, each with all of its history: tie them", where, name)
        dropped = self._dropped(used)
        counts = {
            "parameters": len(trained),
            "moments": self.moments,
            "counters": self.counters,
            "dropped": len(dropped),
        }
        moments = Moments(placed, tuple(outputs), dropped, tuple(trained), tuple(idle), counts)
        return moments, self._problems()

    def _read_entries(self) -> dict[str, Placed]:
        """What the state's tensors are as expressions, put into ``entries``; gives back where their bytes lie."""
        tensors: dict[str, Placed] = {}
        wholes: dict[str, Composite] = {}
        for parameter, entries in self.entries.items():
            for key, value in entries.items():
                name = slot(self.state, parameter, key)
                if isinstance(value, Placed):
                    tensors[name] = value
                elif isinstance(value, Composite):
                    wholes[name] = value
                    tensors.update({f"{name}::{part}": placed for part, placed in value.parts.items() if isinstance(placed, Placed)})
        table = initial_table(Manifest({name: placed.spec for name, placed in tensors.items()}), wholes)
        for parameter, entries in self.entries.items():
            for key in entries:
                found = table.get(slot(self.state, parameter, key))
                if found is not None:
                    entries[key] = found.expr
        return tensors

    def _one(self, output: Output, parts: Sequence[str], rest: Sequence[Expr], node_of: Mapping[Expr, str]) -> Trained | None:
        """The state of one output, or None where it cannot follow."""
        where, before = str(output.origin), self.refusals
        groups = {self.group_of[part] for part in parts}
        if len(groups) > 1:
            self._refuse(f"it is made of parameters of {len(groups)} groups, which are trained differently", where, output.name)
        for part in parts:
            self._check(part, output.name, where)
        kept = [self.entries.get(part, {}) for part in parts]
        for part, other in zip(parts, kept, strict=True):
            if set(other) != set(kept[0]):
                what = f"the optimizer keeps {_listed(kept[0])} of {printable(parts[0])}, and {_listed(other)} of {printable(part)}"
                self._refuse(what, where, output.name)
                break
        entries: dict[str, Any] = {}
        for key in kept[0] if self.refusals == before else ():
            counts = [self._counts(part, key) for part in parts]
            if all(counts):
                entries[key] = self._agreed(key, [found[key] for found in kept], parts, output)
                self.counters += 1
            elif any(counts):
                self._refuse(f"`{printable(key)}` is a moment of one of its parameters and a number of another", where, output.name)
            else:
                entries[key] = self._moved(output, key, rest, node_of)
                self.moments += 1
        return Trained(output.name, min(groups), entries, tuple(parts)) if self.refusals == before else None

    def _counts(self, parameter: str, key: str) -> bool:
        value = self.entries[parameter][key]
        if isinstance(value, (Read, Apply)):
            shape = self.table[parameter].spec.shape
            return (key in COUNTERS and value.spec.numel == 1) or (not value.spec.shape and shape != ())
        return True

    def _check(self, parameter: str, output: str, where: str) -> None:
        """Refuses entries that are neither moments nor counters."""
        shape = self.table[parameter].spec.shape
        for key, value in self.entries.get(parameter, {}).items():
            if isinstance(value, (Read, Apply)):
                if not self._counts(parameter, key) and value.spec.shape != shape:
                    self._refuse(f"`{printable(key)}` {list(value.spec.shape)} has not the parameter's shape {list(shape)}: it is no moment of its elements",
                                 where, output)  # fmt: skip
            elif not isinstance(value, (Read, Apply, *SCALARS)):
                self._refuse(f"`{printable(key)}` is neither a tensor nor a number ({printable(type(value).__name__)})", where, output)

    def _agreed(self, key: str, values: Sequence[Any], parts: Sequence[str], output: Output) -> Any:
        """What is kept for a parameter as a whole, for one that is made of several: they have to agree."""
        first = values[0]
        for part, value in zip(parts[1:], values[1:], strict=True):
            one, other = (each.spec if isinstance(each, (Read, Apply)) else (type(each), each) for each in (first, value))
            if one != other:
                what = f"`{printable(key)}` differs between {printable(parts[0])} and {printable(part)}, which become one"
                self._refuse(what, str(output.origin), output.name)
                return None
        # Whether tensors agree is known when their bytes are read. By twos: hundreds of experts in each other would be deep.
        while len(values) > 1 and isinstance(first, (Read, Apply)):
            pairs = [values[at : at + 2] for at in range(0, len(values), 2)]
            values = [apply(Guard(), *pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return values[0]

    def _moved(self, output: Output, key: str, rest: Sequence[Expr], node_of: Mapping[Expr, str]) -> Expr | None:
        """The output's expression with the entry ``key`` in the place of every parameter."""
        where = str(output.origin)
        for leaf in rest:
            if isinstance(leaf, Fill):
                self._refuse("a part of it is new and has no history; zeros would make its first steps too large", where, output.name)
            elif isinstance(leaf, Read):
                self._refuse(f"a part of it is {printable(leaf.name)}, which the optimizer does not train", where, output.name)
        made: dict[Expr, Expr] = {}
        for node in _above(output.expr, node_of):
            if node in node_of:
                made[node] = self.entries[node_of[node]][key]
            elif isinstance(node, Apply):
                reason = "" if _passes(node.transform) else node.transform.moments_stopped()
                if reason:
                    self._refuse(f"{type(node.transform).__name__.lower()}: {reason}", where, output.name)
                if any(argument not in made for argument in node.arguments) or reason:
                    continue
                arguments = [made[argument] for argument in node.arguments]
                if _passes(node.transform) and len(arguments) == 1:
                    made[node] = arguments[0]
                    continue
                try:
                    made[node] = apply(node.transform, *arguments)
                except Refusal as refusal:
                    self._refuse(f"`{printable(key)}`: {refusal.what}", where, output.name)
        return made.get(output.expr)

    def _dropped(self, used: set[str]) -> tuple[Dropped, ...]:
        """The entries of parameters that no output is made of."""
        dropped_by = {source: drop for drop in self.plan.dropped for source in drop.sources}
        found: list[Dropped] = []
        for parameter, entries in self.entries.items():
            if parameter in used:
                continue
            drop = dropped_by.get(parameter)
            for key, value in entries.items():
                leaves = tuple(leaf.name for leaf in walk([value]) if isinstance(leaf, Read)) if isinstance(value, (Read, Apply)) else ()
                if leaves:
                    found.append(
                        Dropped(slot(self.state, parameter, key), drop.origin if drop else Origin(), "its parameter is dropped", leaves)
                    )
        return tuple(found)

    def _refuse(self, reason: str, where: str, name: str) -> None:
        self.refusals += 1
        names = self.refused.setdefault((reason, where), [])
        if name not in names[-1:]:
            names.append(name)

    def _problems(self) -> list[Problem]:
        found = [
            Problem("CK417", f"the optimizer's state cannot follow {printable(template)}: {reason}", where=where, try_=DROP)
            for (reason, where), names in self.refused.items()
            for template in collapse(names)
        ]
        more = len(found) - MAX_PROBLEMS
        return found[:MAX_PROBLEMS] + ([Problem("CK417", f"and {more:,} more templates cannot be followed")] if more > 0 else [])


def _passes(transform: Transform) -> bool:
    """What changes no element's place or gradient: moments keep their own dtype, and a check of the weights is none of theirs."""
    return isinstance(transform, (Cast, Guard))


def _listed(entries: Mapping[str, Any]) -> str:
    return printable(", ".join(entries)) or "nothing"


def _above(root: Expr, stops: Mapping[Expr, str]) -> Iterator[Expr]:
    """Every distinct node of an expression, arguments first; nothing below the nodes of ``stops``."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if node in seen:
            continue
        if ready or node in stops or not node.arguments:
            seen.add(node)
            yield node
        else:
            stack.append((node, True))
            stack.extend((argument, False) for argument in reversed(node.arguments))


def _leaves(root: Expr, node_of: Mapping[Expr, str]) -> tuple[list[str], list[Expr]]:
    """The parameters that an expression is made of, and what else it is made of."""
    parts: list[str] = []
    rest: list[Expr] = []
    for node in _above(root, node_of):
        if node in node_of:
            parts.append(node_of[node])
        elif not node.arguments:
            rest.append(node)
    return parts, rest


def _taken_twice(outputs: Sequence[Output], node_of: Mapping[Expr, str]) -> Iterator[tuple[str, str]]:
    """Outputs (with their places) that take what another has taken: where two users of one node take regions that meet."""
    takers: dict[Expr, list[tuple[Box, Output]]] = {}
    seen: set[Expr] = set()
    for output in outputs:
        takers.setdefault(output.expr, []).append((Box.whole(output.expr.spec.shape), output))
        for node in _above(output.expr, node_of):
            if node in seen or node in node_of or not isinstance(node, Apply):
                continue
            seen.add(node)
            pieces = node.transform.recover(*(argument.spec for argument in node.arguments))
            for at, argument in enumerate(node.arguments):
                boxes = [piece.box for piece in pieces if piece.argument == at] or [Box.whole(argument.spec.shape)]
                takers.setdefault(argument, []).extend((box, output) for box in boxes)
    for taken in takers.values():
        for second in _meeting(taken):
            yield second.name, str(second.origin)


def _meeting(taken: Sequence[tuple[Box, Output]]) -> Iterator[Output]:
    """Those that reach into a region that another has."""
    if len(taken) < 2:
        return
    axes = range(len(taken[0][0].start))
    cut = [axis for axis in axes if len({(box.start[axis], box.size[axis]) for box, _ in taken}) > 1]
    rows = sorted(taken, key=lambda row: row[0].start)
    if len(cut) == 1:  # slices along one axis, perhaps of hundreds of experts: each need only look at the one before it
        for (box, _), (other, output) in pairwise(rows):
            if other.start[cut[0]] < box.start[cut[0]] + box.size[cut[0]]:
                yield output
        return
    for at, (box, output) in enumerate(rows):
        if any(_meet(box, other) for other, _ in rows[:at]):
            yield output


def _meet(one: Box, other: Box) -> bool:
    return all(a < b + n and b < a + m for a, m, b, n in zip(one.start, one.size, other.start, other.size, strict=True))
