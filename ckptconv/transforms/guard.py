"""A value that passes unchanged, or stops the conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ckptconv.errors import Refusal
from ckptconv.spec import Box, DType, TensorSpec
from ckptconv.transforms.base import Example, Piece, Transform, misfit

if TYPE_CHECKING:
    from torch import Tensor


class Guard(Transform, frozen=True):
    """The first argument, unchanged. ``finite``: it must hold no NaN and no infinity. A second argument must hold the same values."""

    finite: bool = False

    stops_moments: ClassVar[str] = ""

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        if len(arguments) not in (1, 2):
            raise misfit(f"guard takes one or two tensors, not {len(arguments)}", *arguments)
        if arguments[0] != arguments[-1]:
            raise misfit("two tensors of different shape or dtype cannot be equal", *arguments)
        return arguments[0]

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch

        value = arguments[0]
        if value.device.type == "meta":
            return value
        if self.finite and (value.is_floating_point() or value.is_complex()):
            wide = value if value.element_size() > 1 else value.to(torch.float32)
            finite = torch.isfinite(wide)
            if not bool(finite.all()):
                bad = int((~finite).sum())
                first = int((~finite).flatten().nonzero()[0])
                shown = wide.flatten()[first].item()
                raise Refusal(f"{bad:,} of {value.numel():,} values are not finite", code="CK207", found=f"{shown} at element {first:,}")
        if len(arguments) == 2 and not torch.equal(value, arguments[1]):
            unequal = f"{value.item()} and {arguments[1].item()}" if value.numel() == 1 else f"two of {list(value.shape)}"
            raise Refusal("the tensors are not equal", code="CK207", found=unequal)
        return value

    def recover(self, *arguments: TensorSpec) -> tuple[Piece, ...]:
        return tuple(Piece(at, Box.whole(argument.shape), None) for at, argument in enumerate(arguments))

    def describe(self, *arguments: str) -> str:
        conditions = (["finite"] if self.finite else []) + ([f"equal to {arguments[1]}"] if len(arguments) == 2 else [])
        return f"{arguments[0]} checked {' and '.join(conditions)}"

    @classmethod
    def examples(cls) -> list[Example]:
        x = TensorSpec((3, 2), DType.float32)
        return [Example(cls(finite=True), (x,), (x, TensorSpec((3,), DType.float32))), Example(cls(), (TensorSpec((), DType.int64),))]
