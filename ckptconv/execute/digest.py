"""Digests of tensors, from their bytes in the files: two equal digests are two equal tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import xxhash
from msgspec import Struct

from ckptconv.execute.checksums import crc32
from ckptconv.execute.crew import Crew, Worker, turn
from ckptconv.execute.sources import Range, Sources, bytes_of, checksum_mismatch
from ckptconv.formats.base import Placed, Storage
from ckptconv.ranges import Span, span_of
from ckptconv.spec import Manifest

_BLOCK = 1 << 20


def digest_tensors(
    sources: Sources,
    placed: Mapping[str, Placed],
    *,
    threads: int = 2,
    known: Mapping[str, str] | None = None,
    checked: Collection[tuple[int, int]] = (),
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """xxh3_128 (hex) of each tensor's bytes, row-major and little-endian.

    Where the container records a CRC-32 of a storage that is read whole, it is checked on the way; a difference is
    :class:`~ckptconv.errors.InputError` CK312. Contiguous tensors need no torch. What is ``known`` from an earlier pass is not read
    again, nor are the storages whose CRC-32 was ``checked`` in it, told by (file, offset).
    """
    unique: dict[tuple[object, ...], list[str]] = {}
    for name, place in placed.items():
        unique.setdefault((place.storage, place.offset, place.strides, place.spec), []).append(name)
    found: dict[str, str] = {}
    unread: list[list[str]] = []
    for names in unique.values():
        digest = next((known[name] for name in names if name in known), None) if known else None
        if digest is None:
            unread.append(names)
        else:
            found.update(dict.fromkeys(names, digest))
    unread.sort(key=lambda names: (
        turn(placed[names[0]].spec.nbytes), placed[names[0]].storage.file, placed[names[0]].storage.offset, placed[names[0]].offset
    ))  # fmt: skip
    sources.announce(
        (place.storage.file, place.storage.offset + place.offset, place.spec.nbytes) for place in (placed[names[0]] for names in unread)
    )
    work = [_Item(tuple(names), place.spec.nbytes, place, _spans_of(place, names[0])) for names in unread for place in (placed[names[0]],)]
    found |= _digested(sources, work, threads, checked, progress)
    _check_partly_viewed(sources, placed.values(), checked)
    return {name: found[name] for name in placed}


def digest_spans(sources: Sources, outputs: Mapping[str, Sequence[Span]], *, threads: int = 2) -> dict[str, str]:
    """The digest of each output that is nothing but ranges of source bytes, from these."""
    sources.announce((span.storage.file, span.storage.offset + span.offset, span.nbytes) for spans in outputs.values() for span in spans)
    work = [_Item((name,), sum(span.nbytes for span in spans), None, spans) for name, spans in outputs.items()]
    return _digested(sources, work, threads, None, None)


class _Item(Struct, frozen=True):
    """Bytes to be read and digested: contiguous ones by their spans, others by their place."""

    names: tuple[str, ...]
    nbytes: int
    place: Placed | None
    spans: Sequence[Span]

    @property
    def is_small(self) -> bool:
        """True for one range that can be read together with others."""
        return len(self.spans) == 1 and self.nbytes <= _BLOCK

    @property
    def range(self) -> Range:
        """Of a small one."""
        (span,) = self.spans
        return span.storage.file, span.storage.offset + span.offset, span.nbytes


def _spans_of(place: Placed, name: str) -> tuple[Span, ...]:
    return (span_of(place, name),) if place.contiguous else ()


class _Reading(Struct, frozen=True):
    """Some of them, by one worker."""

    sources: Sources
    items: Sequence[_Item]
    checked: Collection[tuple[int, int]] | None
    found: dict[str, str]
    peak_nbytes: int = 0

    def run(self, worker: Worker) -> None:
        buffer = worker.belongings.setdefault("buffer", memoryview(bytearray(_BLOCK)))
        assert isinstance(buffer, memoryview)
        # The small ones first: what is read at once for several stays in the buffer until the last of them is digested.
        small = [item for item in self.items if item.is_small]
        near = self.sources.read_near((item.range for item in small), buffer)
        for item in [*small, *(item for item in self.items if not item.is_small)]:
            if worker.stop.is_set():
                return
            if item.is_small:
                digest = _of_bytes(self.sources, item.spans[0], next(near), self.checked)
            elif item.spans:
                digest = _of_spans(self.sources, item.spans, buffer, self.checked)
            else:
                assert item.place is not None
                digest = xxhash.xxh3_128_hexdigest(bytes_of(self.sources.read_tensor(item.place)))
            self.found.update(dict.fromkeys(item.names, digest))
            worker.tell(item.nbytes)


def _digested(
    sources: Sources,
    work: Iterable[_Item],
    threads: int,
    checked: Collection[tuple[int, int]] | None,
    progress: Callable[[int], None] | None,
) -> dict[str, str]:
    """The digests by name, taken by so many workers."""
    found: dict[str, str] = {}
    Crew(threads, progress, 0).run(_Reading(sources, items, checked, found) for items in _batches(work))
    return found


def _batches(work: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Work for threads: small items go together, because handing one over costs more than reading it."""
    batch: list[_Item] = []
    size = 0
    for item in work:
        batch.append(item)
        size += item.nbytes
        if size >= _BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _of_spans(sources: Sources, spans: Iterable[Span], buffer: memoryview, checked: Collection[tuple[int, int]] | None) -> str:
    """The digest of the spans one after the other. CRC-32 is compared where it is recorded and not ``checked``; with None, nowhere."""
    digest = xxhash.xxh3_128()
    for span in spans:
        storage, check = span.storage, _is_to_be_checked(span, checked)
        crc, start = 0, storage.offset + span.offset
        with sources.reading(storage.file) as read:
            for at in range(0, span.nbytes, _BLOCK):
                part = buffer[: span.nbytes - at]  # at most all of it
                read(start + at, part)
                digest.update(part)
                if check:
                    crc = crc32(part, crc)
        if check and crc != storage.crc32:
            raise checksum_mismatch(sources.files[storage.file], storage.offset, span.tensor)
    return digest.hexdigest()


def _of_bytes(sources: Sources, span: Span, data: memoryview, checked: Collection[tuple[int, int]] | None) -> str:
    """The same of one span that was read."""
    if _is_to_be_checked(span, checked) and crc32(data) != span.storage.crc32:
        raise checksum_mismatch(sources.files[span.storage.file], span.storage.offset, span.tensor)
    return xxhash.xxh3_128_hexdigest(data)


def _is_to_be_checked(span: Span, checked: Collection[tuple[int, int]] | None) -> bool:
    storage = span.storage
    return checked is not None and span.is_storage and storage.crc32 is not None and (storage.file, storage.offset) not in checked


def _check_partly_viewed(sources: Sources, placed: Iterable[Placed], checked: Collection[tuple[int, int]]) -> None:
    """Storages with a checksum of which no tensor is the whole: read once more, because a flipped bit in them would go unseen."""
    whole = set[Storage]()
    partly: dict[Storage, Placed] = {}
    for place in placed:
        if place.contiguous and place.offset == 0 and place.spec.nbytes == place.storage.nbytes:
            whole.add(place.storage)
        elif place.storage.crc32 is not None and (place.storage.file, place.storage.offset) not in checked:
            partly[place.storage] = place
    buffer = memoryview(bytearray(_BLOCK))
    for storage in partly.keys() - whole:
        _of_spans(sources, [Span(storage, 0, storage.nbytes, "a storage")], buffer, ())


def content_digest(manifest: Manifest, digests: Mapping[str, str]) -> str:
    """One digest for a whole state_dict: over name, dtype, shape and digest of each tensor, in order. Independent of the container."""
    total = xxhash.xxh3_128()
    for name, spec in manifest.tensors.items():
        total.update(f"{name}\0{spec}\0{digests[name]}\n".encode("utf-8", "surrogatepass"))
    return f"xxh3_128:{total.hexdigest()}"
