"""Fills laid-out files: byte ranges are copied, expressions computed island by island, by the threads of this machine."""

from __future__ import annotations

import errno
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ckptconv import formats
from ckptconv.errors import FitError, OutputError, Problem, Refusal, printable
from ckptconv.execute.copying import Copier, Copy, batches, write_at
from ckptconv.execute.descriptors import Descriptors
from ckptconv.execute.memory import peak_nbytes
from ckptconv.execute.memory_run import computed
from ckptconv.execute.nonfinite import nonfinite_in
from ckptconv.execute.ranges import as_range
from ckptconv.execute.sources import Sources, bytes_of
from ckptconv.execute.truth import check_truth_values
from ckptconv.formats.base import FileLayout, Placed
from ckptconv.plan import Output, Plan, Read, islands
from ckptconv.transforms.noticing import notice, noticing

Report = Callable[[int], None]
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Receipt:
    """What filling leaves behind for sealing and verifying."""

    crc32: Mapping[str, Mapping[str, int]]  #: file -> slot -> CRC-32, for formats that want it
    digests: Mapping[str, str]  #: output -> xxh3_128 of its bytes, for computed outputs
    copied_nbytes: int
    computed_nbytes: int
    noticed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  #: computed output -> what happened to how many of its values


@dataclass(frozen=True)
class _Place:
    """An output's slot: which file, where."""

    file: str
    offset: int


def fill(
    plan: Plan,
    placed: Mapping[str, Placed],
    sources: Sources,
    layouts: Sequence[FileLayout],
    folder: Path,
    *,
    kept: Mapping[str, Placed] | None = None,
    threads: int = 2,
    max_memory: int | None = None,
    progress: Report | None = None,
) -> Receipt:
    """Writes every tensor's bytes into its slot of the files in ``folder``. Headers are written by :func:`seal_all`.

    Raises :class:`~ckptconv.errors.FitError` for a transform that refuses the values, :class:`~ckptconv.errors.InputError` for a source
    that changed, :class:`~ckptconv.errors.OutputError` where memory does not suffice, ``OSError`` where the disk does not.
    """
    where = {name: _Place(layout.name, slot.offset) for layout in layouts for name, slot in layout.slots.items()}
    wants_crc = {layout.name: layout.needs_crc for layout in layouts}
    crc32: dict[str, dict[str, int]] = {layout.name: {} for layout in layouts}
    copies: dict[str, list[Copy]] = {layout.name: [] for layout in layouts}
    to_compute: list[Output] = []
    copied = 0
    for output in (*plan.stored, *(Output(name, Read(name, place.spec)) for name, place in (kept or {}).items())):
        source = as_range(output.expr, {**placed, **kept} if kept else placed)
        if source is None:
            to_compute.append(output)
            continue
        place, nbytes = where[output.name], source.spec.nbytes
        copied += nbytes
        slot = ""
        if wants_crc[place.file]:
            whole = source.offset == 0 and nbytes == source.storage.nbytes and source.storage.crc32 is not None
            if whole:
                crc32[place.file][output.name] = source.storage.crc32 or 0
            elif nbytes:
                slot = output.name
            else:
                crc32[place.file][output.name] = 0
        if nbytes:
            copies[place.file].append(Copy(source.storage.file, source.storage.offset + source.offset, place.offset, nbytes, slot))
    groups = islands(to_compute)
    _check_memory(groups, max_memory)
    everything = {**placed, **(kept or {})}
    check_truth_values(sources, everything)
    number = {layout.name: at for at, layout in enumerate(layouts)}
    with closing(_outputs(layouts, folder)) as descriptors:
        crew = _Crew(threads, progress or (lambda _: None))
        crew.tasks += [(_copy, (name, batch)) for name, found in copies.items() for batch in batches(sorted(found, key=_by_destination))]
        # The largest islands first: the last worker to finish then has a small one.
        crew.tasks += [(_compute, (group,)) for group in sorted(groups, key=lambda group: -sum(each.expr.spec.nbytes for each in group))]
        found_crc, digests = crew.run(_Bench(everything, sources, descriptors, number, where, wants_crc))
    for file, slot_name, value in found_crc:
        crc32[file][slot_name] = value
    return Receipt(crc32, digests, copied, sum(output.expr.spec.nbytes for output in to_compute), crew.noticed)


def _by_destination(copy: Copy) -> int:
    return copy.destination


def _check_memory(groups: Iterable[Sequence[Output]], max_memory: int | None) -> None:
    for group in groups if max_memory is not None else ():
        needed = peak_nbytes(group)
        if max_memory is not None and needed > max_memory:
            raise OutputError(
                Problem("CK503", f"{printable(group[0].name)} and its like need {needed:,} bytes at once; --max-memory allows {max_memory:,}",
                        where=str(group[0].origin), try_=f"--max-memory {needed // 10**6 + 1}MB")
            )  # fmt: skip


def _outputs(layouts: Sequence[FileLayout], folder: Path) -> Descriptors:
    """The output files at their full sizes. Space is asked for now, where the filesystem can promise it: a full disk shows before the work."""
    paths = [folder / layout.name for layout in layouts]
    descriptors = Descriptors(lambda at: os.open(paths[at], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
    try:
        for at, layout in enumerate(layouts):
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


@dataclass(frozen=True)
class _Bench:
    """What every task needs."""

    placed: Mapping[str, Placed]
    sources: Sources
    descriptors: Descriptors
    number: Mapping[str, int]  #: of each file among the descriptors
    where: Mapping[str, _Place]
    wants_crc: Mapping[str, bool]


class _Crew:
    """Threads that take tasks from one list until it is empty or one of them fails."""

    def __init__(self, threads: int, report: Report) -> None:
        self.threads, self.tasks = threads, list[tuple[Callable[..., None], tuple[Any, ...]]]()
        self._lock = threading.Lock()
        self._report_outside = report
        self.stop = threading.Event()
        self.crc32: list[tuple[str, str, int]] = []
        self.digests: dict[str, str] = {}
        self.noticed: dict[str, Mapping[str, int]] = {}

    def report(self, nbytes: int) -> None:
        with self._lock:
            self._report_outside(nbytes)

    def run(self, bench: _Bench) -> tuple[list[tuple[str, str, int]], dict[str, str]]:
        waiting: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = queue.SimpleQueue()
        for task in self.tasks:
            waiting.put(task)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                copier = Copier(bench.sources, self.report, self.stop)
                while not self.stop.is_set():
                    try:
                        task, arguments = waiting.get_nowait()
                    except queue.Empty:
                        break
                    task(self, bench, copier, *arguments)
            except BaseException as error:
                errors.append(error)
                self.stop.set()

        restore = _single_threaded_kernels(self.threads) if any(task is _compute for task, _ in self.tasks) else None
        workers = [threading.Thread(target=work, name=f"ckptconv-{at}", daemon=True) for at in range(min(self.threads, len(self.tasks)))]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)  # in short turns, so that Ctrl-C is heard
        finally:
            self.stop.set()
            for worker in workers:
                if worker.ident is not None:  # Ctrl-C may come before all of them were started
                    worker.join()
            if restore is not None:
                restore()
        if errors:
            raise errors[0]
        return self.crc32, self.digests


def _copy(crew: _Crew, bench: _Bench, copier: Copier, file: str, batch: Sequence[Copy]) -> None:
    with bench.descriptors.use(bench.number[file]) as descriptor:
        found = copier.run(descriptor, batch)
    with crew._lock:
        crew.crc32 += [(file, slot, value) for slot, value in found.items()]


def _compute(crew: _Crew, bench: _Bench, copier: Copier, group: Sequence[Output]) -> None:  # noqa: ARG001
    current = group[0]
    try:
        results = computed(group, lambda node: bench.sources.read_tensor(bench.placed[node.name]))
        for current in group:
            with noticing() as counts:
                _, value = next(results)
                _store(crew, bench, current, value)
            if counts:
                with crew._lock:
                    crew.noticed[current.name] = dict(counts)
            del value
            if crew.stop.is_set():
                return
    except Refusal as refusal:
        problem = Problem(refusal.code, f"{printable(current.name)}: {refusal.what}", str(current.origin), refusal.found, refusal.try_)
        raise FitError(problem) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch has no class of its own for it
            raise
        needed = peak_nbytes(group)
        raise OutputError(
            Problem("CK503", f"{printable(current.name)}: there is not enough memory", str(current.origin), f"{needed:,} bytes needed at once",
                    "--threads 1, or a machine with more memory")
        ) from None  # fmt: skip


def _store(crew: _Crew, bench: _Bench, output: Output, value: Any) -> None:
    place = bench.where[output.name]
    value = value.detach().resolve_conj().resolve_neg().contiguous()
    notice("NaN or infinite", nonfinite_in(value))
    data = bytes_of(value)
    digest, crc = xxhash.xxh3_128(), 0
    with bench.descriptors.use(bench.number[place.file]) as descriptor:
        for at in range(0, len(data), _CHUNK):
            part = data[at : at + _CHUNK]
            digest.update(part)
            if bench.wants_crc[place.file]:
                crc = zlib.crc32(part, crc)
            write_at(descriptor, place.offset + at, part)
            crew.report(len(part))
    with crew._lock:
        crew.digests[output.name] = digest.hexdigest()
        if bench.wants_crc[place.file]:
            crew.crc32.append((place.file, output.name, crc))


def _single_threaded_kernels(workers: int) -> Callable[[], None]:
    """Workers are the parallelism: a kernel that opens threads of its own on top only makes them wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    return lambda: torch.set_num_threads(before)


def seal_all(layouts: Sequence[FileLayout], receipt: Receipt, metadata: Mapping[str, str], folder: Path) -> None:
    """Writes headers and directories. May be called again with metadata of the same lengths."""
    for layout in layouts:
        descriptor = os.open(folder / layout.name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            for offset, data in formats.WRITERS[layout.format].seal(layout, receipt.crc32[layout.name], metadata):
                write_at(descriptor, offset, data)
        finally:
            os.close(descriptor)
