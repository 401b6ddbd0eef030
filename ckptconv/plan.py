"""The plan: a table of output name -> expression. Pure data; every feature of ckptconv is a walk over it.

A node has exactly one output. Shape and dtype are computed when a node is built, so an expression that exists has a correct shape.
A plan holds no path, no open file, no tensor and no torch object: it can be printed, compared, hashed, mailed, and run against any
copy of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Union

from msgspec import Struct, to_builtins

from ckptconv import transforms
from ckptconv.names import unusable
from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.transforms.base import Transform


class Read(Struct, frozen=True, gc=False):
    """A tensor of the source, by its name there."""

    name: str
    spec: TensorSpec

    @property
    def arguments(self) -> tuple[Expr, ...]:
        return ()


class Fill(Struct, frozen=True):
    """A tensor that no source has. ``recipe``: ``constant`` (value), ``arange`` (from value, by one), ``normal`` (std value, seed)."""

    recipe: str
    value: float | int | bool
    seed: int
    spec: TensorSpec

    @property
    def arguments(self) -> tuple[Expr, ...]:
        return ()


class Apply:
    """A transform of other expressions. Compared by value; the hash is computed once, so large shared trees stay cheap."""

    __slots__ = ("_hash", "arguments", "spec", "transform")
    transform: Transform
    arguments: tuple[Expr, ...]
    spec: TensorSpec

    def __init__(self, transform: Transform, arguments: tuple[Expr, ...], spec: TensorSpec) -> None:
        object.__setattr__(self, "transform", transform)
        object.__setattr__(self, "arguments", arguments)
        object.__setattr__(self, "spec", spec)
        object.__setattr__(self, "_hash", hash((transform, arguments)))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("an expression is frozen")

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined,no-any-return]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Apply) or hash(self) != hash(other):
            return False
        return self.transform == other.transform and self.arguments == other.arguments

    def __repr__(self) -> str:
        return f"Apply({self.transform!r}, {self.arguments!r})"


Expr = Union[Read, Fill, Apply]


def apply(transform: Transform, *arguments: Expr) -> Apply:
    """The node ``transform(arguments)``. Raises :class:`~ckptconv.errors.Refusal` where the shapes do not fit."""
    return Apply(transform, arguments, transform.infer(*(argument.spec for argument in arguments)))


def walk(expressions: Iterable[Expr]) -> Iterator[Expr]:
    """Every distinct node once, arguments before their users. No recursion: depth is bounded by memory only.

    >>> from ckptconv.transforms import Cast
    >>> x = Read("x", TensorSpec((2,), DType.float32))
    >>> [type(node).__name__ for node in walk([apply(Cast(dtype=DType.float64), x), x])]
    ['Read', 'Apply']
    """
    seen: set[Expr] = set()
    for root in expressions:
        stack: list[tuple[Expr, bool]] = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if node in seen:
                continue
            if ready or not node.arguments:
                seen.add(node)
                yield node
            else:
                stack.append((node, True))
                stack.extend((argument, False) for argument in reversed(node.arguments))


class Origin(Struct, frozen=True, gc=False):
    """Which line of which rule file made something."""

    file: str = ""
    line: int = 0
    step: int = 0  #: counted from 1; 0 is no step (passed through)
    op: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.op} (step {self.step})" if self.step else "passed through"


class Output(Struct, frozen=True, gc=False):
    """One line of the table. ``origin`` is the last step that touched it."""

    name: str
    expr: Expr
    origin: Origin = Origin()


class Dropped(Struct, frozen=True):
    """A source tensor that a step dropped on purpose, with the reason that the rule gives."""

    name: str  #: as it was called when the step dropped it
    origin: Origin
    reason: str = ""
    sources: tuple[str, ...] = ()  #: what it was made of


class Plan(Struct, frozen=True, dict=True):
    """What will be written, as expressions over the source, in file order."""

    source: Manifest
    outputs: tuple[Output, ...]
    ties: tuple[tuple[str, ...], ...] = ()
    dropped: tuple[Dropped, ...] = ()
    #: sentences worth saying to the user (an entry that matched nothing, a tie that was undone)
    notes: tuple[str, ...] = ()
    #: What goes along beside the state_dict, made of the same source: an optimizer's moments, by the names of their slots.
    moments: tuple[Output, ...] = ()

    @cached_property
    def manifest(self) -> Manifest:
        """What the output's state_dict will hold."""
        return Manifest({output.name: output.expr.spec for output in self.outputs}, self.ties)

    @cached_property
    def stored(self) -> tuple[Output, ...]:
        """The outputs that have bytes of their own: all but the aliases of ties, and the moments."""
        aliases = self.manifest.aliases
        return (tuple(output for output in self.outputs if output.name not in aliases) if aliases else self.outputs) + self.moments

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the whole plan; equal plans have equal fingerprints."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:32]

    def islands(self) -> list[tuple[Output, ...]]:
        """Stored outputs in groups that share no node with each other: each group can be computed on its own, in any order."""
        return islands(self.stored)

    def to_json(self) -> dict[str, Any]:
        """Plain data: the nodes in a list, arguments and outputs by their number in it."""
        number: dict[Expr, int] = {}
        nodes: list[dict[str, Any]] = []
        for node in walk(output.expr for output in (*self.outputs, *self.moments)):
            number[node] = len(nodes)
            if isinstance(node, Read):
                nodes.append({"read": node.name})
            elif isinstance(node, Fill):
                spec = [node.spec.dtype.value, *node.spec.shape]
                nodes.append({"fill": node.recipe, "value": node.value, "seed": node.seed, "spec": spec})
            else:
                nodes.append({
                    "apply": to_builtins(node.transform), "of": [number[argument] for argument in node.arguments],
                })  # fmt: skip
        return {
            "ckptconv_plan": 1,
            "source": self.source.to_json(),
            "nodes": nodes,
            "outputs": [[output.name, number[output.expr], _origin_json(output.origin)] for output in self.outputs],
            "ties": [list(group) for group in self.ties],
            "dropped": [[drop.name, _origin_json(drop.origin), drop.reason, list(drop.sources)] for drop in self.dropped],
            "notes": list(self.notes),
            **(
                {"moments": [[output.name, number[output.expr], _origin_json(output.origin)] for output in self.moments]}
                if self.moments
                else {}
            ),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_json` described, every shape inferred anew. Raises ``ValueError`` for anything else."""
        if not isinstance(data, Mapping) or data.get("ckptconv_plan") != 1:
            raise ValueError('not a saved plan: it has no "ckptconv_plan": 1')
        try:
            source = Manifest.from_json(data["source"])
            nodes: list[Expr] = []
            for item in data["nodes"]:
                nodes.append(_node(item, nodes, source))
            outputs, moments = (
                tuple(Output(name, nodes[_index(at, nodes)], Origin(*origin)) for name, at, origin in listed)
                for listed in (data["outputs"], data.get("moments", ()))
            )
            dropped = tuple(Dropped(name, Origin(*origin), reason, tuple(sources)) for name, origin, reason, sources in data["dropped"])
            ties = tuple(tuple(group) for group in data["ties"])
            _check_names([output.name for output in outputs], ties)
            _check_names([output.name for output in (*outputs, *moments)], ())
            return Plan(source, outputs, ties, dropped, tuple(data.get("notes", ())), moments)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"not a saved plan: {type(error).__name__}: {error}") from None


def as_it_is(manifest: Manifest) -> Plan:
    """The plan that does nothing: every tensor under its own name.

    >>> manifest = Manifest({"a": TensorSpec((2,), DType.float32)})
    >>> as_it_is(manifest).manifest == manifest
    True
    """
    return Plan(manifest, tuple(Output(name, Read(name, spec)) for name, spec in manifest.tensors.items()), manifest.ties)


def islands(outputs: Sequence[Output]) -> list[tuple[Output, ...]]:
    """Group outputs that share a node, transitively. Order within and between groups is that of ``outputs``."""
    parent = list(range(len(outputs)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    owner: dict[Expr, int] = {}
    for at, output in enumerate(outputs):
        for node in walk([output.expr]):
            other = root(owner.setdefault(node, at))
            mine = root(at)
            parent[max(mine, other)] = min(mine, other)
    groups: dict[int, list[Output]] = {}
    for at, output in enumerate(outputs):
        groups.setdefault(root(at), []).append(output)
    return [tuple(group) for group in groups.values()]


def reads(expression: Expr) -> tuple[str, ...]:
    """The source names that an expression is made of, in order, each once."""
    if isinstance(expression, Read):
        return (expression.name,)
    return tuple(dict.fromkeys(node.name for node in walk([expression]) if isinstance(node, Read)))


def _origin_json(origin: Origin) -> list[Any]:
    return [origin.file, origin.line, origin.step, origin.op]


def _check_names(names: Sequence[Any], ties: Sequence[Sequence[Any]]) -> None:
    for name in names:
        reason = unusable(name)
        if reason:
            raise ValueError(f"not a saved plan: {reason}")
    known = set(names)
    if len(known) != len(names):
        raise ValueError("not a saved plan: two outputs have one name")
    if any(name not in known for group in ties for name in group):
        raise ValueError("not a saved plan: a tie names an output that is not there")


def _index(value: Any, nodes: Sequence[Expr]) -> int:
    if type(value) is not int or not 0 <= value < len(nodes):
        raise ValueError(f"not a saved plan: node {value!r} is not one of the {len(nodes)} before it")
    return value


def _node(item: Mapping[str, Any], nodes: Sequence[Expr], source: Manifest) -> Expr:
    if "read" in item:
        if item["read"] not in source:
            raise ValueError(f"not a saved plan: it reads {item['read']!r}, which its own source does not have")
        return Read(item["read"], source[item["read"]])
    if "fill" in item:
        dtype, *shape = item["spec"]
        if item["fill"] not in ("constant", "arange", "normal") or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError("not a saved plan: an impossible fill")
        return Fill(item["fill"], item["value"], item["seed"], TensorSpec(tuple(shape), DType(dtype)))
    return apply(transforms.parse(item["apply"]), *(nodes[_index(at, nodes)] for at in item["of"]))
