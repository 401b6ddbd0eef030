"""Optimizers' states in a checkpoint's tree, and what they hold, whatever their form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Union

from msgspec import Struct

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Composite, Placed
from ckptconv.formats.containers import MAX_DEPTH, is_flat_optimizer, is_optimizer

Key = Union[str, int]
Member = Union[str, int]
SCALARS = (str, int, float, bool, type(None))
_STATE, _GROUPS = "state", "param_groups"
#: What counts steps, also where the parameter itself has one element.
COUNTERS = ("step",)
#: The way out of every refusal.
DROP = "--optimizer drop writes everything else, and the optimizer starts anew"


class Group(Struct, frozen=True):
    """A parameter group: its entries in their order (``params`` and ``param_names`` among them), and whom it has."""

    options: Mapping[Any, Any]
    members: tuple[Member, ...]
    names: tuple[str, ...] | None = None  #: the members' names, where the group tells them


class OptimizerState(Struct, frozen=True):
    """What ``optimizer.state_dict()`` gave. ``form``: parameters by ``number`` (torch.optim), by ``name`` (torch.distributed.checkpoint), or
    ``flat``, one entry for each parameter and word (``state.NAME.exp_avg``, ``param_groups.NAME.lr``)."""

    path: tuple[Key, ...]  #: where it stands in the file; empty for a file that is nothing else
    form: Literal["number", "name", "flat"]
    groups: tuple[Group, ...]
    state: Mapping[Member, Mapping[str, Any]]
    beside: Mapping[Any, Any]  #: the other entries of its dict, with those of ``state`` and ``param_groups`` left empty

    @property
    def shown(self) -> str:
        return dotted(self.path) or "the optimizer's file"

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(member for group in self.groups for member in group.members)


def dotted(path: Iterable[Key]) -> str:
    """A path in a tree as text."""
    return ".".join(map(str, path))


def find(tree: Any) -> Iterator[tuple[tuple[Key, ...], dict[Any, Any]]]:
    """Every optimizer's state in the tree, with its path, in the file's order."""
    stack: list[tuple[Any, tuple[Key, ...]]] = [(tree, ())]
    while stack:
        node, path = stack.pop()
        if isinstance(node, dict) and is_optimizer(node):
            yield path, node
        elif isinstance(node, (dict, list, tuple)) and len(path) < MAX_DEPTH:
            items = node.items() if isinstance(node, dict) else enumerate(node)
            inner = [(key, child) for key, child in items if isinstance(key, (str, int)) and isinstance(child, (dict, list, tuple))]
            stack.extend((child, (*path, key)) for key, child in reversed(inner))


def parse(node: dict[Any, Any], path: tuple[Key, ...]) -> OptimizerState:
    """The optimizer's state that ``node`` is. Raises :class:`~ckptconv.errors.Refusal` CK314 for one whose parts do not fit each other."""
    if is_flat_optimizer(node):
        return _flat(node, path)
    state, listed = node[_STATE], node[_GROUPS]
    if isinstance(listed, Mapping) and list(listed) == list(range(len(listed))):  # as torch.distributed.checkpoint flattens a list
        listed = list(listed.values())
    if not isinstance(state, Mapping) or not isinstance(listed, (list, tuple)) or not all(isinstance(group, Mapping) for group in listed):
        raise malformed("`state` is a dict, `param_groups` a list of dicts: these are not")
    groups = tuple(_group(group) for group in listed)
    beside = {key: None if key in (_STATE, _GROUPS) else _plain(value, str(key)) for key, value in node.items()}
    form: Literal["number", "name"] = "name" if any(isinstance(member, str) for group in groups for member in group.members) else "number"
    return _checked(OptimizerState(path, form, groups, {key: _entries(key, value) for key, value in state.items()}, beside))


def _group(entries: Mapping[Any, Any]) -> Group:
    members, names = entries.get("params"), entries.get("param_names")
    if isinstance(members, Mapping) and list(members) == list(range(len(members))):
        members = list(members.values())
    if not isinstance(members, (list, tuple)) or not all(type(member) in (str, int) for member in members):
        raise malformed("a parameter group lists its `params` by number or by name: one does not")
    if names is not None and (
        not isinstance(names, (list, tuple)) or len(names) != len(members) or not all(isinstance(name, str) for name in names)
    ):
        raise malformed("a parameter group has other `param_names` than `params`")
    options = {key: None if key in ("params", "param_names") else _plain(value, str(key)) for key, value in entries.items()}
    return Group(options, tuple(members), tuple(names) if names is not None else None)


def _flat(node: dict[Any, Any], path: tuple[Key, ...]) -> OptimizerState:
    state: dict[Member, dict[str, Any]] = {}
    options: dict[Member, dict[str, Any]] = {}
    for key, value in node.items():
        word, _, rest = key.partition(".")
        name, _, entry = rest.rpartition(".")
        if not name or not entry:
            raise malformed(f"{printable(key)!r} names no parameter and entry")
        (state if word == _STATE else options).setdefault(name, {})[entry] = value if word == _STATE else _plain(value, entry)
    groups: dict[str, tuple[dict[str, Any], list[Member]]] = {}
    for name, entries in options.items():
        groups.setdefault(repr(entries), (entries, []))[1].append(name)
    found = tuple(Group(entries, tuple(members)) for entries, members in groups.values())
    return _checked(OptimizerState(path, "flat", found, {name: _entries(name, value) for name, value in state.items()}, {}))


def _checked(state: OptimizerState) -> OptimizerState:
    members, known = state.members, set(state.members)
    if len({type(member) for member in members}) > 1 or len(known) != len(members):
        raise malformed("the parameter groups list a parameter twice, or some by number and some by name")
    strange = [member for member in state.state if member not in known]
    if strange:
        raise malformed(f"there is a state for {printable(strange[0])}, which no parameter group lists")
    return state


def _entries(member: Any, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and "." not in key for key in value):
        raise malformed(f"the state of parameter {printable(member)} is no dict of named entries")
    return value


def _plain(value: Any, name: str) -> Any:
    """An entry that goes along as it is: plain data, and tensors (a learning rate may be one)."""
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, (list, tuple)):
            stack.extend(node)
        elif isinstance(node, Mapping):
            stack.extend(node.values())
        elif not isinstance(node, (*SCALARS, bytes, Placed)):
            raise Refusal(f"the optimizer's entry `{printable(name)}` is an object that cannot be written again", code="CK417",
                          found=printable(repr(node)), try_=DROP)  # fmt: skip
    return value


def shape_of(entries: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The parameter's shape, as far as its state tells: that of its moments. None where there are none, or they differ."""
    shapes = {value.spec.shape for name, value in entries.items() if isinstance(value, (Placed, Composite)) and name not in COUNTERS}
    large = shapes - {()}
    found = large or shapes
    return next(iter(found)) if len(found) == 1 else None


def malformed(what: str) -> Refusal:
    """The refusal of a state that is none."""
    return Refusal(what, code="CK314", try_=DROP)
