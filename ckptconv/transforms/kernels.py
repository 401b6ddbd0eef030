"""What several kernels share: dtypes of torch, and moving elements of dtypes for which torch lacks the operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ckptconv.errors import Refusal
from ckptconv.spec import DType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_AS_BITS = {1: "uint8", 2: "int16", 4: "int32"}
_WIDELY_SUPPORTED = {
    "float64", "float32", "float16", "bfloat16", "complex64", "complex128", "int64", "int32", "int16", "int8", "uint8", "bool",
}  # fmt: skip


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's own object for ``dtype``; a :class:`~ckptconv.errors.Refusal` where the installed torch does not have it."""
    import torch

    found = getattr(torch, dtype.value, None)
    if not isinstance(found, torch.dtype):
        raise Refusal(f"torch {torch.__version__} has no {dtype}", code="CK505", try_="a newer torch")
    return found


def dtype_of(tensor: Tensor) -> DType:
    """The dtype of ``tensor`` in ckptconv's words."""
    return DType(str(tensor.dtype).removeprefix("torch."))


def moved(move: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``move(*tensors)`` for a ``move`` that only moves elements, bit by bit, for every dtype.

    torch has no ``cat`` or ``index_select`` for some dtypes (fp8, unsigned 16 and up, complex32): these go as integers of their width.
    """
    dtype = tensors[0].dtype
    if dtype_of(tensors[0]).value in _WIDELY_SUPPORTED:
        return move(*tensors)
    import torch

    bits: torch.dtype = getattr(torch, _AS_BITS.get(dtype.itemsize, "int64"))
    return move(*(tensor.resolve_conj().view(bits) for tensor in tensors)).view(dtype)
