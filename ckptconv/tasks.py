"""A plan cut into tasks: each may be done by anyone, anywhere, in any order and more than once. Pure; nothing is opened.

A task is a number of stored outputs. Outputs that share a node (an *island*) stay in one task, so that nothing is computed twice; an
island that is larger than a task is cut in the order of its outputs, unless its pieces would read much of the source again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from ckptconv.formats.base import Placed
from ckptconv.layout import Layout
from ckptconv.memory import BESIDE_NBYTES, fixed_nbytes, peak_nbytes
from ckptconv.plan import Output, Plan, Read, islands, reads
from ckptconv.ranges import as_spans, is_ranges

MAX_AMPLIFICATION = 1.2  #: an island is not cut where its pieces would read more than this many times what the whole of it reads

Range = tuple[int, int, int]  #: source file, first byte, byte behind the last


class Task(Struct, frozen=True):
    """Some stored outputs, and what making them costs, in bytes."""

    number: int  #: from 0
    outputs: tuple[str, ...]  #: in file order
    files: tuple[str, ...]  #: output files that they lie in
    read_nbytes: int  #: of the source, each byte counted once
    written_nbytes: int
    peak_nbytes: int  #: of tensors that are alive at once, for the largest island
    computes: bool  #: something of it is more than bytes of the source

    def memory_nbytes(self, threads: int) -> int:
        """The most that a process needs for this task with ``threads`` workers, everything included."""
        peak = self.peak_nbytes
        return min(threads * peak, peak + BESIDE_NBYTES) + fixed_nbytes(threads, computes=self.computes)


class Tasks(Struct, frozen=True):
    """All tasks of a plan. Every stored output is in just one of them."""

    tasks: tuple[Task, ...]
    read_nbytes: int  #: of the source, by one run that does everything: each byte once

    @property
    def written_nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(task.written_nbytes for task in self.tasks)

    @property
    def read_amplification(self) -> float:
        """Bytes that all tasks read, over those that one run reads."""
        return sum(task.read_nbytes for task in self.tasks) / self.read_nbytes if self.read_nbytes else 1.0

    def share(self, index: int, of: int) -> tuple[int, ...]:
        """The numbers of the tasks that worker ``index`` (from 0) of ``of`` does: neighbours, which have sources in common.

        >>> nothing = Task(0, (), (), 0, 0, 0, False)
        >>> [Tasks((nothing,) * 5, 0).share(index, 2) for index in range(2)]
        [(0, 1, 2), (3, 4)]
        """
        return tuple(number for number in range(len(self.tasks)) if number * of // max(len(self.tasks), 1) == index)


class _Reading(Struct, frozen=True):
    """What making one output reads."""

    names: tuple[str, ...]  # of source tensors
    computed: bool  # not just ranges of their bytes
    ranges: tuple[Range, ...]


class _Unit(Struct, frozen=True):
    """Outputs that are made together."""

    outputs: tuple[Output, ...]
    ranges: tuple[Range, ...]  # of the source, apart and in order
    read_nbytes: int
    written_nbytes: int
    peak_nbytes: int

    @property
    def weight(self) -> int:
        return max(self.read_nbytes, self.written_nbytes)


def outputs_of(plan: Plan, kept: Mapping[str, Placed] | None = None) -> tuple[Output, ...]:
    """Everything that is written: the plan's stored outputs, and the tensors that are ``kept`` beside them, as they are."""
    return (*plan.stored, *(Output(name, Read(name, placed.spec)) for name, placed in (kept or {}).items()))


def numbers_text(numbers: Iterable[int], most: int = 12) -> str:
    """Numbers for people, neighbours together.

    >>> numbers_text([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:most]]
    return ", ".join(shown) + (", …" if len(runs) > most else "")


def computed_islands(outputs: Iterable[Output], placed: Mapping[str, Placed]) -> list[tuple[Output, ...]]:
    """The islands of the outputs that are more than ranges of the source's bytes."""
    return islands([output for output in outputs if not is_ranges(output.expr, placed)])


def source_ranges(outputs: Iterable[Output], placed: Mapping[str, Placed]) -> tuple[Range, ...]:
    """What of the source making the outputs reads: ranges that neither touch nor overlap, in order."""
    return _united(each for output in outputs for each in _reading(output, placed).ranges)


def cut(plan: Plan, layout: Layout, placed: Mapping[str, Placed], task_nbytes: int, kept: Mapping[str, Placed] | None = None) -> Tasks:
    """The tasks of a plan, of about ``task_nbytes`` each: read or written, whichever is more. Equal arguments give equal tasks.

    A task stays within one output file, but for islands that reach over several and for small files, which go together. Within a file its
    outputs are put together by where in the source they come from, so that a task needs few source files. One tensor is never cut.
    """
    everything = {**placed, **kept} if kept else placed
    outputs = outputs_of(plan, kept)
    reading = {output.name: _reading(output, everything) for output in outputs}
    place = {output.name: at for at, output in enumerate(outputs)}
    home = {name: at for at, file in enumerate(layout.files) for name in file.slots}
    by_file: list[list[_Unit]] = [[] for _ in layout.files]
    for island in _islands(outputs, reading, everything):
        for unit in _parts(island, reading, task_nbytes):
            by_file[home[unit.outputs[0].name]].append(unit)
    packed = list(_packed(by_file, task_nbytes))
    tasks = []
    for number, units in enumerate(packed):
        mine = sorted((each for unit in units for each in unit.outputs), key=lambda each: place[each.name])
        files = tuple(layout.files[at].name for at in sorted({home[output.name] for output in mine}))
        tasks.append(
            Task(number, tuple(output.name for output in mine), files, _nbytes(_united(each for unit in units for each in unit.ranges)),
                 sum(unit.written_nbytes for unit in units), max(unit.peak_nbytes for unit in units),
                 any(reading[output.name].computed for output in mine))
        )  # fmt: skip
    return Tasks(tuple(tasks), _nbytes(_united(each for units in packed for unit in units for each in unit.ranges)))


def _islands(outputs: Sequence[Output], reading: Mapping[str, _Reading], placed: Mapping[str, Placed]) -> Iterator[tuple[Output, ...]]:
    """Islands, and such together as read one tensor under two names."""
    found = islands(outputs)
    first: dict[object, int] = {}
    parent = list(range(len(found)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for at, island in enumerate(found):
        for name in {name for output in island for name in reading[output.name].names}:
            view = placed[name]
            one, other = root(first.setdefault((view.storage, view.offset, view.strides, view.spec), at)), root(at)
            parent[max(one, other)] = min(one, other)
    groups: dict[int, list[Output]] = {}
    for at, island in enumerate(found):
        groups.setdefault(root(at), []).extend(island)
    return (tuple(group) for group in groups.values())


def _parts(island: Sequence[Output], reading: Mapping[str, _Reading], task_nbytes: int) -> list[_Unit]:
    """The island whole; or, where that is more than a task, in parts of neighbours."""
    whole = _unit(island, reading)
    if whole.weight <= task_nbytes or len(island) == 1:
        return [whole]
    runs: list[list[Output]] = [[]]
    seen: set[Range] = set()
    read = written = 0
    for output in island:
        new = {each for each in reading[output.name].ranges if each not in seen}
        if runs[-1] and max(read + _nbytes(new), written + output.expr.spec.nbytes) > task_nbytes:
            runs.append([])
            seen, read, written = set(), 0, 0
            new = set(reading[output.name].ranges)
        runs[-1].append(output)
        seen |= new
        read, written = read + _nbytes(new), written + output.expr.spec.nbytes
    parts = [_unit(run, reading) for run in runs]
    return parts if sum(part.read_nbytes for part in parts) <= MAX_AMPLIFICATION * whole.read_nbytes else [whole]


def _packed(by_file: Sequence[Sequence[_Unit]], task_nbytes: int) -> Iterator[list[_Unit]]:
    """Units into tasks: file by file, small files together, in the order of the source."""
    task: list[_Unit] = []
    filled = 0
    for units in by_file:
        total = sum(unit.weight for unit in units)
        if task and filled + total > task_nbytes:
            yield task
            task, filled = [], 0
        for unit in sorted(units, key=_origin):
            if task and filled + unit.weight > task_nbytes:
                yield task
                task, filled = [], 0
            task.append(unit)
            filled += unit.weight
        if task and total > task_nbytes:  # the rest of a large file: the next one begins a task of its own
            yield task
            task, filled = [], 0
    if task:
        yield task


def _origin(unit: _Unit) -> Range:
    """Where in the source most of it comes from."""
    return max(unit.ranges, key=lambda each: each[2] - each[1], default=(-1, 0, 0))


def _unit(outputs: Sequence[Output], reading: Mapping[str, _Reading]) -> _Unit:
    ranges = _united(each for output in outputs for each in reading[output.name].ranges)
    peak = peak_nbytes([output for output in outputs if reading[output.name].computed])
    return _Unit(tuple(outputs), ranges, _nbytes(ranges), sum(output.expr.spec.nbytes for output in outputs), peak)


def _reading(output: Output, placed: Mapping[str, Placed]) -> _Reading:
    """What of the source making an output reads: slices of what is copied, whole tensors where something is computed."""
    names, spans = reads(output.expr), as_spans(output.expr, placed)
    if spans is None:
        return _Reading(names, True, tuple(_extent(placed[name]) for name in names if placed[name].spec.numel))
    starts = ((span, span.storage.offset + span.offset) for span in spans if span.nbytes)
    return _Reading(names, False, tuple((span.storage.file, start, start + span.nbytes) for span, start in starts))


def _extent(view: Placed) -> Range:
    """From a tensor's first byte to its last."""
    start = view.storage.offset + view.offset
    elements = 1 + sum((size - 1) * stride for size, stride in zip(view.spec.shape, view.strides, strict=True))
    return view.storage.file, start, start + elements * view.spec.dtype.nbytes


def _united(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same bytes as ranges that neither touch nor overlap, in order."""
    found: list[Range] = []
    for file, start, stop in sorted(ranges):
        if found and found[-1][0] == file and start <= found[-1][2]:
            found[-1] = (file, found[-1][1], max(found[-1][2], stop))
        else:
            found.append((file, start, stop))
    return tuple(found)


def _nbytes(ranges: Iterable[Range]) -> int:
    return sum(stop - start for _, start, stop in ranges)
