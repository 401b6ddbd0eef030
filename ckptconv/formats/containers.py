"""From a file's object tree to the state_dicts in it.

What counts as one, in this order:

* a pickled ``nn.Module``: its parameters and persistent buffers, under the names that its ``state_dict()`` would give;
* a dict whose values are tensors, with numbers, text and None beside them at most (they are skipped);
* a dict of dicts without any dotted key, whose leaves are all tensors: a tree of parameters, its names joined by dots.

Everything below a state_dict belongs to it. An optimizer's state (``state`` and ``param_groups``) is none, and neither are lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Composite, Container, Contents, Foreign, Placed, Unsupported
from ckptconv.formats.rebuilding import Global, Ordered, StorageRef
from ckptconv.formats.strict import allowance
from ckptconv.names import unusable

#: docs/limits.md; the second and third grow with the checkpoint.
MAX_DEPTH = 64
MAX_NODES = 2_000_000
MAX_NAMES = 250_000  #: of one state_dict
MAX_CANDIDATES = 10_000
MAX_SKIPPED = 200
#: Names that trainers give to the weights, the likeliest first; what is not here comes after, the largest first.
KNOWN = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights", "generator",
         "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")  # fmt: skip
_OPTIMIZERS = ("optim", "optimizer", "optimizers", "optimizer_state_dict")
_CONTAINERS = (dict, list, tuple)
_SCALARS = (str, int, float, bool, bytes, type(None))


def contents_from_tree(
    format: str,  # noqa: A002  (the field's own word)
    files: tuple[Path, ...],
    tree: Any,
    *,
    metadata: Mapping[str, str] | None = None,
    warnings: tuple[str, ...] = (),
) -> Contents:
    """The contents of a file whose object is ``tree``. Raises :class:`~ckptconv.errors.Refusal` for a tree that is none (cycles, too deep,
    too large when written out) and for names that cannot be used."""
    times = allowance(sum(path.stat().st_size for path in files))
    check_tree(tree, times)
    found: dict[str, Container] = {}
    _search(tree, (), found, MAX_NAMES * times)
    if not found and isinstance(tree, dict):  # all that there is may be of a kind that cannot be converted: then that is what to say
        for key, node in ((".", tree), *tree.items()):
            if isinstance(node, dict) and node and all(isinstance(value, Unsupported) for value in node.values()):
                found[str(key)] = _from_dict(node, str(key), MAX_NAMES * times)
    ranked = sorted(found.values(), key=_rank)
    return Contents(
        format, files, {container.path: container for container in ranked}, tree, metadata or {}, dict(_strangers(tree)), warnings,
    )  # fmt: skip


def with_top(contents: Contents) -> Contents:
    """``contents`` with the tensors at the file's top as a state_dict of their own, where they are one beside nested dicts.

    ``{"layers.0.weight": tensor, "optimizer": {…}}`` has one; ``{"model": {…}, "loss": tensor}`` has not.
    """
    tree, found = contents.tree, contents.containers
    top = {key: value for key, value in tree.items() if _is_tensor(value)}
    others = {path for path in found if path.partition(".")[0] not in _OPTIMIZERS}
    if not top or "." in found or (others and not any("." in str(key) for key in top)):
        return contents
    times = allowance(sum(path.stat().st_size for path in contents.files))
    beside = {str(key): value.name if isinstance(value, Foreign) else type(value).__name__ for key, value in tree.items() if key not in top}
    container = _from_dict(top, ".", MAX_NAMES * times)
    return replace(contents, containers={".": replace(container, skipped=beside), **found})


def check_tree(tree: Any, times: int = 1) -> None:
    """Refuses a tree that contains itself, nests too deep, or would be too large when every shared part is written out.

    ``times`` multiplies the limit on its size, see :func:`ckptconv.formats.strict.allowance`.
    """
    weights: dict[int, int] = {}  # containers and dict entries, with all below; 0 while it is open
    heights: dict[int, int] = {}  # 1 where it is not here
    stack: list[Any] = [tree] if isinstance(tree, _CONTAINERS) else []
    while stack:
        node = stack[-1]
        inner = [child for child in (node.values() if isinstance(node, dict) else node) if isinstance(child, _CONTAINERS) and child]
        weight = weights.get(id(node))
        if weight is None and inner:
            weights[id(node)] = 0
            for child in inner:
                known = weights.get(id(child))
                if known is None:
                    stack.append(child)
                elif not known:
                    raise Refusal("a container holds itself", code="CK304")
            continue
        stack.pop()
        if weight:  # it was reached twice, and is done
            continue
        weights[id(node)] = weight = 1 + (len(node) if isinstance(node, dict) else 0) + sum([weights[id(child)] for child in inner])
        if weight > MAX_NODES * times:
            raise Refusal("the same containers are reached again and again: written out, the file would have no end", code="CK304")
        if inner:
            heights[id(node)] = height = 1 + max([heights.get(id(child), 1) for child in inner])
            if height > MAX_DEPTH:
                raise Refusal(f"the file nests deeper than {MAX_DEPTH}", code="CK304")


def _rank(container: Container) -> tuple[int, int, str]:
    last = container.path.rsplit(".", 1)[-1]
    order = -1 if container.path == "." else KNOWN.index(last) if last in KNOWN else len(KNOWN)
    return order, -sum(placed.spec.numel for placed in container.tensors.values()), container.path


def _search(node: Any, path: tuple[str, ...], found: dict[str, Container], most: int) -> None:
    if len(path) > MAX_DEPTH:
        return
    if len(found) > MAX_CANDIDATES:
        raise Refusal(f"the file holds more than {MAX_CANDIDATES:,} state_dicts", code="CK304")
    dotted = ".".join(path) or "."
    if _is_module(node):
        found[dotted] = _from_module(node, dotted, most)
        return
    if not isinstance(node, dict) or is_optimizer(node):
        return
    if _is_state_dict(node) or _is_parameter_tree(node):
        found[dotted] = _from_dict(node, dotted, most)
        return
    for key, value in node.items():
        if isinstance(key, (str, int)) and value and isinstance(value, (dict, Foreign)):
            _search(value, (*path, str(key)), found, most)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Placed, Composite, Unsupported)) or _holds_tensors(value)


def _holds_tensors(value: Any) -> bool:
    """A short tuple with tensors in it: torch packs a quantised layer's weight and bias so."""
    return isinstance(value, tuple) and 0 < len(value) <= 8 and any(isinstance(item, (Placed, Composite)) for item in value)


def is_optimizer(node: dict[Any, Any]) -> bool:
    """True for what looks like an optimizer's state_dict, nested or flat."""
    return ("param_groups" in node and "state" in node) or is_flat_optimizer(node)


def is_flat_optimizer(node: dict[Any, Any]) -> bool:
    """True where every key is ``state.NAME.exp_avg`` or ``param_groups.NAME.lr``, as torch.distributed.checkpoint flattens a state."""
    if "state" not in str(next(iter(node), "")) and "param_groups" not in str(next(iter(node), "")):
        return False  # most state_dicts are told by their first key
    words = {key.partition(".")[0] if isinstance(key, str) and "." in key else "" for key in node}
    return "param_groups" in words and words <= {"state", "param_groups"}


def _is_state_dict(node: dict[Any, Any]) -> bool:
    """Tensors, and beside them only what a state_dict may hold; or dicts of nothing but tensors (then their names are joined)."""
    tensors = sum(map(_is_tensor, node.values()))
    others = [value for value in node.values() if not isinstance(value, _SCALARS) and not _is_tensor(value)] if tensors < len(node) else []
    if not tensors or not any(isinstance(value, (Placed, Composite)) for value in node.values()):
        return False
    if any(isinstance(value, dict) and not _only_tensors(value) for value in others) or any(map(_is_module, others)):
        # {"model": {…}, "loss": tensor}: the tensors beside a state_dict are not one
        return tensors > 4 * len(node) // 5 and not any(map(_holds_state_dict, others))
    return tensors * 2 >= len([value for value in node.values() if not isinstance(value, dict)])


def _holds_state_dict(value: Any) -> bool:
    return _is_module(value) or (isinstance(value, dict) and any(map(_is_tensor, value.values())))


def _only_tensors(node: dict[Any, Any]) -> bool:
    """A tree of parameters: every leaf is a tensor, and no key has a dot (a state_dict of its own would)."""
    return bool(node) and all(
        (isinstance(value, dict) and _only_tensors(value)) or _is_tensor(value) for value in node.values()
    ) and not any("." in str(key) for key in node)  # fmt: skip


def _is_parameter_tree(node: dict[Any, Any]) -> bool:
    return not any(str(key) in KNOWN for key in node) and _only_tensors(node)


def _from_dict(node: dict[Any, Any], path: str, most: int) -> Container:
    tensors: dict[str, Placed] = {}
    composites: dict[str, Composite] = {}
    unsupported: dict[str, str] = {}
    skipped: dict[str, str] = {}
    seen: set[str] = set()
    for parts, value in _leaves(node, ()):
        name = ".".join(parts)
        reason = unusable(name)
        if reason:
            raise Refusal(f"{reason}: {printable(name)!r}", code="CK306", found=f"in {printable(path)}")
        if name in seen:
            raise Refusal(f"two entries are called {printable(name)!r}", code="CK306", found=f"in {printable(path)}")
        seen.add(name)
        if len(seen) > most:
            raise Refusal(f"a state_dict of more than {most:,} names", code="CK304", found=f"in {printable(path)}")
        if isinstance(value, Placed):
            tensors[name] = value
        elif isinstance(value, Composite):
            composites[name] = value
        elif isinstance(value, Unsupported):
            unsupported[name] = value.kind
        else:
            skipped[name] = value.name if isinstance(value, Foreign) else type(value).__name__
    versions = node.metadata if isinstance(node, Ordered) else None
    return Container(path, tensors, _versions(versions, len(seen)), skipped, composites, unsupported)


def _leaves(node: dict[Any, Any], parts: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in node.items():
        if isinstance(key, (tuple, bytes)) or (isinstance(key, str) and key.startswith("<tuple ")):
            raise Refusal("a state_dict's keys must be text", code="CK306", found=printable(key))
        if isinstance(value, dict) and not is_optimizer(value):
            yield from _leaves(value, (*parts, str(key)))
        elif _holds_tensors(value):
            yield from _leaves(dict(enumerate(value)), (*parts, str(key)))
        else:
            yield (*parts, str(key)), value


def _versions(value: Any, names: int) -> dict[str, dict[str, Any]]:
    """Module path -> its version. There are not many more modules than tensors; what says otherwise is left alone."""
    if not isinstance(value, dict) or len(value) > 1000 + 10 * names:
        return {}
    plain = (int, float, str, bool, type(None))
    return {
        key: {name: item for name, item in entry.items() if isinstance(name, str) and isinstance(item, plain)}
        for key, entry in value.items()
        if isinstance(key, str) and isinstance(entry, dict)
    }


def _is_module(node: Any) -> bool:
    return _is_scripted(node) or (
        isinstance(node, Foreign)
        and isinstance(node.state, dict)
        and isinstance(node.state.get("_modules"), dict)
        and isinstance(node.state.get("_parameters"), dict)
    )


def _is_scripted(node: Any) -> bool:
    """A module of a TorchScript archive: its parameters, buffers, attributes and submodules all stand in its state."""
    return isinstance(node, Foreign) and node.name.startswith("__torch__.") and isinstance(node.state, dict)


_Entries = list[tuple[Any, Any]]


def _scripted_parts(node: Foreign) -> tuple[_Entries, _Entries]:
    tensors = [(key, value) for key, value in node.state.items() if isinstance(value, (Placed, Composite, Unsupported))]
    return tensors, [(key, value) for key, value in node.state.items() if _is_scripted(value)]


def _module_parts(node: Foreign) -> tuple[_Entries, _Entries]:
    state = node.state
    transient = {name for name in state.get("_non_persistent_buffers_set") or () if type(name) is str}
    buffers = [(key, value) for key, value in (state.get("_buffers") or {}).items() if key not in transient]
    return [*state["_parameters"].items(), *buffers], [(key, child) for key, child in state["_modules"].items() if _is_module(child)]


def _from_module(module: Foreign, path: str, most: int) -> Container:
    tensors: dict[str, Placed] = {}
    composites: dict[str, Composite] = {}
    unsupported: dict[str, str] = {}
    skipped: dict[str, str] = {}
    stack: list[tuple[Foreign, tuple[str, ...]]] = [(module, ())]
    visited = 0
    while stack:
        node, parts = stack.pop()
        if len(parts) > MAX_DEPTH:
            raise Refusal(f"modules nest deeper than {MAX_DEPTH}", code="CK304")
        entries, children = _scripted_parts(node) if _is_scripted(node) else _module_parts(node)
        visited += 1 + len(entries) + len(node.state.get("_non_persistent_buffers_set") or ())
        if visited > most:
            raise Refusal(f"a module of more than {most:,} submodules and tensors", code="CK304", found=f"in {printable(path)}")
        for key, value in entries:
            name = ".".join((*parts, str(key)))
            reason = unusable(name)
            if reason:
                raise Refusal(f"{reason}: {printable(name)!r}", code="CK306")
            if isinstance(value, Placed):
                tensors[name] = value
            elif isinstance(value, Composite):
                composites[name] = value
            elif isinstance(value, Unsupported):
                unsupported[name] = value.kind
            elif value is not None:
                skipped[name] = value.name if isinstance(value, Foreign) else type(value).__name__
        stack.extend((child, (*parts, str(key))) for key, child in reversed(children))
    return Container(path, tensors, {}, skipped, composites, unsupported)


def _strangers(tree: Any) -> Iterator[tuple[str, str]]:
    """Where objects of unknown classes stand in the file's dicts, by path; a bounded list."""
    stack: list[tuple[Any, tuple[str, ...]]] = [(tree, ())]
    count = 0
    seen: set[int] = set()
    while stack and count < MAX_SKIPPED:
        node, path = stack.pop()
        if isinstance(node, (Foreign, Global, StorageRef)):
            if not _is_module(node):
                count += 1
                name = node.name if isinstance(node, (Foreign, Global)) else "storage"
                yield printable(".".join(path) or "."), printable(name)
        elif isinstance(node, dict) and id(node) not in seen:
            seen.add(id(node))
            stack.extend(
                (value, (*path, str(key)))
                for key, value in reversed(node.items())
                if value and isinstance(value, (dict, Foreign, Global, list))
            )
        elif isinstance(node, list) and id(node) not in seen and len(node) <= 1000:
            seen.add(id(node))
            stack.extend((value, (*path, str(at))) for at, value in reversed(list(enumerate(node))) if isinstance(value, (dict, Foreign)))
