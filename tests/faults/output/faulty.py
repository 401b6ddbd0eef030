"""What the tests of output faults share: commands with a fault in them, and what may stand there afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
SIGNALS = {"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}
INTERRUPTED = "interrupted: the output is whole, or as it was before\n"


def required(tool, package):
    """Skips where a tool is missing; where continuous integration misses it, its set-up is broken, and that is a failure."""
    found = shutil.which(tool)
    if found is None:
        missing = f"{tool} is not installed; scripts/system_packages.sh installs {package}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    return found


def shim(folder):
    """The library of faulty calls, compiled."""
    library = folder / "faulty.so"
    subprocess.run([required("cc", "gcc"), "-O1", "-shared", "-fPIC", "-o", library, HERE / "faulty.c", "-ldl"], check=True)
    return library


@dataclass(frozen=True)
class Done:
    code: int  #: negative: died by this signal
    out: str
    err: str
    maxrss: int


class Commands:
    """Runs the command again and again, each time in a fresh child of one process that has everything imported."""

    def __init__(self, folder):
        self.folder, self.library = folder, shim(folder)
        self.out, self.err, self.log = folder / "out", folder / "err", folder / "log"
        self.environment = {**os.environ, "LD_PRELOAD": str(self.library), "COLUMNS": "160", "NO_COLOR": "1"}
        self.server = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "warm.py"], cwd=ROOT, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        assert self.server.stdout.readline() == "ready\n"

    def close(self):
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()

    def run(self, *argv, cwd, fault="", env=None, limits=None, umask=0o022, out=None, plain=False, during=None):
        """``fault`` strikes below ``cwd``; ``plain`` takes root's powers away; ``during`` is called with the process id while it runs."""
        for path in (self.out, self.err, self.log):
            path.write_bytes(b"")
            path.chmod(0o666)
        faults = {"FAULT": fault, "FAULT_ROOT": f"{cwd}/", "FAULT_LOG": str(self.log)}
        job = {
            "argv": [str(word) for word in argv], "cwd": str(cwd), "env": {**self.environment, **faults, **(env or {})}, "limits": limits or {}, "umask": umask,
            "out": str(out or self.out), "err": str(self.err), "plain": plain,
        }  # fmt: skip
        print(json.dumps(job), file=self.server.stdin, flush=True)
        child = int(self.server.stdout.readline())
        try:
            if during is not None:
                during(child)
        finally:
            answer = json.loads(self.server.stdout.readline())
        return Done(answer["code"], self.out.read_text(), self.err.read_text(), answer["maxrss"])

    def calls(self):
        """Name and path of every call that the last command made to change something."""
        return [tuple(line.split("\t")[:2]) for line in self.log.read_text().splitlines()]

    def counts(self):
        return Counter(name for name, _ in self.calls())


def while_stopped(deed):
    """For ``during``: waits until a fault ``kill=19`` has stopped the process, does the deed, and lets it go on."""

    def strike(child):
        end = time.monotonic() + 60
        while Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            assert time.monotonic() < end, "it never stopped"
            time.sleep(0.001)
        deed()
        os.kill(child, signal.SIGCONT)

    return strike


# ---------------------------------------------------------------------------------------------------------------- conversions


def everything(folder):
    """All that is below a folder: bytes of files, targets of links, and modes."""
    return {
        str(path.relative_to(folder)): (
            oct(path.lstat().st_mode),
            os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes(),
        )
        for path in sorted(folder.rglob("*"))
    }


def contents(path):
    """A file's bytes, a folder's files with theirs, or None."""
    if path.is_dir():
        return {each.name: each.read_bytes() for each in sorted(path.iterdir())}
    return path.read_bytes() if path.exists() else None


def write_source(folder):
    """A checkpoint of two shards with its companion: enough for every kind of write."""
    source = folder / "in"
    source.mkdir()
    for at in (1, 2):
        values = {f"module.l.{at}.w": torch.arange(3000 * at, dtype=torch.float32), f"module.l.{at}.b": torch.ones(3)}
        save_file(values, source / f"model-{at:05}-of-00002.safetensors")
    keys = {f"module.l.{at}.{name}": f"model-{at:05}-of-00002.safetensors" for at in (1, 2) for name in "wb"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": keys}))
    (source / "config.json").write_text('{"model_type": "x"}')
    return source


class Conversion:
    """One kind of conversion, fresh or over an old result, in a folder of its own that can be set back."""

    def __init__(self, folder, commands, kind):
        self.folder, self.commands, self.kind = folder / kind, commands, kind
        self.folder.mkdir()
        self.source = write_source(self.folder)
        self.name = {"file": "out.pth", "folder": "out"}[kind.split("-")[0]]
        self.output = self.folder / self.name
        more = [] if self.name == "out.pth" else ["--shard-size", "24kB", "--format", "torch"]
        self.argv = ["run", "dataparallel", "in", self.name, "--force", *more]
        self.old = None
        done = self.run()
        assert done.code == 0, done.err
        self.new, self.calls = contents(self.output), commands.calls()
        self.read = contents(self.source)
        if kind.endswith("replaced"):
            assert commands.run(*self._older(), cwd=self.folder).code == 0
            self.old = contents(self.output)
            assert self.old != self.new
            shutil.copytree(self.output, self.folder / "kept") if self.output.is_dir() else shutil.copyfile(
                self.output, self.folder / "kept"
            )
            assert self.run().code == 0
            assert contents(self.output) == self.new
            self.calls = commands.calls()
        self.reset()

    def _older(self):
        """Another conversion to the same place: its result is told from the new one by every file."""
        (self.folder / "older.yaml").write_text("version: 1\nname: older\nsummary: s\nsteps:\n  - {strip_prefix: module.}\n")
        return ["run", "older.yaml", *self.argv[2:]]

    def reset(self):
        for path in self.folder.iterdir():
            if path.name.startswith((".out", "out")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept = self.folder / "kept"
        if kept.is_dir():
            shutil.copytree(kept, self.output)
        elif kept.exists():
            shutil.copyfile(kept, self.output)

    def run(self, fault="", **options):
        return self.commands.run(*self.argv, cwd=self.folder, fault=fault, **options)

    def left(self):
        """What stands there beside source and output."""
        return sorted(path.name for path in self.folder.iterdir() if path.name not in ("in", self.name, "kept", "older.yaml"))

    def state(self):
        """``old`` or ``new``; anything else fails. The source is as it was."""
        assert contents(self.source) == self.read, "the source was touched"
        found = contents(self.output)
        if found == self.new:
            return "new"
        assert found == self.old, f"neither the old nor the new result stands: {found if found is None else sorted(found)}"
        return "old"

    def run_again(self):
        """The next run, by someone who does not know what happened."""
        done = self.run()
        assert (done.code, done.err) == (0, ""), done.err
        assert self.state() == "new"
        assert self.left() == []

    def moments(self, step):
        """The numbers of the calls to strike at: every one in a long run; else all but the writes, and of these every ``step``-th."""
        writes = 0
        for at, (name, _) in enumerate(self.calls, 1):
            writes += name == "write"
            if LONG or name != "write" or writes % step == 1:
                yield at


LONG = os.environ.get("FAULTS") == "long"  #: `make torture`: every moment, not a sample of them
KINDS = ("file", "file-replaced", "folder", "folder-replaced")
