"""Every position along an axis several times over."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ckptconv.spec import Box, DType, TensorSpec
from ckptconv.transforms.base import Example, Piece, Transform, checked_axis, checked_result, misfit, only
from ckptconv.transforms.index import Index
from ckptconv.transforms.kernels import moved
from ckptconv.transforms.slice import Slice

if TYPE_CHECKING:
    from torch import Tensor


class Repeat(Transform, frozen=True):
    """``times`` copies along ``axis``: ``a a b b`` with ``interleave`` (``torch.repeat_interleave``), ``a b a b`` without (tiling).

    >>> Repeat(axis=0, times=4, interleave=True).infer(TensorSpec((8, 64), DType.float32)).shape
    (32, 64)
    """

    axis: int
    times: int
    interleave: bool

    stops_moments: ClassVar[str] = "copies share what was one gradient, in parts that nothing tells"

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        spec = only("repeat", arguments)
        axis = checked_axis(self.axis, spec)
        if self.times < 1:
            raise misfit(f"repeat needs at least 1 copy, and was told {self.times}", spec)
        return checked_result("repeat", (*spec.shape[:axis], spec.shape[axis] * self.times, *spec.shape[axis + 1 :]), spec)

    def apply(self, *arguments: Tensor) -> Tensor:
        def repeated(tensor: Tensor) -> Tensor:
            axis = self.axis % tensor.dim()
            copies = axis + 1 if self.interleave else axis
            shape = [*tensor.shape[:copies], self.times, *tensor.shape[copies:]]
            return tensor.unsqueeze(copies).expand(shape).flatten(axis, axis + 1)

        return moved(repeated, *arguments)

    def recover(self, *arguments: TensorSpec) -> tuple[Piece, ...]:
        """The first copy of everything."""
        (spec,) = arguments
        axis = checked_axis(self.axis, spec)
        size = spec.shape[axis]
        if self.interleave:
            back: Transform = Index(axis=axis, take=tuple(range(0, size * self.times, self.times)))
        else:
            back = Slice(axis=axis, start=0, stop=size)
        return (Piece(0, Box.whole(spec.shape), back),)

    def describe(self, *arguments: str) -> str:
        return f"repeat({arguments[0]}, axis={self.axis}, times={self.times}, {'interleaved' if self.interleave else 'tiled'})"

    @classmethod
    def examples(cls) -> list[Example]:
        def spec(*shape: int, dtype: DType = DType.float32) -> TensorSpec:
            return TensorSpec(shape, dtype)

        return [
            Example(cls(axis=0, times=3, interleave=True), (spec(2, 2),), (spec(),)),
            Example(cls(axis=-1, times=2, interleave=False), (spec(2, 3),), (spec(2, 3), spec(2, 3))),
            Example(cls(axis=1, times=1, interleave=True), (spec(2, 0, dtype=DType.complex64),), (spec(2),)),
            Example(cls(axis=0, times=2**40, interleave=False), (spec(0, 2),), (spec(2**30, 2),)),
        ]
