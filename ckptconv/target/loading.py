"""A state_dict into a model, as strictly as torch can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class StrictResult:
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

    With ``assign`` the tensors themselves become the model's (the way to load into a model on the meta device), and afterwards nothing
    of it may be left on meta. Without, values are copied, and the model is as it was where loading fails.
    """
    found = {name: value for name, value in state.items() if name not in set(allow_unexpected)}
    present = model.state_dict(keep_vars=True)
    # A key that may stay at its initial value is given that value, so that torch's own strict check does the rest. The same goes for the
    # other names of a tie whose first name is there.
    for name in allow_missing:
        if name in present:
            found.setdefault(name, present[name].detach())
    for name, first in _aliases(present).items():
        if name not in found and first in found:
            found[name] = found[first]
        elif first not in found and name in found:
            found[first] = found[name]
    wrong = [name for name, value in found.items() if name in present and present[name].shape != value.shape]
    if wrong:  # torch copies what fits before it raises: nothing must be copied then
        return StrictResult(
            False,
            "; ".join(f"size mismatch for {name}: {list(found[name].shape)} against {list(present[name].shape)}" for name in wrong[:5]),
        )
    missing = tuple(name for name in present if name not in found)
    unexpected = tuple(name for name in found if name not in present)
    if missing or unexpected:
        return StrictResult(False, f"missing: {list(missing[:5])}, unexpected: {list(unexpected[:5])}", missing, unexpected)
    ties = _aliases(present)
    try:
        model.load_state_dict(found, strict=True, assign=assign)
    except RuntimeError as error:
        return StrictResult(False, str(error))
    if assign:
        tie(model)
        left = [name for name, value in model.state_dict(keep_vars=True).items() if value.is_meta and name not in set(allow_missing)]
        if left:
            return StrictResult(False, f"left without values: {left[:5]}", tuple(left))
    untied = [f"{name} and {first}" for name, first in ties.items() if not _same(model, name, first)]
    notes = (f"load_state_dict(assign=True) unties {', '.join(untied)}: both hold the same values",) if untied else ()
    return StrictResult(True, notes=notes)


def tie(model: nn.Module) -> None:
    """Calls the model's own ``tie_weights``, where it has one (transformers do)."""
    own = getattr(model, "tie_weights", None)
    if callable(own):
        own()


def _aliases(present: Mapping[str, Tensor]) -> dict[str, str]:
    """Every later name of a tensor that stands under several names, mapped to its first."""
    first: dict[int, str] = {}
    return {name: first[id(value)] for name, value in present.items() if first.setdefault(id(value), name) != name}


def _same(model: nn.Module, name: str, other: str) -> bool:
    state = model.state_dict(keep_vars=True)
    return state[name] is state[other] or state[name].data_ptr() == state[other].data_ptr()
