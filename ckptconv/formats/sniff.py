"""What a file is, told from its bytes; never from its name."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ckptconv.errors import Refusal, printable
from ckptconv.formats.strict import cannot_open, read_up_to

_LOOK = 1024


def kind_of(path: Path) -> str:
    """``torch-zip``, ``torch-legacy`` or ``safetensors``. Raises :class:`~ckptconv.errors.Refusal` with a sentence for everything else."""
    head, size = _head(path)
    if not size:
        raise _not("the file is empty", try_="fetch it again")
    if head.startswith(b"PK\3\4"):
        return "torch-zip"
    if head.startswith(b"\x80") and len(head) > 2 and head[1] in range(1, 6):
        return "torch-legacy"
    if size >= 8 and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000 and head[8:9] == b"{":
        return "safetensors"
    for magic, what, hint in _OTHERS:
        if head.startswith(magic):
            raise _not(what.format(size=size), try_=hint)
    if head[257:262] == b"ustar":
        raise _not("this is a tar archive, not a checkpoint", try_="unpack it; torch files from before 2017 (tar) are not read")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise _not(
            "this is a web page, not a checkpoint: a download that went wrong",
            try_="open it in a browser to see why, and fetch the file again",
        )
    if text.startswith((b"{", b"[")):
        raise _not("this is JSON, not a checkpoint", try_="a config or an index? name the folder, or the model's file")
    if head.isascii() and b"\0" not in head:
        raise _not("this is a text file, not a checkpoint", found=printable(head[:60].decode()))
    raise _not("this is no torch and no safetensors file", found=f"its first bytes are {head[:8].hex(' ')}")


_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "this is a git-lfs pointer ({size} bytes), not the file itself", "git lfs pull"),
    (b"PK\5\6", "this is an empty zip archive, not a checkpoint", ""),
    (b"\x1f\x8b", "this is a gzip archive, not a checkpoint", "gunzip it first"),
    (b"7z\xbc\xaf\x27\x1c", "this is a 7z archive, not a checkpoint", "unpack it first"),
    (b"\xfd7zXZ", "this is an xz archive, not a checkpoint", "unpack it first"),
    (b"BZh", "this is a bzip2 archive, not a checkpoint", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "this is a zstd archive, not a checkpoint", "unpack it first"),
    (b"Rar!", "this is a rar archive, not a checkpoint", "unpack it first"),
    (b"GGUF", "this is a GGUF file, which is not read", "convert from the checkpoint that it was made from"),
    (b"\x89HDF\r\n", "this is an HDF5 file (Keras?), which is not read", ""),
    (b"\x93NUMPY", "this is a NumPy array, not a checkpoint", ""),
)


def _not(what: str, *, found: str = "", try_: str = "") -> Refusal:
    return Refusal(what, code="CK301", found=found, try_=try_)


def _head(path: Path) -> tuple[bytes, int]:
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT and path.is_symlink():
            raise Refusal("this is a link to a file that is not there", code="CK310", found=printable(os.readlink(path)),
                          try_="fetch that file, or make the link anew") from None  # fmt: skip
        raise cannot_open(error) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe" if stat.S_ISFIFO(status.st_mode) else "device"
            raise Refusal(f"this is a {kind}, not a file", code="CK310", try_="name a file, or a folder with an index")
        return read_up_to(descriptor, _LOOK, 0), status.st_size
    finally:
        os.close(descriptor)
