"""Are the values of the output exactly those of the source, none lost and none doubled?

Transforms that only move elements keep the *multiset* of their bit patterns. Its checksum (a sum of mixed bits, modulo 2^64) does not
depend on order, so it is taken from the written file and from the source without running any transform: a kernel that loses, doubles or
changes an element cannot hide. Where a plan drops part of a tensor on purpose, or changes values, the outputs are computed a second
time, in memory, and compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.errors import Problem, printable
from ckptconv.execute.memory_run import computed
from ckptconv.execute.sources import Sources
from ckptconv.formats.base import Placed
from ckptconv.memory import memory_explained, peak_nbytes
from ckptconv.plan import Apply, Fill, Output, Plan, Read, reads, walk
from ckptconv.ranges import as_spans
from ckptconv.spec import TensorSpec
from ckptconv.transforms import Concat, Guard, Rearrange, Reshape, Slice

if TYPE_CHECKING:
    from torch import Tensor

_MOVES = (Concat, Guard, Rearrange, Reshape, Slice)
_CHUNK = 1 << 20
# Odd 64-bit constants of the SplitMix64 generator (Steele, Lea, Flood 2014), as signed integers.
_MIX_A, _MIX_B, _STEP = -4658895280553007687, -7723592293110705685, -7046029254386353131


class Conservation(Struct, frozen=True):
    """How many computed outputs were proved, and how; and what was found wrong."""

    conserved: int
    recomputed: int
    problems: tuple[Problem, ...]


def conserved(
    plan: Plan,
    source: Mapping[str, Placed],
    opened: Sources,
    written: Mapping[str, Placed],
    reopened: Sources,
    compared: Collection[str] = (),
) -> Conservation:
    """Looks at every computed output, island by island; bare copies are compared by digest elsewhere.

    ``compared`` names the outputs whose bytes are known to be those that were computed, order included. The others are computed anew.
    """
    proved = recomputed = 0
    problems: list[Problem] = []
    for island in plan.islands():
        made = [output for output in island if isinstance(output.expr, Apply)]
        if not made:
            continue
        ordered = all(output.name in compared for output in made)
        try:
            if ordered and _balanced(island) and (_tiled(island, source) or _same_elements(island, source, opened, written, reopened)):
                proved += len(made)
                continue
            again = _second_run(island, source, opened, written, reopened)
        except (MemoryError, RuntimeError) as error:
            raise memory_explained(error, made[0], peak_nbytes(island)) from None
        for name, equal in again.items():
            recomputed += equal
            if not equal:
                problems.append(Problem("CK409", f"{printable(name)}: the written values are not those of the plan"))
    return Conservation(proved, recomputed, tuple(problems))


def _balanced(island: Sequence[Output]) -> bool:
    """True when every node only moves elements and as many come out as go in."""
    nodes = list(walk(output.expr for output in island))
    if any(isinstance(node, Fill) or (isinstance(node, Apply) and not isinstance(node.transform, _MOVES)) for node in nodes):
        return False
    return sum(output.expr.spec.numel for output in island) == sum(node.spec.numel for node in nodes if isinstance(node, Read))


def _tiled(island: Sequence[Output], source: Mapping[str, Placed]) -> bool:
    """True when the outputs are ranges of source bytes that take every byte of their tensors, and each once.

    That the file holds just these ranges is known from its digest, so nothing need be read again.
    """
    taken: list[tuple[int, int, int]] = []
    for output in island:
        spans = as_spans(output.expr, source)
        if spans is None:
            return False
        taken += [(span.storage.file, span.storage.offset + span.offset, span.nbytes) for span in spans if span.nbytes]
    names = dict.fromkeys(name for output in island for name in reads(output.expr))
    wanted = [(source[name].storage.file, source[name].storage.offset + source[name].offset, source[name].spec.nbytes) for name in names]
    return _joined(taken) == _joined([each for each in wanted if each[2]])


def _joined(ranges: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Ranges (file, start, bytes) in order, neighbours as one. Bytes that are taken twice stand there twice."""
    found: list[tuple[int, int, int]] = []
    for file, start, nbytes in sorted(ranges):
        last, begin, length = found[-1] if found else (-1, 0, 0)
        if last == file and start == begin + length:
            found[-1] = (file, begin, length + nbytes)
        else:
            found.append((file, start, nbytes))
    return found


def _same_elements(
    island: Sequence[Output], source: Mapping[str, Placed], opened: Sources, written: Mapping[str, Placed], reopened: Sources
) -> bool:
    names = dict.fromkeys(name for output in island for name in reads(output.expr))
    before = sum(_checksum(opened, source[name]) for name in names)
    after = sum(_checksum(reopened, written[output.name]) for output in island)
    return (before - after) % 2**64 == 0


def _checksum(opened: Sources, placed: Placed) -> int:
    """That of a tensor in a file: part by part where it is one range of bytes, so that stacked experts of gigabytes need no memory."""
    if not placed.contiguous or placed.spec.numel <= _CHUNK:
        return multiset_checksum(opened.read_tensor(placed))
    parts = range(0, placed.spec.numel, _CHUNK)
    return sum(multiset_checksum(opened.read_tensor(_part(placed, at))) for at in parts) % 2**64


def _part(placed: Placed, at: int) -> Placed:
    """Elements ``at`` and on, as many as are looked at together."""
    count = min(_CHUNK, placed.spec.numel - at)
    offset = placed.offset + at * placed.spec.dtype.nbytes
    return replace(placed, spec=TensorSpec((count,), placed.spec.dtype), offset=offset, strides=(1,))


def _second_run(
    island: Sequence[Output], source: Mapping[str, Placed], opened: Sources, written: Mapping[str, Placed], reopened: Sources
) -> dict[str, bool]:
    """Every output computed anew and compared with what was written, one after the other, in the memory that the run itself needed."""
    again = computed(island, lambda node: opened.read_tensor(source[node.name]))
    return {output.name: _same_bits(value, reopened.read_tensor(written[output.name])) for output, value in again}


def _bits(tensor: Tensor) -> Tensor:
    import torch

    flat = tensor.contiguous().reshape(-1)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if flat.element_size() == 16:  # complex128: two words an element, mixed together below
        return torch.view_as_real(flat).view(torch.int64)
    return flat.view(kinds[flat.element_size()])


def _same_bits(left: Tensor, right: Tensor) -> bool:
    import torch

    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(_bits(left), _bits(right))


def multiset_checksum(tensor: Tensor) -> int:
    """A checksum of the elements' bit patterns that does not depend on their order, modulo 2^64.

    >>> import torch
    >>> x = torch.arange(6.0)
    >>> multiset_checksum(x) == multiset_checksum(x.flip(0).reshape(2, 3)), multiset_checksum(x) == multiset_checksum(x + 1)
    (True, False)
    """
    import torch

    total = 0
    bits = _bits(tensor)
    for at in range(0, bits.shape[0], _CHUNK):
        part = bits[at : at + _CHUNK]
        words = part.to(torch.int64)
        if words.dim() == 2:
            words = _mix(words[:, 0]) * 31 + words[:, 1]
        total += int(_mix(words).sum())
    return total % 2**64


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser on signed words: arithmetic wraps, and a shift's copies of the sign bit are masked off."""
    words = words + _STEP
    words = (words ^ ((words >> 30) & (2**34 - 1))) * _MIX_A
    words = (words ^ ((words >> 27) & (2**37 - 1))) * _MIX_B
    return words ^ ((words >> 31) & (2**33 - 1))
