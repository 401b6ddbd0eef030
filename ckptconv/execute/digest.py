"""Digests of tensors, from their bytes in the files: two equal digests are two equal tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import xxhash

from ckptconv.execute.checksums import Checksums
from ckptconv.execute.crew import turn
from ckptconv.execute.sources import Sources, bytes_of, checksum_mismatch
from ckptconv.formats.base import Placed, Storage
from ckptconv.ranges import Span, span_of
from ckptconv.spec import Manifest

if TYPE_CHECKING:
    from concurrent.futures import Executor

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
    lock = threading.Lock()
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
    local = _Buffers()

    def some(batch: Sequence[list[str]]) -> dict[str, str]:
        digests: dict[str, str] = {}
        for names in batch:
            place = placed[names[0]]
            if place.contiguous:
                digest = _of_spans(sources, [span_of(place, names[0])], local.buffer, checked)
            else:
                digest = xxhash.xxh3_128_hexdigest(bytes_of(sources.read_tensor(place)))
            digests.update(dict.fromkeys(names, digest))
            if progress is not None:
                with lock:
                    progress(place.spec.nbytes)
        return digests

    unread.sort(key=lambda names: (
        turn(placed[names[0]].spec.nbytes), placed[names[0]].storage.file, placed[names[0]].storage.offset, placed[names[0]].offset
    ))  # fmt: skip
    sources.announce(
        (place.storage.file, place.storage.offset + place.offset, place.spec.nbytes) for place in (placed[names[0]] for names in unread)
    )
    batches = list(_batches(unread, lambda names: placed[names[0]].spec.nbytes))
    if batches:
        with _readers(threads) as pool:
            for digests in pool.map(some, batches):
                found |= digests
    _check_partly_viewed(sources, placed.values(), checked)
    return {name: found[name] for name in placed}


def digest_spans(sources: Sources, outputs: Mapping[str, Sequence[Span]], *, threads: int = 2) -> dict[str, str]:
    """The digest of each output that is nothing but ranges of source bytes, from these."""
    local = _Buffers()
    sources.announce((span.storage.file, span.storage.offset + span.offset, span.nbytes) for spans in outputs.values() for span in spans)
    with _readers(threads) as pool:
        return dict(zip(outputs, pool.map(lambda spans: _of_spans(sources, spans, local.buffer, None), outputs.values()), strict=True))


def _readers(threads: int) -> Executor:
    from concurrent.futures import ThreadPoolExecutor  # which brings half of logging along; most runs read nothing a second time

    return ThreadPoolExecutor(threads, thread_name_prefix="ckptconv-digest")


def _batches(items: Iterable[list[str]], nbytes_of: Callable[[list[str]], int]) -> Iterator[list[list[str]]]:
    """Work for threads: small items go together, because handing one over costs more than reading it."""
    batch: list[list[str]] = []
    size = 0
    for item in items:
        batch.append(item)
        size += nbytes_of(item)
        if size >= _BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Buffers(threading.local):
    """A buffer for each thread."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(_BLOCK))


def _of_spans(sources: Sources, spans: Iterable[Span], buffer: memoryview, checked: Collection[tuple[int, int]] | None) -> str:
    """The digest of the spans one after the other. CRC-32 is compared where it is recorded and not ``checked``; with None, nowhere."""
    digest = xxhash.xxh3_128()
    for span in spans:
        storage = span.storage
        check = checked is not None and span.is_storage and storage.crc32 is not None and (storage.file, storage.offset) not in checked
        sums = Checksums(crc=check, digest=False)
        start = storage.offset + span.offset
        for at in range(0, span.nbytes, _BLOCK):
            part = buffer[: min(_BLOCK, span.nbytes - at)]
            sources.read_into(storage.file, start + at, part)
            digest.update(part)
            sums.update(part)
        if check and sums.crc != storage.crc32:
            raise checksum_mismatch(sources.files[storage.file], storage.offset, span.tensor)
    return digest.hexdigest()


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
