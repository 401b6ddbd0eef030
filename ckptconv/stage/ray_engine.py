"""The cluster engine: the tasks of a plan, or the checkpoints of a batch, handed to Ray.

A thin layer over what all engines share. A Ray task opens the plan file in the work folder, does one task there as ``ckptconv work`` would, and
gives back its receipt: a few kilobytes of text. Tensors go from the source's files to the output's; Ray's object store sees none of them.
Ray says where a task runs and runs it again elsewhere when its process or its machine dies. What is done stays done when all of it dies.

Everybody in the cluster must see source and destination under the same paths, and have the same ckptconv.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict, replace

from ckptconv.errors import CkptconvError, FitError, InputError, OutputError, Problem, UsageError, printable
from ckptconv.execute import receipts
from ckptconv.execute.claims import Claims
from ckptconv.execute.receipts import MAX_RECEIPT
from ckptconv.stage import working
from ckptconv.stage.batching import Answer, Request, convert
from ckptconv.stage.planfile import How, open_job, plan_for_work
from ckptconv.stage.producing import Conversion, Produced, Progress

if TYPE_CHECKING:
    from ckptconv.stage.working import Job

RETRIES = 3  #: how often Ray begins a task again whose process or machine died
PLAN = "plan.json"  #: in the work folder: what every worker reads
_LOOK_EVERY = 0.5  # seconds, so that Ctrl-C is heard
_PATIENCE = 5.0  # seconds until a cluster's address counts as wrong
_STORE_NBYTES = 80_000_000  # of a cluster of our own: the smallest that Ray allows, since nothing goes through it


@contextmanager
def cluster(address: str | None, *, cpus: int | None = None) -> Iterator[Any]:
    """Ray, connected to the cluster at ``address`` (``auto``: the one of this machine), else to one that lives as long as the block.

    Raises :class:`~ckptconv.errors.OutputError` CK505 without Ray, CK511 where nobody answers at the address.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is told to anybody
    try:
        import ray
    except ImportError:
        raise OutputError(Problem("CK505", "--engine ray needs the package ray", try_="pip install 'ckptconv[ray]'")) from None
    if ray.is_initialized():  # the program that calls us has a connection of its own
        yield ray
        return
    if address:
        _refuse_silence(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    own = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE_NBYTES}
    with _signals_noted():
        try:
            ray.init(address=address or "local", **quiet, **({} if address else own))
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _unreachable(address or "", str(error).strip().splitlines()[0]) from None
        try:
            _note_signals()  # Ray has put a handler of its own in the place of ours
            yield ray
        finally:
            ray.shutdown()


_heard: list[int] = []
_handlers: dict[int, Any] = {}


@contextmanager
def _signals_noted() -> Iterator[None]:
    """Signals are noted until the block ends, and handled where :func:`_handle_signals` is called: an exception in the middle of Ray's own code
    would leave it in pieces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _heard.clear()
    _handlers.update({number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)})
    try:
        _note_signals()
        yield
    finally:
        for number, handler in _handlers.items():
            signal.signal(number, handler)
        _handlers.clear()
    _handle_signals()


def _note_signals() -> None:
    for number, handler in _handlers.items():
        if callable(handler):
            signal.signal(number, lambda number, _frame: _heard.append(number))


def _handle_signals() -> None:
    """What the handlers do with the signals that came meanwhile: they raise."""
    while _heard:
        number = _heard.pop(0)
        handler = _handlers.get(number) or signal.getsignal(number)
        if callable(handler):
            handler(number, None)


def _refuse_silence(address: str) -> None:
    """Ray itself waits minutes for an address where nobody is."""
    import socket

    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise _unreachable(address, str(error)) from None


def _unreachable(address: str, reason: str) -> OutputError:
    return OutputError(
        Problem("CK511", f"the cluster cannot be reached: {printable(reason)}", where=printable(address),
                try_="ray status --address ADDRESS; without --ray-address a cluster of this machine alone is begun")
    )  # fmt: skip


def run(made: Conversion, address: str | None, progress: Progress | None = None) -> Produced:
    """The conversion by a Ray cluster; what an interrupted one did is checked and kept. Byte for byte what a run by threads writes.

    Raises what :func:`~ckptconv.stage.working.resume` raises, :class:`~ckptconv.errors.OutputError` CK510 for a task whose process died again and
    again, and CK511 where no machine of the cluster is large enough.
    """
    job = working.Job(made, "ckptconv run --engine ray, as it was begun")
    with cluster(address) as ray:
        job.start(anew=made.options.force)
        damaged = job.withdraw_damaged()
        kept = job.done()
        plan_file = _write_plan(job)
        meter = made.meter(progress)
        meter.done = sum(job.tasks.tasks[number].written_nbytes for number in kept)
        tell = meter.counted("working")
        tell(0)
        for receipt in _worked(ray, job, plan_file, [task.number for task in job.tasks.tasks if task.number not in kept]):
            tell(receipt.written_nbytes)
    produced = working.finish(job, meter=meter)
    notes = [f"{len(job.tasks.tasks) - len(kept):,} tasks done by a Ray cluster"]
    notes += [f"{len(kept):,} of {len(job.tasks.tasks):,} tasks were done before, checked and kept"] if kept else []
    notes += [f"done again: {problem.what}" for problem in damaged]
    return replace(produced, notes=(*produced.notes, *notes))


def _write_plan(job: Job) -> Path:
    path = job.folder.work / PLAN
    beside = path.with_name(f".{PLAN}-{os.getpid()}")
    with job.folder.guarded():
        beside.write_text(json.dumps(plan_for_work(job.made, path)), encoding="utf-8")
        os.replace(beside, path)
    return path


def _worked(ray: Any, job: Job, plan_file: Path, numbers: Sequence[int]) -> Iterator[receipts.TaskReceipt]:
    """The receipts of tasks as they come in; the first task that fails ends the others."""
    options = job.made.options
    cpus, room = _largest(ray)
    threads = max(1, min(options.threads, int(cpus)))
    task_options = {"threads": threads, "max_memory": options.max_memory, "sync": options.sync}
    roots = [str(path) for path in _roots(job)]
    remote = ray.remote(do_task)
    calls: dict[Any, int] = {}
    for number in numbers:
        memory = job.tasks.tasks[number].memory_nbytes(threads)
        if memory > room:
            raise OutputError(
                Problem("CK511", f"task {number} needs {memory:,} bytes of memory, and no machine of the cluster offers as much",
                        where=printable(job.made.destination), found=f"{int(room):,} at most", try_="--threads 1, or a larger machine")
            )  # fmt: skip
        call = remote.options(num_cpus=threads, memory=memory, max_retries=RETRIES, name=f"ckptconv task {number}")
        calls[call.remote(str(plan_file), roots, task_options, job.fingerprint, number)] = number
    try:
        for call, number in _as_they_come(ray, calls):
            try:
                answer = ray.get(call)
            except ray.exceptions.RayTaskError:
                raise  # a fault of our own, with its traceback
            except ray.exceptions.RayError as error:
                raise OutputError(_died(f"task {number}", error, job.way_on)) from None
            yield _receipt(json.loads(answer))
    finally:
        for call in calls:
            ray.cancel(call, force=True)


def _as_they_come(ray: Any, calls: dict[Any, int]) -> Iterator[tuple[Any, int]]:
    while calls:
        done, _ = ray.wait(list(calls), num_returns=1, timeout=_LOOK_EVERY)
        _handle_signals()
        for call in done:
            yield call, calls.pop(call)


def _largest(ray: Any) -> tuple[float, float]:
    """Processors, and bytes of memory, of the largest machine in the cluster."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max(each.get("CPU", 0.0) for each in machines), max(each.get("memory", 0.0) for each in machines)


def _died(what: str, error: Exception, way_on: str) -> Problem:
    reason = printable(str(error).strip().splitlines()[0])
    return Problem(
        "CK510", f"the process that did {what} ended, {RETRIES + 1} times", found=reason, try_=f"{way_on}: only what is missing is done"
    )


def _receipt(answer: Mapping[str, Any]) -> receipts.TaskReceipt:
    if "problems" in answer:
        problems = [Problem(each["code"], each["what"], each["where"], each["found"], each["try"]) for each in answer["problems"]]
        kinds: Mapping[int, type[CkptconvError]] = {kind.exit_code: kind for kind in (UsageError, InputError, FitError, OutputError)}
        raise kinds.get(answer["exit_code"], OutputError)(problems)
    return receipts.TaskReceipt.model_validate(answer)


def _roots(job: Job) -> list[Path]:
    """Where the plan file may point to: this plan is our own."""
    files = [
        *job.made.prepared.source.files,
        *job.made.prepared.source.contents.neighbours,
        job.made.destination,
        job.made.prepared.source.path,
    ]
    return sorted({Path(os.path.realpath(path)).parent for path in (*files, *job.made.prepared.source.also.values())})


def do_task(plan_file: str, roots: Sequence[str], options: Mapping[str, Any], order: str, number: int) -> str:
    """In a Ray worker: does one task, and gives back its receipt as JSON of less than ten kilobytes, or why there is none."""
    try:
        job = _job(plan_file, tuple(roots), tuple(sorted(options.items())), order)
        name = f"{number:06}"
        claims = Claims(job.folder.claims, job.about)
        # A claim tells others that it is done. Whoever else has it, the task is done here too: Ray asked for it.
        with claims.take(name), job.made.sources() as opened:
            answer = job.do(number, opened).model_dump_json(exclude={"details"})
        assert len(answer) < MAX_RECEIPT, "receipts travel, tensors never do"
        return answer
    except CkptconvError as error:
        return json.dumps({"problems": [problem.to_json() for problem in error.problems[:20]], "exit_code": error.exit_code})


@lru_cache(maxsize=1)
def _job(plan_file: str, roots: tuple[str, ...], options: tuple[tuple[str, Any], ...], order: str) -> Job:
    """Read once by each worker. Raises CK507 where this machine makes another job of the plan than the one that began it."""
    job = open_job(Path(plan_file), How([Path(root) for root in roots], dict(options)))
    if job.fingerprint != order:
        job.folder.check()
        raise OutputError(
            Problem("CK507", "this worker makes other tasks of the plan", where=printable(plan_file), try_="the same ckptconv everywhere")
        )
    return job


class RayBatch:
    """``count`` checkpoints of a batch at once, by a Ray cluster; an :data:`~ckptconv.stage.batching.Engine`."""

    def __init__(self, count: int, address: str | None = None) -> None:
        self.count, self.address = count, address

    def __call__(self, requests: Sequence[Request], tell: Callable[[int, int, int], None]) -> Generator[Answer, None, None]:
        """Each request's answer as it comes."""
        with cluster(self.address) as ray:
            remote = ray.remote(do_request)
            cpus, _ = _largest(ray)
            calls: dict[Any, int] = {}
            by_number = {request.number: request for request in requests}
            waiting = list(reversed(requests))

            def hand_out() -> None:
                while waiting and len(calls) < self.count:
                    request = waiting.pop()
                    threads = max(1, min(int(request.options["threads"]), int(cpus)))
                    call = remote.options(num_cpus=threads, max_retries=RETRIES, name=f"ckptconv {request.number}")
                    calls[call.remote(json.dumps(asdict(request)))] = request.number

            try:
                hand_out()
                for call, number in _as_they_come(ray, calls):
                    try:
                        said = json.loads(ray.get(call))
                        answer = Answer(**{**said, "problems": tuple(said["problems"])})
                    except ray.exceptions.RayError as error:
                        problem = _died("it", error, "run again").at(printable(by_number[number].source))
                        answer = Answer(number, problems=(problem.to_json(),), exit_code=OutputError.exit_code)
                    hand_out()
                    tell(number, 1, 1)
                    yield answer
            finally:
                for call in calls:
                    ray.cancel(call, force=True)


def do_request(request: str) -> str:
    """In a Ray worker: makes one output of a batch, and says what became of it."""
    found = Request(**json.loads(request))
    os.chdir(found.working_folder)
    return json.dumps(asdict(convert(found)))
