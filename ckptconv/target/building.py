"""Targets as manifests, and strict loading into them. Models are built by a child process with a time limit."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptconv import formats
from ckptconv.errors import FitError, InputError, Problem, Refusal, UsageError, printable
from ckptconv.formats.strict import opened, read_at
from ckptconv.spec import Manifest
from ckptconv.target.loading import StrictResult
from ckptconv.target.words import Target

MAX_ANSWER = 1 << 28
MAX_MANIFEST = 64 << 20  #: bytes (docs/limits.md)
_TAIL = 1500


def manifest_of(target: Target, *, timeout: float = 300.0) -> Manifest:
    """Names, shapes, dtypes, ties and buffers of what the checkpoint must load into, with notes on what they do not tell.

    Raises :class:`~ckptconv.errors.FitError` CK406 where the target cannot be built, with the reason.
    """
    if target.kind == "manifest":
        return _saved(target)
    if target.kind == "checkpoint":
        try:
            contents = formats.read(target.path)
        except Refusal as refusal:
            raise InputError(refusal.at(printable(target.text))) from None
        except OSError as error:
            what = f"the target cannot be opened: {error.strerror or error}"
            raise InputError(Problem("CK310", what, where=printable(target.text))) from None
        if len(contents.containers) != 1 and "." not in contents.containers:
            listed = ", ".join(map(printable, contents.containers)) or "none"
            raise InputError(Problem("CK309", "the target file must hold one state_dict", where=printable(target.text), found=listed))
        return contents.containers["." if "." in contents.containers else next(iter(contents.containers))].manifest
    answer = _ask(target, {"what": "manifest"}, timeout)
    return replace(Manifest.from_json(answer["manifest"]), notes=tuple(answer["notes"]))


def strict_load(
    target: Target, files: Sequence[Path], format: str, *, timeout: float = 300.0, allow_missing: Sequence[str] = (),  # noqa: A002
    allow_unexpected: Sequence[str] = (), container: str = ".",
) -> StrictResult:  # fmt: skip
    """The model, built on the meta device, loads the written ``files`` (mapped, not read) with ``strict=True, assign=True``."""
    request = {
        "what": "load", "files": [str(file.absolute()) for file in files], "format": format, "allow_missing": list(allow_missing),
        "allow_unexpected": list(allow_unexpected), "container": [] if container == "." else container.split("."),
    }  # fmt: skip
    answer = _ask(target, request, timeout)
    return StrictResult(answer["loaded"], answer["error"], tuple(answer["missing"]), tuple(answer["unexpected"]), tuple(answer["notes"]))


def _saved(target: Target) -> Manifest:
    try:
        with opened(target.path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > MAX_MANIFEST:
                raise ValueError(f"a manifest has at most {MAX_MANIFEST:,} bytes; this one has {size:,}")
            return Manifest.from_json(json.loads(read_at(descriptor, size, 0)))
    except OSError as error:
        raise UsageError(Problem("CK107", f"the manifest cannot be read: {error.strerror}", where=printable(target.text))) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(Problem("CK107", printable(error), where=printable(target.text))) from None


def _ask(target: Target, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """One request to a child process, and its answer."""
    full = {
        **request, "kind": target.kind, "name": target.name, "path": str(target.path.absolute()) if target.kind == "hf" else "",
        "arguments": list(target.arguments), "working_folder": os.getcwd(),
    }  # fmt: skip
    answer_read, answer_write = os.pipe()
    start = [sys.executable, "-c", _START, str(Path(__file__).parent.parent.parent)]
    with tempfile.TemporaryFile() as request_file:
        request_file.write(json.dumps(full).encode())
        request_file.seek(0)
        try:
            child = subprocess.Popen(
                [*start, str(request_file.fileno()), str(answer_write)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=(request_file.fileno(), answer_write), start_new_session=True, env=_environment(),
            )  # fmt: skip
        finally:
            os.close(answer_write)
        said = _Tail(child)
        try:
            raw = _collected(answer_read, child, timeout)
        finally:
            os.close(answer_read)
            _end(child)
        tail = said.text()
    where = printable(target.text)
    if raw is None:
        raise FitError(Problem("CK406", f"building the target took longer than {timeout:g} s", where=where, try_="--timeout SECONDS"))
    try:
        answer = json.loads(raw)
    except ValueError:
        found = printable(tail.strip().splitlines()[-1]) if tail.strip() else ""
        code = child.returncode
        ended = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        hint = "memory may have run out" if code == -signal.SIGKILL else ""
        what = f"building the target ended {ended}, without an answer"
        raise FitError(Problem("CK406", what, where=where, found=found, try_=hint)) from None
    if "failed" in answer:
        raise FitError(Problem(answer["code"], printable(answer["failed"], 600), where=where, try_=printable(answer["try"], 300)))
    return dict(answer)


#: The child's first lines: the working folder goes off the path before anything is imported from it.
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append(sys.argv.pop(1)); from ckptconv.target.child import main; main()"
)


def _environment() -> dict[str, str]:
    """Ours, with the working folder taken off PYTHONPATH: ``PYTHONPATH=:/lib`` names it too, and first."""
    here = os.path.realpath(os.curdir)
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folder for folder in named if folder and os.path.realpath(folder) != here)}


class _Tail:
    """The end of what a child prints: read all the time, so that it never waits for us, and forgotten but for the last lines."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None, "it was started with a pipe"
        self._pipe, self._end = child.stdout, b""
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while part := os.read(self._pipe.fileno(), 1 << 16):
            self._end = (self._end + part)[-_TAIL:]

    def text(self) -> str:
        """What was kept; the child is gone by now."""
        self._thread.join(5)
        self._pipe.close()
        return self._end.decode("utf-8", "replace")


def _collected(descriptor: int, child: subprocess.Popen[bytes], timeout: float) -> bytes | None:
    """Everything that comes out of the pipe, or None when time is up."""
    parts: list[bytes] = []
    deadline, size = time.monotonic() + timeout, 0
    poller = select.poll()  # select() knows no descriptor past 1023
    poller.register(descriptor, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        if poller.poll(min(left, 0.5) * 1000):
            part = os.read(descriptor, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER:
                return b"".join(parts)
        elif child.poll() is not None and not poller.poll(0):
            # Dead, and nothing left to read: a grandchild may still hold the pipe open.
            return b"".join(parts)


def _end(child: subprocess.Popen[bytes]) -> None:
    """The child and everything that it started are gone."""
    try:
        child.wait(0.5)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()
