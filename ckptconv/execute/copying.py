"""Byte ranges from source files into an output file, by several threads: by the kernel, or through small buffers.

Bytes that nobody needs to see are the kernel's to copy: half the processor time, no thread waits for another's Python, and in a file of its own
each goes at full speed. What is checksummed, is not here yet, or cannot be copied so, is read and written. Short copies, reads and writes go on
where they stopped, so any filesystem will do. What was just read is in the cache: that is when checksums cost least.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec import Struct, field

from ckptconv.execute.checksums import Checksums
from ckptconv.execute.cloning import BLOCK as PAGE
from ckptconv.execute.cloning import clone
from ckptconv.execute.crew import PART, turn
from ckptconv.execute.sources import Sources, checksum_mismatch

BLOCK = 1 << 20
#: Of one write, in bytes. Linux keeps what one call writes in one piece of memory where it can. In a virtual machine large pieces of free memory
#: are often not there: the host took them back, and gives them again page by page, ten times slower than a copy. Small pieces are there.
#: So each worker begins with large writes, and halves them when more than a few take longer than copying ever should.
_WRITES = (1 << 17, 1 << 16, 1 << 15)
_SMALL_WRITE = 1 << 16
_SLOW = 1.2e-9  #: seconds a byte
_TOO_SLOW = 8  #: a slow block counts 2, a quick one takes 1 back: one that the scheduler interrupted says nothing


class Piece(Struct, frozen=True):
    """A range of a source file."""

    file: int
    offset: int
    nbytes: int
    tensor: str = ""  #: the source tensor that these bytes are, all of it
    crc32: int | None = None  #: what the source records of just these bytes, to be compared


class Copy(Struct, frozen=True):
    """Pieces that lie one after the other in the output file. What is to be checksummed is neither cut nor merged."""

    destination: int
    pieces: tuple[Piece, ...]
    output: str = ""
    crc: bool = False  #: wants the CRC-32 of the whole
    digest: bool = False  #: wants the digest of the whole, and of each piece that is a tensor

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def checked(self) -> bool:
        """True when its bytes must be seen, in order and by one worker."""
        return self.crc or self.digest


class Found(Struct):
    """What was found of bytes that passed; several workers' are put together by :meth:`add`."""

    crc32: dict[str, int] = field(default_factory=dict)  #: by output
    outputs: dict[str, str] = field(default_factory=dict)  #: digests by output
    tensors: dict[str, str] = field(default_factory=dict)  #: digests by source tensor
    checked: set[tuple[int, int]] = field(default_factory=set)  #: (file, offset) of storages whose recorded CRC-32 is right
    noticed: dict[str, dict[str, int]] = field(default_factory=dict)  #: by output: what happened to how many of its values

    def add(self, other: Found) -> None:
        self.crc32 |= other.crc32
        self.outputs |= other.outputs
        self.tensors |= other.tensors
        self.checked |= other.checked
        self.noticed |= other.noticed

    def note(self, output: str, sums: Checksums) -> None:
        """The checksums of a whole output."""
        self.crc32[output] = sums.crc
        if sums.digest:
            self.outputs[output] = sums.digest


def batches(copies: Iterable[Copy]) -> list[list[Copy]]:
    """Work for threads: neighbours that stay neighbours become one range, large ranges are cut, small ones go together."""
    work: list[list[Copy]] = []
    small: list[Copy] = []
    size = 0
    for copy in _merged(copies):
        nbytes = copy.nbytes
        if nbytes >= BLOCK:
            work += [[part] for part in _cut(copy)]
            continue
        if small and (size + nbytes > BLOCK or copy.destination < small[-1].destination):
            work.append(small)
            small, size = [], 0
        small.append(copy)
        size += nbytes
    work += [small] if small else []
    return sorted(work, key=lambda batch: turn(sum(copy.nbytes for copy in batch)))


def _merged(copies: Iterable[Copy]) -> Iterator[Copy]:
    last: Copy | None = None
    for copy in copies:
        for part in [copy] if copy.checked else _apart(copy):
            both = _joined(last, part) if last is not None else None
            if both is None and last is not None:
                yield last
            last = both or part
    if last is not None:
        yield last


def _apart(copy: Copy) -> Iterator[Copy]:
    at = copy.destination
    for piece in copy.pieces:
        yield Copy(at, (piece,))
        at += piece.nbytes


def _joined(one: Copy, other: Copy) -> Copy | None:
    if one.checked or other.checked:
        return None
    a, b = one.pieces[0], other.pieces[0]
    if a.file != b.file or a.offset + a.nbytes != b.offset or one.destination + a.nbytes != other.destination:
        return None
    return Copy(one.destination, (Piece(a.file, a.offset, a.nbytes + b.nbytes),))


def _cut(copy: Copy) -> Iterator[Copy]:
    if copy.checked:
        yield copy
        return
    (piece,) = copy.pieces
    for at, nbytes in _aligned(copy.destination, 0, piece.nbytes, PART):
        yield Copy(copy.destination + at, (Piece(piece.file, piece.offset + at, nbytes),))


def _aligned(to: int, start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """``start`` to ``stop`` of what goes to ``to``, as (at, bytes), cut where the destination is a multiple of ``step``: a write that begins
    somewhere else is kept in many small pieces of memory."""
    at = start
    while at < stop:
        nbytes = min(step - (to + at) % step, stop - at)
        yield at, nbytes
        at += nbytes


class Copier:
    """One worker's buffers, and what it does with them."""

    def __init__(self, sources: Sources, report: Callable[[int], None], stop: threading.Event) -> None:
        self._sources, self._report, self._stop = sources, report, stop
        self._buffer = memoryview(bytearray(BLOCK))
        self._parts = [[self._buffer[at : at + nbytes] for at in range(0, BLOCK, nbytes)] for nbytes in _WRITES]
        self._span = memoryview(b"")
        self._slow = 0
        self._clones, self._in_kernel = True, hasattr(os, "copy_file_range")  #: until the first time that it cannot be done
        self.found = Found()
        self.cloned_nbytes = self.kernel_nbytes = 0

    def run(self, batch: Sequence[Copy], descriptor: int) -> None:
        """Copies a batch, and notes the checksums in ``found``; gives up quietly when another worker failed.

        Raises :class:`~ckptconv.errors.InputError` CK312 where bytes are not those whose CRC-32 the source records.
        """
        if len(batch) == 1 and batch[0].nbytes >= BLOCK:
            self._streamed(batch[0], descriptor)
        else:
            self._gathered(batch, descriptor)

    def _streamed(self, copy: Copy, descriptor: int) -> None:
        """A large range, block by block."""
        total = Checksums(crc=copy.crc, digest=copy.digest) if len(copy.pieces) > 1 else None
        to = copy.destination
        for piece in copy.pieces:
            sums = self._sums(copy, piece)
            wanted = [each.update for each in (sums, total) if each is not None] if copy.checked else []
            begin, end = self._cloned(piece, descriptor, to)
            for start, stop, is_there in ((0, begin, False), (begin, end, True), (end, piece.nbytes, False)):
                if is_there and not copy.checked:
                    self._report(stop - start)
                    continue
                begun = start if copy.checked else self._passed(piece, descriptor, to, start, stop)
                if not self._through_buffer(piece, None if is_there else descriptor, to, begun, stop, wanted):
                    return
            to += piece.nbytes
            self._note(copy, piece, sums)
        if total is not None:
            self.found.note(copy.output, total)

    def _through_buffer(
        self, piece: Piece, descriptor: int | None, to: int, start: int, stop: int, wanted: Sequence[Callable[[memoryview], None]]
    ) -> bool:
        """Reads the piece from ``start`` to ``stop``, shows it to ``wanted`` and writes it; False where another worker failed.

        While this runs Python, which it does once for every MiB, the other workers wait: so it does little, and that itself.
        """
        buffer, parts, report, pwrite, clock = self._buffer, self._parts[0], self._report, os.pwrite, time.perf_counter
        size, offset, slow = len(parts[0]), piece.offset, _SLOW * BLOCK
        with self._sources.reading(piece.file) as read:
            for at, nbytes in _aligned(to, start, stop, BLOCK):
                if self._stop.is_set():
                    return False
                part = buffer if nbytes == BLOCK else buffer[:nbytes]
                read(offset + at, part)
                for update in wanted:
                    update(part)
                if descriptor is not None and nbytes < BLOCK:
                    write_at(descriptor, to + at, part)
                elif descriptor is not None:
                    where, started = to + at, clock()
                    for each in parts:
                        done = pwrite(descriptor, each, where)
                        if done < size:
                            write_at(descriptor, where + done, each[done:])
                        where += size
                    self._slow = self._slow + 2 if clock() - started > slow else max(0, self._slow - 1)
                    if self._slow >= _TOO_SLOW and len(self._parts) > 1:
                        self._slow = 0
                        del self._parts[0]
                        parts, size = self._parts[0], len(self._parts[0][0])
                report(nbytes)
        return True

    def _cloned(self, piece: Piece, descriptor: int, to: int) -> tuple[int, int]:
        """The part of the piece that need not be copied, because the filesystem shares it."""
        if not self._clones or self._sources.is_remote(piece.file):
            return 0, 0
        try:
            with self._sources.descriptors.use(piece.file) as source:
                begin, end = clone(source, piece.offset, descriptor, to, piece.nbytes)
        except OSError:  # copying says what is wrong, if anything is
            self._clones = False
            return 0, 0
        self.cloned_nbytes += end - begin
        return begin, end

    def _passed(self, piece: Piece, descriptor: int, to: int, start: int, stop: int) -> int:
        """Has the kernel copy from ``start`` on, and says how far it got: nowhere, where it cannot."""
        at = start
        # Where the range lies differently in its pages, every page would be put together of two.
        if self._in_kernel and not (piece.offset - to) % PAGE and not self._sources.is_remote(piece.file):
            try:
                with self._sources.descriptors.use(piece.file) as source:
                    while at < stop and self._in_kernel and not self._stop.is_set():
                        nbytes = min(-(to + at) % _SMALL_WRITE or PART, stop - at)  # the kernel goes on by 64 KiB from where it begins
                        started = time.perf_counter()
                        done = os.copy_file_range(source, descriptor, nbytes, piece.offset + at, to + at)
                        if nbytes >= BLOCK and time.perf_counter() - started > _SLOW * nbytes:
                            self._in_kernel = False  # it writes by 64 KiB, and smaller writes are ours to make
                        if not done:
                            break
                        at += done
                        self._report(done)
            except OSError:  # reading and writing say what is wrong, if anything is
                self._in_kernel = False
        self.kernel_nbytes += at - start
        return at

    def _gathered(self, batch: Sequence[Copy], descriptor: int) -> None:
        """Small ranges: read in one go where they lie close together, written together where their destinations touch."""
        if not self._span:
            self._span = memoryview(bytearray(BLOCK))
        pieces = self._sources.read_near(((piece.file, piece.offset, piece.nbytes) for copy in batch for piece in copy.pieces), self._span)
        start, filled = batch[0].destination, 0
        for copy in batch:
            if start + filled != copy.destination:
                write_at(descriptor, start, self._buffer[:filled])
                start, filled = copy.destination, 0
            begin = filled
            for piece in copy.pieces:
                part = self._buffer[filled : filled + piece.nbytes]
                part[:] = next(pieces)
                filled += piece.nbytes
                if copy.checked:
                    sums = self._sums(copy, piece)
                    sums.update(part)
                    self._note(copy, piece, sums)
            if len(copy.pieces) > 1 and copy.checked:
                total = Checksums(crc=copy.crc, digest=copy.digest)
                total.update(self._buffer[begin:filled])
                self.found.note(copy.output, total)
        write_at(descriptor, start, self._buffer[:filled])
        self._report(sum(copy.nbytes for copy in batch))

    def _sums(self, copy: Copy, piece: Piece) -> Checksums:
        return Checksums(crc=copy.crc or piece.crc32 is not None, digest=copy.digest)

    def _note(self, copy: Copy, piece: Piece, sums: Checksums) -> None:
        if piece.crc32 is not None:
            if sums.crc != piece.crc32:
                raise checksum_mismatch(self._sources.files[piece.file], piece.offset, piece.tensor or copy.output)
            self.found.checked.add((piece.file, piece.offset))
        if piece.tensor and sums.digest:
            self.found.tensors[piece.tensor] = sums.digest
        if len(copy.pieces) == 1 and copy.checked:
            self.found.note(copy.output, sums)


def write_at(descriptor: int, offset: int, data: memoryview | bytes) -> None:
    """All of ``data`` at ``offset``, however many calls it takes; none of more than 64 KiB, nor across a multiple of that."""
    view = memoryview(data).cast("B") if not isinstance(data, memoryview) else data
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _SMALL_WRITE - (offset + done) % _SMALL_WRITE], offset + done)
