"""What can be done to tensors. One idea per file: its fields, its shape rule, its kernel and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic_core import ValidationError

from ckptconv.errors import Refusal, printable
from ckptconv.lazy import Lazy
from ckptconv.names import nearest
from ckptconv.transforms.base import Example, Piece, Transform

if TYPE_CHECKING:
    from ckptconv.transforms.affine import Affine
    from ckptconv.transforms.cast import Cast
    from ckptconv.transforms.combine import Combine
    from ckptconv.transforms.concat import Concat
    from ckptconv.transforms.decode import Decode
    from ckptconv.transforms.dense import Dense
    from ckptconv.transforms.guard import Guard
    from ckptconv.transforms.index import Index
    from ckptconv.transforms.pad import Pad
    from ckptconv.transforms.rearrange import Rearrange
    from ckptconv.transforms.reduce import Reduce
    from ckptconv.transforms.repeat import Repeat
    from ckptconv.transforms.reshape import Reshape
    from ckptconv.transforms.resize import Resize
    from ckptconv.transforms.slice import Slice

    ALL: tuple[type[Transform], ...]

#: Every transform there is, by its class name. A new one is a file beside this one, a line here and one above.
_CLASSES: Mapping[str, type[Transform]] = Lazy({
    name: f"ckptconv.transforms.{name.lower()}:{name}"
    for name in (
        "Rearrange", "Reshape", "Concat", "Slice", "Index", "Pad", "Repeat", "Affine", "Cast", "Combine", "Reduce", "Resize", "Decode", "Dense",
        "Guard",
    )
})  # fmt: skip

__all__ = [
    "ALL", "Affine", "Cast", "Combine", "Concat", "Decode", "Dense", "Example", "Guard", "Index", "Pad", "Piece", "Rearrange", "Reduce", "Repeat", "Reshape",
    "Resize", "Slice", "Transform", "parse",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The transforms are imported when they are asked for; ``ALL`` asks for each."""
    if name == "ALL":
        return tuple(_CLASSES.values())
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _CLASSES[name]


def parse(data: Mapping[str, Any]) -> Transform:
    """The transform whose fields ``data`` holds, as ``msgspec.to_builtins`` gives them.

    Raises :class:`~ckptconv.errors.Refusal` for an unknown ``op`` and for fields that are unknown, missing or of the wrong type.

    >>> parse({"op": "slice", "axis": 0, "start": 2, "stop": 5})
    Slice(axis=0, start=2, stop=5)
    """
    op = data.get("op") if isinstance(data, Mapping) else None
    kinds = {name.lower(): name for name in _CLASSES}
    if not isinstance(op, str) or op not in kinds:
        near = nearest(op, kinds) if isinstance(op, str) else None
        raise Refusal(
            "a saved transform names one of the known operations in its field `op`", code="CK102",
            found=printable(repr(op)), try_=near or ", ".join(kinds),
        )  # fmt: skip
    try:
        return _CLASSES[kinds[op]].validated({name: value for name, value in data.items() if name != "op"})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc'])) or op}: {fault['msg']}" for fault in error.errors(include_url=False))
        raise Refusal(f"the saved transform {op} has wrong fields", code="CK102", found=printable(faults)) from None
