"""Outputs that must be computed: island by island, read where a value is first needed, written and forgotten one by one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ckptconv.errors import FitError, Problem, Refusal, printable
from ckptconv.execute import arrays, writeback
from ckptconv.execute.checksums import Checksums
from ckptconv.execute.copying import Found, write_at
from ckptconv.execute.crew import Worker
from ckptconv.execute.memory_run import computed
from ckptconv.execute.nonfinite import NONFINITE, nonfinite_in
from ckptconv.execute.sources import bytes_of, checksum_mismatch
from ckptconv.memory import memory_explained
from ckptconv.plan import Apply, Output, Read
from ckptconv.ranges import span_of
from ckptconv.spec import DType
from ckptconv.transforms import Cast
from ckptconv.transforms.noticing import notice, noticing

if TYPE_CHECKING:
    from torch import Tensor

    from ckptconv.execute.engine import Bench

_CHUNK = 8 << 20
_ROWS_NBYTES = 1 << 20  # of a source that is cast piece by piece: source, result and what lies between stay in the cache


class Compute(Struct, frozen=True):
    """One island, by one worker."""

    island: Sequence[Output]
    bench: Bench
    peak_nbytes: int
    without_torch: bool = False  #: it is of the kinds that :mod:`~ckptconv.execute.arrays` knows

    def run(self, worker: Worker) -> None:
        """Raises :class:`~ckptconv.errors.FitError`, with the output's name and its rule, for values that a transform refuses, and
        :class:`~ckptconv.errors.OutputError` where memory does not suffice."""
        found = Found()
        current = self.island[0]
        try:
            with noticing() as counts:
                by_pieces = self._cast_by_pieces(worker, found)
            if by_pieces:
                found.noticed |= {current.name: dict(counts)} if counts else {}
            else:
                results = self._results(found)
                for current in self.island:
                    with noticing() as counts:
                        _, value = next(results)
                        self._store(worker, current, value, found)
                    found.noticed |= {current.name: dict(counts)} if counts else {}
                    del value
                    if worker.stop.is_set():
                        return
        except Refusal as refusal:
            problem = Problem(refusal.code, f"{printable(current.name)}: {refusal.what}", str(current.origin), refusal.found, refusal.try_)
            raise FitError(problem) from None
        except (MemoryError, RuntimeError) as error:
            raise memory_explained(error, current, self.peak_nbytes) from None
        self.bench.add(found)
        if self.peak_nbytes >= _CHUNK:
            _malloc_trim()(0)

    def _results(self, found: Found) -> Iterator[tuple[Output, Any]]:
        """The outputs one after the other: tensors of torch, or arrays of numpy."""
        if self.without_torch and not arrays.is_plain_cast(self.island, self.bench.placed):
            return computed(self.island, lambda node: self._read_array(node, found), arrays.apply)
        return computed(self.island, lambda node: self._read(node, found))

    def _read(self, node: Read, found: Found) -> Tensor:
        placed = self.bench.placed[node.name]
        value = self.bench.sources.read_tensor(placed)
        self._summed(node, bytes_of(value), found)
        return value

    def _read_array(self, node: Read, found: Found) -> Any:
        value = arrays.read(self.bench.sources, self.bench.placed[node.name])
        self._summed(node, arrays.bytes_of(value), found)
        return value

    def _summed(self, node: Read, data: memoryview, found: Found) -> None:
        """Takes a source tensor's checksums now, while its bytes are in the cache: it need not be read again for them."""
        if self.bench.digests:
            placed = self.bench.placed[node.name]
            span = span_of(placed)
            recorded = placed.storage.crc32 if placed.contiguous and span.is_storage else None
            sums = Checksums(crc=recorded is not None, digest=True)
            sums.update(data)
            self._checked(node.name, sums, recorded, found)

    def _checked(self, name: str, sums: Checksums, recorded: int | None, found: Found) -> None:
        storage = self.bench.placed[name].storage
        if recorded is not None:
            if sums.crc != recorded:
                raise checksum_mismatch(self.bench.sources.files[storage.file], storage.offset, name)
            found.checked.add((storage.file, storage.offset))
        found.tensors[name] = sums.digest

    def _store(self, worker: Worker, output: Output, value: Any, found: Found) -> None:
        file, offset = self.bench.where[output.name]
        data = self._plain_bytes(value, output.expr.spec.dtype)
        sums = Checksums(crc=self.bench.wants_crc[file], digest=True)
        for at in range(0, len(data), _CHUNK):
            part = data[at : at + _CHUNK]
            sums.update(part)
            self._write(worker, file, offset + at, part)
        found.note(output.name, sums)

    def _plain_bytes(self, value: Any, dtype: DType) -> memoryview:
        """An output's bytes in order, and what is not finite in it noticed."""
        if not hasattr(value, "detach"):  # an array
            value = arrays.contiguous(value)
            notice(NONFINITE, arrays.nonfinite_in(value, dtype))
            return arrays.bytes_of(value)
        value = value.detach().resolve_conj().resolve_neg().contiguous()
        notice(NONFINITE, nonfinite_in(value))
        return bytes_of(value)

    def _write(self, worker: Worker, file: str, offset: int, part: memoryview) -> None:
        with self.bench.writing(file) as descriptor:
            write_at(descriptor, offset, part)
            if self.bench.sync:
                writeback.start(descriptor, offset, len(part))
        worker.computed_nbytes += len(part)
        worker.tell(len(part))

    def _cast_by_pieces(self, worker: Worker, found: Found) -> bool:
        """A contiguous tensor whose only change is its dtype, in pieces that fit the cache. False where it is not that, or a value is
        refused: the whole tensor then says which."""
        (output, *others), expr = self.island, self.island[0].expr
        if others or not isinstance(expr, Apply) or not isinstance(expr.transform, Cast) or not isinstance(expr.arguments[0], Read):
            return False
        node = expr.arguments[0]
        placed = self.bench.placed[node.name]
        if not placed.contiguous or not placed.spec.numel:
            return False
        span = span_of(placed)
        recorded = placed.storage.crc32 if self.bench.digests and span.is_storage else None
        before = Checksums(crc=recorded is not None, digest=self.bench.digests)
        file, offset = self.bench.where[output.name]
        after = Checksums(crc=self.bench.wants_crc[file], digest=True)
        raw = memoryview(bytearray(min(_ROWS_NBYTES, span.nbytes)))
        caster = arrays.Caster(placed.spec.dtype, expr.transform.dtype) if self.without_torch else None
        for at in range(0, span.nbytes, _ROWS_NBYTES):
            part = raw[: min(_ROWS_NBYTES, span.nbytes - at)]
            self.bench.sources.read_into(placed.storage.file, placed.storage.offset + placed.offset + at, part)
            before.update(part)
            data = caster.cast(part) if caster is not None else None
            if data is None:
                try:
                    data = _cast_by_torch(expr.transform, part, placed.spec.dtype)
                except Refusal:
                    return False
            after.update(data)
            self._write(worker, file, offset, data)
            offset += len(data)
            if worker.stop.is_set():
                return True
        if self.bench.digests:
            self._checked(node.name, before, recorded, found)
        found.note(output.name, after)
        return True


def _cast_by_torch(transform: Cast, part: memoryview, source: DType) -> memoryview:
    import torch

    value = transform.apply(torch.frombuffer(part, dtype=getattr(torch, source.value)))
    notice(NONFINITE, nonfinite_in(value))
    return bytes_of(value)


def kernel_threads(count: int) -> Callable[[], None]:
    """How many threads a kernel may open. Gives the way back.

    One, where the workers are the parallelism already: more would only make them wait for each other.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    return lambda: torch.set_num_threads(before)


@cache
def _malloc_trim() -> Callable[[int], int]:
    """glibc keeps what large tensors leave behind, for each thread apart; this gives it back. Elsewhere nothing need be done."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda _: 0
    return found
