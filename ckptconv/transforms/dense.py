"""A sparse tensor written out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ckptconv.errors import Refusal
from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms.base import Example, Transform, checked_result, misfit
from ckptconv.transforms.kernels import moved

if TYPE_CHECKING:
    from torch import Tensor


class Dense(Transform, frozen=True):
    """Zeros of ``shape`` with the stored values at their places: ``coo`` (indices ``[rank, n]``, values ``[n]``) or ``csr`` (row pointers,
    columns, values; rank 2). Values stored twice at one place are added, as torch does; none may lie outside.

    >>> i, v = TensorSpec((2, 5), DType.int64), TensorSpec((5,), DType.float32)
    >>> str(Dense(layout="coo", shape=(4, 3)).infer(i, v))
    '[4, 3] float32'
    """

    layout: Literal["coo", "csr"]
    shape: tuple[int, ...]

    stops_moments: ClassVar[str] = "the places that a sparse tensor leaves out have no history"

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        if len(arguments) != (2 if self.layout == "coo" else 3):
            raise misfit(
                f"a {self.layout} tensor is {'indices and values' if self.layout == 'coo' else 'row pointers, columns and values'}",
                *arguments,
            )
        values = arguments[-1]
        if any(spec.dtype not in (DType.int64, DType.int32) for spec in arguments[:-1]):
            raise misfit("the indices of a sparse tensor are int64 or int32", *arguments)
        count = values.shape[0] if values.shape else 0
        if self.layout == "coo":
            sparse = arguments[0].shape[0] if len(arguments[0].shape) == 2 else -1
            fits = sparse >= 0 and arguments[0].shape == (sparse, count) and values.shape[1:] == self.shape[sparse:]
        else:
            fits = len(self.shape) == 2 and arguments[0].shape == (self.shape[0] + 1,) and arguments[1].shape == values.shape == (count,)
        if not fits:
            raise misfit(f"the parts of the {self.layout} tensor do not make up {list(self.shape)}", *arguments)
        return checked_result("dense", self.shape, values)

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch

        values = arguments[-1]
        if values.device.type == "meta":
            return torch.empty(self.shape, dtype=values.dtype, device="meta")
        if self.layout == "coo":
            places = arguments[0].to(torch.int64)
        else:
            rows, columns = arguments[0].to(torch.int64), arguments[1].to(torch.int64)
            counts = rows.diff()
            if int(rows[0]) != 0 or bool((counts < 0).any()) or int(rows[-1]) != len(columns):
                raise Refusal("the row pointers of a sparse tensor do not count its values", code="CK305")
            places = torch.stack([torch.arange(self.shape[0]).repeat_interleave(counts), columns])
        limits = torch.tensor(self.shape[: len(places)]).unsqueeze(-1)
        if bool(((places < 0) | (places >= limits)).any()):
            raise Refusal("a sparse tensor has values outside its shape", code="CK305", found=str(list(self.shape)))
        strides = torch.tensor([_product(self.shape[at + 1 : len(places)]) for at in range(len(places))]).unsqueeze(-1)
        flat = (places * strides).sum(0)
        if bool((torch.sort(flat).values.diff() == 0).any()):
            wide = torch.zeros(self.shape, dtype=values.dtype).reshape(-1, *values.shape[1:])
            return wide.index_add_(0, flat, values).reshape(self.shape)

        def scatter(stored: Tensor) -> Tensor:
            return (
                torch.zeros(self.shape, dtype=stored.dtype).reshape(-1, *stored.shape[1:]).index_copy_(0, flat, stored).reshape(self.shape)
            )

        return moved(scatter, values)

    def describe(self, *arguments: str) -> str:
        return f"dense({', '.join(arguments)}, {self.layout}, {list(self.shape)})"

    @classmethod
    def examples(cls) -> list[Example]:
        # Indices of zeros and ones at most: the contract test fills arguments with numbers of its own.
        return [Example(cls(layout="coo", shape=(100, 100, 2)), (TensorSpec((2, 5), DType.int64), TensorSpec((5, 2), DType.float32)), (TensorSpec((3, 5), DType.int64), TensorSpec((5, 2), DType.float32)))]  # fmt: skip


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
