"""The contract of every fault, asserted in one place: exit code, whole message, nothing left behind, little time, little memory.

Each case is a child process forked from a warm one (``server.py``): limits and isolation as for a command started by hand, at twenty
milliseconds instead of a second. What is only different bytes to one reader, by the thousand, is swept inside the test's own process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: A bad input costs at most this much (seconds of processor time; MiB above what an idle process has).
SECONDS, MB = 5, 512
#: A target is built in a process of its own, which is asked through a temporary file that has no name.
_CHILD = re.compile(r"^(subprocess\.Popen|os\.posix_spawn|os\.fork|tempfile\.)|^(open|os\.remove) (\.\./)*(\.\.|[a-z0-9_]{8})$")
_STAGING = re.compile(
    r"^(open|os\.(remove|link|rename|mkdir|rmdir)|shutil\.rmtree) \.out[^ /]*\.partial(/|$)|^os.truncate [0-9]+$|^ctypes\.dlopen None$"
)
#: Passes everything: what is wrong lies in the source.
PASS = "version: 1\nname: pass\nsummary: passes everything\nsteps:\n  - drop: {keys: nothing.at.all, optional: true}\n"


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str
    events: tuple[str, ...]  #: what the audit hook noted
    seconds: float
    peak_nbytes: int
    left: bool  #: a process was still running


class Server:
    """The warm process. ``torch``: with torch imported, for cases that compute."""

    def __init__(self, torch: bool = False) -> None:
        command = [sys.executable, str(Path(__file__).with_name("server.py")), *(["torch"] if torch else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, cwd: Path, arguments: tuple[str, ...], env: Mapping[str, str], seconds: int, mb: int) -> Outcome:
        """Runs ``ckptconv`` with ``arguments`` in ``cwd``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        said = [cwd.parent / f"{cwd.name}.{stream}" for stream in ("out", "err")]
        for path in said:
            path.write_bytes(b"")
        request = {"cwd": str(cwd), "arguments": arguments, "out": str(said[0]), "err": str(said[1]), "seconds": seconds, "mb": mb,
                   "env": {"COLUMNS": "160", "NO_COLOR": "1", **env}}  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        out, err = (path.read_bytes().decode("utf-8", "surrogateescape") for path in said)
        return Outcome(answer["code"], out, err, tuple(answer["events"]), answer["seconds"], answer["peak_nbytes"], answer["left"])

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def digest(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below ``folder``: kind, mode, and bytes or where a link leads."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content: Any = None
        if stat.S_ISLNK(kind):
            content = os.readlink(path)
        elif stat.S_ISREG(kind) and os.access(path, os.R_OK):
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "blake2b").hexdigest() if hasattr(hashlib, "file_digest") else path.read_bytes()
        found[str(path.relative_to(folder))] = (kind, stat.S_IMODE(status.st_mode), status.st_size if content is not None else 0, content)
    return found


def message(where: str, code: str, what: str, found: str = "", try_: str = "") -> str:
    """A problem as it is printed, every line of it."""
    lines = [f"error: {where}  [{code}]" if where else f"error: [{code}]", f"  {what}"]
    return "\n".join([*lines, *([f"  found: {found}"] if found else []), *([f"  try: {try_}"] if try_ else [])]) + "\n"


@dataclass
class Box:
    """A sandbox: an empty folder with a rule file that passes everything, and the commands that are run in it."""

    folder: Path
    servers: Mapping[bool, Server]
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.write("pass.yaml", PASS)

    def write(self, name: str, data: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def run(self, *arguments: object, torch: bool = False, seconds: int = SECONDS, mb: int = MB) -> Outcome:
        """Runs a command within the limits, whatever comes of it. Nobody's signal ends it, and nothing of it goes on running."""
        outcome = self.servers[torch].run(self.folder, tuple(map(str, arguments)), self.env, seconds, mb)
        assert outcome.code >= 0, f"ended by signal {-outcome.code} (limits: {seconds} s, {mb} MB)\n{outcome.err}"
        assert "Traceback" not in outcome.err, outcome.err
        assert not outcome.left, "a process was left running"
        assert outcome.peak_nbytes < (mb or MB) << 20
        assert "\x1b" not in outcome.err + outcome.out, "a file's text reached the terminal unescaped"
        return outcome

    def refuses(self, code: int, text: str, *arguments: object, staged: bool = False, child: bool = False, **limits: Any) -> Outcome:
        """The command ends with ``code`` and ``text`` on stderr, to the letter, and the folder is as it was: nothing written anywhere,
        nothing run, nothing asked of the network. ``staged``: it may have begun to write, beside the output's place, and took that away;
        ``child``: it may have asked a process of its own to build a target.
        """
        before, outside = digest(self.folder), self._outside()
        outcome = self.run(*arguments, **limits)
        assert (outcome.code, outcome.err) == (code, text)
        unexplained = [
            event for event in outcome.events if not (staged and _STAGING.search(event)) and not (child and _CHILD.search(event))
        ]
        assert unexplained == [], "no reader of a bad file has a reason for these"
        assert digest(self.folder) == before
        assert self._outside() == outside
        return outcome

    def _outside(self) -> set[str]:
        """What lies beside the sandbox, but for what the commands said."""
        return {*os.listdir(self.folder.parent)} - {f"{self.folder.name}.{stream}" for stream in ("out", "err")}

    def converts(self, *arguments: object, source: str = "in.pth", **limits: Any) -> Outcome:
        """The command succeeds; the source is as it was, and beside the output there is nothing new."""
        before = digest(self.folder)
        outcome = self.run(*(arguments or ("run", "pass.yaml", source, "out.pth", "--no-sync")), **limits)
        assert outcome.code == 0, outcome.err
        after = digest(self.folder)
        assert {name: after[name] for name in before} == before
        new = {name.partition("/")[0] for name in after.keys() - before.keys()}
        assert new <= {"out.pth", "out.safetensors", "out"}, new
        return outcome
