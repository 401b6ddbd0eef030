"""Opening strangers' files, and reading the JSON in them, without surprises. Shared by the readers."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from ckptconv.errors import Refusal, printable
from ckptconv.names import DIGITS_TO_ZEROS
from ckptconv.places.presence import arriving, version_of

Identity = tuple[int, int, int, int]
#: More digits than any 64-bit number has. Longer ones become floats: parsing them exactly costs quadratic time.
_INT_DIGITS = 20
#: What a JSON text may be made of (docs/limits.md), counted by its commas and brackets: each costs up to a hundred bytes when it is parsed.
MAX_VALUES = 2_000_000


_HINTS = {
    errno.ENOENT: "look at the spelling of the path: ls shows what is there", errno.ENOTDIR: "look at the spelling of the path: ls shows what is there",
    errno.EACCES: "look at the rights of the file and its folders: ls -l", errno.EPERM: "look at the rights of the file and its folders: ls -l",
    errno.EIO: "the disk or the network behind it failed: copy the file elsewhere first", errno.EMFILE: "ulimit -n 1024",
    errno.ELOOP: "a link leads back to itself: name the file that is meant", errno.ENAMETOOLONG: "a shorter name",
}  # fmt: skip


def cannot_open(error: OSError) -> Refusal:
    """The refusal of a source that the operating system does not give, with what helps."""
    hint = _HINTS.get(error.errno or 0, "look at the file and at the disk that it is on")
    return Refusal(f"the source cannot be opened: {error.strerror or error}", code="CK310", try_=hint)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file; a pipe or a device is refused at once instead of waited for.

    Raises ``OSError`` when the file cannot be opened, :class:`~ckptconv.errors.Refusal` (CK310) when it is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Refusal("not a regular file", code="CK310")
        yield descriptor
    finally:
        os.close(descriptor)


def identity(status: os.stat_result) -> Identity:
    """What a file is told by: another one under its name, or a write to it, changes this."""
    version = version_of(status)  # a placeholder is written to whenever something arrives
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns if version is None else version


def identities_below(path: Path) -> dict[Path, Identity]:
    """Those of a checkpoint's files, to be taken before its headers are read: of the file, what lies in the folder, what lies by the index."""
    folder = path if path.is_dir() else path.parent if path.suffix == ".json" else None
    found = {}
    for each in [path] if folder is None else [*folder.glob("*"), *folder.glob("*/*")]:
        with suppress(OSError):  # a link to nothing, say: the reader will find its words for it
            found[each] = identity(os.stat(each))
    return found


def read_up_to(descriptor: int, nbytes: int, offset: int) -> bytes:
    """``nbytes`` bytes from ``offset``, or as many as there are: a read that comes back short is gone on with, as on any network disk."""
    pieces: list[bytes] = []
    for at, wanted in arriving(descriptor, offset, nbytes):
        end = at + wanted
        while at < end:
            piece = os.pread(descriptor, end - at, at)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            at += len(piece)  # noqa: PLW2901
    return b"".join(pieces)


def read_at(descriptor: int, nbytes: int, offset: int) -> bytes:
    """``nbytes`` bytes from ``offset``. Raises :class:`~ckptconv.errors.Refusal` (CK302) when the file ends before."""
    found = read_up_to(descriptor, nbytes, offset)
    if len(found) != nbytes:
        raise Refusal("the file ends early", code="CK302", found=f"{len(found):,} of {nbytes:,} bytes at offset {offset:,}")
    return found


def allowance(nbytes: int) -> int:
    """How many times the limits a checkpoint of this many bytes gets: who ships a hundred GiB may have the names that go with them.

    >>> allowance(1 << 20), allowance(10 << 30)
    (1, 11)
    """
    return 1 + (nbytes >> 30)


def _may_have_odd_integers(raw: bytes) -> bool:
    """True unless no number in a JSON text is negative or longer than any 64-bit number."""
    zeros = raw.translate(DIGITS_TO_ZEROS)
    return b"-0" in zeros or b"0" * _INT_DIGITS in zeros


def parse_json(raw: bytes, *, code: str, times: int = 1) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN, no infinite numbers, no lone surrogates, no bottomless nesting.

    A negative number is given back as a float, so that ``-0`` is not taken for a size.

    >>> parse_json(b'{"a": [1, -0]}', code="CK307")
    {'a': [1, -0.0]}
    >>> parse_json(b'{"a": 1, "a": 2}', code="CK307")
    Traceback (most recent call last):
    ...
    ckptconv.errors.Refusal: the key 'a' occurs twice

    ``times`` is how often the limit on values is allowed. Raises :class:`~ckptconv.errors.Refusal` with the ``code`` given.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise Refusal(f"the key {printable(twice)!r} occurs twice", code=code)
        return made

    def integer(digits: str) -> int | float:
        return int(digits) if len(digits) <= _INT_DIGITS and digits[0] != "-" else number(digits)

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise Refusal("a number is out of range", code=code, found=printable(digits, 40))
        return value

    def constant(word: str) -> NoReturn:
        raise Refusal(f"{word} is not JSON", code=code)

    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > MAX_VALUES * times:
        raise Refusal(f"the JSON has more than {MAX_VALUES * times:,} values", code=code, found=f"{values:,} commas and brackets")
    parse_int = integer if _may_have_odd_integers(raw) else int  # which json does by itself, in a third of the time
    try:
        text = raw.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=unique, parse_int=parse_int, parse_float=number, parse_constant=constant)
        if "\\u" in text:
            # Only an escape can smuggle in half a character; writing the text out again finds it.
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal("not UTF-8 text", code=code, found=f"byte {error.object[error.start]:#04x} at {error.start:,}") from None
    except UnicodeEncodeError:
        raise Refusal("a text holds a lone surrogate", code=code) from None
    except RecursionError:
        raise Refusal("the JSON is nested too deep", code=code) from None
    except json.JSONDecodeError as error:
        raise Refusal("not valid JSON", code=code, found=f"{error.msg} at character {error.pos:,}") from None
    return parsed
