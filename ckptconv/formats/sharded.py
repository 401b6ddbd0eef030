"""Folders in Hugging Face's style: shards and the index that says which tensor is in which, or one model file and its companions.

The index and the file names come from strangers. Every shard must be a plain file of the folder; a link may lead only into the blobs
of the Hugging Face cache that the folder belongs to (``snapshots/REVISION/model.safetensors`` -> ``blobs/DIGEST``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from msgspec.structs import replace

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import INDEX_SUFFIX, Composite, Container, Contents, FileLayout, Placed, Writer
from ckptconv.formats.joining import shifted
from ckptconv.formats.strict import opened, parse_json, read_at
from ckptconv.places.presence import look_into
from ckptconv.spec import Manifest, TensorSpec

MAX_INDEX = 50_000_000  #: bytes (docs/limits.md)

#: Suffixes of model files, by format; the first is the one that Hugging Face writes.
SUFFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "safetensors": (".safetensors",), "torch": (".bin", ".pt", ".pth", ".ckpt", ".th"),
})  # fmt: skip
#: Weights of other libraries. They do not come along when a folder is converted: they would no longer belong to it.
_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".gguf", ".ggml", ".npz", ".npy", ".ot", ".tflite", ".pkl", ".distcp", INDEX_SUFFIX)
#: What trainers leave beside a model in files that look like one.
_TRAINER_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states\w*)\.\w+")
_NUMBERED = re.compile(r"(.+)-[0-9]+-of-([0-9]+)\.\w+")
_SHOWN = 3


def _refused(what: str, *, found: str = "", try_: str = "") -> Refusal:
    return Refusal(what, code="CK308", found=found, try_=try_)


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many there are."""
    listed = list(names)
    return ", ".join(printable(name, 80) for name in listed[:_SHOWN]) + (f", … ({len(listed):,})" if len(listed) > _SHOWN else "")


# ---------------------------------------------------------------------------------------------------------------- reading


def read_folder(folder: Path, format: str | None = None) -> Contents:  # noqa: A002  (the field's own word)
    """What a folder's model holds. ``format`` (``torch`` or ``safetensors``) chooses where it holds both.

    Raises :class:`~ckptconv.errors.Refusal`: CK301 when there is no model in it, CK308 when there is more than one, when the index
    and the shards disagree, or when something points outside the folder.
    """
    files = _listing(folder)
    by_format = {kind: [name for name in files if _is_model(name, kind)] for kind in SUFFIXES if format in (None, kind)}
    models = {kind: names for kind, names in by_format.items() if names}
    if not models:
        raise Refusal("the folder holds no model file and no shard index" + (f" of format {format}" if format else ""), code="CK301",
                      found=_some(files) or "no file", try_="name the file itself")  # fmt: skip
    if len(models) > 1:
        raise _refused("ambiguous: the folder holds models in more than one format",
                       found=_some(name for names in models.values() for name in names), try_="name the index or the model file that is meant")  # fmt: skip
    (names,) = models.values()
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) == 1:
        contents = read_index(folder / indexes[0])
        shards = {path.name for path in contents.files}
        names = [name for name in names if name not in shards]
    if len(names) > 1:
        raise _refused(
            "ambiguous: the folder holds more than one model", found=_some(names), try_="name the file or the index that is meant"
        )
    if indexes:
        return contents
    (name,) = names
    match = _NUMBERED.fullmatch(name)
    if match is not None and int(match[2]) > 1:
        raise _refused("a shard without the others and without an index", found=printable(name), try_="download the checkpoint again")
    contents = _read_shard(folder, name)
    neighbours, left = beside(folder, {name})
    return replace(contents, neighbours=neighbours, warnings=(*contents.warnings, *left))


def read_index(path: Path) -> Contents:
    """What the shards of the index at ``path`` hold, in one container ``.``. Raises as :func:`read_folder` does.

    A tensor's ``storage.file`` is its shard's place in ``files``; shards are in the order of their names.
    """
    folder = path.parent
    shard_of, total_size = _read_index_file(folder, path.name)
    shards = sorted(set(shard_of.values()))
    _check_complete(shards)
    look_into(folder / shard for shard in shards if (folder / shard).is_file())
    parts = [_read_shard(folder, shard) for shard in shards]
    containers = [shifted(_state_dict(shard, part), at) for at, (shard, part) in enumerate(zip(shards, parts, strict=True))]
    merged = _merged(containers, shards, shard_of)
    warnings = [f"{printable(shard)}: {warning}" for shard, part in zip(shards, parts, strict=True) for warning in part.warnings]
    # A tie counts once or twice, depending on who wrote the index.
    sizes = (merged.manifest.nbytes, sum(placed.spec.nbytes for placed in merged.tensors.values()))
    if total_size is not None and total_size not in sizes and not merged.unsupported:
        warnings.append(f"{printable(path.name)}: total_size is {total_size:,}, the tensors have {sizes[0]:,} bytes")
    neighbours, left = beside(folder, {*shards, path.name})
    return Contents(
        parts[0].format, tuple(folder / shard for shard in shards), {".": merged}, tree=dict(merged.tensors),
        metadata=_common([part.metadata for part in parts]), warnings=(*warnings, *left), neighbours=neighbours,
    )  # fmt: skip


def _listing(folder: Path) -> list[str]:
    """Names of the folder's files, sorted; hidden ones and folders are left out."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".") and not (folder / name).is_dir())


def _is_model(name: str, format: str) -> bool:  # noqa: A002
    return name.removesuffix(INDEX_SUFFIX).endswith(SUFFIXES[format]) and not _TRAINER_STATE.fullmatch(name)


def _read_index_file(folder: Path, name: str) -> tuple[dict[str, str], float | None]:
    """Tensor name -> shard file name, and the size that the index gives."""
    with opened(confined(folder, name)) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_INDEX:
            raise _refused(f"the index is larger than {MAX_INDEX:,} bytes", found=f"{size:,} bytes")
        raw = read_at(descriptor, size, 0)
    try:
        index = parse_json(raw, code="CK308")
    except Refusal as refusal:
        raise _refused(f"{printable(name)}: {refusal.what}", found=refusal.found) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refused(f'{printable(name)}: "weight_map" must map tensor names to shard files, and name at least one')
    for shard in weight_map.values():
        if not _plain(shard):
            raise _refused("a shard must be a plain file name, in the folder of the index", found=printable(repr(shard)))
    metadata = index.get("metadata")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, total_size if isinstance(total_size, (int, float)) else None


def _plain(name: object) -> bool:
    """True for a file's name and nothing else: no path, no drive, no stream, no control characters."""
    return isinstance(name, str) and name not in ("", ".", "..") and name.isprintable() and not any(ch in name for ch in "/\\:")


def confined(folder: Path, name: str) -> Path:
    """The path of one of the folder's files. Raises where it is missing, not a regular file, or a link that leads out."""
    home = folder.resolve()
    try:
        real = (home / name).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        raise _refused("a file is missing", found=printable(name), try_="download the checkpoint again") from None
    blobs = {outer.parent / "blobs" for outer in home.parents if outer.name == "snapshots"}
    if real.parent != home and real.parent not in blobs:
        raise _refused("a link leads out of the folder", found=printable(name))
    if not real.is_file():
        raise _refused("not a regular file", found=printable(name))
    return folder / name


def _check_complete(shards: Sequence[str]) -> None:
    """``-of-00003`` wants three shards."""
    families: dict[tuple[str, int], int] = {}
    for name in shards:
        match = _NUMBERED.fullmatch(name)
        if match is not None:
            family = (match[1], int(match[2]))
            families[family] = families.get(family, 0) + 1
    for (stem, count), found in families.items():
        if found < count:
            raise _refused(f"ambiguous: the index names {found} of {count} shards", found=f"{printable(stem)}-…")


def _read_shard(folder: Path, name: str) -> Contents:
    """One file of the folder. What is wrong with it is said with its name in front."""
    from ckptconv.formats import READERS, kind_of  # the table of formats imports this module

    path = confined(folder, name)
    try:
        return READERS[kind_of(path)](path)
    except Refusal as refusal:
        raise Refusal(f"{printable(name)}: {refusal.what}", code=refusal.code, found=refusal.found, try_=refusal.try_) from None


def _state_dict(shard: str, contents: Contents) -> Container:
    """The state_dict of a shard: its top, or the only one that it has."""
    containers = contents.containers
    if "." in containers:
        return containers["."]
    if len(containers) != 1:
        raise Refusal(f"{printable(shard)}: a shard must hold one state_dict, not {len(containers)}", code="CK309", found=_some(containers))
    return next(iter(containers.values()))


def _merged(containers: Sequence[Container], shards: Sequence[str], shard_of: Mapping[str, str]) -> Container:
    """One container of all shards, in their order. Raises where the index and the shards do not agree on every tensor."""
    home: dict[str, str] = {}
    tensors: dict[str, Placed] = {}
    versions: dict[str, Mapping[str, Any]] = {}
    skipped: dict[str, str] = {}
    composites: dict[str, Composite] = {}
    unsupported: dict[str, str] = {}
    for shard, container in zip(shards, containers, strict=True):
        names = [*container.tensors, *container.composites, *container.unsupported]
        twice = [name for name in names if name in home]
        if twice:
            raise _refused("a tensor is in two shards", found=f"{_some(twice)} in {printable(home[twice[0]])} and {printable(shard)}")
        home.update(dict.fromkeys(names, shard))
        # Hugging Face leaves the further names of a tied tensor out of the index.
        tied = {name for group in container.manifest.ties if any(name in shard_of for name in group) for name in group}
        unnamed = [name for name in names if name not in shard_of and name not in tied]
        if unnamed:
            raise _refused("a tensor is in a shard but not in the index", found=f"{_some(unnamed)} in {printable(shard)}")
        tensors.update(container.tensors)
        versions.update(container.module_versions)
        skipped.update(container.skipped)
        composites.update(container.composites)
        unsupported.update(container.unsupported)
    lost = [name for name, shard in shard_of.items() if home.get(name) != shard]
    if lost:
        raise _refused("a tensor is in the index but not in its shard", found=f"{_some(lost)}, wanted in {printable(shard_of[lost[0]])}")
    return Container(".", tensors, versions, skipped, composites, unsupported)


def _common(all_metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What every shard says alike about itself."""
    first, *others = all_metadata
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def beside(folder: Path, read: set[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The folder's files that should come along with a converted model, and a warning that names those that should not."""
    names = [name for name in _listing(folder) if name not in read]
    neighbours = [name for name in names if _is_companion(folder, name)]
    left = [name for name in names if name not in neighbours]
    warnings = (f"not taken along from the folder: {_some(left)}",) if left else ()
    return tuple(folder / name for name in neighbours), warnings


def _is_companion(folder: Path, name: str) -> bool:
    """True for a readable file of the folder's own that holds no weights."""
    if name.endswith(_OTHER_WEIGHTS) or any(name.endswith(suffixes) for suffixes in SUFFIXES.values()):
        return False
    try:
        confined(folder, name)
    except Refusal:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------- writing


def plan_shards(
    manifest: Manifest, format: str, shard_nbytes: int | None, stem: str, together: Iterable[Sequence[str]] = (),  # noqa: A002
) -> list[tuple[str, Manifest]]:  # fmt: skip
    """File names and what goes into each: names in order, at most ``shard_nbytes`` bytes a file where a single tensor does not pass that.

    The names of a tie stay together, and so do those of each group in ``together`` that fits into a file. Without a limit, or where
    everything fits, it is one file without a number.

    >>> from ckptconv.spec import DType
    >>> m = Manifest({name: TensorSpec((256,), DType.float32) for name in "abc"})
    >>> [(name, list(part)) for name, part in plan_shards(m, "safetensors", 2048, "model")]
    [('model-00001-of-00002.safetensors', ['a', 'b']), ('model-00002-of-00002.safetensors', ['c'])]
    >>> [list(part) for _, part in plan_shards(m, "safetensors", 2048, "model", [("b", "c")])]
    [['a'], ['b', 'c']]
    """
    stored = manifest.stored
    group_of: dict[str, Sequence[str]] = {}
    for group in together:
        if shard_nbytes is None or sum(stored[name].nbytes for name in group) <= shard_nbytes:
            group_of.update(dict.fromkeys(group, group))
    shard_of: dict[str, int] = {}
    at, filled = 0, 0
    for name in stored:
        if name in shard_of:  # it came with its group
            continue
        names = group_of.get(name, (name,))
        nbytes = sum(stored[each].nbytes for each in names)
        if filled and shard_nbytes is not None and filled + nbytes > shard_nbytes:
            at, filled = at + 1, 0
        shard_of.update(dict.fromkeys(names, at))
        filled += nbytes
    aliases = manifest.aliases
    tensors: list[dict[str, TensorSpec]] = [{} for _ in range(at + 1)]
    for name, spec in manifest.tensors.items():
        tensors[shard_of[aliases.get(name, name)]][name] = spec
    ties: list[list[tuple[str, ...]]] = [[] for _ in tensors]
    for group in manifest.ties:
        ties[shard_of[group[0]]].append(group)
    suffix, count = SUFFIXES[format][0], len(tensors)
    names = [f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)] if count > 1 else [stem + suffix]
    parts = (Manifest(part, tuple(groups), manifest.buffers & part.keys()) for part, groups in zip(tensors, ties, strict=True))
    return list(zip(names, parts, strict=True))


#: The files of a folder, laid out, and its index (file name and contents) where it has one. The index is written last.
Folder = tuple[tuple[FileLayout, ...], tuple[str, bytes] | None]


def lay_out_folder(
    writer: Writer, stem: str, manifest: Manifest, shard_nbytes: int | None, together: Iterable[Sequence[str]], options: Mapping[str, Any]
) -> Folder:
    """The shards of ``manifest`` as ``writer`` lays them out with ``options``, and the index where there are several."""
    shards = plan_shards(manifest, writer.name, shard_nbytes, stem, together)
    files = tuple(writer.lay_out(name, part, **options) for name, part in shards)
    suffix = SUFFIXES[writer.name][0] + INDEX_SUFFIX
    return files, (stem + suffix, index_json(shards, manifest.nbytes)) if len(shards) > 1 else None


def index_json(shards: Sequence[tuple[str, Manifest]], total_size: int) -> bytes:
    """The index of ``shards``, as Hugging Face writes it. In a safetensors index the further names of a tie are left out."""
    weight_map = {
        name: file_name
        for file_name, manifest in shards
        for name in (manifest.stored if file_name.endswith(SUFFIXES["safetensors"]) else manifest.tensors)
    }
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")
