"""The lock of a batch: which output was made from which source by which rules. It lies in the folder of the outputs.

It is written after every file that is done, so it never says more than is true, and two batches into one folder may share it. What
it says is compared with what the command line names and with what the disk holds; no path of it is ever followed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ckptconv._version import __version__
from ckptconv.errors import Problem, Refusal, UsageError, printable
from ckptconv.execute.staging import turn
from ckptconv.formats.strict import Identity, identities_below, identity, opened, parse_json, read_at

NAME = "ckptconv.lock.json"
MAX_LOCK = 64 << 20  #: bytes (docs/limits.md)
_VERSION = 1
_BLOCK = 1 << 20
_Digest = Annotated[str, Field(pattern="^xxh3_128:[0-9a-f]{32}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Files(_Strict):
    """The files of a checkpoint: a digest of their bytes, and what each is told by without being read (size, time in ns, inode)."""

    digest: _Digest
    files: dict[str, Annotated[list[int], Field(min_length=3, max_length=3)]]


class Made(_Strict):
    """One output that a batch made and verified, and everything that it was made of."""

    source: str  #: relative to the lock's folder
    made_of: Files
    rules: str  #: name@revision
    rules_digest: str
    options: dict[str, Any]
    output: Files
    verified: str  #: the rungs that were reached
    ckptconv: str = __version__


class Lock(_Strict):
    """The whole file."""

    ckptconv_lock: int = _VERSION
    given: dict[str, Files] = Field(default_factory=dict)  #: files that options name (a second source, a config), as they were last read
    started: list[str] = Field(default_factory=list)  #: outputs that a batch began to make for the first time: what stands there is its own
    outputs: dict[str, Made] = Field(default_factory=dict)


def text_of(path: str) -> str:
    """A path as text that JSON can hold, also where a file's name is no UTF-8.

    >>> text_of("a/b.pth")
    'a/b.pth'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def look(paths: Mapping[str, Path]) -> dict[str, list[int]]:
    """What tells each file without reading it. Raises ``OSError`` where one is gone."""
    return {name: _told_by(os.stat(path)) for name, path in paths.items()}


def take(paths: Mapping[str, Path]) -> Files:
    """The digest of files, by reading them: of one file that of its bytes (``xxhsum -H2``), of several that of the list of theirs.

    Raises ``OSError`` where one cannot be read, :class:`~ckptconv.errors.Refusal` where one is not a regular file.
    """
    told = look(paths)
    each = {name: _digest(path) for name, path in sorted(paths.items())}
    if len(each) == 1:
        (digest,) = each.values()
    else:
        digest = xxhash.xxh3_128_hexdigest("".join(f"{digest}  {name}\n" for name, digest in each.items()).encode())
    return Files(digest=f"xxh3_128:{digest}", files=told)


def same(paths: Mapping[str, Path], known: Files) -> Files | None:
    """``known``, told anew, where the files' bytes are still those; None where they changed. Read only where size, time or inode differ."""
    try:
        now = look(paths)
        if now == known.files:
            return known
        if {name: told[0] for name, told in now.items()} != {name: told[0] for name, told in known.files.items()}:
            return None
        taken = take(paths)
    except (OSError, Refusal):
        return None
    return taken if taken.digest == known.digest else None


def files_below(path: Path, *more: Path) -> dict[str, Path]:
    """The files that a checkpoint is made of: itself, or what lies in its folder; and ``more`` beside it, by their names."""
    if path.is_dir() or path.suffix == ".json":
        folder = path if path.is_dir() else path.parent
        found = {str(each.relative_to(folder)): each for each in sorted(identities_below(path)) if each.is_file() and _counts(each)}
    else:
        found = {path.name: path}
    return {text_of(name): each for name, each in {**found, **{each.name: each for each in more}}.items()}


def _counts(path: Path) -> bool:
    return not path.name.startswith(".") or path.name == ".metadata"


def _told_by(status: os.stat_result) -> list[int]:
    return [status.st_size, max(status.st_mtime_ns, 0), status.st_ino]


def _digest(path: Path) -> str:
    digest, buffer, offset = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK)), 0
    with opened(path) as descriptor:
        while count := os.preadv(descriptor, [buffer], offset):
            digest.update(buffer[:count])
            offset += count
    return digest.hexdigest()


class LockFile:
    """The lock of one folder, read when somebody else wrote it, and rewritten as a whole.

    Raises :class:`~ckptconv.errors.UsageError` CK111 for a file that is no lock, ``OSError`` where it cannot be written.
    """

    def __init__(self, folder: Path, *, sync: bool = True) -> None:
        self.folder, self.path, self._sync = folder, folder / NAME, sync
        self._seen: Identity | None = None
        self.lock = Lock()
        self._texts: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> Lock:
        """The lock as it stands there now; an empty one where there is none yet."""
        try:
            with opened(self.path) as descriptor:
                status = os.fstat(descriptor)
                if identity(status) == self._seen:
                    return self.lock
                if status.st_size > MAX_LOCK:
                    raise Refusal(f"the file is larger than {MAX_LOCK:,} bytes", code="CK111", found=f"{status.st_size:,} bytes")
                raw = read_at(descriptor, status.st_size, 0)
            self.lock, self._texts, self._seen = _parsed(raw), {}, identity(status)
        except FileNotFoundError:
            self.lock, self._texts, self._seen = Lock(), {}, None
        except Refusal as refusal:
            raise self._none(refusal.what, refusal.found) from None
        except ValidationError as error:
            first = error.errors()[0]
            raise self._none(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return self.lock

    def _none(self, reason: str, found: str = "") -> UsageError:
        return UsageError(
            Problem("CK111", f"this is no lock of a batch: {printable(reason)}", where=printable(self.path), found=found,
                    try_=f"restore it, or remove it: rm {printable(self.path)}; the batch then makes everything again with --force")
        )  # fmt: skip

    def put(
        self, outputs: Mapping[str, Made] | None = None, *, given: Mapping[str, Files] | None = None, started: Iterable[str] = ()
    ) -> None:
        """Adds to the lock what became true, beside what other batches wrote meanwhile."""
        with turn(self.folder):
            had = self.refresh()
            new = outputs or {}
            self.lock = Lock(
                given={**had.given, **(given or {})},
                started=sorted({*had.started, *started} - {*new}),
                outputs={**had.outputs, **new},
            )
            for name in new:
                self._texts.pop(name, None)
            self._write()

    def _write(self) -> None:
        partial = self.folder / f".{NAME}.{os.getpid()}-{secrets.token_hex(4)}.partial"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(self._text().encode())
                stream.flush()
                if self._sync:
                    os.fsync(descriptor)
                self._seen = identity(os.fstat(descriptor))
            os.replace(partial, self.path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise

    def _text(self) -> str:
        """The file's text, sorted. What was written once is not spelt again: a batch of thousands writes it thousands of times."""
        for name, made in self.lock.outputs.items():
            if name not in self._texts:
                self._texts[name] = f"{_json(name)}: {_table(made.model_dump(), ' ')}"
        given = _table({name: files.model_dump() for name, files in self.lock.given.items()}, "")
        head = f'"ckptconv_lock": {_VERSION},\n"given": {given},\n"started": {_json(self.lock.started)}'
        return f'{{\n{head},\n"outputs": {{\n' + ",\n".join(self._texts[name] for name in sorted(self._texts)) + "\n}\n}\n"

    def clear_up(self) -> None:
        """Removes what batches left that were killed while they wrote the lock."""
        with turn(self.folder):
            for left in self.folder.glob(f".{NAME}.*.partial"):
                with suppress(OSError):
                    left.unlink()


def _json(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _table(entries: Mapping[str, Any], indent: str) -> str:
    """A JSON object, an entry a line."""
    lines = (f"{indent}{_json(key)}: {_json(value)}" for key, value in sorted(entries.items()))
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}" if entries else "{}"


def _parsed(raw: bytes) -> Lock:
    data = parse_json(raw, code="CK111")
    version = data.get("ckptconv_lock") if isinstance(data, dict) else None
    if version != _VERSION or isinstance(version, bool):
        raise Refusal(f"it should begin with ckptconv_lock: {_VERSION}", code="CK111", found=printable(version))
    lock = Lock.model_validate(data)
    for name in (*lock.outputs, *lock.started):
        path = PurePosixPath(name)
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts or str(path) != name:
            raise Refusal("an output must lie in the lock's folder", code="CK111", found=printable(name))
    return lock
