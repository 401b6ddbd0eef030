"""What tests share: the command line as a person uses it, and a model or two."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

# The workers of a run, and the processes that they start, share the processors: torch's threads would spin and wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
ROOT = TESTS.parent


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def _environment(env):
    return {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", **(env or {})}


def started(*arguments, cwd=None, env=None, timeout=120, stdin=None):
    """Runs the command in a process of its own, as a person would."""
    command = [sys.executable, "-m", "ckptconv", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd or ROOT, env=_environment(env), capture_output=True, text=True, timeout=timeout, check=False, input=stdin
    )
    return Result(done.returncode, done.stdout, done.stderr)


class Warm:
    """A process that has the commands imported, and runs each in a child: what a command costs is its work, not the start of Python."""

    def __init__(self, folder):
        self.said = {stream: folder / stream for stream in ("in", "out", "err")}
        self.server = subprocess.Popen([sys.executable, TESTS / "warm.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout.readline() == "ready\n"

    def run(self, *arguments, cwd=None, env=None, timeout=120, stdin=None):
        for stream, path in self.said.items():
            path.write_text(stdin or "" if stream == "in" else "")
        job = {
            "argv": [str(word) for word in arguments], "cwd": os.path.abspath(cwd or ROOT), "env": _environment(env),
            **{stream: str(path) for stream, path in self.said.items()},
        }  # fmt: skip
        print(json.dumps(job), file=self.server.stdin, flush=True)
        child = int(self.server.stdout.readline())
        ending = threading.Timer(timeout, os.kill, (child, 9))
        ending.start()
        try:
            answer = json.loads(self.server.stdout.readline())
        finally:
            ending.cancel()
        return Result(answer["code"], self.said["out"].read_text(), self.said["err"].read_text())

    def close(self):
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()


@pytest.fixture(scope="session")
def _warm(tmp_path_factory):
    made = Warm(tmp_path_factory.mktemp("warm"))
    yield made
    made.close()


@pytest.fixture
def cli(_warm):
    """The command line: exit code, stdout, stderr. Each call runs in a child of one process that has the commands imported, but not torch."""
    return _warm.run


@pytest.fixture
def process():
    """The same, from the start of Python on: for what lies in the start, and for the README's commands."""
    return started


def listing(folder):
    """Every file under a folder with its bytes: nothing may be left behind, and nothing touched."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture
def snapshot():
    return listing
