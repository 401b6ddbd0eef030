"""Rows 129 and 130: a source that is cut, rewritten or replaced while it is read. The run is stopped in the middle, and goes on after."""

import os
import shutil

import pytest
import torch
from faulty import contents, while_stopped


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def grow(path):
    with open(path, "ab") as stream:
        stream.write(b"more")


def rewrite(path):
    with open(path, "r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        stream.write(b"\1\2\3\4")


def replace(path):
    copy = path.with_suffix(".copy")
    shutil.copyfile(path, copy)
    copy.rename(path)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("deed", [cut, empty, grow, rewrite, replace, remove])
@pytest.mark.parametrize("moment", ["create:1", "write:1", "write:2"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_source_that_changes(place, commands, deed, moment, kind):
    argv, changed = (
        (["in.pth", "out.pth"], place / "in.pth") if kind == "file" else (["in", "out"], place / "in/model-00001-of-00002.safetensors")
    )
    (place / argv[1]).mkdir() if kind == "folder" else (place / argv[1]).write_bytes(b"old")
    before = contents(place / argv[1])
    done = commands.run(
        "run", "dataparallel", *argv, "--force", cwd=place, fault=f"{moment}:kill=19", during=while_stopped(lambda: deed(changed))
    )
    shown = changed.relative_to(place)
    if done.err.startswith(f"error: {shown}  [CK310]"):
        assert deed is remove
    else:
        message = f"error: {shown}  [CK311]\n  the file changed while it was read\n  try: run again once nobody writes to it\n"
        assert done.err == message
    assert done.code == 3
    assert contents(place / argv[1]) == before
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("moment", ["create:1", "write:1"])
def test_a_source_that_hides_that_it_changed(place, commands, moment):
    """The same size and the same time of the last change: the checksum that the archive records still tells.

    One thread, because of two the other may have read the middle already; then the change comes too late to matter.
    """
    path = place / "in.pth"
    torch.save({"module.a": torch.arange(900_000.0)}, path)
    status = path.stat()

    def rewrite_quietly():
        with open(path, "r+b") as stream:
            stream.seek(status.st_size // 2)
            stream.write(b"\1\2\3\4")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    done = commands.run(
        "run",
        "dataparallel",
        "in.pth",
        "out.pth",
        "--threads",
        "1",
        cwd=place,
        fault=f"{moment}:kill=19",
        during=while_stopped(rewrite_quietly),
    )
    assert done.code == 3
    assert done.err.startswith("error: in.pth  [CK312]\n  module.a: the checksum that the file records does not match its bytes\n")
    assert sorted(each.name for each in place.iterdir()) == ["in", "in.pth"]
