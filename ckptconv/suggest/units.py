"""A checkpoint as modules: tensors with their role in a module, modules in a tree, and a signature by which parts of two trees are compared.

Signatures are of shapes alone, without axes of size 1 and with matrices turned to `out x in`, so that a convolution of one pixel, a linear
layer and a Conv1D that do the same are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv.names import natural_key
from ckptconv.spec import DType, Manifest

#: What a parameter is called inside of its module -> its role there.
_ROLES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "scale": "weight", "running_mean": "running_mean",
          "running_var": "running_var", "num_batches_tracked": "num_batches_tracked", "weight_g": "weight_g", "weight_v": "weight_v"}  # fmt: skip
_WEIGHT_NORM = {"original0": "weight_g", "original1": "weight_v"}  #: as torch.nn.utils.parametrizations has it
_KINDS = {"float": 0, "complex": 1, "int": 2, "uint": 2, "bool": 3}

Signature = tuple[tuple[int, ...], ...]


class Unit(Struct, frozen=True, dict=True):
    """One tensor; or several that are one tensor on the other side: pieces along ``axis``, each stacked over ``count`` members of a list."""

    path: tuple[str, ...]  #: of the module
    role: str  #: empty for a parameter without a module of its own
    shape: tuple[int, ...]
    dtype: DType
    at: int
    names: tuple[str, ...]  #: piece by piece, of every piece member by member
    sizes: tuple[int, ...] = ()
    axis: int = 0
    count: int = 0
    turned: bool = False  #: stored `in x out`
    unsure: bool = False  #: another of its siblings could stand in its place
    same: bool = False  #: all of ``names`` hold the same

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def joined(self) -> bool:
        return bool(self.sizes or self.count or self.same)

    @cached_property
    def form(self) -> tuple[int, ...]:
        """The shape by which it is compared, with the kind of its numbers before it."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.turned else self.shape
        return (_KINDS[self.dtype.kind], *(size for size in shape if size != 1))


class Module(Struct, frozen=True, dict=True):
    """The parameters that belong together."""

    path: tuple[str, ...]
    units: tuple[Unit, ...]

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def at(self) -> int:
        return self.units[0].at

    @cached_property
    def signature(self) -> Signature:
        return tuple(sorted(unit.form for unit in self.units))


class Node(Struct):
    """A place in the tree of modules."""

    path: tuple[str, ...]
    children: list[Node] = field(default_factory=list)
    module: Module | None = None
    modules: list[Module] = field(default_factory=list)  #: all in it, in order
    total: int = 0  #: of the signatures of all modules in it, so that equal totals mean equal contents
    shape: int = 0  #: the same with the names and the tree: what is equal here is solved once

    @property
    def name(self) -> str:
        return ".".join(self.path)

    def below(self) -> Iterator[Node]:
        """All nodes in it, itself first."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))


class Side(Struct, frozen=True, dict=True):
    """One of the two checkpoints, as units, and whether the order of its names says anything."""

    units: tuple[Unit, ...]
    ordered: bool  #: the names stand in the order of registration, not of the alphabet

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        found: dict[tuple[str, ...], list[Unit]] = {}
        for unit in self.units:
            found.setdefault(unit.path, []).append(unit)
        return tuple(Module(path, tuple(units)) for path, units in found.items())

    @cached_property
    def forms(self) -> Counter[tuple[int, ...]]:
        return Counter(unit.form for unit in self.units)

    def without(self, gone: Iterable[Unit]) -> Side:
        names = {unit.names for unit in gone}
        return self.holding(unit for unit in self.units if unit.names not in names)

    def holding(self, units: Iterable[Unit]) -> Side:
        return Side(tuple(units), self.ordered)


def side_of(manifest: Manifest, *, aliases: bool) -> Side:
    """The tensors of a manifest as units; without the further names of ties, unless ``aliases``."""
    names = list(manifest.tensors if aliases else manifest.stored)
    units = []
    for at, name in enumerate(names):
        spec = manifest[name]
        path, role = _place(name)
        units.append(Unit(path, role, spec.shape, spec.dtype, at, (name,)))
    return Side(tuple(_oriented(units)), not is_sorted(names) and not _is_shuffled(units))


def _place(name: str) -> tuple[tuple[str, ...], str]:
    *path, leaf = name.split(".")
    if leaf in _ROLES and path:
        return tuple(path), _ROLES[leaf]
    if path[-2:] == ["parametrizations", "weight"] and leaf in _WEIGHT_NORM:
        return tuple(path[:-2]), _WEIGHT_NORM[leaf]
    if path and leaf.startswith(("weight_", "bias_")):  # of a recurrent layer
        return tuple(path), leaf
    head, _, tail = leaf.rpartition("_")
    if head and tail in ("weight", "bias"):
        return (*path, head), tail
    return (*path, leaf), ""


def is_sorted(names: Sequence[str]) -> bool:
    """Whether the names stand as in an alphabet, so that their order tells nothing."""
    return len(names) > 1 and (list(names) == sorted(names) or list(names) == sorted(names, key=natural_key))


def _is_shuffled(units: Sequence[Unit]) -> bool:
    """Whether members of one list hold the same parts in different orders, as no constructor would register them."""
    orders: dict[tuple[str, ...], dict[str, dict[str, int]]] = {}
    for unit in units:
        for depth in range(1, len(unit.path)):
            above = unit.path[:depth]
            if any(part.isdigit() for part in above):
                kind = tuple("#" if part.isdigit() else part for part in above)
                parts = orders.setdefault(kind, {}).setdefault(".".join(above), {})
                parts.setdefault(unit.path[depth], len(parts))
    for members in orders.values():
        first: dict[frozenset[str], list[str]] = {}
        for parts in members.values():
            words = [part for part in parts if not part.isdigit()]
            if first.setdefault(frozenset(words), words) != words:
                return True
    return False


def _oriented(units: Sequence[Unit]) -> list[Unit]:
    """Matrices told to be `in x out` by the bias beside them; square ones as most of the others are."""
    biases = {unit.path: unit.shape[0] for unit in units if unit.role == "bias" and len(unit.shape) == 1}
    turned, straight = 0, 0
    found = list(units)
    square = []
    for at, unit in enumerate(units):
        size = biases.get(unit.path)
        if unit.role != "weight" or size is None or len(unit.shape) != 2 or size not in unit.shape:
            continue
        if unit.shape[0] == unit.shape[1]:
            square.append(at)
        elif unit.shape[1] == size:
            found[at] = replace(unit, turned=True)
            turned += 1
        else:
            straight += 1
    if turned > straight:
        for at in square:
            found[at] = replace(found[at], turned=True)
    return found


def tree_of(side: Side) -> Node:
    """The modules as a tree: numbered children by number, the others as they were registered (by the alphabet, where nothing else is known)."""
    root = Node(())
    places: dict[tuple[str, ...], Node] = {(): root}
    for module in side.modules:
        node = root
        for depth in range(1, len(module.path) + 1):
            path = module.path[:depth]
            if path not in places:
                places[path] = Node(path)
                node.children.append(places[path])
            node = places[path]
        node.module = module
    _finish(root, side.ordered)
    return root


def _finish(root: Node, ordered: bool) -> None:
    for node in reversed(list(root.below())):
        if not ordered:
            node.children.sort(key=lambda child: natural_key(child.path[-1]))
        elif any(child.path[-1].isdigit() for child in node.children):
            numbered = iter(sorted((child for child in node.children if child.path[-1].isdigit()), key=lambda child: int(child.path[-1])))
            node.children = [next(numbered) if child.path[-1].isdigit() else child for child in node.children]
        own = [] if node.module is None else [node.module]
        node.modules = own + [module for child in node.children for module in child.modules]
        node.total = (sum(hash(module.signature) for module in own) + sum(child.total for child in node.children)) & (1 << 62) - 1
        inside = tuple((child.path[-1], child.shape) for child in node.children)
        node.shape = hash((_own(node.module), inside)) & (1 << 62) - 1


def _own(module: Module | None) -> tuple[int, ...]:
    # Text has another hash in every run, but equal texts have equal hashes in this one: no result depends on more.
    return () if module is None else tuple(hash((unit.role, unit.form, unit.names[0].rpartition(".")[2])) for unit in module.units)
