"""A range along one axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ckptconv.spec import Box, DType, TensorSpec
from ckptconv.transforms.base import Example, Piece, Transform, checked_axis, misfit, only

if TYPE_CHECKING:
    from torch import Tensor


class Slice(Transform, frozen=True):
    """Elements ``start`` to ``stop`` (exclusive) along ``axis``. Both are counted from the front and lie within the tensor.

    >>> Slice(axis=0, start=768, stop=1536).infer(TensorSpec((2304, 768), DType.float32)).shape
    (768, 768)
    """

    axis: int
    start: int
    stop: int

    stops_moments: ClassVar[str] = ""

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        spec = only("slice", arguments)
        axis = checked_axis(self.axis, spec)
        if not 0 <= self.start <= self.stop <= spec.shape[axis]:
            raise misfit(f"slice {self.start}:{self.stop} does not lie within axis {axis} of size {spec.shape[axis]}", spec)
        return TensorSpec((*spec.shape[:axis], self.stop - self.start, *spec.shape[axis + 1 :]), spec.dtype)

    def apply(self, *arguments: Tensor) -> Tensor:
        (tensor,) = arguments
        return tensor.narrow(self.axis, self.start, self.stop - self.start)

    def recover(self, *arguments: TensorSpec) -> tuple[Piece, ...]:
        (spec,) = arguments
        axis = checked_axis(self.axis, spec)
        start = tuple(self.start if at == axis else 0 for at in range(len(spec.shape)))
        return (Piece(0, Box(start, self.infer(spec).shape), None),)

    def describe(self, *arguments: str) -> str:
        return f"slice({arguments[0]}, axis={self.axis}, {self.start}:{self.stop})"

    @classmethod
    def examples(cls) -> list[Example]:
        qkv = TensorSpec((6, 4), DType.float32)
        return [
            Example(cls(axis=0, start=2, stop=4), (qkv,), (TensorSpec((3, 4), DType.float32),)),
            Example(cls(axis=-1, start=0, stop=4), (qkv,), (TensorSpec((), DType.float32),)),
            Example(cls(axis=0, start=3, stop=3), (qkv,), (qkv, qkv)),
            Example(cls(axis=1, start=0, stop=0), (TensorSpec((0, 3), DType.float8_e4m3fn),)),
        ]
