"""What the calls in a torch pickle stand for: tensors on storages, dicts, bytes. Known by name, made here; nothing is ever called."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any

from msgspec import Struct

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Composite, Foreign, Placed, Storage, Unsupported
from ckptconv.formats.dtypes import QUANTISED_STORAGES, STORAGE_DTYPES, TORCH_DTYPES
from ckptconv.spec import MAX_ELEMENTS, MAX_RANK, DType, TensorSpec, contiguous_strides

#: A view that repeats its elements (``expand``) may be this much larger than what is stored, or this large at all.
MAX_REPEAT, MAX_EXPANDED = 4, 1 << 30
MAX_ARGUMENTS = 8  #: of a call whose arguments are copied


class Ordered(dict[Any, Any]):
    """An ``OrderedDict`` of the file; ``metadata`` is its ``_metadata`` attribute (torch keeps module versions there)."""

    metadata: Any = None


class Global(Struct, frozen=True):
    """A name that the pickle mentions: ``module.name``."""

    name: str


class StorageRef(Struct, frozen=True, gc=False):
    """A storage that a tensor is a view on; ``dtype`` is None where the tensor says it."""

    dtype: DType | None
    storage: Storage
    nbytes: int
    quantised: bool = False
    kind: str = ""  #: of a quantised storage, its class


def malformed(what: str, at: int = -1, *, code: str = "CK304", found: str = "") -> Refusal:
    """The refusal of a pickle that is none, with the byte at which that was seen."""
    return Refusal(what, code=code, found=found or (f"at byte {at:,} of the pickle" if at >= 0 else ""))


@lru_cache(maxsize=64)
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
    if not isinstance(value, (tuple, list)):
        raise malformed(f"a tensor whose {what} is no row of sizes", code="CK305", found=printable(value))
    if len(value) > MAX_RANK:
        raise malformed(f"a tensor of rank {len(value)}; at most {MAX_RANK} are read", code="CK305")
    for size in value:
        if type(size) is not int or not 0 <= size <= MAX_ELEMENTS:
            raise malformed(f"a tensor whose {what} is no row of sizes", code="CK305", found=printable(value))
    return tuple(value)


@lru_cache(maxsize=4096)
def _view(shape: tuple[int, ...], strides: tuple[int, ...], dtype: DType) -> tuple[TensorSpec, int, bool]:
    """Spec, elements from the first to the last, and whether it has more elements than any tensor can. Few shapes are many tensors'."""
    beyond = prod(n or 1 for n in shape) > MAX_ELEMENTS
    span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if 0 not in shape else 0
    return TensorSpec(shape, dtype), span, beyond


def _stepped(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides without what a file says of axes that nobody steps along: it may be anything, and chosen so that all of it hashes alike."""
    return contiguous_strides(shape) if 0 in shape else tuple([step if size > 1 else 1 for size, step in zip(shape, strides, strict=True)])


def _tensor(arguments: tuple[Any, ...], dtype: DType | None = None) -> Placed | Unsupported:
    """``_rebuild_tensor``, ``_v2`` and ``_v3``: storage, offset, size, stride, and whether it wants gradients."""
    reference, offset, size, stride = arguments[:4]
    if not isinstance(reference, StorageRef) or type(offset) is not int or not 0 <= offset <= MAX_ELEMENTS:
        raise malformed("a tensor without a storage or with an impossible offset", code="CK305")
    shape, strides = _sizes(size, "shape"), _sizes(stride, "strides")
    if len(shape) != len(strides):
        raise malformed("a tensor with more sizes than strides, or fewer", code="CK305", found=f"{list(shape)} and {list(strides)}")
    if 0 in shape or 1 in shape:
        strides = _stepped(shape, strides)
    if reference.quantised:
        return Unsupported("quantized")  # without a quantiser beside it, its numbers mean nothing
    dtype = dtype or reference.dtype
    if dtype is None:
        raise malformed("a tensor without a dtype", code="CK305")
    width = dtype.nbytes
    available = reference.nbytes // width
    spec, span, beyond = _view(shape, strides, dtype)
    needed = offset + span
    if needed > available:
        raise malformed(
            "a tensor reaches past the end of its storage", code="CK305", found=f"{needed:,} elements needed, {available:,} stored"
        )
    if beyond or (span < spec.numel and spec.numel > MAX_REPEAT * max(available, 1) and spec.nbytes > MAX_EXPANDED):
        raise malformed("a tensor repeats its elements beyond measure", code="CK305", found=f"{spec}, {available:,} elements stored")
    return Placed(spec, reference.storage, offset * width, strides, bool(arguments[4]) if len(arguments) > 4 else False)


def _tensor_v3(arguments: tuple[Any, ...]) -> Placed | Unsupported:
    named = arguments[6] if len(arguments) > 6 else None
    if not isinstance(named, Global) or named.name not in TORCH_DTYPES:
        return Unsupported(f"dtype {named.name}" if isinstance(named, Global) else "unknown dtype")
    return _tensor(arguments, TORCH_DTYPES[named.name])


def _inner(arguments: tuple[Any, ...]) -> Any:
    """``_rebuild_parameter(data, requires_grad, hooks)``: the tensor, whatever hooks come with it."""
    known = (Placed, Composite, Unsupported)
    return arguments[0] if arguments and isinstance(arguments[0], known) else Unsupported("parameter of unknown data")


def _from_type(arguments: tuple[Any, ...]) -> Any:
    """``_rebuild_from_type_v2(function, type, arguments, state)``: the plain tensor of a Parameter; other subclasses are only named."""
    if len(arguments) != 4 or not all(isinstance(item, Global) for item in arguments[:2]) or not isinstance(arguments[2], tuple):
        raise malformed("a tensor subclass that is rebuilt by something unknown", code="CK305")
    function, kind = arguments[0].name, arguments[1].name
    rebuild = KNOWN.get(function)
    if rebuild is None or function not in _TENSORS:
        raise Refusal(f"a tensor subclass is to be rebuilt by {printable(function)}", code="CK303", try_="ask the author for plain tensors")
    if kind.endswith(".DTensor") and function == "torch._utils._rebuild_wrapper_subclass":
        return _whole_dtensor(arguments[2], arguments[3])
    made = rebuild(arguments[2])
    return (
        made
        if kind in ("torch.nn.parameter.Parameter", "torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Buffer")
        else Unsupported(kind)
    )


def _whole_dtensor(arguments: tuple[Any, ...], state: Any) -> Any:
    """A DTensor's local tensor, where it is the whole of it (one rank, or replicated); a shard of one is only named."""
    slots = state[1] if isinstance(state, tuple) and len(state) == 2 else state
    local = slots.get("_local_tensor") if isinstance(slots, dict) else None
    if not isinstance(local, Placed) or len(arguments) < 3 or local.spec.shape != _sizes(arguments[2], "shape"):
        return Unsupported("DTensor shard" if isinstance(local, Placed) else "DTensor")
    return local


def _sparse(arguments: tuple[Any, ...]) -> Composite | Unsupported:
    """``_rebuild_sparse_tensor(layout, (indices, values, size, …))``, or row pointers, columns, values and size."""
    if len(arguments) != 2 or not isinstance(arguments[0], Foreign) or not isinstance(arguments[1], tuple):
        return Unsupported("sparse")
    layout = arguments[0].arguments[0] if arguments[0].arguments else None
    if type(layout) is not str:  # nothing of a file is hashed before it is known to be text
        return Unsupported("sparse")
    parts = {"torch.sparse_coo": ("indices", "values"), "torch.sparse_csr": ("rows", "columns", "values")}.get(layout)
    if parts is None or len(arguments[1]) <= len(parts) or not all(isinstance(part, Placed) for part in arguments[1][: len(parts)]):
        return Unsupported("sparse")
    placed = dict(zip(parts, arguments[1], strict=False))
    shape = _sizes(arguments[1][len(parts)], "size")
    if prod(n or 1 for n in shape) > MAX_EXPANDED:
        raise malformed("a sparse tensor that is too large to be written out", code="CK305", found=str(list(shape)))
    return Composite("coo" if len(parts) == 2 else "csr", TensorSpec(shape, placed["values"].spec.dtype), placed)


def _quantised(arguments: tuple[Any, ...]) -> Composite | Unsupported:
    """``_rebuild_qtensor(storage, offset, size, stride, (scheme, scale, zero point[, axis]), …)``: its integers and how to read them."""
    if (
        len(arguments) < 5
        or not isinstance(arguments[0], StorageRef)
        or not isinstance(arguments[4], tuple)
        or len(arguments[4]) > MAX_ARGUMENTS
    ):
        raise malformed("a quantised tensor that is none", code="CK305")
    integers = _QUANTISED.get(arguments[0].kind)
    scheme, *rest = arguments[4] or ("",)
    if integers is None or not isinstance(scheme, Global):
        return Unsupported("quantized")
    plain = StorageRef(integers, arguments[0].storage, arguments[0].nbytes)
    numbers = _tensor((plain, *arguments[1:4]))
    if not isinstance(numbers, Placed):
        return Unsupported("quantized")
    spec = TensorSpec(numbers.spec.shape, DType.float32)
    if scheme.name == "torch.per_tensor_affine" and len(rest) == 2 and all(type(value) in (int, float) for value in rest):
        return Composite("int8", spec, {"numbers": numbers, "scales": float(rest[0]), "zeros": float(rest[1])})
    if scheme.name != "torch.per_channel_affine" or len(rest) != 3 or type(rest[2]) is not int or not 0 <= rest[2] < len(spec.shape):
        return Unsupported("quantized")
    scales, zeros, axis = rest
    if not isinstance(scales, Placed) or not isinstance(zeros, Placed):
        return Unsupported("quantized")
    if scales.spec.shape != (spec.shape[axis],) or zeros.spec.shape != (spec.shape[axis],):
        raise malformed("a quantised tensor whose scales do not fit", code="CK305", found=f"{scales.spec} for {spec}")
    return Composite("int8", spec, {"numbers": numbers, "scales": scales, "zeros": zeros}, axis=axis)


def _encode(arguments: tuple[Any, ...]) -> bytes:
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] not in ("latin1", "latin-1", "utf-8"):
        raise malformed("bytes in an unknown encoding")
    return arguments[0].encode(arguments[1])


def _reconstructed(arguments: tuple[Any, ...]) -> Foreign:
    if not arguments or not isinstance(arguments[0], Global):
        raise malformed("an object of something that is no class")
    return Foreign(arguments[0].name, arguments=arguments[1:] if len(arguments) <= MAX_ARGUMENTS else ())


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


#: The integers of torch's quantised storages; those of less than a byte are only named.
_QUANTISED = {"QInt8Storage": DType.int8, "QUInt8Storage": DType.uint8, "QInt32Storage": DType.int32}
DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})
_TENSORS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _inner,
    "torch._utils._rebuild_parameter_with_state": _inner,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_sparse_tensor": _sparse,
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
    **{f"torch.jit._pickle.build_{kind}list": _plain_list for kind in ("int", "double", "bool", "tensor")},
    "torch.jit._pickle.restore_type_tag": lambda arguments: arguments[0] if arguments else None,
    **{f"{builtins}.{name}": _plain_list for builtins in ("builtins", "__builtin__") for name in ("set", "frozenset", "list")},
}
