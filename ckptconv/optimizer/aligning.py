"""Which parameter each entry of an optimizer's state belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

from ckptconv.compare import shared_prefix
from ckptconv.errors import Refusal, printable
from ckptconv.optimizer.reading import DROP, Member, OptimizerState, malformed, shape_of
from ckptconv.spec import Manifest, TensorSpec

_Place = tuple[int, ...]
Shape = Union[tuple[int, ...], None]
#: Half-done placements that are followed at once; more is no order that anyone could be sure of.
MAX_OPEN = 4096
#: What batch normalisation counts beside its parameters (``torch.nn.modules.batchnorm``).
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NAMED = "save it with names: torch.optim.AdamW(model.named_parameters(), …), from torch 2.6 on"


def parameters_of(source: Manifest, model: Manifest | None = None) -> dict[str, tuple[int, ...]]:
    """Names in the order of ``named_parameters()``, with their shapes: of the source, or of the ``model`` that it is a state_dict of.

    A tie counts once. Without a model, what cannot be trained is left out: integers, and the statistics of batch normalisation.
    Raises :class:`~ckptconv.errors.Refusal` CK314 for a model with other names.
    """
    if model is None:
        return {name: spec.shape for name, spec in source.stored.items() if trainable(name, spec)}
    wanted = [name for name in model.stored if name not in model.buffers]
    found = _matched(wanted, source)
    lost = [name for name in wanted if name not in found]
    if lost:
        raise Refusal(f"the source model has the parameter {printable(lost[0])}, and the state_dict has not", code="CK314",
                      found=f"{len(lost):,} of {len(wanted):,}", try_="--source-model names the model that was trained")  # fmt: skip
    return {found[name]: source[found[name]].shape for name in wanted}


def trainable(name: str, spec: TensorSpec) -> bool:
    """False for what is certainly no parameter: integers, and the statistics of batch normalisation."""
    return spec.dtype.kind in ("float", "complex") and name.rpartition(".")[2] not in _STATISTICS


def parameter_of(state: OptimizerState, source: Manifest, model: Manifest | None = None, *, ordered: bool = True) -> dict[Member, str]:
    """The source's name of every member of the parameter groups.

    By names where the state has them; else by the order of the parameters within each group, if shapes leave one way only. Raises
    :class:`~ckptconv.errors.Refusal` CK314 where there is none, or more than one, and where neither a model nor an ``ordered`` source
    tells the order.
    """
    given: dict[Member, str] = {}
    for group in state.groups:
        names = group.names if group.names is not None else group.members
        given.update((member, name) for member, name in zip(group.members, names, strict=True) if isinstance(name, str))
    if len(given) == len(state.members):
        return _by_name(given, source)
    if model is None and not ordered:
        raise Refusal("the optimizer knows its parameters by number, and this format keeps the tensors in an order of its own, not the model's",
                      code="CK314", try_=f"--source-model MODEL, the one that was trained; or {DROP}")  # fmt: skip
    return _by_order(state, parameters_of(source, model), sure=model is not None)


def _by_name(given: Mapping[Member, str], source: Manifest) -> dict[Member, str]:
    found = _matched(list(given.values()), source)
    lost = [name for name in given.values() if name not in found]
    if lost:
        raise Refusal(f"the optimizer has a parameter {printable(lost[0])}, and the state_dict has not", code="CK314",
                      found=f"{len(lost):,} of {len(given):,}, as in {printable(next(iter(source.tensors), ''))!r}", try_=DROP)  # fmt: skip
    named = {member: found[name] for member, name in given.items()}
    if len(set(named.values())) != len(named):
        raise malformed("two parameters of the optimizer have one name")
    return named


def _matched(names: Sequence[str], source: Manifest) -> dict[str, str]:
    """Names to the source's, which may have one prefix more or less (``module.``); the further names of a tie are the first."""
    aliases = source.aliases
    there = {name: aliases.get(name, name) for name in source.tensors}
    missing = [name for name in names if name not in there]
    if missing:
        longer = shared_prefix(list(there), names)
        shorter = "" if longer else shared_prefix(names, list(there))
        if longer or shorter:
            there = {name[len(longer) :] if longer else shorter + name: first for name, first in there.items() if name.startswith(longer)}
    return {name: there[name] for name in names if name in there}


def _by_order(state: OptimizerState, parameters: Mapping[str, tuple[int, ...]], *, sure: bool) -> dict[Member, str]:
    names = list(parameters)
    groups = [[shape_of(state.state.get(member, {})) for member in group.members] for group in state.groups]
    count = sum(map(len, groups))
    try:
        if count > len(names):
            raise Unplaced
        taken = place(groups, list(parameters.values()))
    except Unplaced:
        raise Refusal(
            "the moments' shapes do not go with the state_dict's parameters in their order", code="CK314",
            found=f"{count:,} parameters in {len(groups)} groups, {len(names):,} in the state_dict",
            try_=f"--source-model MODEL tells which are parameters, {_NAMED}; or {DROP}",
        ) from None  # fmt: skip
    except Ambiguous as open_:
        way = _NAMED if sure else f"--source-model MODEL tells which are parameters; or {_NAMED}"
        raise Refusal(
            f"{printable(names[open_.entry])} may be one of several of the optimizer's {count:,} numbered parameters, or none: their order and shapes "
            "leave it open", code="CK314", found=f"{count:,} parameters in {len(groups)} groups, {len(names):,} in the state_dict", try_=f"{way}; or {DROP}",
        ) from None  # fmt: skip
    return {
        state.groups[at[0]].members[at[1]]: name for name, at in zip(names, taken, strict=True) if at is not None
    }  # fmt: skip


class Unplaced(Exception):  # noqa: N818  (an answer, not a fault)
    """There is no way."""


class Ambiguous(Exception):  # noqa: N818
    """There is more than one way; ``entry`` is the number of a parameter that differs."""

    def __init__(self, entry: int) -> None:
        super().__init__(entry)
        self.entry = entry


def place(groups: Sequence[Sequence[Shape]], entries: Sequence[tuple[int, ...]]) -> list[tuple[int, int] | None]:
    """For each entry the (group, position in it) that it is, or None for an entry that no group has.

    Every group is a subsequence of the entries, and shapes agree where they are known. Raises :class:`Unplaced` where that cannot be,
    and :class:`Ambiguous` where it can in more than one way.

    >>> place([[(4, 3), (2, 4)], [(4,), (2,)]], [(4, 3), (4,), (2, 4), (2,)])
    [(0, 0), (1, 0), (0, 1), (1, 1)]
    """
    spare = len(entries) - sum(map(len, groups))
    start = (0,) * len(groups)
    # For every entry: how far each group may be after it, and from where; two ways are enough to know that there is not one.
    layers: list[dict[_Place, list[tuple[_Place, int | None]]]] = [{start: []}]
    for number, shape in enumerate(entries):
        layer: dict[_Place, list[tuple[_Place, int | None]]] = {}
        for before in layers[-1]:
            if number - sum(before) < spare:
                layer.setdefault(before, []).append((before, None))
            for at, group in enumerate(groups):
                if before[at] < len(group) and group[before[at]] in (shape, None):
                    after = (*before[:at], before[at] + 1, *before[at + 1 :])
                    layer.setdefault(after, []).append((before, at))
        if len(layer) > MAX_OPEN:
            raise Ambiguous(number)
        layers.append(layer)
    here = tuple(map(len, groups))
    if here not in layers[-1]:
        raise Unplaced
    found: list[tuple[int, int] | None] = []
    for number in reversed(range(len(entries))):
        ways = layers[number + 1][here]
        if len(ways) > 1:
            raise Ambiguous(number)
        ((here, group_at),) = ways
        found.append(None if group_at is None else (group_at, here[group_at]))
    return found[::-1]
