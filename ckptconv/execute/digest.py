"""Digests of tensors, from their bytes in the files: two equal digests are two equal tensors."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import xxhash

from ckptconv.errors import InputError, Problem, printable
from ckptconv.execute.sources import Sources, bytes_of
from ckptconv.formats.base import Placed, Storage
from ckptconv.spec import Manifest

_BLOCK = 1 << 20


def digest_tensors(
    sources: Sources,
    placed: Mapping[str, Placed],
    *,
    threads: int = 2,
    check_crc: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """xxh3_128 (hex) of each tensor's bytes, row-major and little-endian.

    Where the container records a CRC-32 of a storage that is read whole, it is checked on the way; a difference is
    :class:`~ckptconv.errors.InputError` CK312. Contiguous tensors need no torch.
    """
    lock, local = threading.Lock(), threading.local()
    unique: dict[tuple[object, ...], list[str]] = {}
    for name, place in placed.items():
        unique.setdefault((place.storage, place.offset, place.strides, place.spec), []).append(name)

    def one(names: list[str]) -> tuple[list[str], str]:
        place = placed[names[0]]
        if not place.contiguous:
            digest = xxhash.xxh3_128_hexdigest(bytes_of(sources.read_tensor(place)))
        else:
            if not hasattr(local, "buffer"):
                local.buffer = memoryview(bytearray(_BLOCK))
            crc = place.storage.crc32 if check_crc and place.offset == 0 and place.spec.nbytes == place.storage.nbytes else None
            digest = _of_range(sources, place, local.buffer, crc, names[0])
        if progress is not None:
            with lock:
                progress(place.spec.nbytes)
        return names, digest

    by_place = sorted(
        unique.values(), key=lambda names: (placed[names[0]].storage.file, placed[names[0]].storage.offset, placed[names[0]].offset)
    )
    with ThreadPoolExecutor(threads, thread_name_prefix="ckptconv-digest") as pool:
        found = {name: digest for names, digest in pool.map(one, by_place) for name in names}
    if check_crc:
        _check_partly_viewed(sources, placed.values())
    return {name: found[name] for name in placed}


def _of_range(sources: Sources, place: Placed, buffer: memoryview, crc: int | None, name: str) -> str:
    digest, found = xxhash.xxh3_128(), 0
    start, nbytes = place.storage.offset + place.offset, place.spec.nbytes
    for at in range(0, nbytes, _BLOCK):
        part = buffer[: min(_BLOCK, nbytes - at)]
        sources.read_into(place.storage.file, start + at, part)
        digest.update(part)
        if crc is not None:
            found = zlib.crc32(part, found)
    if crc is not None and found != crc:
        raise _mismatch(sources, place.storage, name)
    return digest.hexdigest()


def _check_partly_viewed(sources: Sources, placed: Iterable[Placed]) -> None:
    """Storages with a checksum of which no tensor is the whole: read once more, because a flipped bit in them would go unseen."""
    whole = set[Storage]()
    partly: dict[Storage, Placed] = {}
    for place in placed:
        if place.contiguous and place.offset == 0 and place.spec.nbytes == place.storage.nbytes:
            whole.add(place.storage)
        elif place.storage.crc32 is not None:
            partly[place.storage] = place
    buffer = memoryview(bytearray(_BLOCK))
    for storage in partly.keys() - whole:
        found = 0
        for at in range(0, storage.nbytes, _BLOCK):
            part = buffer[: min(_BLOCK, storage.nbytes - at)]
            sources.read_into(storage.file, storage.offset + at, part)
            found = zlib.crc32(part, found)
        if found != storage.crc32:
            raise _mismatch(sources, storage, "a storage")


def _mismatch(sources: Sources, storage: Storage, name: str) -> InputError:
    return InputError(
        Problem("CK312", f"{printable(name)}: the checksum that the file records does not match its bytes",
                where=printable(sources.files[storage.file]), found=f"storage at offset {storage.offset:,}", try_="fetch the file again")
    )  # fmt: skip


def content_digest(manifest: Manifest, digests: Mapping[str, str]) -> str:
    """One digest for a whole state_dict: over name, dtype, shape and digest of each tensor, in order. Independent of the container."""
    total = xxhash.xxh3_128()
    for name, spec in manifest.tensors.items():
        total.update(f"{name}\0{spec}\0{digests[name]}\n".encode("utf-8", "surrogatepass"))
    return f"xxh3_128:{total.hexdigest()}"
