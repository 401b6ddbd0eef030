"""A checkpoint opened for its explanation: everything that its headers tell as plain facts, or why it cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from ckptconv.errors import CkptconvError, Problem, named, printable
from ckptconv.explain.sides import FileFacts, Part
from ckptconv.explain.trying import Question
from ckptconv.formats.base import Container, Contents, Foreign
from ckptconv.stage.opening import choose, config_for, contents_of


class Opened(Struct, frozen=True):
    """What is known of a source before it is compared with anything."""

    file: FileFacts
    question: Question = field(default_factory=lambda: Question((), None))
    problems: tuple[Problem, ...] = ()  #: why it cannot be read


def open_for_explaining(path: Path, select: Sequence[str] = (), config: Path | None = None) -> Opened:
    """The facts of the checkpoint at ``path``; one that cannot be read has problems in place of parts, and raises nothing."""
    try:
        contents = contents_of(path)
        containers = [choose(contents, select, path)] if select else list(contents.containers.values())
    except CkptconvError as error:
        size = path.stat().st_size if path.is_file() else 0
        return Opened(FileFacts(named(path), "", size), problems=error.problems)
    parts = tuple(_part(container, contents) for container in containers)
    facts = FileFacts(
        named(path), contents.format, sum(file.stat().st_size for file in contents.files), len(contents.files), parts,
        _beside(contents), dict(contents.skipped), _optimizer(contents.tree) if not parts else None, dict(contents.metadata),
    )  # fmt: skip
    question = Question(
        parts, None, {container.path: container.composites for container in containers},
        {container.path: container.stored_manifest for container in containers}, config_for(path, config),
    )  # fmt: skip
    return Opened(facts, question, _nothing(path, facts))


def _part(container: Container, contents: Contents) -> Part:
    kinds = {name: composite.kind for name, composite in container.composites.items()}
    node = _at(contents.tree, container.path)
    return Part(container.path, container.manifest, isinstance(node, Foreign), kinds, dict(container.unsupported))


def _at(tree: Any, path: str) -> Any:
    """What stands at a container's path; None where a key has dots of its own."""
    for key in path.split(".") if path != "." else ():
        if not isinstance(tree, Mapping):
            return None
        tree = next((value for name, value in tree.items() if str(name) == key), None)
    return tree


def _beside(contents: Contents) -> tuple[str, ...]:
    """Entries of the file's top that are no state_dict."""
    if not isinstance(contents.tree, Mapping) or "." in contents.containers:
        return ()
    heads = {path.split(".")[0] for path in contents.containers}
    return tuple(str(name) for name in contents.tree if str(name) not in heads)[:100]


def _optimizer(tree: Any) -> tuple[int, int] | None:
    """Parameters and groups of an optimizer's state that is the file's top, or its only content."""
    nodes = [tree, *(tree.values() if isinstance(tree, Mapping) else ())]
    for node in nodes:
        if isinstance(node, Mapping) and "param_groups" in node and "state" in node:
            state, groups = node["state"], node["param_groups"]
            return len(state) if isinstance(state, Mapping) else 0, len(groups) if isinstance(groups, Sequence) else 0
    return None


def _nothing(path: Path, facts: FileFacts) -> tuple[Problem, ...]:
    if facts.parts or facts.optimizer is not None:
        return ()
    found = f"at its top: {', '.join(printable(name) for name in facts.beside[:8])}" if facts.beside else ""
    what = "the file is a checkpoint, but no state_dict is in it"
    return (Problem("CK309", what, where=printable(path), found=found, try_=f"ckptconv inspect {printable(path)}"),)
