"""Torch's storage classes and the element types that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ckptconv.spec import DType

#: Name of the typed storage class -> element type. Newer types have no class of their own: torch stores them as ``UntypedStorage``
#: and names the type beside it.
STORAGE_DTYPES: Mapping[str, DType] = MappingProxyType({
    "DoubleStorage": DType.float64, "FloatStorage": DType.float32, "HalfStorage": DType.float16, "BFloat16Storage": DType.bfloat16,
    "LongStorage": DType.int64, "IntStorage": DType.int32, "ShortStorage": DType.int16, "CharStorage": DType.int8,
    "ByteStorage": DType.uint8, "BoolStorage": DType.bool,
    "ComplexDoubleStorage": DType.complex128, "ComplexFloatStorage": DType.complex64,
})  # fmt: skip

#: The inverse, for the types that have a typed storage class.
DTYPE_STORAGES: Mapping[DType, str] = MappingProxyType({dtype: name for name, dtype in STORAGE_DTYPES.items()})

#: Storage classes of torch's own quantised tensors -> bytes of one stored element.
QUANTISED_STORAGES: Mapping[str, int] = MappingProxyType({
    "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1,
})  # fmt: skip

#: How torch's pickles name an element type: ``torch.float32`` -> float32, with the old aliases.
TORCH_DTYPES: Mapping[str, DType] = MappingProxyType(
    {f"torch.{dtype.value}": dtype for dtype in DType}
    | {"torch.double": DType.float64, "torch.float": DType.float32, "torch.half": DType.float16, "torch.long": DType.int64,
       "torch.int": DType.int32, "torch.short": DType.int16, "torch.cfloat": DType.complex64, "torch.cdouble": DType.complex128,
       "torch.chalf": DType.complex32}
)  # fmt: skip
