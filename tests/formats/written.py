"""Writing a checkpoint the way any engine does: lay out, fill the slots in some order, seal."""

from __future__ import annotations

import os
import random
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ckptconv.formats import dcp_writer
from ckptconv.formats.base import FileLayout, Writer
from ckptconv.spec import DType, Manifest, TensorSpec


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), DType(str(tensor.dtype).removeprefix("torch.")))


def manifest_of(tensors: Mapping[str, torch.Tensor], ties: tuple[tuple[str, ...], ...] = ()) -> Manifest:
    return Manifest({name: spec_of(tensor) for name, tensor in tensors.items()}, ties)


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def fill(path: Path, layout: FileLayout, data: Mapping[str, bytes], threads: int = 1) -> dict[str, int]:
    """Every slot in random order, from several threads; the CRC-32 of each."""
    names = list(layout.slots)
    random.Random(0).shuffle(names)
    checksums: dict[str, int] = {}
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.ftruncate(descriptor, layout.nbytes)

        def work(mine: list[str]) -> None:
            for name in mine:
                os.pwrite(descriptor, data[name], layout.slots[name].offset)
                checksums[name] = zlib.crc32(data[name])

        workers = [threading.Thread(target=work, args=(names[at::threads],)) for at in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        os.close(descriptor)
    return checksums


def seal(path: Path, layout: FileLayout, writer: Writer, checksums: Mapping[str, int], metadata: Mapping[str, str]) -> None:
    with path.open("r+b") as file:
        for offset, piece in writer.seal(layout, checksums, metadata):
            file.seek(offset)
            file.write(piece)
    if layout.format == "dcp":
        (path.parent / dcp_writer.METADATA_FILE).write_bytes(dcp_writer.index([layout]))


def write(
    path: Path, writer: Writer, tensors: Mapping[str, torch.Tensor], *, ties: tuple[tuple[str, ...], ...] = (),
    metadata: Mapping[str, str] | None = None, threads: int = 1, kept: Mapping[str, torch.Tensor] | None = None, **options: Any,
) -> FileLayout:  # fmt: skip
    layout = writer.lay_out(path.name, manifest_of(tensors, ties), metadata=metadata or {}, **options)
    data = {name: bytes_of(tensor) for name, tensor in {**tensors, **(kept or {})}.items()}
    assert {name: slot.nbytes for name, slot in layout.slots.items()} == {name: len(data[name]) for name in layout.slots}
    checksums = fill(path, layout, data, threads)
    seal(path, layout, writer, checksums, layout.metadata)
    return layout
