"""What tests share: the command line as a person uses it, and a model or two."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def ckptconv(*arguments, cwd=None, env=None, timeout=120, stdin=None):
    """Runs the command in a process of its own, as a person would."""
    command = [sys.executable, "-m", "ckptconv", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", **(env or {})}
    done = subprocess.run(
        command, cwd=cwd or ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False, input=stdin
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def cli():
    return ckptconv


def listing(folder):
    """Every file under a folder with its bytes: nothing may be left behind, and nothing touched."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture
def snapshot():
    return listing
