"""The engine of a batch on this machine: processes that live as long as the batch, each with one checkpoint at a time.

A worker is told of its work in lines of JSON on its standard input, and answers in lines of JSON. One that dies takes nothing but its own
checkpoint with it; one whose batch is gone ends, with its output whole or as it was before.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import IO

from msgspec.structs import asdict

from ckptconv.errors import OUTPUT, Problem, printable
from ckptconv.signals import Signalled, begin
from ckptconv.stage.batching import Answer, Request, convert
from ckptconv.target.building import _environment

_PATIENCE = 10.0  #: seconds that a worker has to clean up
_TELL_EVERY = 0.1  #: seconds
#: A worker's first lines: the working folder goes off the path before anything is imported from it.
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append(sys.argv.pop(1)); "
    "from ckptconv.stage.batch_workers import main; main()"
)

Tell = Callable[[int, int, int], None]


class Workers:
    """``count`` processes that convert; an :data:`~ckptconv.stage.batching.Engine`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, requests: Sequence[Request], tell: Tell) -> Generator[Answer, None, None]:
        """Each request's answer as it comes. Leaving early ends the workers."""
        waiting, answers = deque(requests), Queue[Answer | BaseException]()
        hands = [_Hand(waiting, answers, tell) for _ in range(min(self.count, len(requests)))]
        threads = [threading.Thread(target=hand.work, name="ckptconv-batch", daemon=True) for hand in hands]
        try:
            for thread in threads:
                thread.start()
            for _ in requests:
                yield _next(answers)
        finally:
            waiting.clear()
            for hand in hands:
                hand.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


def _next(answers: Queue[Answer | BaseException]) -> Answer:
    while True:
        try:
            answer = answers.get(timeout=0.2)  # in short turns, so that Ctrl-C is heard
        except Empty:
            continue
        if isinstance(answer, BaseException):
            raise answer
        return answer


class _Hand:
    """One worker, and the thread that hands it its work; a new worker where one died."""

    def __init__(self, waiting: deque[Request], answers: Queue[Answer | BaseException], tell: Tell) -> None:
        self._waiting, self._answers, self._tell = waiting, answers, tell
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def work(self) -> None:
        try:
            while not self._stopped:
                try:
                    request = self._waiting.popleft()
                except IndexError:
                    return
                self._answers.put(self._done(request))
        except BaseException as error:  # no process can be started, say: the batch is told, and does not wait for ever
            self._answers.put(error)
        finally:
            self._let_go()

    def _done(self, request: Request) -> Answer:
        child = self._started()
        if child is not None:
            assert child.stdin is not None, "it was started with pipes"
            assert child.stdout is not None, "it was started with pipes"
            try:
                child.stdin.write(json.dumps(asdict(request)) + "\n")
                child.stdin.flush()
                for line in child.stdout:
                    said = json.loads(line)
                    if "done" not in said:
                        return Answer(**{**said, "problems": tuple(said["problems"])})
                    self._tell(request.number, said["done"], said["total"])
            except (BrokenPipeError, ValueError):  # it died in the middle of a word
                pass
        return self._lost(request)

    def _started(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._child is None and not self._stopped:
                # A session of its own: Ctrl-C is for the batch, which then ends its workers.
                self._child = subprocess.Popen(
                    [sys.executable, "-c", _START, str(Path(__file__).parent.parent.parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    text=True, encoding="ascii", start_new_session=True, env=_environment(),
                )  # fmt: skip
            return self._child

    def _lost(self, request: Request) -> Answer:
        code = self._let_go(kill=True)
        ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        hint = (
            "memory may have run out: --jobs 1, or --max-memory" if code == -signal.SIGKILL else "run again: only what is missing is done"
        )
        problem = Problem("CK510", f"the process that converted it ended {ended}", where=printable(request.source), try_=hint)
        return Answer(request.number, problems=(problem.to_json(),), exit_code=OUTPUT)

    def stop(self) -> None:
        """Asks the worker to end now."""
        with self._lock:
            self._stopped = True
            if self._child is not None:
                self._child.terminate()

    def _let_go(self, *, kill: bool = False) -> int:
        """The worker is gone, and everything that it started. Gives back how it ended."""
        with self._lock:
            child, self._child = self._child, None
        if child is None:
            return 0
        assert child.stdin is not None, "it was started with pipes"
        assert child.stdout is not None, "it was started with pipes"
        try:
            child.stdin.close()
        except BrokenPipeError:
            pass
        try:
            code = child.wait(1 if kill else _PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        child.stdout.close()
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return code


def main() -> None:
    """A worker: a request a line, until there are none. Ends at once, and tidily, where the batch is gone."""
    begin()
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no answer
    requests, idle = Queue[str](), threading.Event()
    idle.set()
    threading.Thread(target=_listen, args=(sys.stdin, requests, idle), daemon=True).start()
    code = 0
    try:
        while line := requests.get():
            _answer(Request(**json.loads(line)), answers)
            idle.set()
    except BrokenPipeError:
        pass
    except Signalled as signalled:
        code = 128 + signalled.number
    sys.stderr.flush()
    os._exit(code)  # nobody waits for threads of a library


def _answer(request: Request, answers: IO[str]) -> None:
    last = 0.0

    def say(data: object) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    def tell(_stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _TELL_EVERY:
            last = now
            say({"done": done, "total": total})

    say(asdict(convert(request, tell)))


def _listen(stream: IO[str], requests: Queue[str], idle: threading.Event) -> None:
    for line in stream:
        idle.clear()
        requests.put(line)
    if not idle.is_set():  # the batch is gone while we work for it
        os.kill(os.getpid(), signal.SIGTERM)
    requests.put("")
