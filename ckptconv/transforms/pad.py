"""More elements around an axis, all of one value."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ckptconv.spec import Box, DType, TensorSpec
from ckptconv.transforms.base import Example, Piece, Transform, checked_axis, checked_result, misfit, only
from ckptconv.transforms.filling import fill
from ckptconv.transforms.kernels import dtype_of, moved
from ckptconv.transforms.slice import Slice

if TYPE_CHECKING:
    from torch import Tensor


class Pad(Transform, frozen=True):
    """``before`` and ``after`` elements of ``value`` along ``axis`` (a vocabulary rounded up, padded heads).

    >>> str(Pad(axis=0, before=0, after=3).infer(TensorSpec((5, 4), DType.float32)))
    '[8, 4] float32'
    """

    axis: int
    before: int
    after: int
    value: float = 0.0

    stops_moments: ClassVar[str] = "the new elements have no history, and zeros would make their first steps too large"

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        spec = only("pad", arguments)
        axis = checked_axis(self.axis, spec)
        if self.before < 0 or self.after < 0:
            raise misfit(f"pad cannot take elements away: {self.before} before, {self.after} after", spec)
        return checked_result("pad", (*spec.shape[:axis], self.before + spec.shape[axis] + self.after, *spec.shape[axis + 1 :]), spec)

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch

        (tensor,) = arguments

        def edge(size: int) -> Tensor:
            shape = (*tensor.shape[: self.axis % tensor.dim()], size, *tensor.shape[self.axis % tensor.dim() + 1 :])
            if tensor.device.type == "meta":
                return torch.empty(shape, dtype=tensor.dtype, device="meta")
            return fill("constant", self.value, 0, shape, dtype_of(tensor))

        return moved(lambda *parts: torch.cat(parts, self.axis), edge(self.before), tensor, edge(self.after))

    def recover(self, *arguments: TensorSpec) -> tuple[Piece, ...]:
        (spec,) = arguments
        axis = checked_axis(self.axis, spec)
        return (Piece(0, Box.whole(spec.shape), Slice(axis=axis, start=self.before, stop=self.before + spec.shape[axis])),)

    def describe(self, *arguments: str) -> str:
        return f"pad({arguments[0]}, axis={self.axis}, {self.before} before, {self.after} after, value={self.value:g})"

    @classmethod
    def examples(cls) -> list[Example]:
        x = TensorSpec((3, 2), DType.float32)
        return [
            Example(cls(axis=0, before=0, after=2), (x,), (TensorSpec((), DType.float32),)),
            Example(cls(axis=-1, before=1, after=1, value=1.0), (TensorSpec((2, 3), DType.bfloat16),)),
            Example(cls(axis=0, before=1, after=0), (TensorSpec((0, 3), DType.int64),)),
            Example(cls(axis=0, before=1, after=0), (TensorSpec((2,), DType.float8_e4m3fn),)),
        ]
