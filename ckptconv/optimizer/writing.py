"""The optimizer's state as the target's optimizer takes it: parameters in the target's order, groups with their hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from ckptconv.errors import Problem, Refusal, printable
from ckptconv.formats.base import Kept, Placed
from ckptconv.names import collapse
from ckptconv.optimizer.aligning import trainable
from ckptconv.optimizer.following import Moments, Trained, slot
from ckptconv.optimizer.reading import DROP, Key, OptimizerState
from ckptconv.plan import Apply, Plan, Read
from ckptconv.spec import Manifest, TensorSpec


class Member(Struct, frozen=True):
    """A parameter of the target: what its optimizer calls it, its group, and the output that its state comes from."""

    name: str
    group: int
    trained: Trained | None = None


def members(
    plan: Plan, state: OptimizerState, moments: Moments, wanted: Manifest | None, order: Sequence[str] = (), *, alone: bool = True
) -> tuple[list[Member], list[Problem]]:
    """The parameters in the target's order; without a target, in that of the outputs, or of the source's parameters where ``order`` tells it. With
    problems CK417 for what has no place there.

    A parameter that is new in the target goes into the one group, without a state, where this optimizer is ``alone``; of several, nothing tells
    which.
    """
    if wanted is None:
        place = {name: at for at, name in enumerate(order)}
        trained = (
            sorted(moments.trained, key=lambda each: min(place.get(part, len(place)) for part in each.parts)) if place else moments.trained
        )
        return [Member(each.name, each.group, each) for each in trained], []
    aliases, by_name = plan.manifest.aliases, {each.name: each for each in moments.trained}
    tied = {name: group for group in wanted.ties for name in group}
    found: list[Member] = []
    new: list[str] = []
    problems: list[Problem] = []
    placed: set[str] = set()
    seen: set[str] = set()
    idle = frozenset(moments.idle)
    for name, spec in wanted.tensors.items():
        if name in seen:
            continue
        seen.update(tied.get(name, ()))  # a tie counts at its first name, as named_parameters() has it
        stored = dict.fromkeys(aliases.get(other, other) for other in tied.get(name, (name,)) if other in plan.manifest)
        mine = [by_name[other] for other in stored if other in by_name]
        placed.update(each.name for each in mine)
        if len(mine) > 1:
            what = f"{printable(mine[0].name)} and {printable(mine[1].name)} are one parameter in the target, and have a state each"
            problems.append(Problem("CK417", f"the optimizer's state cannot follow: {what}", try_=DROP))
        elif mine and name in wanted.buffers:
            what = f"the optimizer's state cannot follow {printable(mine[0].name)}: it is a buffer in the target, which no optimizer trains"
            problems.append(Problem("CK417", what, try_=DROP))
        elif mine:
            found.append(Member(name, mine[0].group, mine[0]))
        elif name not in wanted.buffers and trainable(name, spec) and stored.keys() <= idle:
            if len(state.groups) == 1 and alone:
                found.append(Member(name, 0))
            else:
                new.append(name)
    strange = [each.name for each in moments.trained if each.name not in placed]
    problems += [
        Problem(
            "CK417",
            f"the optimizer's state cannot follow {printable(template)}: the target does not know it",
            try_=f"drop it in the rules; or {DROP}",
        )
        for template in collapse(strange)[:5]
    ]
    problems += [
        Problem(
            "CK417",
            f"the target's {printable(template)} is new, and nothing tells which of the parameter groups has it",
            try_=DROP,
        )
        for template in collapse(new)[:5]
    ]
    return found, problems


def written(state: OptimizerState, parameters: Sequence[Member]) -> dict[Any, Any]:
    """The optimizer's state_dict in the form that the source had, with a :class:`~ckptconv.formats.base.Kept` for every tensor that follows."""
    by_group = [[each for each in parameters if each.group == at] for at in range(len(state.groups))]
    if state.form == "flat":
        entries = {f"state.{each.name}.{key}": value for each in parameters for key, value in _state(state, each).items()}
        options = {
            f"param_groups.{each.name}.{key}": value
            for group, some in zip(state.groups, by_group, strict=True) for each in some for key, value in group.options.items()
        }  # fmt: skip
        return {**entries, **options}
    called: dict[str, Key] = {}
    for some in by_group:
        called.update({each.name: each.name if state.form == "name" else at for at, each in enumerate(some, len(called))})
    groups = []
    for group, some in zip(state.groups, by_group, strict=True):
        own = {"params": [called[each.name] for each in some], "param_names": [each.name for each in some]}
        groups.append({key: own.get(key, value) if value is None else value for key, value in group.options.items()})
    in_order = sorted(parameters, key=lambda each: called[each.name]) if state.form == "number" else parameters
    states = {called[each.name]: entries for each in in_order if (entries := _state(state, each))}
    return {key: states if key == "state" else groups if key == "param_groups" else value for key, value in state.beside.items()}


def _state(state: OptimizerState, each: Member) -> dict[str, Any]:
    if each.trained is None:
        return {}
    return {
        key: Kept(slot(state, each.trained.name, key), value.spec) if isinstance(value, (Read, Apply)) else value
        for key, value in each.trained.entries.items()
    }


def replaced(tree: Any, changes: Mapping[tuple[Key, ...], Any]) -> Any:
    """The tree with something else at some paths; with None, nothing. What does not change is shared.

    >>> replaced({"epoch": 3, "all": [{"a": 1}, {"b": 2}]}, {("all", 0): {"c": 3}, ("epoch",): None})
    {'all': [{'c': 3}, {'b': 2}]}
    """
    if () in changes:
        return changes[()]
    heads = {path[0] for path in changes}
    inner = {head: {path[1:]: value for path, value in changes.items() if path[0] == head} for head in heads}

    def changed(key: Key, value: Any) -> Any:
        return replaced(value, inner[key]) if key in heads else value

    def gone(key: Key) -> bool:
        return key in heads and inner[key].get((), inner) is None

    if isinstance(tree, Mapping):
        return {key: changed(key, value) for key, value in tree.items() if not gone(key)}
    return type(tree)(changed(at, value) for at, value in enumerate(tree) if not gone(at))


def read_back(planned: Any, found: Any) -> dict[str, Placed]:
    """Where the tensors of a written optimizer's state lie, by the names of their slots.

    Raises :class:`~ckptconv.errors.Refusal` CK407 where anything in it is not what was planned.
    """
    placed: dict[str, Placed] = {}
    stack: list[tuple[Any, Any, tuple[Key, ...]]] = [(planned, found, ())]
    while stack:
        wanted, there, path = stack.pop()
        where = printable(".".join(map(str, path))) or "the optimizer's state"
        if isinstance(wanted, (Kept, Placed)):
            spec: TensorSpec = wanted.spec
            if not isinstance(there, Placed) or there.spec != spec:
                raise Refusal(f"{where} of the written optimizer is not the tensor that was planned: {spec}", code="CK407")
            if isinstance(wanted, Kept):
                placed[wanted.name] = there
        elif isinstance(wanted, Mapping):
            if not isinstance(there, Mapping) or list(wanted) != list(there):
                raise Refusal(f"{where} of the written optimizer has other entries than planned", code="CK407")
            stack.extend((value, there[key], (*path, key)) for key, value in wanted.items())
        elif isinstance(wanted, (list, tuple)):
            if type(wanted) is not type(there) or len(wanted) != len(there):
                raise Refusal(f"{where} of the written optimizer has other entries than planned", code="CK407")
            stack.extend((value, other, (*path, at)) for at, (value, other) in enumerate(zip(wanted, there, strict=True)))
        elif type(wanted) is not type(there) or repr(wanted) != repr(there):
            raise Refusal(f"{where} of the written optimizer is not what was planned", code="CK407", found=printable(repr(there)))
    return placed
