"""Many checkpoints by one rule: only what changed, past those that cannot be converted, by several processes.

The story: which checkpoints (:mod:`.batch_words`) · which of them are as the lock says (:mod:`.batch_lock`) · the others, each by a worker of the
engine (:mod:`.batch_workers`), each as :func:`convert` does it · the lock rewritten after each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict, fields, replace

from ckptconv.errors import CkptconvError, InputError, OutputError, Problem, Refusal, UsageError, printable
from ckptconv.layout import parse_size
from ckptconv.ruleset.model import RuleFile
from ckptconv.stage.batch_lock import Files, LockFile, Made, files_below, look, same, take, text_of
from ckptconv.stage.batch_words import Job, jobs_of, make_folder
from ckptconv.stage.opening import config_beside, named_paths, rule_file, variables
from ckptconv.stage.preparing import Options, prepare
from ckptconv.stage.producing import Progress, produce

#: Options that change no byte of a result, nor how far it is proved.
_INDIFFERENT = ("force", "threads", "max_memory", "max_output", "sync", "timeout", "allow_code", "use_rule_target", "task_size", "resume")
MAX_JOBS = 64


class Request(Struct, frozen=True):
    """All that a worker needs to make one output, as plain data."""

    number: int
    source: str
    output: str
    rules: str
    meaning: str  #: of the rules: label and digest
    options: Mapping[str, Any]
    known: Mapping[str, Any] | None  #: the lock's entry, where only the files' bytes can tell whether it still holds
    working_folder: str

    @property
    def nbytes(self) -> int:
        """Of the source, for the share of it that is done."""
        return sum(path.stat().st_size for path in files_below(Path(self.source)).values())


class Answer(Struct, frozen=True):
    """What became of a request, as plain data."""

    number: int
    made: Mapping[str, Any] | None = None  #: the entry for the lock: of a new output, or of one that is still right
    unchanged: bool = False
    why: str = ""  #: what had changed, where only the files' bytes could tell
    nbytes: int = 0  #: of the output
    problems: tuple[Mapping[str, str], ...] = ()
    exit_code: int = 0


#: An engine: takes requests, tells (number, bytes done of the source), and gives each one's answer as it comes. It loses none.
Engine = Callable[[Sequence[Request], Callable[[int, int, int], None]], Generator[Answer, None, None]]


class Done(Struct, frozen=True):
    """One checkpoint of a batch, and what became of it."""

    job: Job
    why: str  #: new, or what changed
    nbytes: int = 0
    verified: str = ""
    problems: tuple[Problem, ...] = ()
    exit_code: int = 0


class Batched(Struct, frozen=True):
    """A whole batch."""

    rules: RuleFile
    converted: tuple[Done, ...]
    unchanged: tuple[Job, ...]
    failed: tuple[Done, ...]
    jobs: int = 1


class _Wanted(Struct):
    """What the lock must say of an output for it to be left alone."""

    rules: RuleFile
    options: Mapping[str, Any]
    folder: Path

    def difference(self, job: Job, made: Made | None) -> str | None:
        """Why an output is made again; empty where only the bytes can tell, None where it is as it was made."""
        if made is None:
            return "new"
        if made.source != self.source_of(job):
            return "another source"
        if (made.rules, made.rules_digest) != (self.rules.label, f"sha256:{self.rules.digest}"):
            return f"rules: {printable(made.rules)}, now {self.rules.label}" if made.rules != self.rules.label else "rules: another meaning"
        if made.options != self.options:
            return "options"
        if not os.path.lexists(job.output):
            return "the output is gone"
        try:
            told = look(made_of(job.source, self.options)), look(files_below(job.output))
        except OSError:
            return "the source or the output cannot be looked at"
        return None if told == (made.made_of.files, made.output.files) else ""

    def source_of(self, job: Job) -> str:
        return text_of(os.path.relpath(job.source, self.folder))


def batch(
    words: Sequence[str], rules: str, destination: Path, options: Options, engine: Callable[[int], Engine], *, jobs: int | None = None,
    elsewhere: bool = False, dry_run: bool = False, progress: Progress | None = None, told: Callable[[Done], None] | None = None,
) -> Batched:  # fmt: skip
    """Converts every checkpoint that the words name into ``destination``, where the lock does not say that it is done.

    ``engine(jobs)`` is what does the work; ``elsewhere`` means that the jobs do not share this machine's processors and memory. Raises :class:`~ckptconv.errors.UsageError`, with nothing converted, for what is
    wrong with the batch as a whole; what is wrong with one checkpoint is in the result, and the others are converted.
    """
    parsed = rule_file(rules)
    work = jobs_of(words, destination, options.format)
    variables(options.set), named_paths(options.also)
    for size in (options.max_memory, options.max_output, options.shard_size):
        parse_size(size or "1")
    if not dry_run:
        make_folder(destination)
    lock = LockFile(destination, sync=options.sync)
    wanted = _Wanted(parsed, {}, destination)
    wanted.options, given = _that_matter(options, parsed, lock)
    changed = [(job, why) for job in work if (why := wanted.difference(job, lock.lock.outputs.get(job.name))) is not None]
    todo = {job.name for job, _ in changed}
    unchanged = [job for job in work if job.name not in todo]
    most = MAX_JOBS if elsewhere else os.cpu_count() or 1
    count = max(1, min(jobs or most, len(changed), MAX_JOBS))
    if dry_run:
        return Batched(parsed, tuple(Done(job, why or "changed, or only touched") for job, why in changed), tuple(unchanged), (), count)
    begun = {name for name in lock.lock.started if os.path.lexists(destination / name)}
    started = [job.name for job, _ in changed if job.name not in lock.lock.outputs and not os.path.lexists(job.output)]
    shared = options
    if not elsewhere:
        shared = replace(options, threads=max(1, options.threads // count), max_memory=_share(options.max_memory, count))
    requests = []
    for at, (job, why) in enumerate(changed):
        made = lock.lock.outputs.get(job.name)
        ours = job.name in begun or (made is not None and made.source == wanted.source_of(job))
        known = made.model_dump() if made is not None and not why else None
        requests.append(_request(at, job, rules, f"{parsed.label} {parsed.digest}", replace(shared, force=options.force or ours), known))
    with _lock_explained(lock):
        lock.clear_up()
        if started or given != lock.lock.given:
            lock.put(given=given, started=started)
    meter = _Meter(requests, progress)
    converted, failed, met = list[Done](), list[Done](), list[Request]()

    def take_in(answer: Answer) -> None:
        job, why = changed[answer.number]
        if answer.made is not None:
            entry = Made.model_validate({**answer.made, "source": wanted.source_of(job), "options": wanted.options})
            with _lock_explained(lock):
                lock.put({job.name: entry})
        if answer.unchanged:
            unchanged.append(job)
        elif answer.made is not None:
            done = Done(job, why or answer.why, answer.nbytes, str(answer.made["verified"]))
            converted.append(done)
            if told is not None:
                told(done)
        elif wanted.difference(job, lock.refresh().outputs.get(job.name)) is None:  # another batch made it meanwhile
            unchanged.append(job)
        elif requests[answer.number] not in met and _is_met(answer, job.name in lock.lock.started):  # … or is about to
            met.append(requests[answer.number])
            return
        else:
            problems = tuple(Problem(each["code"], each["what"], each["where"], each["found"], each["try"]) for each in answer.problems)
            failed.append(Done(job, why or "changed", problems=problems, exit_code=answer.exit_code))
        meter.done(answer.number)

    for waiting in (requests, met):  # what another batch was making is tried once more when all else is done
        if waiting:
            with closing(engine(count)(tuple(waiting), meter.tell)) as answers:
                for answer in answers:
                    take_in(answer)
    by_name = sorted(failed, key=lambda done: done.job.name)
    return Batched(parsed, tuple(sorted(converted, key=lambda done: done.job.name)), tuple(unchanged), tuple(by_name), count)


def _is_met(answer: Answer, started: bool) -> bool:
    """Whether another batch has just made this output, and not yet said so in the lock, or is making it."""
    return {problem["code"] for problem in answer.problems} <= ({"CK501", "CK506"} if started else {"CK506"})


def _request(
    number: int, job: Job, rules: str, meaning: str, options: Options, known: Mapping[str, Any] | None
) -> Request:  # fmt: skip
    plain = {**asdict(options), "config": str(options.config) if options.config else None}
    return Request(number, str(job.source), str(job.output), rules, meaning, _plain(plain, str), known, os.getcwd())


def convert(request: Request, progress: Progress | None = None) -> Answer:
    """Makes one output, or finds that it is right as it stands. Never raises what is the checkpoint's fault: that is an answer too."""
    try:
        return _convert(request, progress)
    except CkptconvError as error:
        return Answer(request.number, problems=tuple(problem.to_json() for problem in error.problems), exit_code=error.exit_code)


def _convert(request: Request, progress: Progress | None) -> Answer:
    source, output = Path(request.source), Path(request.output)
    options = Options(**{**request.options, "config": Path(request.options["config"]) if request.options["config"] else None})
    parts, why = made_of(source, {"config": options.config}), ""
    if request.known is not None:
        known = Made.model_validate(request.known)
        sources, outputs = same(parts, known.made_of), same(files_below(output), known.output)
        if sources is not None and outputs is not None:
            return Answer(request.number, known.model_copy(update={"made_of": sources, "output": outputs}).model_dump(), unchanged=True)
        why = "the source" if sources is None else "the output was altered"
    try:
        before = look(parts)
    except OSError:  # preparing has the sentence for it
        before = {}
    make_folder(output.parent)
    prepared = prepare(_rules(request.rules, request.meaning), source, options)
    produced = produce(prepared, output, options, progress)
    try:
        taken, written = take(parts), take(files_below(output))
    except (OSError, Refusal) as error:
        what = f"the output is in place, but it or its source cannot be read again: {printable(error)}"
        raise InputError(Problem("CK310", what, where=printable(source))) from None
    if taken.files != before:
        what = "the source changed while it was converted; the output is in place, and made again next time"
        raise InputError(Problem("CK311", what, where=printable(source), try_="run again once nobody writes to it"))
    entry = Made(
        source="", made_of=taken, rules=prepared.label, rules_digest=f"sha256:{prepared.rules_digest}", options={}, output=written,
        verified=produced.ladder.reached,
    )  # fmt: skip
    return Answer(request.number, entry.model_dump(), why=why, nbytes=produced.layout.nbytes)


def made_of(source: Path, options: Mapping[str, Any]) -> dict[str, Path]:
    """The files that an output depends on: the checkpoint's own, and the config beside it, where no other one is named."""
    config = None if options.get("config") else config_beside(source)
    return files_below(source, *([config] if config is not None else []))


@lru_cache(maxsize=4)
def _rules(word: str, meaning: str) -> RuleFile:  # noqa: ARG001  (the same word may come to mean something else)
    """Read once by each worker."""
    return rule_file(word)


def _share(size: str | None, count: int) -> str | None:
    return None if size is None else f"{parse_size(size) // count}B"


def _that_matter(options: Options, rules: RuleFile, lock: LockFile) -> tuple[dict[str, Any], dict[str, Files]]:
    """The options that the results depend on, with digests of the files that they name; and what those files are told by."""
    plain = Options()
    chosen = {
        each.name: getattr(options, each.name)
        for each in fields(Options)
        if each.name not in _INDIFFERENT and (getattr(options, each.name) or None) != (getattr(plain, each.name) or None)
    }
    if "set" in chosen:
        chosen["set"] = variables(chosen["set"])
    named: dict[str, Path] = {text_of(str(path)): path for path in named_paths(options.also).values()}
    words = [options.like, options.target, *(str(word).partition("=")[2] for word in options.parity)]
    words += [str(word) for word in (options.source_model, options.optimizer_file) if isinstance(word, (str, Path))]
    field_ = rules.header.target
    if field_ is not None and field_.model is not None and field_.model.endswith(".json") and rules.folder is not None:
        words.append(str(rules.folder / field_.model))
    for word in words:
        if word and (path := _file_named(word)) is not None:
            named[text_of(word)] = path
    if options.config is not None:
        named[text_of(str(options.config))] = options.config
    given: dict[str, Files] = {}
    for text, path in named.items():
        known = lock.lock.given.get(text)
        try:
            paths = files_below(path)
            given[text] = (same(paths, known) if known is not None else None) or take(paths)
        except (OSError, Refusal) as error:
            reason = error.strerror if isinstance(error, OSError) else printable(error)
            raise UsageError(Problem("CK107", f"the file cannot be read: {reason}", where=printable(path))) from None
    matter = _plain(chosen)
    if given:
        matter["files"] = {text: files.digest for text, files in sorted(given.items())}
    return matter, {**lock.lock.given, **given}


def _file_named(word: str) -> Path | None:
    """The file or folder that an option's word stands for; of a model's folder only the config, which is all that is read of it."""
    path = Path(word.removeprefix("hf:")) / "config.json" if word.startswith("hf:") else Path(word)
    return path if os.path.exists(path) else None


def _plain(value: Any, text: Callable[[str], str] = text_of) -> Any:
    """Options as JSON: tables, lists, texts, numbers."""
    if isinstance(value, Mapping):
        return {text(str(key)): _plain(item, text) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, text) for item in value]
    return value if isinstance(value, (bool, int, float, type(None))) else text(str(value))


class _Meter(Struct):
    """One measure over all checkpoints of a batch, in bytes of their sources."""

    requests: Sequence[Request]
    progress: Progress | None
    share: dict[int, int] = field(default_factory=dict)
    finished: int = 0
    sizes: list[int] = []

    def __post_init__(self) -> None:
        self.sizes = [_size(request) for request in self.requests] if self.progress is not None else []

    def tell(self, number: int, done: int, total: int) -> None:
        """One checkpoint is so far."""
        if self.progress is not None:
            self.share[number] = self.sizes[number] * done // max(total, 1)
            self._show()

    def done(self, number: int) -> None:
        """One checkpoint is done with, whatever became of it."""
        self.finished += 1
        self.tell(number, 1, 1)

    def _show(self) -> None:
        assert self.progress is not None, "who shows asks first"
        self.progress(f"{self.finished:,} of {len(self.requests):,} checkpoints", sum(self.share.values()), sum(self.sizes))


def _size(request: Request) -> int:
    try:
        return request.nbytes
    except OSError:
        return 0


class _lock_explained:  # noqa: N801  (a context manager, used as a function)
    """A lock that cannot be written ends the batch: what is done would be done again."""

    def __init__(self, lock: LockFile) -> None:
        self.lock = lock

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, CkptconvError):
            raise OutputError(
                Problem("CK503", f"the lock of the batch cannot be written: {error.strerror}", where=printable(self.lock.path),
                        try_="free some space, or write where you may")
            ) from None  # fmt: skip
