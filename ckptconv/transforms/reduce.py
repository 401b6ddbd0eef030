"""One axis summed or averaged away, or kept with size one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms.base import Example, Transform, checked_axis, misfit, only

if TYPE_CHECKING:
    from torch import Tensor


class Reduce(Transform, frozen=True):
    """The sum or mean over ``axis``, which stays with size 1. Computed in float32 (float64 for float64) and rounded back.

    >>> str(Reduce(how="sum", axis=1).infer(TensorSpec((64, 3, 7, 7), DType.float32)))
    '[64, 1, 7, 7] float32'
    """

    how: Literal["sum", "mean"]
    axis: int

    exact: ClassVar[bool] = False
    stops_moments: ClassVar[str] = "a sum or a mean has other gradients than what goes into it"

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        spec = only("reduce", arguments)
        axis = checked_axis(self.axis, spec)
        if spec.dtype.kind != "float" or spec.dtype in (DType.float4_e2m1fn_x2, DType.float8_e8m0fnu):
            raise misfit(f"a {self.how} is taken of floating-point numbers, not of {spec.dtype}", spec)
        return TensorSpec((*spec.shape[:axis], 1, *spec.shape[axis + 1 :]), spec.dtype)

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch

        (tensor,) = arguments
        wide = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
        return (wide.sum(self.axis, keepdim=True) if self.how == "sum" else wide.mean(self.axis, keepdim=True)).to(tensor.dtype)

    def describe(self, *arguments: str) -> str:
        return f"{self.how}({arguments[0]}, axis={self.axis})"

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example(cls(how="sum", axis=1), (TensorSpec((4, 3, 2), DType.float32),), (TensorSpec((4,), DType.float32),)),
            Example(cls(how="mean", axis=-1), (TensorSpec((4, 3), DType.bfloat16),), (TensorSpec((2, 2), DType.int64),)),
        ]
