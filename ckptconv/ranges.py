"""Which outputs are nothing but ranges of a source's bytes, one after the other."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from math import prod

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.formats.base import Placed, Storage
from ckptconv.plan import Apply, Expr, Output, Read
from ckptconv.transforms import Concat, Rearrange, Reshape, Slice
from ckptconv.transforms.rearrange import Side, sides

_PAGE = 4096
_LARGE = 1 << 20
_LEAST = 64 << 10  # bytes of a piece: shorter ones are faster put together in memory


class Span(Struct, frozen=True):
    """A range of a storage's bytes."""

    storage: Storage
    offset: int  #: from the storage's start
    nbytes: int
    tensor: str = ""  #: the source tensor that these bytes are, all of it

    @property
    def is_storage(self) -> bool:
        """True when it is all that its storage has, so that the recorded CRC-32 is its own."""
        return self.offset == 0 and self.nbytes == self.storage.nbytes


def span_of(placed: Placed, name: str = "") -> Span:
    """The bytes of a contiguous tensor."""
    return Span(placed.storage, placed.offset, placed.spec.nbytes, name)


def as_spans(expr: Expr, placed: Mapping[str, Placed]) -> tuple[Span, ...] | None:
    """The ranges that an output is, or None where its bytes must be computed.

    A tensor, rows of one, one under another shape, and such ones joined along their outermost axis (experts stacked). Along an inner axis too,
    where the pieces are large enough to be worth a copy each (gate and up of stacked experts joined, and taken apart again).
    """
    cutter = _Cutter(placed)
    return tuple(cutter.pieces(expr, 0, expr.spec.nbytes)) if cutter.can_cut(expr) else None


def is_ranges(expr: Expr, placed: Mapping[str, Placed]) -> bool:
    """Whether :func:`as_spans` has an answer, without giving it: an output that is copied, not computed."""
    return placed[expr.name].contiguous if isinstance(expr, Read) else _Cutter(placed).can_cut(expr)


class _Turns(Struct, frozen=True):
    """How the arguments of a slice or a concat lie in memory: in turns, each argument's part behind the one before."""

    count: int
    row: int  #: bytes of one step along the axis
    starts: tuple[int, ...]  #: of each argument in a turn; and the turn's end

    def width(self, at: int) -> int:
        return self.starts[at + 1] - self.starts[at]


class _Cutter:
    """Cuts one expression into ranges of its sources."""

    def __init__(self, placed: Mapping[str, Placed]) -> None:
        self._placed = placed
        self._turns: dict[int, _Turns] = {}  # by the node's identity: the expression outlives us

    def can_cut(self, expr: Expr) -> bool:
        if isinstance(expr, Read):
            return self._placed[expr.name].contiguous
        if not isinstance(expr, Apply):
            return False
        move = expr.transform
        if isinstance(move, (Slice, Concat)):
            turns = self._turns_of(expr, move.axis)
            if turns.count != 1 and self._shortest(move, turns) < _LEAST:
                return False
        elif not isinstance(move, Reshape) and not (isinstance(move, Rearrange) and _keeps_order(move.pattern)):
            return False
        return all(self.can_cut(argument) for argument in expr.arguments)

    @staticmethod
    def _shortest(move: Slice | Concat, turns: _Turns) -> int:
        if isinstance(move, Slice):
            return (move.stop - move.start) * turns.row
        return min(turns.width(at) for at in range(len(turns.starts) - 1))

    def _turns_of(self, expr: Apply, axis: int) -> _Turns:
        if id(expr) not in self._turns:
            first = expr.arguments[0].spec
            axis %= len(first.shape)
            row = prod(first.shape[axis + 1 :]) * first.dtype.nbytes
            starts = accumulate((argument.spec.shape[axis] * row for argument in expr.arguments), initial=0)
            self._turns[id(expr)] = _Turns(prod(first.shape[:axis]), row, tuple(starts))
        return self._turns[id(expr)]

    def pieces(self, expr: Expr, start: int, stop: int) -> Iterator[Span]:
        """Bytes ``start`` to ``stop`` of what an expression is."""
        if start >= stop:
            return
        if isinstance(expr, Read):
            whole = span_of(self._placed[expr.name], expr.name)
            yield whole if stop - start == whole.nbytes else replace(whole, offset=whole.offset + start, nbytes=stop - start, tensor="")
            return
        assert isinstance(expr, Apply), "only what is made of ranges is cut into them"
        move = expr.transform
        if not isinstance(move, (Slice, Concat)):
            yield from self.pieces(expr.arguments[0], start, stop)
            return
        turns = self._turns_of(expr, move.axis)
        long = (move.stop - move.start) * turns.row if isinstance(move, Slice) else turns.starts[-1]
        for turn in range(start // long, -(-stop // long)):
            begin, end = max(start - turn * long, 0), min(stop - turn * long, long)
            if isinstance(move, Slice):
                at = turn * turns.starts[-1] + move.start * turns.row
                yield from self.pieces(expr.arguments[0], at + begin, at + end)
                continue
            for number in range(bisect_right(turns.starts, begin) - 1, bisect_left(turns.starts, end)):
                at = turn * turns.width(number) - turns.starts[number]
                yield from self.pieces(
                    expr.arguments[number], at + max(begin, turns.starts[number]), at + min(end, turns.starts[number + 1])
                )


def _keeps_order(pattern: str) -> bool:
    """True for a pattern that only groups axes, or adds and takes away axes of size 1: elements stay where they are."""
    left, right = sides(pattern)
    return _axes(left) == _axes(right)


def _axes(side: Side) -> list[str | None]:
    return [axis for group in side for axis in (group if group is not None else (None,))]


def phases_of(outputs: Iterable[Output], placed: Mapping[str, Placed]) -> dict[str, int]:
    """Where in their page large outputs lie in the source, of those that are one range of it."""
    found = {}
    for output in outputs:
        spans = as_spans(output.expr, placed) if output.expr.spec.nbytes >= _LARGE else None
        if spans is not None and len(spans) == 1:
            found[output.name] = (spans[0].storage.offset + spans[0].offset) % _PAGE
    return found
