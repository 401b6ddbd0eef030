"""A state_dict into a model, as strictly as torch can."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ckptconv.names import collapse

if TYPE_CHECKING:
    from torch import Tensor, nn


class StrictResult(Struct, frozen=True):
    """What ``load_state_dict`` said."""

    loaded: bool
    error: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], *, allow_missing: Sequence[str] = (), allow_unexpected: Sequence[str] = (), assign: bool = False
) -> StrictResult:  # fmt: skip
    """``model.load_state_dict(state, strict=True)``; keys that are allowed to differ are made up for, everything else stays strict.

    Beyond what torch checks: two names of one tensor of the model must bring one value (torch lets the last one win), and with ``assign``
    nothing of the state_dict may be left on the meta device. ``assign`` makes the tensors themselves the model's, the way to load into a
    model on meta; without it values are copied, and the model is as it was where loading fails.

    >>> import torch
    >>> load_into(torch.nn.Linear(2, 1), {"weight": torch.zeros(1, 2)}).error
    'missing: bias'
    >>> load_into(torch.nn.Linear(2, 1), {"weight": torch.zeros(1, 2)}, allow_missing=["bias"]).notes
    ('loaded with initial values for what is allowed to be missing: bias',)
    """
    may_miss, may_be_extra = frozenset(allow_missing), frozenset(allow_unexpected)
    present: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    found: OrderedDict[str, Any] = OrderedDict(
        (name, value) for name, value in state.items() if name in present or name not in may_be_extra
    )
    notes = []
    # A key that may stay at its initial value is given that value, so that torch's own strict check does the rest. The same goes for
    # a module's extra state, which no tensor file can hold.
    own = [name for name, value in present.items() if not _is_tensor(value) and name not in found]
    initial = [name for name in present if name in may_miss and name not in found and name not in own]
    if own:
        notes.append(f"no tensor, and left as the model has it: {_few(own)}")
    if initial:
        notes.append(f"loaded with initial values for what is allowed to be missing: {_few(initial)}")
    aliases = _aliases(present)
    for name, first in aliases.items():
        if name not in found and first in found:
            found[name] = found[first]
        elif first not in found and name in found:
            found[first] = found[name]
    for name in (*own, *initial):
        found.setdefault(name, present[name].detach() if _is_tensor(present[name]) else present[name])

    wrong = [name for name, value in found.items() if name in present and _shape(present[name]) != _shape(value)]
    if wrong:  # torch copies what fits before it raises: nothing must be copied then
        sizes = (f"size mismatch for {name}: {_shape(found[name])} against {_shape(present[name])}" for name in wrong[:5])
        return StrictResult(False, "; ".join(sizes) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    missing = tuple(name for name in present if name not in found)
    unexpected = tuple(name for name in found if name not in present)
    if missing or unexpected:
        kinds = [f"{kind}: {_few(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]
        return StrictResult(False, "; ".join(kinds), missing, unexpected)
    parted = [f"{name} and {first}" for name, first in aliases.items() if not _equal(found[name], found[first])]
    if parted:
        return StrictResult(False, f"one tensor in the model, two different values in the file: {_few(parted)}")

    _carry_versions(state, found)
    try:
        model.load_state_dict(found, strict=True, assign=assign)
    except Exception as error:  # hooks of the model run here, and may raise anything
        return StrictResult(False, f"{type(error).__name__}: {' '.join(str(error).split())}")
    if assign:
        tie(model)
    after: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    left = tuple(name for name, value in after.items() if assign and _is_tensor(value) and value.is_meta and name not in may_miss)
    if left:
        return StrictResult(False, f"left without values: {_few(left)}", left)
    untied = [f"{name} and {first}" for name, first in aliases.items() if after[name] is not after[first]]
    if untied:
        notes.append(f"load_state_dict(assign=True) unties {_few(untied)}: both hold the same values")
    return StrictResult(True, notes=tuple(notes))


def tie(model: nn.Module) -> None:
    """Calls the model's own ``tie_weights``, where it has one that asks for nothing (transformers do)."""
    own = getattr(model, "tie_weights", None)
    if not callable(own):
        return
    try:
        inspect.signature(own).bind()
    except (TypeError, ValueError):
        return  # another method of the same name: it wants what only its author knows
    own()


def to_meta(model: nn.Module) -> None:
    """Moves parameters and buffers to the meta device in place; ``Module.to`` would make two of each that has two names."""
    from torch import nn

    moved: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None or nn.parameter.is_lazy(value):
                    continue
                if id(value) not in moved:
                    empty = value.detach().to("meta")
                    moved[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else empty
                table[name] = moved[id(value)]


def _aliases(present: Mapping[str, Any]) -> dict[str, str]:
    """Every later name of a tensor that stands under several names, mapped to its first."""
    first: dict[int, str] = {}
    return {name: first[id(value)] for name, value in present.items() if _is_tensor(value) and first.setdefault(id(value), name) != name}


def _carry_versions(state: Mapping[str, Any], found: OrderedDict[str, Any]) -> None:
    """The module versions of ``state``, by which modules upgrade old state_dicts. Copied, because torch writes into them."""
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, Mapping):
        copied = OrderedDict((path, dict(entry)) for path, entry in versions.items() if isinstance(entry, Mapping))
        found._metadata = copied  # type: ignore[attr-defined]


def _is_tensor(value: Any) -> bool:
    from torch import Tensor

    return isinstance(value, Tensor)


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if _is_tensor(value) else "no tensor"


def _equal(one: Any, other: Any) -> bool:
    """Same dtype and same bits: NaN equals itself, 0.0 is not -0.0."""
    import torch

    if one is other:
        return True
    if one.dtype != other.dtype or one.is_meta or other.is_meta:
        return False
    if one.device == other.device and one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    bits = [value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
    return torch.equal(*bits)


def _few(names: Sequence[str], most: int = 5) -> str:
    """Names as templates, at most ``most`` of them."""
    templates = collapse(names)
    return ", ".join(map(str, templates[:most])) + (f" and {len(templates) - most} more" if len(templates) > most else "")
