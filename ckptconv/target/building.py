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
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from msgspec.structs import replace

from ckptconv import formats
from ckptconv.errors import FitError, InputError, Problem, Refusal, UsageError, printable
from ckptconv.formats.strict import cannot_open, opened, read_at
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
            raise InputError(Problem("CK310", what, where=printable(target.text), try_=cannot_open(error).try_)) from None
        if len(contents.containers) != 1 and "." not in contents.containers:
            listed = ", ".join(map(printable, contents.containers)) or "none"
            raise InputError(Problem("CK309", "the target file must hold one state_dict", where=printable(target.text), found=listed))
        return contents.containers["." if "." in contents.containers else next(iter(contents.containers))].manifest
    with Builder(target) as builder:
        return builder.manifest(timeout)


def strict_load(
    target: Target, files: Sequence[Path], format: str, *, timeout: float = 300.0, allow_missing: Sequence[str] = (),  # noqa: A002
    allow_unexpected: Sequence[str] = (), container: str = ".",
) -> StrictResult:  # fmt: skip
    """The model, built on the meta device, loads the written ``files`` (mapped, not read) with ``strict=True, assign=True``."""
    with Builder(target) as builder:
        return builder.strict_load(
            files, format, timeout=timeout, allow_missing=allow_missing, allow_unexpected=allow_unexpected, container=container
        )


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


class Builder:
    """A model as a target, and the process that builds it: once, to say what it wants, and kept there to be loaded into later.

    The process is started when it is first asked something, ends with the object, and, should it have ended before, is started anew.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._child: _Child | None = None

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process. What is asked afterwards starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def manifest(self, timeout: float = 300.0) -> Manifest:
        """What :func:`manifest_of` gives."""
        answer = self._ask({"what": "manifest"}, timeout)
        return replace(Manifest.from_json(answer["manifest"]), notes=tuple(answer["notes"]))

    def strict_load(
        self, files: Sequence[Path], format: str, *, timeout: float = 300.0, allow_missing: Sequence[str] = (),  # noqa: A002
        allow_unexpected: Sequence[str] = (), container: str = ".",
    ) -> StrictResult:  # fmt: skip
        """What :func:`strict_load` does."""
        answer = self._ask({
            "what": "load", "files": [str(file.absolute()) for file in files], "format": format, "allow_missing": list(allow_missing),
            "allow_unexpected": list(allow_unexpected), "container": [] if container == "." else container.split("."),
        }, timeout)  # fmt: skip
        return StrictResult(
            answer["loaded"], answer["error"], tuple(answer["missing"]), tuple(answer["unexpected"]), tuple(answer["notes"])
        )

    def _ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        target, where = self.target, printable(self.target.text)
        full = {
            **request, "kind": target.kind, "name": target.name, "path": str(target.path.absolute()) if target.kind == "hf" else "",
            "arguments": list(target.arguments), "working_folder": os.getcwd(),
        }  # fmt: skip
        kept, self._child = self._child, self._child or _Child()
        done = False
        try:
            raw = self._child.ask(json.dumps(full).encode(), timeout)
            if kept is not None and raw is not None and not raw.endswith(b"\n"):  # it ended while nobody asked
                self.close()
                self._child = _Child()
                raw = self._child.ask(json.dumps(full).encode(), timeout)
            if raw is None:
                raise FitError(
                    Problem("CK406", f"building the target took longer than {timeout:g} s", where=where, try_="--timeout SECONDS")
                )
            try:
                answer = json.loads(raw)
            except ValueError:
                raise FitError(self._child.ended(where)) from None
            if "failed" in answer:
                raise FitError(Problem(answer["code"], printable(answer["failed"], 600), where=where, try_=printable(answer["try"], 300)))
            done = True
            return dict(answer)
        finally:
            if not done:
                self.close()


class _Child:
    """A process that builds models; see :mod:`ckptconv.target.child`. It ends when this object does."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            self._request = stack.enter_context(tempfile.TemporaryFile())  # a pipe would hold only so much of a request
            asked, self._asking = os.pipe()
            stack.callback(os.close, self._asking)
            self._answer, answering = os.pipe()
            stack.callback(os.close, self._answer)
            start = [sys.executable, "-c", _START, str(Path(__file__).parent.parent.parent)]
            passed = (self._request.fileno(), asked, answering)
            try:
                self._process = subprocess.Popen(
                    [*start, *map(str, passed)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    pass_fds=passed, start_new_session=True, env=_environment(),
                )  # fmt: skip
            finally:
                os.close(asked)
                os.close(answering)
            self._tail = _Tail(self._process)
            stack.callback(self._tail.close)
            stack.callback(_end, self._process)
            self.end = weakref.finalize(self, stack.pop_all().close)

    def ask(self, request: bytes, timeout: float) -> bytes | None:
        """A line of answer; less than that where the process ended, None when time is up."""
        self._request.seek(0)
        self._request.truncate()
        self._request.write(request)
        self._request.flush()
        try:
            os.write(self._asking, b".")
        except BrokenPipeError:
            return b""
        return _collected(self._answer, self._process, timeout, b"\n")

    def ended(self, where: str) -> Problem:
        """The process is gone, and left no answer."""
        self.end()
        tail, code = self._tail.text().strip(), self._process.returncode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return Problem("CK406", f"building the target ended {how}, without an answer", where=where,
                       found=printable(tail.splitlines()[-1]) if tail else "",
                       try_="memory may have run out" if code == -signal.SIGKILL else "")  # fmt: skip


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

    def close(self) -> None:
        """The child is gone by now."""
        self._thread.join(5)
        self._pipe.close()

    def text(self) -> str:
        """What was kept."""
        return self._end.decode("utf-8", "replace")


def _collected(descriptor: int, child: subprocess.Popen[bytes], timeout: float, last: bytes = b"") -> bytes | None:
    """What comes out of the pipe until it is closed, or something ends with ``last``; None when time is up."""
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
            if size > MAX_ANSWER or (last and part.endswith(last)):
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
