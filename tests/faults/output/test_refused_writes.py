"""Rows 121 to 123: a disk that is full, broken, or forbids, at any call; and one that only takes less than it was given."""

import errno
import os

import pytest
from faulty import LONG

FULL = "no space left on the disk"
TRY = {
    errno.ENOSPC: "free some space, or write elsewhere", errno.EIO: "the disk or the network behind it failed: write elsewhere",
    errno.EDQUOT: "your quota is used up: free some of it, or write elsewhere", errno.EROFS: "write elsewhere: the filesystem is read-only",
    errno.EACCES: "write where you may", errno.EPERM: "write where you may", errno.EXDEV: "write elsewhere",
    errno.EBUSY: "a mount point cannot be replaced: another name", errno.EFBIG: "a file may not grow that large here: see ulimit -f, or write elsewhere",
}  # fmt: skip


def refusal(conversion, what, number):
    reason = FULL if number == errno.ENOSPC else os.strerror(number)
    return f"error: {conversion.output}  [CK503]\n  {what}: {reason}\n  try: {TRY[number]}\n"


def check(conversion, fault, number):
    """The fault ends in exit code 5, a whole message, the old result, and nothing beside it."""
    conversion.reset()
    done = conversion.run(fault)
    state = conversion.state()
    if state == "new":
        assert done.err == refusal(conversion, "the output is in place, but the disk did not confirm it", number)
    elif "cannot be copied along" in done.err:
        assert done.err.startswith(f"error: {conversion.output}  [CK503]\n  config.json cannot be copied along: {os.strerror(number)}\n")
    else:
        assert done.err == refusal(conversion, "the output cannot be written", number)
    assert done.code == 5
    assert conversion.left() == []
    return state


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_every_call_may_fail(conversion, number):
    """One call fails, each in its turn: the write that fills the disk, the fsync or the rename that the disk refuses."""
    states = []
    moments = [at for at in conversion.moments(5) if conversion.calls[at - 1][0] != "unlink"]
    for at in moments if LONG else moments[number % 3 :: 3]:
        states.append(check(conversion, f"*:{at}:error={number}", number))
    assert "old" in states
    assert states[:-1].count("new") == 0, "only the last fsync comes when the new result stands"
    conversion.run_again()


@pytest.mark.parametrize("at", [1, 2, 5, "last"])
def test_the_disk_stays_full(conversion, at):
    """What is removed does not need room; everything else finds none from here on."""
    writes = [name for name, _ in conversion.calls].count("write")
    fault = f"fallocate:1:error={errno.EOPNOTSUPP}+;write:{writes if at == 'last' else at}:error={errno.ENOSPC}+"
    assert check(conversion, fault, errno.ENOSPC) == "old"


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("fsync", errno.EIO), ("renameat2", errno.EIO), ("renameat2", errno.EXDEV), ("rename", errno.EXDEV), ("rename", errno.EPERM),
        ("rename", errno.EBUSY), ("create", errno.EROFS), ("create", errno.EACCES), ("mkdir", errno.EROFS), ("mkdir", errno.EACCES),
        ("write", errno.EDQUOT), ("write", errno.EFBIG), ("ftruncate", errno.EFBIG), ("chmod", errno.EPERM),
    ],
    ids=lambda value: errno.errorcode.get(value, value),
)  # fmt: skip
def test_a_call_fails(conversions, call, number):
    those_that_make_it = [each for each in conversions.values() if call in {name for name, _ in each.calls}]
    assert those_that_make_it
    for conversion in those_that_make_it:
        assert check(conversion, f"{call}:1:error={number}", number) == "old"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_what_a_filesystem_does_not_know_is_done_another_way(conversion, number):
    """No exchange, no promise of space: the result is the same."""
    conversion.reset()
    done = conversion.run(f"renameat2:1:error={number}+;fallocate:1:error={number}+")
    assert (done.code, done.err) == (0, "")
    assert (conversion.state(), conversion.left()) == ("new", [])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_short_and_interrupted_calls_go_on(conversion, step):
    """Half a write, half a read, and EINTR, again and again: the bytes are the same."""
    writes, reads = [name for name, _ in conversion.calls].count("write"), 40
    faults = [f"write:{at}:short" for at in range(1, writes + 1, step)][:12] + [f"pread:{at}:short" for at in range(1, reads, step)][:12]
    conversion.reset()
    done = conversion.run(
        ";".join([*faults, f"write:2:error={errno.EINTR}", f"pread:2:error={errno.EINTR}", f"fsync:1:error={errno.EINTR}"])
    )
    assert (done.code, done.err) == (0, "")
    assert (conversion.state(), conversion.left()) == ("new", [])


def test_what_was_replaced_cannot_be_removed(conversions):
    conversion = conversions["folder-replaced"]
    conversion.reset()
    done = conversion.run(f"unlink:1:error={errno.EACCES}+")
    (left,) = conversion.left()
    assert done.code == 5
    assert done.err == (
        f"error: {conversion.output}  [CK503]\n  the output is in place, but what it replaced cannot be removed\n"
        f"  found: {conversion.folder / left}\n  try: rm -r {left}\n"
    )
    assert conversion.state() == "new"
    conversion.run_again()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_a_read_that_fails_is_told_by_its_file(conversions, number):
    """The source's disk is the source's fault; that of the output, read back to be verified, is not."""
    conversion = conversions["file-replaced"]
    codes = set()
    for at in range(1, 80, 1 if LONG else 4):
        conversion.reset()
        done = conversion.run(f"pread:{at}:error={number}")
        if done.code == 0:
            break
        (path,) = [path for name, path in conversion.commands.calls() if name == "pread"]
        of_source = path.startswith(f"{conversion.source}/")
        assert done.code == (3 if of_source else 4), done.err
        assert done.err.startswith("error: in" if of_source else f"error: {path}"), done.err
        assert f"  [{'CK310' if of_source else 'CK'}" in done.err
        assert any(f"cannot be {what}: {os.strerror(number)}\n" in done.err for what in ("opened", "read", "read back")), done.err
        assert (conversion.state(), conversion.left()) == ("old", [])
        codes.add(done.code)
    assert codes == {3, 4}
