"""Rows moved and floats cast with numpy. To import torch takes as long as casting some gigabytes, and these few kinds of work need nothing of it.

Every function gives the bits that torch's kernels give, or says that torch must do it. Elements are integers of their width here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptconv.execute.sources import Sources
from ckptconv.formats.base import Placed
from ckptconv.plan import Apply, Expr, Output, Read, walk
from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms import Cast, Concat, Rearrange, Reshape, Slice
from ckptconv.transforms.rearrange import sides

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

#: Shorter rows are moved faster by torch, which goes through memory in tiles.
_ROW_NBYTES = 64
#: Of what is computed in one run. Beyond it, torch's faster kernels earn back the time that its import takes.
_TORCH_PAYS = 8 << 30
_WORD = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}
#: The bits of positive infinity, for dtypes that numpy can look at.
_INFINITY = {DType.bfloat16: 0x7F80, DType.float16: 0x7C00, DType.float32: 0x7F800000, DType.float64: 0x7FF0000000000000}
#: Elements that are cast at a time. Source, result and what lies between stay near the processor; and each of the dozen steps takes so long that
#: workers seldom wait for each other, as they do between steps.
_PIECE = 1 << 17
#: float32 bits of the least magnitude that rounds to infinity in a narrower dtype (IEEE 754, 4.3.1).
_OVERFLOWS = {DType.bfloat16: 0x7F7F8000, DType.float16: 0x477FF000}
_WIDENED = {DType.bfloat16, DType.float16}


def suits(groups: Sequence[Sequence[Output]], placed: Mapping[str, Placed]) -> Callable[[Sequence[Output]], bool]:
    """Which of the islands numpy should compute: all that it can, of a run that is small enough."""
    if sum(output.expr.spec.nbytes for group in groups for output in group) > _TORCH_PAYS:
        return lambda _: False
    return lambda group: is_plain_cast(group, placed) or all(_moves(node, placed) for node in walk(output.expr for output in group))


def is_plain_cast(group: Sequence[Output], placed: Mapping[str, Placed]) -> bool:
    """True for one whole tensor whose only change is a cast that :class:`Caster` knows."""
    expr = group[0].expr
    if len(group) != 1 or not isinstance(expr, Apply) or not isinstance(expr.transform, Cast):
        return False
    (argument,) = expr.arguments
    if not isinstance(argument, Read) or not placed[argument.name].contiguous:
        return False
    source, wanted = argument.spec.dtype, expr.transform.dtype
    return (source is DType.float32 and wanted in _OVERFLOWS) or (source in _WIDENED and wanted is DType.float32)


def _moves(node: Expr, placed: Mapping[str, Placed]) -> bool:
    if isinstance(node, Read):
        dtype = node.spec.dtype
        return placed[node.name].contiguous and (dtype in _INFINITY or (dtype.kind not in ("float", "complex") and dtype.nbytes in _WORD))
    if not isinstance(node, Apply):
        return False
    if isinstance(node.transform, Rearrange):
        return _moves_rows(node.transform, node.arguments[0].spec)
    return isinstance(node.transform, (Concat, Reshape, Slice))


def _moves_rows(transform: Rearrange, spec: TensorSpec) -> bool:
    """True where the innermost axis stays innermost, and is long enough."""
    left, right = ([axis for group in side for axis in (group if group is not None else ("...",))] for side in sides(transform.pattern))
    if not left or left[-1] != right[-1]:
        return False
    size = dict(transform.sizes).get(left[-1]) or spec.shape[-1]
    return size * spec.dtype.nbytes >= _ROW_NBYTES


def read(sources: Sources, placed: Placed) -> Array:
    """A contiguous tensor of the source as integers of its width, in its shape."""
    import numpy as np

    array = np.empty(placed.spec.shape, _WORD[placed.spec.dtype.nbytes])
    if array.size:
        sources.read_into(placed.storage.file, placed.storage.offset + placed.offset, bytes_of(array))
    return array


def apply(transform: Any, *arguments: Array) -> Array:
    """What the transform's own kernel does, for those that :func:`suits` lets through. The result may be a view."""
    import numpy as np

    if isinstance(transform, Rearrange):
        import einops

        moved: Array = einops.rearrange(arguments[0], transform.pattern, **dict(transform.sizes))
        return moved
    if isinstance(transform, Reshape):
        return arguments[0].reshape(transform.shape)
    if isinstance(transform, Slice):
        whole = [slice(None)] * arguments[0].ndim
        whole[transform.axis] = slice(transform.start, transform.stop)
        return arguments[0][tuple(whole)]
    assert isinstance(transform, Concat)
    return np.concatenate(arguments, axis=transform.axis)


def contiguous(array: Array) -> Array:
    """The array with its elements in row-major order, itself where it has them so."""
    import numpy as np

    return np.ascontiguousarray(array).reshape(array.shape)  # the function makes one axis out of none


def bytes_of(array: Array) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view("uint8").data if array.size else memoryview(b"")


def nonfinite_in(array: Array, dtype: DType) -> int:
    """How many elements of a dtype that :func:`suits` lets through are NaN or infinite."""
    infinity = _INFINITY.get(dtype)
    if infinity is None or not array.size or _below(array, infinity):
        return 0
    sign = 1 << (8 * array.itemsize - 1)
    return int(((array & (sign - 1)) >= infinity).sum())


def _below(array: Array, limit: int) -> bool:
    """True where every element's magnitude is below ``limit``: as a signed word the largest is positive, as an unsigned one negative."""
    signed = array.view(f"int{8 * array.itemsize}")
    return int(signed.max()) < limit and int(array.max()) < limit + (1 << (8 * array.itemsize - 1))


class Caster:
    """Casts the pieces of one tensor as :func:`is_plain_cast` lets through. A worker's own: its buffers are used again for every piece.

    >>> import struct
    >>> narrow = Caster(DType.float32, DType.bfloat16).cast(memoryview(struct.pack("<3f", 1.0, 3.14159265, -2.0)))
    >>> [hex(word) for word in narrow.cast("H")]
    ['0x3f80', '0x4049', '0xc000']
    """

    def __init__(self, source: DType, wanted: DType) -> None:
        import numpy as np

        self._source, self._wanted = source, wanted
        self._limit = _OVERFLOWS.get(wanted, _INFINITY[source])
        self._between = np.empty(_PIECE, np.uint32)
        self._out = np.empty(0, _WORD[wanted.nbytes])

    def cast(self, data: memoryview) -> memoryview | None:
        """The bytes of the cast elements, in a buffer that the next call overwrites. None where a value overflows, is not finite, or becomes
        zero: then torch has to cast, to count and to refuse."""
        import numpy as np

        words: Array = np.frombuffer(data, _WORD[self._source.nbytes])
        if self._out.size < words.size:
            self._out = np.empty(words.size, self._out.dtype)
        out = self._out[: words.size]
        for at in range(0, words.size, _PIECE):
            if not self._part(words[at : at + _PIECE], out[at : at + _PIECE]):
                return None
        return bytes_of(out)

    def _part(self, words: Array, out: Array) -> bool:
        import numpy as np

        if not _below(words, self._limit):
            return False
        if self._source is DType.bfloat16:
            np.left_shift(words, 16, out=out, dtype=np.uint32)
        elif self._source is DType.float16:
            out.view(np.float32)[:] = words.view(np.float16)
        elif self._wanted is DType.float16:
            out.view(np.float16)[:] = words.view(np.float32)
        else:
            # To the nearest, of two that are equally near to the even one: half of the last bit that stays, less one where that bit is 0.
            between = self._between[: words.size]
            np.right_shift(words, 16, out=between)
            between &= 1
            between += 0x7FFF
            between += words
            between >>= 16
            out[:] = between
        return self._wanted is DType.float32 or not _has_zero(out) or _zeros(out) == _zeros(words)


def _has_zero(words: Array) -> bool:
    """True where one is 0 or -0."""
    return int(words.min()) == 0 or int(words.view(f"int{8 * words.itemsize}").min()) == -(1 << (8 * words.itemsize - 1))


def _zeros(words: Array) -> int:
    import numpy as np

    return int(words.size - np.count_nonzero(words & ((1 << (8 * words.itemsize - 1)) - 1)))
