"""Safetensors folders to which every rank wrote its own chunks: ``HuggingFaceStorageWriter(save_distributed=True)`` of torch.

``shard-00002-model-00001-of-00004.safetensors`` is a file of the second rank. Its metadata says where in each whole tensor the chunk
begins; how large the whole is, only the chunks themselves say.
"""

from __future__ import annotations

from pathlib import Path

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Composite, Container, Contents, Placed
from ckptconv.formats.chunks import joined
from ckptconv.formats.joining import plain_files, shifted
from ckptconv.formats.safetensors import SHARE, read_share
from ckptconv.formats.sharded import beside, confined
from ckptconv.spec import Box


def _bad(what: str, found: str = "") -> Refusal:
    return Refusal(
        what, code="CK308", found=found, try_="save the checkpoint again, or let torch join the files (enable_consolidation=True)"
    )


def found(folder: Path) -> list[str]:
    """The ranks' files; empty where the folder's safetensors files are others."""
    names = [name for name in plain_files(folder) if name.endswith(".safetensors")]
    return names if all(SHARE.fullmatch(name) for name in names) else []


def read(folder: Path, names: list[str]) -> Contents:
    """The whole tensors, in the order of the first rank that has a part of each.

    Raises :class:`~ckptconv.errors.Refusal` CK308 where a rank is missing, or chunks do not belong together.
    """
    ranks = sorted({int(match[1]) for name in names if (match := SHARE.fullmatch(name))})
    if ranks != list(range(1, len(ranks) + 1)):
        raise _bad("files of a rank are missing", printable(", ".join(names[:3])))
    pieces: dict[str, dict[Box, Placed]] = {}
    unsupported: dict[str, str] = {}
    for number, name in enumerate(names):
        contents, starts = read_share(confined(folder, name))
        share = shifted(contents.containers["."], number)
        unsupported |= share.unsupported
        for tensor, placed in share.tensors.items():
            start = starts.get(tensor)
            if start is None or len(start) != len(placed.spec.shape):
                raise _bad(f"{printable(name)} does not say where its part of {printable(tensor)} begins")
            pieces.setdefault(tensor, {}).setdefault(Box(start, placed.spec.shape), placed)
    whole = {name: _whole(name, boxes) for name, boxes in pieces.items()}
    container = Container(
        ".", {name: each for name, each in whole.items() if isinstance(each, Placed)}, unsupported=unsupported,
        composites={name: each for name, each in whole.items() if isinstance(each, Composite)},
    )  # fmt: skip
    neighbours, left = beside(folder, set(names))
    count = "1 rank's" if len(ranks) == 1 else f"{len(ranks)} ranks'"
    warnings = (f"{count} files are taken as all: such files do not say how many there were", *left)
    return Contents(
        "safetensors", tuple(folder / name for name in names), {".": container}, tree=None, warnings=warnings, neighbours=neighbours
    )


def _whole(name: str, boxes: dict[Box, Placed]) -> Placed | Composite:
    if len({len(box.start) for box in boxes}) > 1:
        raise _bad(f"the chunks of {printable(name)} have different ranks")
    shape = tuple(max(ends) for ends in zip(*([a + n for a, n in zip(box.start, box.size, strict=True)] for box in boxes), strict=True))
    filled = {box: placed for box, placed in boxes.items() if placed.spec.numel}
    return joined(name, shape, filled or boxes, _bad)
