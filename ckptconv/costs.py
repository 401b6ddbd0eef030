"""What a conversion costs on paper: bytes, requests and seconds, by the kind of place and the number of workers. Pure.

    requests = Σ over ranges ⌈bytes of the range / bytes of a request⌉ + those that each file costs
    rounds   = ⌈requests / in flight⌉
    seconds  = max(rounds × (latency + bytes of a request / one stream), bytes / what a worker gets), reading and writing each
    tasks    : the next one goes to whoever is free;  headers : read by every worker, a file's requests one after the other
    proof    : the output is read back, by one; what was computed a second time, and its sources too

Nothing here is measured while a program runs: a place is a table of figures, and others than these can be given.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from math import inf

from msgspec import Struct

from ckptconv.formats.base import Placed
from ckptconv.layout import Layout
from ckptconv.plan import Plan
from ckptconv.tasks import Range, Tasks, computed_islands, outputs_of, source_ranges

COMPUTE_NBYTES_PER_S = 0.5e9  #: results that one worker computes (transposed, cast) in a second
START_S = 0.4  #: of a worker, until it has planned; planning itself costs 25 µs for a tensor
PLAN_S_PER_TENSOR = 25e-6
PROVE_NBYTES_PER_S = 0.1e9  #: values that were moved one by one, looked at again on both sides


class Place(Struct, frozen=True):
    """How fast a kind of place is: seconds, and bytes in a second."""

    latency_s: float  #: until a request is answered
    stream_nbytes_per_s: float  #: one request by itself
    worker_nbytes_per_s: float  #: all that one machine can get
    shared_nbytes_per_s: float = inf  #: all machines together
    read_nbytes: int = 1 << 20  #: of one request
    written_nbytes: int = 1 << 20
    reads_in_flight: int = 2
    writes_in_flight: int = 2
    gap_nbytes: int = 0  #: ranges with no more than this between them are one
    file_reads: int = 3  #: requests that a file costs beside its tensors: it is looked at, the header's length, the header
    file_writes: int = 2  #: … and one that is written: begun, completed
    besides: int = 0  #: requests that a conversion costs, one after the other: folders listed, the destination looked at

    def gets(self, workers: int) -> float:
        """Bytes that each of the workers gets in a second, at most."""
        return min(self.worker_nbytes_per_s, self.shared_nbytes_per_s / workers)

    def read_s(self, nbytes: int, requests: int, workers: int = 1) -> float:
        """Seconds that one of the workers reads."""
        return self._seconds(nbytes, requests, self.reads_in_flight, workers)

    def write_s(self, nbytes: int, requests: int, workers: int = 1) -> float:
        """Seconds that one of the workers writes."""
        return self._seconds(nbytes, requests, self.writes_in_flight, workers)

    def _seconds(self, nbytes: int, requests: int, in_flight: int, workers: int) -> float:
        if not requests:
            return 0.0
        rounds = -(-requests // in_flight)
        return max(rounds * (self.latency_s + nbytes / requests / self.stream_nbytes_per_s), nbytes / self.gets(workers))

    def steps_s(self, files: int, steps: int, in_flight: int) -> float:
        """Seconds for what each of the files costs: one request after the other, several files at once."""
        return -(-files // in_flight) * steps * self.latency_s


#: A local disk that all workers share (NVMe); a file server behind 10 Gbit/s; an object store in the same region, each worker behind 10 Gbit/s.
PLACES: Mapping[str, Place] = {
    "disk": Place(1e-4, 1.5e9, 2e9, 2e9),
    "nfs": Place(5e-4, 0.4e9, 1.1e9, 4e9),
    "s3": Place(
        3e-2,
        80e6,
        1.1e9,
        read_nbytes=8 << 20,
        written_nbytes=16 << 20,
        reads_in_flight=16,
        writes_in_flight=8,
        gap_nbytes=32 << 10,
        file_reads=4,
        besides=10,
    ),
}


class Load(Struct, frozen=True):
    """What one task moves, in bytes and requests."""

    read_nbytes: int
    reads: int
    written_nbytes: int
    writes: int
    computed_nbytes: int = 0


class Cost(Struct, frozen=True):
    """What a whole conversion costs."""

    workers: int
    read_nbytes: int  #: of the source, by all workers
    written_nbytes: int
    proved_nbytes: int  #: read again: the output, what no output takes of the source, and both sides of what was computed
    reads: int
    writes: int
    tasks_s: float  #: while tasks are done
    alone_s: float  #: that no further worker makes shorter: planning, headers, the proof

    @property
    def seconds(self) -> float:
        return self.tasks_s + self.alone_s


def requests_of(ranges: Iterable[Range], nbytes: int, gap: int = 0) -> int:
    """Requests of at most ``nbytes`` for ranges in order; those that nearly touch go together.

    >>> requests_of([(0, 0, 10), (0, 12, 20), (1, 0, 4)], 8), requests_of([(0, 0, 10), (0, 12, 20), (1, 0, 4)], 8, gap=2)
    (4, 4)
    """
    count, file, start, stop = 0, -1, 0, 0
    for each, begin, end in ranges:
        if each == file and begin - stop <= gap:
            stop = max(stop, end)
            continue
        count += -(-(stop - start) // nbytes)
        file, start, stop = each, begin, end
    return count + -(-(stop - start) // nbytes)


def loads_of(
    plan: Plan, layout: Layout, placed: Mapping[str, Placed], tasks: Tasks, source: Place, destination: Place,
    kept: Mapping[str, Placed] | None = None,
) -> list[Load]:  # fmt: skip
    """What each task moves; ``kept`` are tensors that are carried along as they are."""
    placed = {**placed, **kept} if kept else placed
    outputs = {output.name: output for output in outputs_of(plan, kept)}
    computed = {output.name for island in computed_islands(plan.stored, placed) for output in island}
    extents = {
        name: (at, slot.offset, slot.offset + slot.nbytes) for at, file in enumerate(layout.files) for name, slot in file.slots.items() if slot.nbytes
    }  # fmt: skip
    found = []
    for task in tasks.tasks:
        ranges = source_ranges([outputs[name] for name in task.outputs], placed)
        written = sorted(extents[name] for name in task.outputs if name in extents)
        found.append(
            Load(sum(stop - start for _, start, stop in ranges), requests_of(ranges, source.read_nbytes, source.gap_nbytes),
                 task.written_nbytes, requests_of(written, destination.written_nbytes, destination.gap_nbytes),
                 sum(outputs[name].expr.spec.nbytes for name in task.outputs if name in computed))
        )  # fmt: skip
    return found


def cost(
    loads: Sequence[Load], workers: int, source: Place, destination: Place, *, tensors: int, source_files: int, output_files: int,
    beside_nbytes: int = 0, verified: bool = True,
) -> Cost:  # fmt: skip
    """What tasks cost on ``workers`` machines. ``tensors`` of the source; ``beside_nbytes`` of it that no output takes are read for the proof.

    The proof is that of ``--verify 3``: what is copied is read back, what is computed a second time, and its sources too.
    """
    busy = min(workers, max(len(loads), 1))
    free = [0.0] * busy
    for load in loads:
        seconds = (
            source.read_s(load.read_nbytes, load.reads, busy)
            + destination.write_s(load.written_nbytes, load.writes, busy)
            + load.computed_nbytes / COMPUTE_NBYTES_PER_S
        )
        heapq.heapreplace(free, free[0] + seconds)
    headers = source_files * source.file_reads
    written = sum(load.written_nbytes for load in loads)
    computed = sum(load.computed_nbytes for load in loads)
    back, again = (written + computed, beside_nbytes + computed) if verified else (0, 0)
    backs = -(-back // destination.read_nbytes) + output_files * destination.file_reads * verified
    agains = -(-again // source.read_nbytes)
    begun = output_files * destination.file_writes + (output_files > 1)
    alone = START_S + tensors * PLAN_S_PER_TENSOR + (source.besides + destination.besides) / 2 * source.latency_s
    alone += source.steps_s(source_files, source.file_reads, source.reads_in_flight)
    alone += destination.steps_s(output_files, destination.file_writes, destination.writes_in_flight)
    if verified:
        alone += destination.read_s(back, backs) + source.read_s(again, agains) + 2 * computed / PROVE_NBYTES_PER_S
    return Cost(
        workers, sum(load.read_nbytes for load in loads), written, back + again,
        sum(load.reads for load in loads) + busy * headers + backs + agains + source.besides,
        sum(load.writes for load in loads) + begun, max(free), alone,
    )  # fmt: skip


def per_terabyte(
    workers: int, place: Place, *, task_nbytes: int = 4_000_000_000, tensor_nbytes: int = 16 << 20, verified: bool = True
) -> Cost:
    """A terabyte of tensors of one size that get other names and places, in shards of 5 GB: the figures of docs/scale.md."""
    count = 10**12 // task_nbytes
    tensors = task_nbytes // tensor_nbytes
    ranges = [
        (0, at * (tensor_nbytes + place.gap_nbytes + 1), at * (tensor_nbytes + place.gap_nbytes + 1) + tensor_nbytes)
        for at in range(tensors)
    ]
    load = Load(task_nbytes, requests_of(ranges, place.read_nbytes, place.gap_nbytes), task_nbytes, -(-task_nbytes // place.written_nbytes))
    return cost([load] * count, workers, place, place, tensors=tensors * count, source_files=200, output_files=200, verified=verified)
