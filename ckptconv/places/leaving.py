"""Outputs for a remote store: made and verified in the scratch folder, sent when they are whole, visible last of all.

An object is visible only once its upload is completed, so a file is there as a whole or not at all. Of a folder the index (or the one
model file) goes last: without it there is no checkpoint, however many shards lie there. Names that the store has already are left alone
until then: new shards get names of their own, the index is replaced at one stroke, and only then the old files are removed.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ckptconv.errors import CkptconvError, InputError, OutputError, Problem, UsageError, named, printable
from ckptconv.places.stores import Entry, Store
from ckptconv.places.urls import HUB, name_of, protocol_of
from ckptconv.places.visiting import Visit

PART = 16 << 20  #: bytes of one part of an upload; more where a file would have more than 10,000
AT_ONCE = 8  #: parts in flight
_MOST_PARTS = 9_000
_INDEX = ".index.json"
_METADATA = ".metadata"  # of torch.distributed.checkpoint
Report = Callable[[int], None]
T = TypeVar("T")


class Leaving:
    """One output on its way. ``path`` is where it is made; :meth:`send` sends it."""

    def __init__(self, url: str, visit: Visit, *, force: bool, refuse: Callable[[list[str], list[str]], str]) -> None:
        if protocol_of(url) == HUB:
            raise UsageError(Problem("CK107", "hf:// is a place to read from", where=printable(url), try_="a folder, then: hf upload"))
        self.url, self._force, self._refuse = url, force, refuse
        self._store = Store(url)
        self._root = self._store.root.rstrip("/")
        self.path = path_for(url, visit)

    def refuse_overlap(self, sources: Sequence[str | Path]) -> None:
        """Raises :class:`~ckptconv.errors.UsageError` CK502 where a source is the output, lies in it, or around it."""
        for word in sources:
            if protocol_of(word) != self._store.protocol:
                continue
            root = Store(str(word)).root.rstrip("/")
            if root == self._root:
                raise UsageError(
                    Problem(
                        "CK502", "the output is the source", where=printable(self.url), try_="another name; sources are never overwritten"
                    )
                )
            if self._root.startswith(f"{root}/") or root.startswith(f"{self._root}/"):
                raise UsageError(
                    Problem("CK502", "the output and the source lie in one another", where=printable(self.url), try_="another folder")
                )

    def refuse_what_is_there(self) -> None:
        """Raises :class:`~ckptconv.errors.OutputError`: CK501 for an output that exists, without force; CK503 for what force may not remove,
        and for a bucket that is not there."""
        there = self._there()
        if not there:
            self._refuse_no_bucket()
            return
        if not self._force:
            names = [each.name.rpartition("/")[2] for each in there]
            found = (
                ""
                if len(names) == 1 and there[0].name == self._root
                else printable(", ".join(names[:3])) + (", …" if len(names) > 3 else "")
            )
            if found and not any(name.endswith(_INDEX) for name in names):
                found += "; no index: the rest of a run that was cut off?"
            raise OutputError(
                Problem("CK501", "the output exists already, and nothing is ever overwritten unasked", where=printable(self.url), found=found,
                        try_="--force, or another name")
            )  # fmt: skip
        if any(each.name.endswith(f"/{_METADATA}") for each in there):
            what = "a distributed checkpoint in a store is not replaced: its files have fixed names, and the old one would break before the new one is whole"
            raise OutputError(Problem("CK503", what, where=printable(self.url), try_="a new folder"))
        if there[0].name != self._root:
            below = [each.name.rpartition("/")[2] for each in there]
            other = self._refuse([name for name, each in zip(below, there, strict=True) if each.is_folder],
                                 [name for name, each in zip(below, there, strict=True) if not each.is_folder])  # fmt: skip
            if other:
                raise OutputError(
                    Problem("CK503", "the folder holds more than one converted checkpoint, and --force would take all of it away",
                            where=printable(self.url), found=printable(other), try_="a new folder, or move out what is yours")
                )  # fmt: skip

    def _refuse_no_bucket(self) -> None:
        if not hasattr(self._store.fs, "call_s3"):
            return
        with suppress(InputError):  # who may write to a bucket need not be allowed to look at it
            if self._store.entry(self._root.partition("/")[0]) is None:
                raise OutputError(
                    Problem("CK503", "the output cannot be sent: there is no such bucket", where=printable(self.url), try_="make it first")
                )

    def _there(self) -> list[Entry]:
        """What stands at the destination: the object itself, or what lies in the folder."""
        entry = self._store.entry(self._root)
        if entry is None:
            return []
        return self._store.listing(self._root) if entry.is_folder else [entry]

    def send(self, report: Report) -> None:
        """Uploads what was made. Raises :class:`~ckptconv.errors.OutputError`; then nothing is visible that could be taken for the output."""
        self.refuse_what_is_there()  # it may be hours later
        if self.path.is_dir():
            self._send_folder(report)
            return
        pending = self._sent(self.path, self._root, report, new=not self._force)
        self._completed(pending, self.path)

    def _send_folder(self, report: Report) -> None:
        old = [each for each in self._there() if not each.is_folder]
        taken = {each.name.rpartition("/")[2] for each in old}
        names = sorted(path.name for path in self.path.iterdir())
        index = next((name for name in names if name.endswith(_INDEX)), None)
        called = {name: name for name in names}
        if index is not None:
            called |= self._renamed(index, taken)
        last = index or _marker(names)
        # Shards, then what lies beside them, then what makes a checkpoint of them.
        first = sorted((name for name in names if name != last), key=lambda name: (not _is_weights(name), name))
        for name in [*first, last]:
            path, to = self.path / name, f"{self._root}/{called[name]}"
            self._completed(self._sent(path, to, report, new=called[name] not in taken), path)
        self._remove([each for each in old if each.name.rpartition("/")[2] not in called.values()])

    def _renamed(self, index: str, taken: Collection[str]) -> dict[str, str]:
        """Other names for shards whose names are taken, also in the index: the old checkpoint must stay whole until the new one is."""
        path = self.path / index
        data: dict[str, Any] = json.loads(path.read_bytes())
        shards = set(data["weight_map"].values())
        if not shards & set(taken):
            return {}
        for number in range(1, 1_000_000):
            called = {name: _numbered(name, number) for name in shards}
            if not set(called.values()) & set(taken):
                break
        data["weight_map"] = {tensor: called[shard] for tensor, shard in data["weight_map"].items()}
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return called

    def _remove(self, old: Sequence[Entry]) -> None:
        for entry in old:
            try:
                self._store.asked(lambda path=entry.name: self._store.fs.rm_file(path), self._store.url_of(entry.name), "", output=True)  # type: ignore[misc]
            except FileNotFoundError:
                continue
            except CkptconvError as error:
                what = "the output is in place, but what it replaced cannot be removed"
                found = printable(entry.name.rpartition("/")[2])
                raise OutputError(Problem("CK503", what, where=printable(self.url), found=found, try_=error.problems[0].try_)) from None

    def _sent(self, path: Path, to: str, report: Report, *, new: bool) -> Pending:
        """An upload that is complete but for its last request. What fails on the way is tried again from the start, a few times."""
        return self._retried(lambda: _uploaded(self._store, path, to, report, new=new))

    def _completed(self, pending: Pending, path: Path) -> None:
        """Makes it visible."""
        before = 0

        def complete() -> None:
            nonlocal pending, before
            try:
                if before:  # the store gave the upload up: once more, from the start
                    pending = _uploaded(self._store, path, pending.to, lambda _: None, new=pending.new)
                before += 1
                pending.commit()
            except BaseException:
                pending.discard()
                raise

        self._retried(complete)
        there = self._store.entry(pending.to)
        if there is None or there.nbytes != path.stat().st_size:
            found = "nothing is there" if there is None else f"{there.nbytes:,} bytes, {path.stat().st_size:,} were sent"
            raise OutputError(
                Problem("CK503", "the store does not hold what was sent", where=printable(self._store.url_of(pending.to)), found=found)
            )

    def _retried(self, request: Callable[[], T]) -> T:
        where = printable(self.url)
        try:
            return self._store.asked(request, self.url, "the output cannot be sent", output=True)
        except FileExistsError:
            raise OutputError(
                Problem("CK501", "the output appeared while it was being made", where=where, try_="--force, or another name")
            ) from None
        except FileNotFoundError as error:
            what = "the output cannot be sent: there is no such bucket or folder"
            raise OutputError(Problem("CK503", what, where=where, found=printable(named(error)), try_="make it first")) from None


class Pending(Protocol):
    """An upload of which nothing is visible yet."""

    to: str
    new: bool

    def commit(self) -> None:
        """Makes it visible at one stroke. Raises ``FileExistsError`` where it should be new, and is not."""

    def discard(self) -> None:
        """Gives it up, and leaves nothing in the store."""


def _uploaded(store: Store, path: Path, to: str, report: Report, *, new: bool) -> Pending:
    kind = _Multipart if hasattr(store.fs, "call_s3") else _Moved
    return kind(store, path, to, report, new=new)


class _Moved:
    """Any filesystem of fsspec: sent under another name, and moved (on the store's side) when it is whole."""

    def __init__(self, store: Store, path: Path, to: str, report: Report, *, new: bool) -> None:
        self.to, self.new, self._store = to, new, store
        folder, _, name = to.rpartition("/")
        self._aside = f"{folder}/.{name}.{secrets.token_hex(4)}.partial"
        with suppress(FileExistsError):
            store.fs.makedirs(folder, exist_ok=True)
        try:
            store.fs.put_file(str(path), self._aside)
        except BaseException:
            self.discard()
            raise
        report(path.stat().st_size)

    def commit(self) -> None:
        if self.new and self._store.entry(self.to) is not None:
            raise FileExistsError(self.to)
        self._store.fs.mv(self._aside, self.to)

    def discard(self) -> None:
        with suppress(Exception):  # it is given up because something else failed; that is what is told
            self._store.fs.rm_file(self._aside)


class _Multipart:
    """S3 and what speaks like it: parts in parallel, and one request that completes them. A small file is one request."""

    def __init__(self, store: Store, path: Path, to: str, report: Report, *, new: bool) -> None:
        self.to, self.new, self._call = to, new, store.fs.call_s3
        bucket, key, _ = store.fs.split_path(to)
        self._where = {"Bucket": bucket, "Key": key}
        self._upload: str | None = None
        self._body: bytes | None = None
        nbytes = path.stat().st_size
        size = max(PART, -(-nbytes // _MOST_PARTS))
        if nbytes <= size:
            self._body = path.read_bytes()
            report(nbytes)
            return
        self._upload = self._call("create_multipart_upload", **self._where)["UploadId"]
        stopped = threading.Event()

        def part(number: int) -> dict[str, Any]:
            if stopped.is_set():
                raise InterruptedError("the upload was given up")
            with path.open("rb") as stream:
                stream.seek((number - 1) * size)
                body = stream.read(size)
            answer = self._call("upload_part", **self._where, UploadId=self._upload, PartNumber=number, Body=body)
            report(len(body))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="ckptconv-send")
        try:
            self._parts = list(pool.map(part, range(1, -(-nbytes // size) + 1)))
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)  # a part that comes after the end would stay in the store for ever
            self.discard()
            raise
        pool.shutdown()

    def commit(self) -> None:
        match = {"IfNoneMatch": "*"} if self.new else {}
        if self._upload is None:
            self._call("put_object", **self._where, Body=self._body, **match)
        else:
            self._call("complete_multipart_upload", **self._where, UploadId=self._upload, MultipartUpload={"Parts": self._parts}, **match)

    def discard(self) -> None:
        if self._upload is not None:
            with suppress(Exception):  # it is given up because something else failed; that is what is told
                self._call("abort_multipart_upload", **self._where, UploadId=self._upload)
            self._upload = None


def path_for(url: str, visit: Visit) -> Path:
    """Where an output for ``url`` is made. A slash at the URL's end says that it is a folder, whatever its name looks like."""
    place = visit.place()
    path = place / ("output" if url.endswith("/") else name_of(url))
    visit.show(path, url.rstrip("/"))
    return path


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pth", ".pt", ".distcp"))


def _marker(names: Sequence[str]) -> str:
    """Of a folder without an index, the file without which it is no checkpoint."""
    return _METADATA if _METADATA in names else next((name for name in names if _is_weights(name)), names[-1])


def _numbered(name: str, number: int) -> str:
    """Another name for a shard, which readers and a later run understand.

    >>> _numbered("model-00001-of-00002.safetensors", 1)
    'model-v1-00001-of-00002.safetensors'
    """
    stem, _, rest = name.partition("-")
    return f"{stem}-v{number}-{rest}"
