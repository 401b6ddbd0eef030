"""Row 136, and rows 121 to 124 as the kernel sees them: the calls themselves, from strace."""

import errno
import os
import re
import signal
import subprocess
import sys

import pytest
from faulty import contents, required

CHANGING = "openat,open,creat,mkdir,mkdirat,rmdir,unlink,unlinkat,link,linkat,symlink,symlinkat,rename,renameat,renameat2,chmod,fchmod,fchmodat," \
    "chown,fchown,fchownat,truncate,ftruncate,fallocate,write,pwrite64,writev,pwritev,pwritev2,copy_file_range,sendfile,splice,fsync,fdatasync," \
    "sync_file_range,syncfs,setxattr,utimensat,mknod,mknodat"  # fmt: skip
#: How the library of faults calls them.
ALIKE = {
    "openat": "create",
    "open": "create",
    "pwrite64": "write",
    "sendfile": "write",
    "copy_file_range": "write",
    "unlinkat": "unlink",
    "rmdir": "unlink",
    "fchmod": "chmod",
    "fchmodat": "chmod",
    "mkdirat": "mkdir",
}


@pytest.fixture
def strace(place):
    program = required("strace", "strace")

    def run(*argv, inject=(), env=None):
        faults = [word for fault in inject for word in ("-e", f"inject={fault}")]
        command = [
            program,
            "-f",
            "-y",
            "-qq",
            "-s",
            "0",
            "-o",
            place / "trace",
            "-e",
            f"trace={CHANGING}",
            *faults,
            sys.executable,
            "-m",
            "ckptconv",
            *argv,
        ]
        return subprocess.run(command, cwd=place, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160", **(env or {})})

    return run


def traced(place):
    """Name and path of each call below the folder that changes something, in the order in which they ended. The trace itself is left out."""
    calls = []
    pending = {}
    for line in (place / "trace").read_text().splitlines():
        process, text = line.split(maxsplit=1)
        if text.endswith("<unfinished ...>"):
            pending[process] = text.removesuffix("<unfinished ...>")
            continue
        resumed = re.match(r"<\.\.\. \w+ resumed>", text)
        if resumed:
            text = pending.pop(process) + text[resumed.end() :]
        name = text.partition("(")[0]
        if name in ("openat", "open") and "O_CREAT" not in text:
            continue
        found = re.findall(r'<([^<>]+)>|"([^"]*)"(?!\.\.\.)', text)  # what three dots follow is data
        paths = [os.path.join(str(place), of_descriptor or word) for of_descriptor, word in found]
        if name == "unlinkat" and len(paths) > 1:
            paths = [os.path.join(*paths[:2])]
        target = paths[0] if name == "sendfile" else paths[-1]
        if target.startswith(f"{place}/"):
            calls.append((ALIKE.get(name, name), target))
        elif name == "fsync" and paths[:1] == [str(place)]:
            calls.append((name, str(place)))
    return calls


@pytest.mark.parametrize("argv", [["in.pth", "out.pth"], ["in", "out", "--shard-size", "20kB"]], ids=["file", "folder"])
@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
def test_what_is_renamed_is_on_the_disk_and_the_folder_after_it(place, strace, argv, force):
    """After a power loss at any moment there is either the old result or the new one: this order is what it rests on."""
    words = ["run", "dataparallel", *argv, "--quiet", *(["--force"] if force else [])]
    if force:
        assert strace(*words).returncode == 0
    assert strace(*words).returncode == 0
    calls = traced(place)
    out, names = place / argv[1], [name for name, _ in calls]
    (renamed,) = [at for at, (name, path) in enumerate(calls) if name.startswith("rename") and path == str(out)]
    staged = {path for name, path in calls[:renamed] if name in ("write", "ftruncate")}
    assert len(staged) == (1 if out.is_file() else len(list(out.iterdir())))
    for path in staged:
        last_change = max(
            at for at, call in enumerate(calls) if call[1] == path and call[0] in ("create", "write", "ftruncate", "fallocate", "chmod")
        )
        synced = [at for at, call in enumerate(calls) if call == ("fsync", path)]
        assert synced, f"{path} is never synced"
        assert last_change < synced[-1] < renamed
    if out.is_dir():
        (folder,) = {os.path.dirname(path) for path in staged}
        assert any(call == ("fsync", folder) for call in calls[:renamed]), "nor are the names in the new folder"
    after = [at for at, call in enumerate(calls) if call == ("fsync", str(place)) and at > renamed]
    assert after, "the rename itself is never synced"
    assert all(at > after[0] for at in range(renamed, len(calls)) if names[at] == "unlink"), "the old result goes when the new one is safe"


def test_without_sync_nothing_is_waited_for(place, strace):
    assert strace("run", "dataparallel", "in.pth", "out.pth", "--quiet", "--no-sync").returncode == 0
    assert [name for name, _ in traced(place) if "sync" in name] == []


def test_the_library_of_faults_sees_every_call_that_the_kernel_sees(place, strace, commands):
    """What the sweeps over all calls are worth: Python asks the C library for each of them, and nothing goes around it."""
    env = {"LD_PRELOAD": str(commands.library), "FAULT_ROOT": f"{place}/", "FAULT_LOG": str(commands.log)}
    commands.log.write_bytes(b"")
    assert strace("run", "dataparallel", "in", "out", "--shard-size", "20kB", "--threads", "1", "--quiet", env=env).returncode == 0
    seen = [call for call in commands.calls() if call[0] != "flock"]
    # Early write-back is a hint that nothing depends on, and no call that can fail: it is not swept.
    kernel = [call for call in traced(place) if call[1] != str(place) and call[0] != "sync_file_range"]
    assert len(seen) > 15
    assert sorted(call for call in seen) == sorted(kernel)


@pytest.mark.parametrize(
    "fault", ["pwrite64:error=ENOSPC:when=1", "pwrite64:error=ENOSPC:when=3+", "fsync:error=EIO:when=1", "fallocate:error=ENOSPC:when=1"]
)
def test_an_error_of_the_kernel(place, strace, fault):
    (place / "out.pth").write_bytes(b"old")
    done = strace("run", "dataparallel", "in.pth", "out.pth", "--force", inject=[fault])
    reason = "no space left on the disk" if "ENOSPC" in fault else os.strerror(errno.EIO)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith(f"error: {place}/out.pth  [CK503]\n  the output cannot be written: {reason}\n")
    assert (place / "out.pth").read_bytes() == b"old"
    assert sorted(path.name for path in place.iterdir()) == ["in", "in.pth", "out.pth", "trace"]


@pytest.mark.parametrize(
    "fault", ["rename:signal=KILL:when=1", "fsync:signal=KILL:when=1", "fsync:signal=KILL:when=2", "pwrite64:signal=KILL:when=2"]
)
def test_a_kill_from_the_kernel(place, strace, commands, fault):
    (place / "out.pth").write_bytes(b"old")
    done = strace("run", "dataparallel", "in.pth", "out.pth", "--force", inject=[fault])
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    found = contents(place / "out.pth")
    assert commands.run("run", "dataparallel", "in.pth", "out.pth", "--force", cwd=place).code == 0
    assert found in (b"old", contents(place / "out.pth"))
    assert (found == b"old") == (fault != "fsync:signal=KILL:when=2")
    assert sorted(path.name for path in place.iterdir()) == ["in", "in.pth", "out.pth", "trace"]
