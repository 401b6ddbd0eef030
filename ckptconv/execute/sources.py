"""Source files, opened once, read by position, and watched for changes.

Nothing is memory-mapped: a file that shrinks under a mapping kills the process, a read that comes up short is an error with a sentence.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ckptconv.errors import InputError, Problem, printable
from ckptconv.execute.descriptors import Descriptors
from ckptconv.formats.base import Placed
from ckptconv.formats.strict import Identity, identity
from ckptconv.places import presence

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 64
_NEAR = 4096  # small ranges with no more than this between them are read in one go


Range = tuple[int, int, int]  #: number of the file, offset and length in bytes


class Sources:
    """The files of a checkpoint as a context manager; offsets and sizes are in bytes.

    ``identities`` are those that the files had before their headers were read: where they differ by now, the offsets mean nothing.
    """

    def __init__(self, files: Sequence[Path], identities: Mapping[Path, Identity] | None = None) -> None:
        self.files = tuple(files)
        self.descriptors = Descriptors(self._opened)
        known = identities or {}
        self._identities = {at: known[path] for at, path in enumerate(self.files) if path in known}

    def __enter__(self) -> Sources:
        try:
            for at in range(len(self.files)):
                with self.descriptors.use(at):
                    pass
        except BaseException:
            self.descriptors.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.descriptors.close()

    def _opened(self, at: int) -> int:
        """Opens a file, for the first time or once more; then it must be the one that it was."""
        path = self.files[at]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if at in self._identities and error.errno == errno.ENOENT:
                raise _changed(path) from None
            raise _unreadable(path, "opened", error) from None
        found = identity(os.fstat(descriptor))
        if self._identities.setdefault(at, found) != found:
            os.close(descriptor)
            raise _changed(path)
        return descriptor

    def check_unchanged(self) -> None:
        """Raises :class:`~ckptconv.errors.InputError` CK311 when a file was written to, cut, or replaced since it was opened."""
        for at, known in self._identities.items():
            try:
                named = identity(os.stat(self.files[at]))
            except OSError:
                named = None
            if named != known:
                raise _changed(self.files[at])
        elsewhere = presence.changed(self.files)
        if elsewhere is not None:
            raise _changed(elsewhere)

    def is_remote(self, file: int) -> bool:
        """True for a placeholder: what is read of it must arrive first."""
        return presence.keeper_of(self.files[file]) is not None

    def announce(self, ranges: Iterable[Range]) -> None:
        """What will be read, as (file, offset, length), in this order. Costs nothing where everything is here."""
        presence.announce((self.files[file], offset, nbytes) for file, offset, nbytes in ranges)

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from ``offset``; a short file is CK311, a disk that fails CK310."""
        with self.descriptors.use(file) as descriptor:
            self._read(file, descriptor, offset, buffer)

    @contextmanager
    def reading(self, file: int) -> Iterator[Callable[[int, memoryview], None]]:
        """What :meth:`read_into` does, for many ranges of one file: a function of offset and buffer. The file stays open meanwhile."""
        with self.descriptors.use(file) as descriptor:
            yield partial(self._read_here if presence.keeper_of(descriptor) is None else self._read, file, descriptor)

    def _read(self, file: int, descriptor: int, offset: int, buffer: memoryview) -> None:
        for at, nbytes in presence.arriving(descriptor, offset, len(buffer)):
            self._read_here(file, descriptor, at, buffer[at - offset : at - offset + nbytes])

    def _read_here(self, file: int, descriptor: int, offset: int, buffer: memoryview) -> None:
        try:
            done = os.preadv(descriptor, [buffer], offset)
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if not count:
                    raise _changed(self.files[file])
                done += count
        except OSError as error:
            raise _unreadable(self.files[file], "read", error) from None

    def read_near(self, ranges: Iterable[Range], buffer: memoryview) -> Iterator[memoryview]:
        """The bytes of each range, good until the next are asked for. Those that lie close together are read in one go.

        None may be larger than the buffer.
        """
        near: list[Range] = []
        for file, offset, nbytes in ranges:
            if near and not (
                file == near[0][0] and 0 <= offset - (near[-1][1] + near[-1][2]) <= _NEAR and offset + nbytes - near[0][1] <= len(buffer)
            ):
                yield from self._read_at_once(near, buffer)
                near = []
            near.append((file, offset, nbytes))
        if near:
            yield from self._read_at_once(near, buffer)

    def _read_at_once(self, near: Sequence[Range], buffer: memoryview) -> Iterator[memoryview]:
        first, last = near[0][1], near[-1][1] + near[-1][2]
        self.read_into(near[0][0], first, buffer[: last - first])
        for _, offset, nbytes in near:
            yield buffer[offset - first : offset - first + nbytes]

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


def _unreadable(path: Path, what: str, error: OSError) -> InputError:
    hint = "ulimit -n 1024" if error.errno == errno.EMFILE else "look at its permissions, and at the disk that it is on"
    return InputError(Problem("CK310", f"the source cannot be {what}: {error.strerror}", where=printable(path), try_=hint))


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
