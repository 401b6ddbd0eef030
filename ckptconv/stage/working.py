"""A conversion in tasks: begun by anyone, worked on by many, finished once. The story of a run, told by more than one process.

Everybody lays the output out and cuts the plan anew, from the plan and the source's headers; what they must agree on is the *order*, whose
fingerprint every claim and receipt carries. Where two disagree, the second is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ckptconv._version import __version__
from ckptconv.errors import FitError, InputError, OutputError, Problem, Refusal, printable
from ckptconv.execute import receipts
from ckptconv.execute.claims import LEASE_SECONDS, Claimed, Claims
from ckptconv.execute.engine import fill
from ckptconv.execute.receipts import Details, TaskReceipt
from ckptconv.execute.sources import Sources
from ckptconv.execute.truth import check_truth_values
from ckptconv.execute.workfolder import WorkFolder
from ckptconv.layout import Layout, parse_size
from ckptconv.plan import Plan
from ckptconv.stage.producing import Conversion, Meter, Produced, Progress, conclude
from ckptconv.tasks import Tasks, cut, numbers_text, outputs_of

TASK_SIZE = "1GB"  #: where nothing is said
_PAUSE = 5.0  #: seconds between two looks at what others do, at most
_FINISH = "finish"  #: the claim of who puts everything together
MAX_NAMED = 20


class Job:
    """A laid-out conversion, cut into tasks. Making one opens headers only and writes nothing.

    ``way_on`` is the command that goes on with the work: whoever finds the folder is told.
    """

    def __init__(self, made: Conversion, way_on: str) -> None:
        self.made, self.way_on = made, way_on
        self.tasks = tasks_of(made)
        self.order = order_of(made, self.tasks)
        self.folder = WorkFolder(made.destination, made.layout, self.order, force=made.options.force)

    @cached_property
    def fingerprint(self) -> str:
        """Of the order: two jobs with one fingerprint write the same bytes to the same places."""
        return _digest(self.order)

    @cached_property
    def about(self) -> Mapping[str, str]:
        """What claims say of whom they are."""
        return {"order": self.fingerprint, "ckptconv": self.order["ckptconv"], "torch": self.order["torch"]}

    def start(self, *, anew: bool = False) -> None:
        """Makes the work folder, or joins. Raises as :meth:`~ckptconv.execute.workfolder.WorkFolder.start` does."""
        self.folder.start(self.way_on, anew=anew)

    def done(self) -> set[int]:
        """Numbers of the tasks that have a receipt."""
        return {number for number in receipts.done(self.folder.receipts) if number < len(self.tasks.tasks)}

    def do(self, number: int, opened: Sources, *, progress: Callable[[int], None] | None = None) -> TaskReceipt:
        """Does one task, whoever else does it at the same time, and leaves its receipt. The folder was started.

        The receipt that is given back travels: it has less than ten kilobytes. Raises as :func:`~ckptconv.execute.engine.fill` does.
        """
        made, task, started = self.made, self.tasks.tasks[number], time.monotonic()
        options = made.options
        with self.folder.guarded():
            filled = fill(
                made.prepared.plan, made.prepared.source.placed, opened, self.folder.layouts_of(task.files), self.folder.folder,
                kept=made.kept, outputs=[self._outputs[name] for name in task.outputs], threads=options.threads,
                max_memory=parse_size(options.max_memory) if options.max_memory else None, digests=True, sync=options.sync, progress=progress,
            )  # fmt: skip
            opened.check_unchanged()
            if options.sync:
                self.folder.sync(task.files)
            computes = bool(filled.computed_nbytes)
            receipt = TaskReceipt(
                task=number, order=self.fingerprint, ckptconv=__version__, torch=torch_version() if computes else None,
                owner=f"{os.uname().nodename}:{os.getpid()}", seconds=round(time.monotonic() - started, 3), read_nbytes=task.read_nbytes,
                copied_nbytes=filled.copied_nbytes, computed_nbytes=filled.computed_nbytes, tensors=len(task.outputs), digest="",
            )  # fmt: skip
            return receipts.write(self.folder.receipts, receipt, receipts.details_of(filled), sync=options.sync)

    def read(self, number: int) -> tuple[TaskReceipt, Details] | None:
        """The receipt of a task. Raises :class:`~ckptconv.errors.Refusal` CK416 for one that is damaged or another's."""
        found = receipts.read(self.folder.receipts, number, self.fingerprint, self.tasks.tasks[number].outputs)
        if found is not None and found[0].torch not in (None, self.order["torch"]):
            raise Refusal("it was computed by another torch", code="CK416", found=printable(found[0].torch, 40))
        if found is not None and (files := self._unchecked(number, found[1])):
            raise Refusal("its receipt lacks checksums", code="CK416", found=printable(files))
        return found

    def withdraw_damaged(self, *, progress: Callable[[int], None] | None = None) -> list[Problem]:
        """Reads back what the finished tasks wrote. A task whose receipt or bytes are damaged is one to be done again, and is named."""
        problems, right = [], dict[int, Details]()
        for number in sorted(self.done()):
            try:
                found = self.read(number)
            except Refusal as refusal:
                problems.append(self._withdrawn(number, refusal.what, refusal.found))
            else:
                if found is not None:
                    right[number] = found[1]
        wanted = {name: digest for details in right.values() for name, digest in details.digests.items()}
        with self.folder.guarded():
            digests = self.folder.digests(wanted, threads=self.made.options.threads, progress=progress)
        for number, details in right.items():
            bad = next((name for name in details.digests if digests.get(name) != wanted[name]), None)
            if bad is not None:
                problems.append(self._withdrawn(number, "the bytes that it wrote are not there any more", printable(bad)))
        return problems

    @cached_property
    def _outputs(self) -> Mapping[str, Any]:
        return {output.name: output for output in outputs_of(self.made.prepared.plan, self.made.kept)}

    def _unchecked(self, number: int, details: Details) -> list[str]:
        """Outputs without the CRC-32 that their format wants."""
        task = self.tasks.tasks[number]
        return [
            name
            for file in self.folder.layouts_of(task.files)
            if file.needs_crc
            for name in task.outputs
            if name in file.slots and file.slots[name].nbytes and name not in details.crc32.get(file.name, {})
        ][:3]

    def _withdrawn(self, number: int, what: str, found: str) -> Problem:
        receipts.withdraw(self.folder.receipts, number)
        return Problem(
            "CK416",
            f"task {number}: {what}",
            where=printable(self.folder.work),
            found=found,
            try_=f"{self.way_on_work}: it will be done again",
        )

    @property
    def way_on_work(self) -> str:
        """The command that does what is left to do."""
        return self.way_on.replace("ckptconv finish", "ckptconv work")


class Worked(Struct, frozen=True):
    """What one worker did."""

    receipts: tuple[TaskReceipt, ...]
    total: int  #: tasks that there are
    done: int  #: of these, done by now, by anyone
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "ckptconv_worked": 1, "tasks": [receipt.task for receipt in self.receipts], "total": self.total, "done": self.done,
            "nbytes": sum(receipt.written_nbytes for receipt in self.receipts), "seconds": round(self.seconds, 3),
        }  # fmt: skip


def work(
    job: Job, share: Sequence[int] | None = None, *, help_others: bool = True, lease: float = LEASE_SECONDS, wait: bool = True,
    progress: Progress | None = None, meter: Meter | None = None,
) -> Worked:  # fmt: skip
    """Does tasks until none is left to do: those of ``share`` first, then, with ``help_others``, all the rest.

    A task that a living other does is left to it; with ``wait`` this one stays until that is done too, to take over where the other dies.
    """
    started = time.monotonic()
    everything = range(len(job.tasks.tasks))
    mine = list(everything) if share is None else list(share)
    if share is None and mine:  # who begins elsewhere meets fewer others
        at = random.randrange(len(mine))
        mine = mine[at:] + mine[:at]
    others = [number for number in everything if number not in set(mine)] if help_others else []
    if meter is None:
        meter = Meter(progress or (lambda _stage, _done, _total: None), sum(job.tasks.tasks[number].written_nbytes for number in mine))
    tell, claims, done = meter.counted("working"), Claims(job.folder.claims, job.about, lease), []
    pause = 0.0
    with job.made.sources() as opened:
        while True:
            finished = job.done()
            left = [number for number in (*mine, *others) if number not in finished]
            moved = False
            for number in left:
                try:
                    with job.folder.guarded(), claims.take(_name(number)) as got:
                        if got and number not in job.done():
                            done.append(job.do(number, opened, progress=tell))
                            moved = True
                except OutputError:
                    if not job.folder.is_there:  # somebody finished meanwhile, and this was done twice
                        return Worked(tuple(done), len(everything), len(everything), time.monotonic() - started)
                    raise
            if not left or not (moved or wait):
                return Worked(tuple(done), len(everything), len(job.done()), time.monotonic() - started)
            pause = 0.0 if moved else min(max(2 * pause, 0.05), _PAUSE, lease / 4)
            if not moved:
                time.sleep(pause)
                if not job.folder.is_there:
                    return Worked(tuple(done), len(everything), len(everything), time.monotonic() - started)


def finish(job: Job, progress: Progress | None = None, *, lease: float = LEASE_SECONDS, meter: Meter | None = None) -> Produced:
    """Puts the receipts of all tasks together, verifies the output as a run does, and renames it into place.

    Raises :class:`~ckptconv.errors.FitError` CK416 naming tasks that are not done, or whose receipts or bytes are damaged: nothing is
    published, and the damaged ones are to be done again.
    """
    with job.folder.explained():
        job.folder.refuse_what_is_there()
    if not job.folder.is_there:
        raise FitError(
            Problem("CK416", "no task is done: the work is not begun", where=printable(job.made.destination), try_=job.way_on_work)
        )
    job.folder.check()
    claims = Claims(job.folder.claims, job.about, lease)
    with job.folder.guarded(), claims.take(_FINISH) as got:
        if not got:
            raise OutputError(
                Problem("CK506", "somebody else finishes this work", where=printable(job.made.destination), try_="wait until it is done")
            )
        receipt = _collected(job)
        _wait_for_stragglers(job, claims)
        if job.made.options.level is None and (problems := job.withdraw_damaged()):  # else the ladder's first rung finds it out
            raise FitError(problems[:MAX_NAMED])
        if meter is None:
            meter = job.made.meter(progress)
            meter.done = job.tasks.written_nbytes
        with job.made.sources() as opened:
            check_truth_values(opened, job.made.prepared.source.placed)
            try:
                return conclude(job.made, job.folder, opened, receipt, meter)
            except FitError as error:
                rungs = (error.verification or {}).get("rungs", [])
                if not any(rung.get("level") == 0 and rung.get("status") == "failed" for rung in rungs):
                    raise
                problems = job.withdraw_damaged()
                raise FitError([*problems, *error.problems], error.verification, error.about) from None


def resume(made: Conversion, progress: Progress | None = None) -> Produced:
    """A run that may be interrupted: what was done before is checked and kept, the rest is done, and the output is published.

    Raises :class:`~ckptconv.errors.OutputError` CK507 where what was begun had other rules, another source or other options.
    """
    words = (made.prepared.rules_file, made.prepared.source.path, made.destination)
    job = Job(made, f"ckptconv run --resume {' '.join(shlex.quote(printable(word)) for word in words)} as it was begun")
    job.start(anew=made.options.force)
    damaged = job.withdraw_damaged()
    kept = job.done()
    meter = made.meter(progress)
    meter.done = sum(job.tasks.tasks[number].written_nbytes for number in kept)
    work(job, meter=meter)
    produced = finish(job, meter=meter)
    notes = [f"{len(kept):,} of {len(job.tasks.tasks):,} tasks were done before, checked and kept"] if kept else []
    notes += [f"done again: {problem.what}" for problem in damaged]
    return replace(produced, notes=tuple(notes))


class Status(Struct, frozen=True):
    """How far a work is."""

    work: str
    destination: str
    order: str
    begun: bool
    stands: bool  #: something is at the destination: the output, where it was published
    tasks: Tasks
    done: Mapping[int, TaskReceipt]
    damaged: Mapping[int, str]
    claims: Mapping[int, Claimed]  #: of tasks that are not done
    nbytes_per_second: float  #: over the last tasks, by all workers; 0 where it is not known

    @property
    def missing(self) -> tuple[int, ...]:
        """Tasks that nobody does and nobody did."""
        return tuple(number for number in range(len(self.tasks.tasks)) if number not in self.done and number not in self.claims)

    @property
    def done_nbytes(self) -> int:
        return sum(self.tasks.tasks[number].written_nbytes for number in self.done)

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None where there is none."""
        left = self.tasks.written_nbytes - self.done_nbytes
        return left / self.nbytes_per_second if self.nbytes_per_second else None if left else 0.0

    def to_json(self) -> dict[str, Any]:
        by_state = {state: [number for number, found in self.claims.items() if found.state == state] for state in ("claimed", "stale")}
        return {
            "ckptconv_status": 1, "work": self.work, "destination": self.destination, "order": self.order, "begun": self.begun, "stands": self.stands,
            "tasks": len(self.tasks.tasks), "done": sorted(self.done), "claimed": by_state["claimed"], "stale": by_state["stale"],
            "missing": list(self.missing), "damaged": {str(number): what for number, what in self.damaged.items()},
            "nbytes": self.tasks.written_nbytes, "done_nbytes": self.done_nbytes, "read_nbytes": self.tasks.read_nbytes,
            "read_amplification": round(self.tasks.read_amplification, 4), "nbytes_per_second": round(self.nbytes_per_second),
            "seconds_left": None if self.seconds_left is None else round(self.seconds_left, 1),
            "owners": {str(number): str(found.owner) for number, found in self.claims.items() if found.owner is not None},
        }  # fmt: skip


def status(job: Job, *, lease: float = LEASE_SECONDS) -> Status:
    """How far the work is. Receipts and claims are read, nothing is written but what tells the filesystem's time."""
    done: dict[int, TaskReceipt] = {}
    damaged: dict[int, str] = {}
    claims: dict[int, Claimed] = {}
    begun, ends = job.folder.is_there, []
    if begun:
        job.folder.check()
        for number in sorted(job.done()):
            try:
                found = job.read(number)
            except Refusal as refusal:
                damaged[number] = refusal.what
                continue
            if found is not None:
                done[number] = found[0]
                ends.append((receipts.written_at(job.folder.receipts, number), number))
        looking = Claims(job.folder.claims, job.about, lease)
        for number in range(len(job.tasks.tasks)):
            claim = looking.look(_name(number)) if number not in done else None
            if claim is not None:
                claims[number] = claim
    return Status(
        printable(job.folder.work), printable(job.made.destination), job.fingerprint, begun, os.path.lexists(job.made.destination), job.tasks, done, damaged, claims, _rate(job, ends, done)
    )  # fmt: skip


def _rate(job: Job, ends: list[tuple[float, int]], done: Mapping[int, TaskReceipt]) -> float:
    """Bytes per second that all workers together write: over the receipts of late, from when the first of their tasks began."""
    last = sorted(ends)[-64:]
    if not last:
        return 0.0
    began = min(end - done[number].seconds for end, number in last)
    return sum(job.tasks.tasks[number].written_nbytes for _, number in last) / max(last[-1][0] - began, 1e-3)


def _collected(job: Job) -> Any:
    """The receipts of all tasks as one. Raises FitError CK416 that names every task whose receipt is missing or wrong."""
    found: list[tuple[TaskReceipt, Details]] = []
    missing, problems = [], []
    for number in range(len(job.tasks.tasks)):
        try:
            one = job.read(number)
        except Refusal as refusal:
            problems.append(job._withdrawn(number, refusal.what, refusal.found))
            continue
        if one is None:
            missing.append(number)
        else:
            found.append(one)
    if missing:
        what = f"{len(missing):,} of {len(job.tasks.tasks):,} tasks are not done"
        problems.append(
            Problem("CK416", what, where=printable(job.folder.work), found=f"tasks {numbers_text(missing)}", try_=job.way_on_work)
        )
    if problems:
        raise FitError(problems[:MAX_NAMED])
    try:
        return receipts.put_together((details for _, details in found), (receipt for receipt, _ in found))
    except Refusal as refusal:
        raise InputError(refusal.at(printable(job.made.prepared.source.path))) from None


def _wait_for_stragglers(job: Job, claims: Claims) -> None:
    """Nobody writes into the output any more when it is verified: who does a task that another has done too is waited for."""
    for number in range(len(job.tasks.tasks)):
        while (found := claims.look(_name(number))) is not None and found.state == "claimed":
            time.sleep(0.1)


def tasks_of(made: Conversion) -> Tasks:
    """The tasks of a laid-out conversion, of the size that its options say."""
    return cut(made.prepared.plan, made.layout, made.prepared.source.placed, parse_size(made.options.task_size or TASK_SIZE), made.kept)


def order_of(made: Conversion, tasks: Tasks) -> dict[str, str]:
    """Everything that decides which bytes go where, part by part, as digests or words."""
    source = made.prepared.source
    return {
        "ckptconv": __version__, "torch": torch_version() if any(task.computes for task in tasks.tasks) else "not needed",
        "rules": f"{made.prepared.label} {made.prepared.rules_digest}", "plan": _digest(_meaning(made.prepared.plan)),
        "source": _digest([source.container.path, identities(made)]), "layout": _digest(_places(made.layout)),
        "tasks": _digest([task.outputs for task in tasks.tasks]),
    }  # fmt: skip


def identities(made: Conversion) -> list[tuple[str, int, int]]:
    """Name, bytes and time of the last change of each source file: what another machine sees of it, too."""
    found = []
    for path in made.prepared.source.files:
        known = made.prepared.source.contents.identities.get(path)
        if known is None:
            told = os.stat(path)
            found.append((path.name, told.st_size, told.st_mtime_ns))
        else:
            found.append((path.name, *known[2:]))
    return found


def torch_version() -> str:
    """Of the installed torch, without importing it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "not installed"


def _meaning(plan: Plan) -> dict[str, Any]:
    """What of a plan decides its bytes: not where in which rule file it comes from."""
    data = plan.to_json()
    return {
        "source": plan.source.fingerprint,
        "nodes": data["nodes"],
        "outputs": [each[:2] for each in data["outputs"]],
        "ties": data["ties"],
    }


def _places(layout: Layout) -> list[Any]:
    files = [
        [file.name, file.format, file.nbytes, sorted(file.metadata.items()), [[name, slot.offset, slot.nbytes] for name, slot in file.slots.items()]]
        for file in layout.files
    ]  # fmt: skip
    return [layout.is_folder, files]


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]


def _name(number: int) -> str:
    return f"{number:06d}"
