"""Source files, opened once, read by position, and watched for changes.

Nothing is memory-mapped: a file that shrinks under a mapping kills the process, a read that comes up short is an error with a sentence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ckptconv.errors import InputError, Problem, printable
from ckptconv.formats.base import Placed

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 64


class Sources:
    """The files of a checkpoint as a context manager; offsets and sizes are in bytes."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._stack = ExitStack()
        self.descriptors: list[int] = []
        self._identities: list[tuple[int, int, int, int]] = []

    def __enter__(self) -> Sources:
        try:
            for path in self.files:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                self._stack.callback(os.close, descriptor)
                self.descriptors.append(descriptor)
                self._identities.append(_identity(os.fstat(descriptor)))
        except OSError as error:
            self._stack.close()
            raise InputError(Problem("CK310", f"the source cannot be opened: {error.strerror}", where=printable(path))) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def check_unchanged(self) -> None:
        """Raises :class:`~ckptconv.errors.InputError` CK311 when a file was written to, cut, or replaced since it was opened."""
        for path, descriptor, identity in zip(self.files, self.descriptors, self._identities, strict=True):
            try:
                named = _identity(os.stat(path))
            except OSError:
                named = None
            if _identity(os.fstat(descriptor)) != identity or named != identity:
                raise _changed(path)

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from ``offset``; a short file is CK311."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self.descriptors[file], [buffer[done:]], offset + done)
            if not count:
                raise _changed(self.files[file])
            done += count

    def read_tensor(self, placed: Placed) -> Tensor:
        """The tensor, contiguous, in memory of its own."""
        import torch

        spec = placed.spec
        dtype = getattr(torch, spec.dtype.value)
        if not spec.numel:
            return torch.empty(spec.shape, dtype=dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, placed.strides, strict=True))
        raw = torch.empty(span * spec.dtype.nbytes, dtype=torch.uint8)
        self.read_into(placed.storage.file, placed.storage.offset + placed.offset, _view(raw))
        if placed.storage.big_endian:
            width = spec.dtype.nbytes // (2 if spec.dtype.kind == "complex" else 1)
            raw = raw.view(-1, width).flip(1).contiguous().view(-1)
        flat = raw.view(dtype)
        if placed.contiguous or not spec.shape:
            return flat.view(spec.shape) if not placed.storage.big_endian else flat.as_strided(spec.shape, placed.strides).contiguous()
        return flat.as_strided(spec.shape, placed.strides).contiguous()


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a uint8 tensor as a writable memoryview, without numpy."""
    import ctypes

    held = (ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())
    held.tensor = tensor  # type: ignore[attr-defined]  # the view keeps the array alive, and so the array must keep the memory
    return memoryview(held).cast("B")


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without numpy. The view keeps the tensor alive."""
    import torch

    return _view(tensor.reshape(-1).view(torch.uint8)) if tensor.numel() else memoryview(b"")


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _changed(path: Path) -> InputError:
    return InputError(
        Problem("CK311", "the file changed while it was read", where=printable(path), try_="run again once nobody writes to it")
    )


def checksum_mismatch(path: Path, offset: int, name: str) -> InputError:
    """Bytes of a source that are not those whose checksum it records."""
    return InputError(
        Problem("CK312", f"{printable(name)}: the checksum that the file records does not match its bytes",
                where=printable(path), found=f"storage at offset {offset:,}", try_="fetch the file again")
    )  # fmt: skip
