"""From an output's manifest to files: names, headers, and the byte offset of every tensor. Pure; nothing is opened.

Layout comes before filling: once it exists, any worker may write any tensor's bytes, in any order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from msgspec import Struct

from ckptconv import formats
from ckptconv.errors import InputError, Problem, Refusal, UsageError, printable
from ckptconv.formats.base import Composite, Container, Contents, Converted, FileLayout, Foreign, Kept, Placed, Unsupported, Writer
from ckptconv.spec import Manifest

#: What an output file's name says about its format. Inputs are told by their bytes; outputs have none yet.
FORMAT_OF_SUFFIX: Mapping[str, str] = {
    ".safetensors": "safetensors", ".pth": "torch", ".pt": "torch", ".bin": "torch", ".ckpt": "torch", ".th": "torch", ".tar": "torch",
}  # fmt: skip
_WRITTEN = re.compile(r"(model|pytorch_model)(-v\d+)?(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|__\d+_\d+\.distcp|\.metadata")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
MAX_TREE_DEPTH = 64


class Layout(Struct, frozen=True):
    """All files of an output."""

    files: tuple[FileLayout, ...]
    is_folder: bool
    index: tuple[str, bytes] | None = None  #: (file name, contents) of a sharded output

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def written_like(contents: Contents) -> str:
    """The format of an output that is to be like its source."""
    return {"safetensors": "safetensors", "torch-distributed": "dcp"}.get(contents.format, "torch")


def parse_size(text: str) -> int:
    """``5GB`` in bytes; GB is decimal, GiB is not.

    >>> parse_size("5GB"), parse_size("512 MiB")
    (5000000000, 536870912)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise UsageError(Problem("CK107", f"{printable(text)!r} is no size", try_="5GB, 500MB, 2GiB"))
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def lay_out(
    manifest: Manifest,
    destination: PurePath,
    *,
    format: str,  # noqa: A002  (the field's own word)
    is_folder: bool,
    shard_nbytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    module_versions: Mapping[str, Mapping[str, Any]] | None = None,
    tree: Any = None,
    phases: Mapping[str, int] | None = None,
    together: Iterable[Sequence[str]] = (),
) -> Layout:
    """The files that hold ``manifest``; ``phases`` as :meth:`~ckptconv.formats.base.Writer.lay_out` takes them. Of names that are
    ``together`` each group is in one shard, where it fits into one.

    Raises :class:`~ckptconv.errors.InputError` CK504 for what the format cannot hold (a dtype, a header past its limit), and
    :class:`~ckptconv.errors.UsageError` CK209 for names that cannot be written.
    """
    writer = formats.WRITERS[format]
    refusals = writer.refuse(manifest)
    try:
        if not refusals:
            return _lay_out(
                writer,
                manifest,
                destination,
                is_folder,
                shard_nbytes,
                together,
                {"metadata": metadata or {}, "module_versions": module_versions, "tree": tree, "phases": phases},
            )
    except Refusal as refusal:
        refusals = [refusal]
    kind = InputError if any(refusal.code == "CK504" for refusal in refusals) else UsageError
    raise kind([refusal.at(printable(destination)) for refusal in refusals[:20]])


def _lay_out(
    writer: Writer, manifest: Manifest, destination: PurePath, is_folder: bool, shard_nbytes: int | None, together: Iterable[Sequence[str]],
    options: Mapping[str, Any],
) -> Layout:  # fmt: skip
    if not is_folder:
        return Layout((writer.lay_out(destination.name, manifest, **options),), is_folder=False)
    files, index = writer.lay_out_folder(manifest, shard_nbytes, together, **options)
    return Layout(files, is_folder=True, index=index)


def not_written_here(folders: Iterable[str], files: Iterable[str]) -> str:
    """Of what a folder holds, the first name that shows it to be more than one converted checkpoint; empty where nothing does.

    >>> not_written_here([], ["config.json", "model-00001-of-00002.safetensors"]), not_written_here([".git"], ["model.safetensors"])
    ('', '.git')
    >>> not_written_here([], [".metadata", "__0_0.distcp"])
    ''
    >>> not_written_here([], ["model.safetensors", "resnet50.pth"]), not_written_here([], ["thesis.tex"])
    ('resnet50.pth', 'thesis.tex')
    """
    names = sorted(files)
    ours = [name for name in names if _WRITTEN.fullmatch(name)]
    weights = [name for name in names if PurePath(name).suffix in FORMAT_OF_SUFFIX and name not in ours]
    return next(iter([*sorted(folders), *weights, *([] if ours else names)]), "")


def renamed_versions(versions: Mapping[str, Mapping[str, Any]], new_name_of: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """``state_dict._metadata`` for the new names: a module's version goes where its tensors went, and so do the modules around it.

    ``new_name_of`` maps source tensor names to output names, for tensors that were only renamed.
    """
    found: dict[str, dict[str, Any]] = {"": dict(versions[""])} if "" in versions else {}
    for old, new in new_name_of.items():
        old_parts, new_parts = old.split(".")[:-1], new.split(".")[:-1]
        # Walk outwards while the two names still end alike: blocks.0.attn -> layers.0.attn maps `attn`, and then stops at the first
        # segment that differs, which still stands for the same module.
        while old_parts and new_parts:
            module = versions.get(".".join(old_parts))
            if module is not None:
                found.setdefault(".".join(new_parts), dict(module))
            if old_parts[-1] != new_parts[-1]:
                break
            old_parts, new_parts = old_parts[:-1], new_parts[:-1]
    return found


def carried_tree(contents: Contents, container: Container) -> tuple[Any, dict[str, Placed], list[str]]:
    """The source's own structure with the state_dict taken out, for an output that keeps a training checkpoint's other entries.

    Gives back the tree for the writer, the tensors that it carries by their slot names, and the paths of what cannot be written again
    (objects of foreign classes, unsupported tensors). What is to be kept and stands in the tree as such is the plan's. A state_dict at the
    file's top stands in the tree under itself: its entries join the others, which only the torch.distributed.checkpoint writer can do.
    Raises :class:`~ckptconv.errors.Refusal` where it is the whole file.
    """
    beside = entries_beside(contents.tree, container)
    if container.path == "." and not beside:
        raise Refusal("the file holds nothing beside the state_dict", code="CK107", try_="leave --keep-extras out")
    kept: dict[str, Placed] = {}
    taken: set[str] = set()
    left_out: list[str] = []

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        dotted = ".".join(path)
        if dotted == container.path:
            return Converted()
        if len(path) > MAX_TREE_DEPTH:
            raise Refusal(f"nested deeper than {MAX_TREE_DEPTH}", code="CK304")
        if isinstance(value, Placed):
            name = f"::{dotted}"
            if name in kept:
                raise Refusal(f"two entries are called {printable(name)}", code="CK306")
            kept[name] = value
            return Kept(name, value.spec)
        if isinstance(value, Kept):  # it comes from the plan
            taken.add(value.name)
            return value
        if isinstance(value, (Foreign, Composite, Unsupported)):
            left_out.append(dotted)
            return None
        if isinstance(value, Mapping):
            return {key: walk(item, (*path, str(key))) for key, item in value.items() if not _gone(item, (*path, str(key)), left_out)}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item, (*path, str(at))) for at, item in enumerate(value))
        return value

    tree = walk(beside if container.path == "." else contents.tree, ())
    if not taken.isdisjoint(kept):
        raise Refusal(f"two entries are called {printable(min(taken & kept.keys()))}", code="CK306")
    return {**tree, Converted(): Converted()} if container.path == "." else tree, kept, left_out


def entries_beside(tree: Any, container: Container) -> dict[Any, Any]:
    """What stands at a file's top and is no part of the state_dict there."""
    if not isinstance(tree, Mapping):
        return {}
    names = [*container.tensors, *container.composites, *container.unsupported]
    whole = set(names)
    heads = {name.partition(".")[0] for name in names if name not in tree}
    return {key: value for key, value in tree.items() if str(key) not in whole and str(key) not in heads}


def _gone(value: Any, path: tuple[str, ...], left_out: list[str]) -> bool:
    if isinstance(value, (Foreign, Composite, Unsupported)):
        left_out.append(".".join(path))
        return True
    return False
