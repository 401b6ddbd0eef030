"""Tensors joined along one axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ckptconv.spec import Box, DType, TensorSpec
from ckptconv.transforms.base import Example, Piece, Transform, checked_axis, checked_result, misfit
from ckptconv.transforms.kernels import moved
from ckptconv.transforms.slice import Slice

if TYPE_CHECKING:
    from torch import Tensor


class Concat(Transform, frozen=True):
    """The arguments one after the other along ``axis``. They agree in dtype, rank and every other size.

    >>> q, kv = TensorSpec((8, 4), DType.bfloat16), TensorSpec((2, 4), DType.bfloat16)
    >>> str(Concat(axis=0).infer(q, kv, kv))
    '[12, 4] bfloat16'
    """

    axis: int

    stops_moments: ClassVar[str] = ""

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        if not arguments:
            raise misfit("concat needs at least one tensor")
        first = arguments[0]
        axis = checked_axis(self.axis, first)
        before, after = first.shape[:axis], first.shape[axis + 1 :]
        total = 0
        for spec in arguments:
            if spec.dtype != first.dtype:
                raise misfit("concat needs pieces of one dtype", *_few(arguments, spec))
            if len(spec.shape) != len(first.shape) or spec.shape[:axis] != before or spec.shape[axis + 1 :] != after:
                raise misfit(f"concat needs pieces that agree on every axis but {axis}", *_few(arguments, spec))
            total += spec.shape[axis]
        return checked_result("concat", (*before, total, *after), first)

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch

        return moved(lambda *tensors: torch.cat(tensors, self.axis), *arguments)

    def recover(self, *arguments: TensorSpec) -> tuple[Piece, ...]:
        axis = checked_axis(self.axis, arguments[0])
        pieces, start = [], 0
        for at, spec in enumerate(arguments):
            stop = start + spec.shape[axis]
            pieces.append(Piece(at, Box.whole(spec.shape), Slice(axis=axis, start=start, stop=stop)))
            start = stop
        return tuple(pieces)

    def describe(self, *arguments: str) -> str:
        return f"concat({', '.join(arguments)}, axis={self.axis})"

    @classmethod
    def examples(cls) -> list[Example]:
        def spec(*shape: int, dtype: DType = DType.float32) -> TensorSpec:
            return TensorSpec(shape, dtype)

        return [
            Example(cls(axis=0), (spec(4, 3), spec(2, 3), spec(0, 3)), (spec(4, 3), spec(2, 5))),
            Example(cls(axis=-1), (spec(2, 3), spec(2, 1)), (spec(2, 3), spec(2, 3, 1))),
            Example(cls(axis=1), (spec(2, 3), spec(2, 3)), (spec(2, 3), spec(2, 3, dtype=DType.float16))),
            Example(cls(axis=0), (spec(5),), (spec(), spec())),
            Example(cls(axis=0), (spec(2, dtype=DType.float8_e5m2), spec(3, dtype=DType.float8_e5m2)), ()),
        ]


def _few(arguments: tuple[TensorSpec, ...], other: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """The two arguments that a message needs: the first, and the one that differs from it."""
    return arguments[0], other
