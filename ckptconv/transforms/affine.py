"""Multiply and add: norms that store their weight minus one, scales folded into weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms.base import Example, Transform, misfit, only

if TYPE_CHECKING:
    from torch import Tensor


class Affine(Transform, frozen=True):
    """``x * mul + add``, computed in float32 (float64 for float64) and rounded back. Not exact: ``+1`` and then ``-1`` changes most values.

    >>> str(Affine(add=1.0).infer(TensorSpec((4,), DType.bfloat16)))
    '[4] bfloat16'
    """

    mul: float = 1.0
    add: float = 0.0

    exact: ClassVar[bool] = False
    stops_moments: ClassVar[str] = "values that are scaled or shifted have other gradients"

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        spec = only("affine", arguments)
        if spec.dtype.kind not in ("float", "complex") or spec.dtype in (DType.float4_e2m1fn_x2, DType.float8_e8m0fnu):
            raise misfit(f"affine works on floating-point numbers, not on {spec.dtype}", spec)
        return spec

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch

        (tensor,) = arguments
        wide = tensor if tensor.dtype in (torch.float64, torch.complex64, torch.complex128) else tensor.to(torch.float32)
        return (wide * self.mul + self.add).to(tensor.dtype)

    def describe(self, *arguments: str) -> str:
        scaled = arguments[0] if self.mul == 1 else f"{self.mul:g} * {arguments[0]}"
        return scaled if not self.add else f"{scaled} + {self.add:g}"

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example(cls(add=1.0), (TensorSpec((4,), DType.bfloat16),), (TensorSpec((4,), DType.int64),)),
            Example(cls(mul=0.5), (TensorSpec((2, 3), DType.float64),)),
            Example(cls(mul=2.0, add=-1.0), (TensorSpec((), DType.float32),)),
        ]
