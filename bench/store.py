"""A store with latency: what an object store looks like to a client, in one process, with every request and byte counted.

    store = LatencyStore(latency_s=0.05, bytes_per_s=100e6)   # slow:// is this store from now on
    store.put("bucket/in.safetensors", Path("in.safetensors"))
    ... ckptconv.run("dataparallel", "slow://bucket/in.safetensors", "out.pth") ...
    store.requests, store.read_nbytes, store.most_in_flight

Each request waits for ``latency_s``, and for its bytes at ``bytes_per_s``: a stream of its own, as fast as it would be alone. Objects lie
in memory or, put by their path, in their files. As in an object store, an object is replaced at one stroke and has an ETag.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


@dataclass(frozen=True)
class Request:
    """One request as it was answered."""

    kind: str  #: ``list``, ``head``, ``get``, ``part``, ``put``, ``delete``, ``create_multipart_upload`` or ``abort_multipart_upload``
    path: str
    start: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class _Object:
    body: bytes | Path
    nbytes: int
    etag: str


class LatencyStore:
    """The store. The one that was made last answers ``slow://``; ``latency_s`` and ``bytes_per_s`` may be changed at any time.

    ``hook`` is called with every :class:`Request` before it is answered: what it raises, the client gets in place of the answer.
    """

    def __init__(self, latency_s: float = 0.0, bytes_per_s: float = float("inf"), hook: Callable[[Request], None] | None = None) -> None:
        self.latency_s, self.bytes_per_s, self.hook = latency_s, bytes_per_s, hook
        self.objects: dict[str, _Object] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}  #: begun, and neither completed nor given up: their parts
        self._lock = threading.Lock()
        self._made = 0
        self.reset()
        SlowFileSystem.store = self
        fsspec.register_implementation("slow", SlowFileSystem, clobber=True)

    def reset(self) -> None:
        """Counts from nothing again."""
        self.log: list[Request] = []
        self.in_flight = self.most_in_flight = 0

    @property
    def requests(self) -> int:
        """How many requests were answered, refused ones too."""
        return len(self.log)

    @property
    def by_kind(self) -> Counter[str]:
        """How many of each kind."""
        return Counter(request.kind for request in self.log)

    @property
    def read_nbytes(self) -> int:
        """Bytes of objects that were sent to the client."""
        return sum(request.nbytes for request in self.log if request.kind == "get")

    @property
    def written_nbytes(self) -> int:
        """Bytes that the client sent."""
        return sum(request.nbytes for request in self.log if request.kind in ("part", "put"))

    def ranges(self, path: str) -> list[tuple[int, int]]:
        """(begin, end) of every read of one object, in the order in which they were asked for."""
        return [(each.start, each.start + each.nbytes) for each in self.log if each.kind == "get" and each.path == path]

    def put(self, path: str, body: bytes | Path) -> None:
        """An object, at once and uncounted."""
        with self._lock:
            self._made += 1
            nbytes = len(body) if isinstance(body, bytes) else body.stat().st_size
            self.objects[path] = _Object(body, nbytes, f'"{self._made}"')

    def body(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """An object's bytes, uncounted."""
        found = self.objects[path]
        if isinstance(found.body, bytes):
            return found.body[start:end]
        with found.body.open("rb") as stream:
            stream.seek(start)
            return stream.read(-1 if end is None else max(0, end - start))

    @contextmanager
    def answering(self, request: Request) -> Iterator[None]:
        """The time that a request takes, on its own stream."""
        with self._lock:
            self.log.append(request)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.hook is not None:
                self.hook(request)
            time.sleep(self.latency_s + request.nbytes / self.bytes_per_s)
            yield
        finally:
            with self._lock:
                self.in_flight -= 1


class SlowFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """``slow://`` for fsspec. It speaks S3 where it is written to: parts, and one request that makes an object of them."""

    protocol = "slow"
    root_marker = ""
    cachable = False
    store: ClassVar[LatencyStore]

    def _found(self, path: str) -> _Object:
        try:
            return self.store.objects[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    def _entry(self, path: str) -> dict[str, Any]:
        found = self._found(path)
        return {"name": path, "size": found.nbytes, "type": "file", "ETag": found.etag}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path).rstrip("/")
        with self.store.answering(Request("list", path)):
            entries: dict[str, dict[str, Any]] = {}
            for name in sorted(self.store.objects):
                if name == path:
                    entries[name] = self._entry(name)
                elif name.startswith(f"{path}/" if path else ""):
                    inner, more, _rest = name[len(path) + 1 if path else 0 :].partition("/")
                    below = f"{path}/{inner}" if path else inner
                    entries[below] = {"name": below, "size": 0, "type": "directory"} if more else self._entry(name)
        if not entries:
            raise FileNotFoundError(path)
        return list(entries.values()) if detail else list(entries)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path).rstrip("/")
        with self.store.answering(Request("head", path)):
            if "/" not in path or (path not in self.store.objects and any(name.startswith(f"{path}/") for name in self.store.objects)):
                return {"name": path, "size": 0, "type": "directory"}
            return self._entry(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        path = self._strip_protocol(path)
        found = self._found(path)
        begin = min(start or 0, found.nbytes)
        stop = found.nbytes if end is None else min(end, found.nbytes)
        with self.store.answering(Request("get", path, begin, max(0, stop - begin))):
            return self.store.body(path, begin, stop)

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        with self.store.answering(Request("delete", path)):
            self._found(path)
            del self.store.objects[path]

    _rm = rm_file

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def split_path(self, path: str) -> tuple[str, str, None]:
        """Bucket and key, as s3fs splits them."""
        bucket, _, key = self._strip_protocol(path).partition("/")
        return bucket, key, None

    def call_s3(self, method: str, *, Bucket: str, Key: str, **words: Any) -> dict[str, Any]:  # noqa: N803  (S3's own names)
        """The requests of a multipart upload, as s3fs passes them on."""
        store, path = self.store, f"{Bucket}/{Key}"
        upload = words.get("UploadId", "")
        body = words.get("Body", b"")
        kind = {"upload_part": "part", "put_object": "put", "complete_multipart_upload": "put"}.get(method, method)
        with store.answering(Request(kind, path, 0, len(body))):
            if kind == "put" and words.get("IfNoneMatch") == "*" and path in store.objects:
                raise FileExistsError(path)
            if method == "create_multipart_upload":
                upload = f"{path}#{len(store.log)}"
                store.uploads[upload] = {}
            elif method == "upload_part":
                store.uploads[upload][words["PartNumber"]] = bytes(body)
            elif method == "put_object":
                store.put(path, bytes(body))
            else:
                parts = store.uploads.pop(upload)
                if method == "complete_multipart_upload":
                    store.put(path, b"".join(parts[part["PartNumber"]] for part in words["MultipartUpload"]["Parts"]))
        return {"UploadId": upload, "ETag": f'"{words.get("PartNumber", 0)}"'}
