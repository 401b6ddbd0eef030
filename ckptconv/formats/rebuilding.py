"""What the calls in a torch pickle stand for: tensors on storages, dicts, bytes. Known by name, made here; nothing is ever called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Foreign, Placed, Storage, Unsupported
from ckptconv.formats.dtypes import QUANTISED_STORAGES, STORAGE_DTYPES, TORCH_DTYPES
from ckptconv.spec import MAX_ELEMENTS, MAX_RANK, DType, TensorSpec, contiguous_strides

#: A view that repeats its elements (``expand``) may be this much larger than what is stored, or this large at all.
MAX_REPEAT, MAX_EXPANDED = 4, 1 << 30


class Ordered(dict[Any, Any]):
    """An ``OrderedDict`` of the file; ``metadata`` is its ``_metadata`` attribute (torch keeps module versions there)."""

    metadata: Any = None


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle mentions: ``module.name``."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage that a tensor is a view on; ``dtype`` is None where the tensor says it."""

    dtype: DType | None
    storage: Storage
    nbytes: int
    quantised: bool = False


def malformed(what: str, at: int = -1, *, code: str = "CK304", found: str = "") -> Refusal:
    """The refusal of a pickle that is none, with the byte at which that was seen."""
    return Refusal(what, code=code, found=found or (f"at byte {at:,} of the pickle" if at >= 0 else ""))


def storage_dtype(kind: str) -> tuple[DType | None, int, bool]:
    """dtype (None: the tensor says it), bytes of one element, and whether it is quantised, of a storage class."""
    if kind in STORAGE_DTYPES:
        return STORAGE_DTYPES[kind], STORAGE_DTYPES[kind].nbytes, False
    if kind in QUANTISED_STORAGES:
        return None, QUANTISED_STORAGES[kind], True
    if kind == "UntypedStorage":
        return None, 1, False
    raise malformed(f"there is no storage class {printable(kind)!r}", code="CK305")


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or any(type(size) is not int or not 0 <= size <= MAX_ELEMENTS for size in value):
        raise malformed(f"a tensor whose {what} is no row of sizes", code="CK305", found=printable(value))
    if len(value) > MAX_RANK:
        raise malformed(f"a tensor of rank {len(value)}; at most {MAX_RANK} are read", code="CK305")
    return tuple(value)


def _tensor(arguments: tuple[Any, ...], dtype: DType | None = None) -> Placed | Unsupported:
    """``_rebuild_tensor``, ``_v2`` and ``_v3``: storage, offset, size, stride, and whether it wants gradients."""
    reference, offset, size, stride = arguments[:4]
    if not isinstance(reference, StorageRef) or type(offset) is not int or not 0 <= offset <= MAX_ELEMENTS:
        raise malformed("a tensor without a storage or with an impossible offset", code="CK305")
    shape, strides = _sizes(size, "shape"), _sizes(stride, "strides")
    if len(shape) != len(strides):
        raise malformed("a tensor with more sizes than strides, or fewer", code="CK305", found=f"{list(shape)} and {list(strides)}")
    if reference.quantised:
        return Unsupported("quantized")
    dtype = dtype or reference.dtype
    if dtype is None:
        raise malformed("a tensor without a dtype", code="CK305")
    spec = TensorSpec(shape, dtype)
    available = reference.nbytes // dtype.nbytes
    needed = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if 0 not in shape else offset
    if needed > available:
        raise malformed(
            "a tensor reaches past the end of its storage", code="CK305", found=f"{needed:,} elements needed, {available:,} stored"
        )
    if prod(n or 1 for n in shape) > MAX_ELEMENTS or (spec.numel > MAX_REPEAT * max(available, 1) and spec.nbytes > MAX_EXPANDED):
        raise malformed("a tensor repeats its elements beyond measure", code="CK305", found=f"{spec}, {available:,} elements stored")
    if 0 in shape:
        strides = contiguous_strides(shape)
    return Placed(spec, reference.storage, offset * dtype.nbytes, strides, bool(arguments[4]) if len(arguments) > 4 else False)


def _tensor_v3(arguments: tuple[Any, ...]) -> Placed | Unsupported:
    named = arguments[6] if len(arguments) > 6 else None
    if not isinstance(named, Global) or named.name not in TORCH_DTYPES:
        return Unsupported(f"dtype {named.name}" if isinstance(named, Global) else "unknown dtype")
    return _tensor(arguments, TORCH_DTYPES[named.name])


def _inner(arguments: tuple[Any, ...]) -> Any:
    """``_rebuild_parameter(data, requires_grad, hooks)``: the tensor, whatever hooks come with it."""
    return arguments[0] if arguments and isinstance(arguments[0], (Placed, Unsupported)) else Unsupported("parameter of unknown data")


def _from_type(arguments: tuple[Any, ...]) -> Any:
    """``_rebuild_from_type_v2(function, type, arguments, state)``: the plain tensor of a Parameter; other subclasses are only named."""
    if len(arguments) != 4 or not all(isinstance(item, Global) for item in arguments[:2]) or not isinstance(arguments[2], tuple):
        raise malformed("a tensor subclass that is rebuilt by something unknown", code="CK305")
    function, kind = arguments[0].name, arguments[1].name
    rebuild = KNOWN.get(function)
    if rebuild is None or function not in _TENSORS:
        raise Refusal(f"a tensor subclass is to be rebuilt by {printable(function)}", code="CK303", try_="ask the author for plain tensors")
    made = rebuild(arguments[2])
    return (
        made
        if kind in ("torch.nn.parameter.Parameter", "torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Buffer")
        else Unsupported(kind)
    )


def _encode(arguments: tuple[Any, ...]) -> bytes:
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] not in ("latin1", "latin-1", "utf-8"):
        raise malformed("bytes in an unknown encoding")
    return arguments[0].encode(arguments[1])


def _reconstructed(arguments: tuple[Any, ...]) -> Foreign:
    if not arguments or not isinstance(arguments[0], Global):
        raise malformed("an object of something that is no class")
    return Foreign(arguments[0].name, arguments=arguments[1:])


def _mapping(arguments: tuple[Any, ...]) -> Ordered:
    found = Ordered()
    if arguments and isinstance(arguments[-1], dict):
        found.update(arguments[-1])
    elif len(arguments) == 1 and isinstance(arguments[0], list):  # Python 2 wrote the pairs
        for pair in arguments[0]:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or type(pair[0]) not in (str, int) or pair[0] in found:
                raise malformed("an ordered dict of something that is no pairs")
            found[pair[0]] = pair[1]
    return found


def _unsupported(kind: str) -> Callable[[tuple[Any, ...]], Unsupported]:
    return lambda _arguments: Unsupported(kind)


def _plain_list(arguments: tuple[Any, ...]) -> list[Any]:
    return list(arguments[0]) if arguments and isinstance(arguments[0], (list, tuple)) else []


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    return _sizes(arguments[0] if arguments else (), "size")


DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})
_TENSORS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _inner,
    "torch._utils._rebuild_parameter_with_state": _inner,
    "torch._utils._rebuild_qtensor": _unsupported("quantized"),
    "torch._utils._rebuild_sparse_tensor": _unsupported("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": _unsupported("sparse"),
    "torch._utils._rebuild_nested_tensor": _unsupported("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unsupported("meta"),
    "torch._utils._rebuild_wrapper_subclass": _unsupported("tensor subclass"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unsupported("device tensor"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _unsupported("device tensor"),
}
KNOWN: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _inner,
    "torch.nn.parameter.Buffer": _inner,
    "torch.Size": _size,
    "torch.distributed.tensor._api.DTensor": _unsupported("DTensor"),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
    "copyreg.__newobj__": _reconstructed,
    **dict.fromkeys(DICTS, _mapping),
    **{f"{builtins}.{name}": _plain_list for builtins in ("builtins", "__builtin__") for name in ("set", "frozenset", "list")},
}
