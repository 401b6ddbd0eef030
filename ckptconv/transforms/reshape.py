"""The same elements in the same order under another shape."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, ClassVar

from ckptconv.spec import Box, DType, TensorSpec
from ckptconv.transforms.base import Example, Piece, Transform, checked_result, misfit, only
from ckptconv.transforms.kernels import moved

if TYPE_CHECKING:
    from torch import Tensor


class Reshape(Transform, frozen=True):
    """The elements in row-major order as ``shape``; one size may be -1, which takes what the others leave.

    >>> Reshape(shape=(-1, 2)).infer(TensorSpec((3, 4), DType.float32)).shape
    (6, 2)
    """

    shape: tuple[int, ...]

    stops_moments: ClassVar[str] = ""

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        spec = only("reshape", arguments)
        known = prod(size for size in self.shape if size != -1)
        if self.shape.count(-1) > 1 or any(size < -1 for size in self.shape):
            raise misfit(f"reshape to {list(self.shape)}: sizes are not negative, and -1 stands at most once", spec)
        if -1 not in self.shape:
            if known != spec.numel:
                raise misfit(f"reshape to {list(self.shape)} needs {known:,} elements, and there are {spec.numel:,}", spec)
            return checked_result("reshape", self.shape, spec)
        if known == 0:
            raise misfit(f"reshape to {list(self.shape)}: the size at -1 is not determined beside a size of 0", spec)
        if spec.numel % known:
            raise misfit(f"reshape to {list(self.shape)}: {spec.numel:,} elements cannot be divided by {known:,}", spec)
        return checked_result("reshape", tuple(spec.numel // known if size == -1 else size for size in self.shape), spec)

    def apply(self, *arguments: Tensor) -> Tensor:
        return moved(lambda tensor: tensor.reshape(self.shape), *arguments)

    def recover(self, *arguments: TensorSpec) -> tuple[Piece, ...]:
        (spec,) = arguments
        return (Piece(0, Box.whole(spec.shape), Reshape(shape=spec.shape)),)

    def describe(self, *arguments: str) -> str:
        return f"reshape({arguments[0]}, {list(self.shape)})"

    @classmethod
    def examples(cls) -> list[Example]:
        def spec(*shape: int) -> TensorSpec:
            return TensorSpec(shape, DType.float32)

        return [
            Example(cls(shape=(-1,)), (spec(2, 3),), (spec(2), spec(3))),
            Example(cls(shape=(3, -1, 2)), (spec(4, 3),), (spec(5, 5),)),
            Example(cls(shape=()), (spec(1, 1),), (spec(2),)),
            Example(cls(shape=(1, 1)), (spec(),), (spec(0),)),
            Example(cls(shape=(0, 7)), (spec(3, 0),), (spec(1),)),
            Example(cls(shape=(4, -1)), (spec(0, 3),), (spec(3),)),
        ]
