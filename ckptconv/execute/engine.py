"""Fills laid-out files: byte ranges are copied, expressions computed island by island, by the threads of this machine."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from itertools import zip_longest
from pathlib import Path

from msgspec import Struct, field

from ckptconv import formats
from ckptconv.execute import writeback
from ckptconv.execute.checksums import Checksums
from ckptconv.execute.copying import Copier, Copy, Found, Piece, batches, write_at
from ckptconv.execute.crew import Crew, Task, Worker
from ckptconv.execute.descriptors import Descriptors
from ckptconv.execute.sources import Sources
from ckptconv.execute.truth import check_truth_values
from ckptconv.formats.base import FileLayout, Placed
from ckptconv.memory import budget_nbytes, peak_nbytes
from ckptconv.plan import Output, Plan, islands, reads
from ckptconv.ranges import Span, as_spans, span_of
from ckptconv.tasks import outputs_of

Report = Callable[[int], None]
_EMPTY_DIGEST = Checksums(crc=False, digest=True).digest


class Receipt(Struct, frozen=True):
    """What filling leaves behind for sealing and verifying."""

    crc32: Mapping[str, Mapping[str, int]]  #: file -> slot -> CRC-32, for formats that want it
    digests: Mapping[str, str]  #: output -> xxh3_128 of its bytes: of computed outputs, and of copied ones where digests were wanted
    source_digests: Mapping[str, str]  #: source tensor -> xxh3_128, of those that were read whole, where digests were wanted
    checked: frozenset[tuple[int, int]]  #: (file, offset) of source storages whose recorded CRC-32 was compared on the way
    copied_nbytes: int
    computed_nbytes: int
    workers: tuple[Worker, ...] = ()
    noticed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  #: computed output -> what happened to how many of its values


class Bench(Struct):
    """What every task needs, and where they leave what they found."""

    placed: Mapping[str, Placed]
    sources: Sources
    where: Mapping[str, tuple[str, int]]  #: output -> file, offset
    wants_crc: Mapping[str, bool]
    digests: bool  #: take them of what is copied and read, not only of what is computed
    sync: bool  #: the files will be fsynced: start writing early
    descriptors: Descriptors
    number: Mapping[str, int]  #: of each file among the descriptors
    found: Found = field(default_factory=Found)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def writing(self, file: str) -> AbstractContextManager[int]:
        """The descriptor of an output file, open until the block ends."""
        return self.descriptors.use(self.number[file])

    def add(self, found: Found) -> None:
        """Notes what a worker found."""
        with self._lock:
            self.found.add(found)


def fill(
    plan: Plan,
    placed: Mapping[str, Placed],
    sources: Sources,
    layouts: Sequence[FileLayout],
    folder: Path,
    *,
    kept: Mapping[str, Placed] | None = None,
    outputs: Sequence[Output] | None = None,
    threads: int = 2,
    max_memory: int | None = None,
    digests: bool = False,
    sync: bool = False,
    progress: Report | None = None,
) -> Receipt:
    """Writes every tensor's bytes into its slot of the files in ``folder``. Headers are written by :func:`seal_all`.

    With ``outputs``, only those of all are written, into files that are there at their full sizes, while others may fill the rest.

    With ``digests``, those of the source's tensors and of the outputs are taken while the bytes pass, and recorded CRC-32s compared. With
    ``sync``, pages are sent to the disk early, because an fsync will come.

    Raises :class:`~ckptconv.errors.FitError` for a transform that refuses the values, :class:`~ckptconv.errors.InputError` for a source
    that changed or is damaged, :class:`~ckptconv.errors.OutputError` where memory does not suffice, ``OSError`` where the disk does not.
    """
    everything = {**placed, **kept} if kept else placed
    where = {name: (layout.name, slot.offset) for layout in layouts for name, slot in layout.slots.items()}
    wants_crc = {layout.name: layout.needs_crc for layout in layouts}
    seen = Found()
    crc32: dict[str, dict[str, int]] = {layout.name: {} for layout in layouts}
    copies: dict[str, list[Copy]] = {layout.name: [] for layout in layouts}
    to_compute: list[Output] = []
    copied = 0
    chosen = outputs_of(plan, kept) if outputs is None else outputs
    for output in chosen:
        spans = as_spans(output.expr, everything)
        if spans is None:
            to_compute.append(output)
            continue
        file, offset = where[output.name]
        copied += output.expr.spec.nbytes
        recorded = _recorded_crc(spans) if wants_crc[file] else None
        if recorded is not None:
            crc32[file][output.name] = recorded
        copy = _copy(output.name, offset, spans, crc=wants_crc[file] and recorded is None, digest=digests)
        if copy.pieces:
            copies[file].append(copy)
        elif digests:
            seen.outputs[output.name] = _EMPTY_DIGEST
    groups = islands(to_compute)
    peaks = [peak_nbytes(group) for group in groups]
    budget = budget_nbytes(groups, peaks, threads, max_memory)
    check_truth_values(sources, everything if outputs is None else {name: everything[name] for each in chosen for name in reads(each.expr)})
    number = {layout.name: at for at, layout in enumerate(layouts)}
    with closing(_outputs(layouts, folder, sized=outputs is not None)) as descriptors, ExitStack() as stack:
        bench = Bench(everything, sources, where, wants_crc, digests, sync, descriptors, number, seen)
        tasks: list[Task] = _abreast(
            [
                [CopyRanges(name, batch, bench) for batch in batches(sorted(found, key=lambda copy: copy.destination))]
                for name, found in copies.items()
            ],
            threads,
        )
        if groups:
            from ckptconv.execute import arrays
            from ckptconv.execute.computing import Compute, kernel_threads

            suits = arrays.suits(groups, everything)
            computes = [Compute(group, bench, peak, suits(group)) for group, peak in zip(groups, peaks, strict=True)]
            if not all(task.without_torch for task in computes):
                stack.callback(kernel_threads(1 if sum(sorted(peaks)[-threads:]) <= budget else threads))
            # The largest islands first: the last worker to finish then has a small one.
            tasks += sorted(computes, key=lambda task: -task.peak_nbytes)
        sources.announce(_needs(tasks, everything))
        workers = Crew(threads, progress, budget).run(tasks)
    for name, value in seen.crc32.items():
        crc32[where[name][0]].setdefault(name, value)
    return Receipt(
        crc32, seen.outputs, seen.tensors, frozenset(seen.checked), copied,
        sum(output.expr.spec.nbytes for output in to_compute), workers, seen.noticed,
    )  # fmt: skip


class CopyRanges(Struct, frozen=True):
    """A batch of byte ranges, by one worker."""

    file: str
    batch: Sequence[Copy]
    bench: Bench
    peak_nbytes: int = 0

    def run(self, worker: Worker) -> None:
        copier = worker.belongings.get("copier")
        if not isinstance(copier, Copier):
            copier = worker.belongings["copier"] = Copier(self.bench.sources, worker.tell, worker.stop)
        copier.found, copier.cloned_nbytes, copier.kernel_nbytes = Found(), 0, 0
        with self.bench.writing(self.file) as descriptor:
            copier.run(self.batch, descriptor)
            if self.bench.sync:
                begin, last = self.batch[0].destination, self.batch[-1]
                writeback.start(descriptor, begin, last.destination + last.nbytes - begin)
        self.bench.add(copier.found)
        worker.cloned_nbytes += copier.cloned_nbytes
        worker.kernel_nbytes += copier.kernel_nbytes
        worker.copied_nbytes += sum(copy.nbytes for copy in self.batch)


def _abreast(files: Sequence[Sequence[Task]], threads: int) -> list[Task]:
    """The tasks of ``threads`` files in turns, then those of the next: two that write into one file wait for each other."""
    groups = (files[at : at + threads] for at in range(0, len(files), threads))
    return [task for group in groups for turn in zip_longest(*group) for task in turn if task is not None]


def _needs(tasks: Iterable[Task], placed: Mapping[str, Placed]) -> Iterator[tuple[int, int, int]]:
    """Every range of the source that the tasks read, in their order."""
    for task in tasks:
        if isinstance(task, CopyRanges):
            yield from ((piece.file, piece.offset, piece.nbytes) for copy in task.batch for piece in copy.pieces)
        else:
            for name in dict.fromkeys(name for output in getattr(task, "island", ()) for name in reads(output.expr)):
                span = span_of(placed[name])
                yield span.storage.file, span.storage.offset + span.offset, span.nbytes


def _recorded_crc(spans: Sequence[Span]) -> int | None:
    """The CRC-32 that the source records of just these bytes."""
    filled = [span for span in spans if span.nbytes]
    if not filled:
        return 0
    return filled[0].storage.crc32 if len(filled) == 1 and filled[0].is_storage else None


def _copy(output: str, destination: int, spans: Sequence[Span], *, crc: bool, digest: bool) -> Copy:
    pieces = tuple(
        Piece(span.storage.file, span.storage.offset + span.offset, span.nbytes, span.tensor if digest else "",
              span.storage.crc32 if digest and span.is_storage else None)
        for span in spans if span.nbytes
    )  # fmt: skip
    return Copy(destination, pieces, output, crc, digest)


def _outputs(layouts: Sequence[FileLayout], folder: Path, *, sized: bool) -> Descriptors:
    """The output files at their full sizes. Space is asked for now, where the filesystem can promise it: a full disk shows before the work.

    Files that are ``sized`` already are left as they are: where a filesystem cannot promise space, the C library asks for it by writing.
    """
    paths = [folder / layout.name for layout in layouts]
    create = 0 if sized else os.O_CREAT
    descriptors = Descriptors(lambda at: os.open(paths[at], os.O_RDWR | create | os.O_CLOEXEC, 0o666))
    try:
        for at, layout in enumerate(() if sized else layouts):
            with descriptors.use(at) as descriptor:
                os.ftruncate(descriptor, layout.nbytes)
                if layout.nbytes and hasattr(os, "posix_fallocate"):
                    try:
                        os.posix_fallocate(descriptor, 0, layout.nbytes)
                    except OSError as error:
                        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                            raise
    except BaseException:
        descriptors.close()
        raise
    return descriptors


def seal_all(layouts: Sequence[FileLayout], receipt: Receipt, metadata: Mapping[str, str], folder: Path) -> None:
    """Writes headers and directories. May be called again with metadata of the same lengths."""
    for layout in layouts:
        descriptor = os.open(folder / layout.name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            for offset, data in formats.WRITERS[layout.format].seal(layout, receipt.crc32[layout.name], metadata):
                write_at(descriptor, offset, data)
        finally:
            os.close(descriptor)
