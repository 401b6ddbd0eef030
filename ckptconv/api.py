"""The whole job as functions: ``explain``, ``suggest``, ``run``, ``plan``, ``convert``, ``load``, ``inspect``, ``diff``, ``verify``.

The command line calls these and nothing else. Problems come as :class:`~ckptconv.errors.CkptconvError`, all of them at once. Each
function imports what it needs: ``inspect`` does not wait for the rule language, nor ``check`` for the readers of checkpoints.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, Union

from msgspec.structs import replace

from ckptconv.errors import CkptconvError, FitError, Problem, Refusal, UsageError, named, printable
from ckptconv.places.visiting import is_remote, near, visit
from ckptconv.spec import DType, Manifest, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ckptconv.backwards import BackRule
    from ckptconv.report.batch import BatchItem, BatchReport
    from ckptconv.report.explaining import Explanation, SuggestReport
    from ckptconv.report.model import Difference, Inspection, RunReport
    from ckptconv.ruleset.model import RuleFile
    from ckptconv.stage.preparing import Options, Prepared
    from ckptconv.stage.producing import Produced, Progress
    from ckptconv.stage.working import Status, Worked

Rules = Union[str, Path, "RuleFile"]
P = ParamSpec("P")
T = TypeVar("T")


def _visiting(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with words that may also be URLs: ``near`` gives paths for them, which are gone when it ends.

    It stands here and not beside :func:`~ckptconv.places.visiting.visit` because doctest looks only at what a module defines itself.
    """

    @wraps(function)
    def visiting(*args: P.args, **kwargs: P.kwargs) -> T:
        with visit():
            return function(*args, **kwargs)

    return visiting


@_visiting
def run(
    rules: Rules | None, source: str | Path, destination: str | Path, *, plan_file: str | Path | None = None,
    progress: Progress | None = None, engine: str = "local", ray_address: str | None = None, **options: Any,
) -> RunReport:  # fmt: skip
    """Converts ``source`` by ``rules`` (a path, a built-in name, or a :class:`RuleFile`) and writes ``destination``.

    ``options`` are the fields of :class:`~ckptconv.stage.preparing.Options`. With ``plan_file``, a plan that :func:`plan` saved is run
    and ``rules`` is None. ``engine="ray"`` hands the tasks to a Ray cluster, that at ``ray_address`` or one of this machine. Gives back the report; raises a :class:`~ckptconv.errors.CkptconvError` with nothing written.

    >>> import tempfile, torch, ckptconv
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"module.weight": torch.ones(2, 3)}, folder / "in.pth")
    >>> report = ckptconv.run("dataparallel", folder / "in.pth", folder / "out.pth")
    >>> report.ladder.reached, list(torch.load(folder / "out.pth"))
    ('L0 L1 L3', ['weight'])
    """
    from ckptconv.stage.preparing import Options
    from ckptconv.stage.producing import begin
    from ckptconv.stage.sending import also_words, produce_at, refuse_elsewhere

    started = time.monotonic()
    chosen = Options(**options)
    with _with_report("run", chosen, destination):
        prepared = _prepared(rules, near(source), chosen, plan_file)
        refuse_elsewhere([source, destination, *also_words(chosen)], ray=engine == "ray", resume=chosen.resume)
        if engine == "ray":
            from ckptconv.stage import ray_engine

            produced = ray_engine.run(begin(prepared, Path(destination), chosen), ray_address, progress)
        elif chosen.resume:
            from ckptconv.stage.working import resume

            produced = resume(begin(prepared, Path(destination), chosen), progress)
        else:
            produced = produce_at(prepared, destination, source, chosen, progress)
    return _ran(prepared, chosen, destination, produced, started)


def work(
    plan_file: str | Path, *, index: int | None = None, of: int | None = None, claim: bool | None = None, roots: Sequence[str | Path] = (),
    lease: float | None = None, wait: bool = True, progress: Progress | None = None, **options: Any,
) -> Worked:  # fmt: skip
    """Does tasks of a plan that :func:`plan` saved with a destination, until none is left. Any number of processes may do so at once.

    ``index`` and ``of`` say which share is this worker's (else what a launcher's environment says); with ``claim`` it helps with the rest
    when that is done. Without a share every task is open to everyone. ``options``: ``threads``, ``max_memory``, ``sync``, ``force``.
    """
    from ckptconv.execute.claims import LEASE_SECONDS
    from ckptconv.stage import working
    from ckptconv.stage.launchers import checked, share_of
    from ckptconv.stage.planfile import How, open_job

    if index is not None and of is None:
        raise UsageError(Problem("CK107", "--index needs --of: how many workers there are"))
    share = checked(index, of, "--index") if index is not None and of is not None else None if claim else share_of(os.environ, of)
    job = open_job(Path(plan_file), How([Path(root) for root in roots], options))
    job.start(anew=job.made.options.force)
    mine = job.tasks.share(*share) if share is not None else None
    return working.work(job, mine, help_others=bool(claim), lease=LEASE_SECONDS if lease is None else lease, wait=wait, progress=progress)


def finish(plan_file: str | Path, *, roots: Sequence[str | Path] = (), progress: Progress | None = None, **options: Any) -> RunReport:
    """Puts together what :func:`work` did: verifies the output as :func:`run` does, and renames it into place.

    ``options``: ``target``, ``verify``, ``parity``, ``threads``, ``sync``, ``force``, ``timeout``. Raises
    :class:`~ckptconv.errors.FitError` CK416 where a task is not done or damaged, and nothing is published.
    """
    from ckptconv.stage import working
    from ckptconv.stage.planfile import How, open_job

    started = time.monotonic()
    with _with_report("finish", None, ""):
        job = open_job(Path(plan_file), How([Path(root) for root in roots], options, compare=True))
        produced = working.finish(job, progress)
    return _ran(job.made.prepared, job.made.options, job.made.destination, produced, started)


def status(plan_file: str | Path, *, roots: Sequence[str | Path] = (), lease: float | None = None) -> Status:
    """How far the work on a saved plan is: tasks done, claimed, stale and missing, bytes, rate and remaining time."""
    from ckptconv.execute.claims import LEASE_SECONDS
    from ckptconv.stage import working
    from ckptconv.stage.planfile import How, open_job

    job = open_job(Path(plan_file), How([Path(root) for root in roots]))
    return working.status(job, lease=LEASE_SECONDS if lease is None else lease)


def batch(
    sources: Sequence[str | Path], rules: str | Path, destination: str | Path, *, jobs: int | None = None, dry_run: bool = False,
    progress: Progress | None = None, told: Callable[[BatchItem], None] | None = None, engine: str = "local",
    ray_address: str | None = None, **options: Any,
) -> BatchReport:  # fmt: skip
    """Converts many checkpoints into the folder ``destination``: those of which its lock does not say that they are done.

    ``sources`` are files, patterns and folders; ``options``, ``engine`` and ``ray_address`` are those of :func:`run`. ``told`` hears of each checkpoint as soon as it is
    converted. A checkpoint that cannot be converted is in the report, and not raised.

    >>> import tempfile, torch, ckptconv
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"module.weight": torch.ones(2, 3)}, folder / "in.pth")
    >>> report = ckptconv.batch([folder / "*.pth"], "dataparallel", folder / "out")
    >>> [item.source == str(folder / "in.pth") for item in report.converted], list(torch.load(folder / "out" / "in.pth"))
    ([True], ['weight'])
    >>> len(ckptconv.batch([folder / "*.pth"], "dataparallel", folder / "out").unchanged)
    1
    """
    from ckptconv.report.batch import BatchItem, BatchReport
    from ckptconv.stage import batching
    from ckptconv.stage.preparing import Options

    if engine == "ray":
        from ckptconv.stage.ray_engine import RayBatch

        start: Callable[[int], batching.Engine] = partial(RayBatch, address=ray_address)
    else:
        from ckptconv.stage.batch_workers import Workers

        start = Workers

    def item(done: batching.Done) -> BatchItem:
        job = done.job
        return BatchItem(str(job.source), str(job.output), done.why, done.nbytes, done.verified, done.problems, done.exit_code)

    started = time.monotonic()
    found = batching.batch(
        [str(word) for word in sources], str(rules), Path(destination), Options(**options), start, jobs=jobs, elsewhere=engine == "ray",
        dry_run=dry_run, progress=progress, told=None if told is None else lambda done: told(item(done)),
    )  # fmt: skip
    return BatchReport(
        {"rules": found.rules.label, "file": found.rules.file, "digest": f"sha256:{found.rules.digest}"}, str(destination),
        tuple(map(item, found.converted)), tuple(str(job.source) for job in found.unchanged), tuple(map(item, found.failed)), found.jobs,
        time.monotonic() - started, dry_run,
    )  # fmt: skip


@_visiting
def plan(
    rules: Rules | None, source: str | Path, destination: str | Path | None = None, *, out: str | Path | None = None,
    plan_file: str | Path | None = None, workers: int | None = None, store: str = "disk", **options: Any,
) -> RunReport:  # fmt: skip
    """The dry run: what :func:`run` would write, its bytes and its peak memory. Reads headers only. ``out`` saves the plan as JSON.

    ``workers`` asks what its tasks would cost on so many machines, with source and destination at a kind of place: ``disk``, ``nfs`` or ``s3``.
    """
    from ckptconv.stage.preparing import Options, saved_plan
    from ckptconv.stage.producing import estimate
    from ckptconv.stage.sending import also_words, out_path

    started = time.monotonic()
    chosen = Options(**options)
    with _with_report("plan", chosen, destination or ""):
        prepared = _prepared(rules, near(source), chosen, plan_file)
    made, computed, peak = estimate(prepared, out_path(destination) if destination is not None else None, chosen)
    shape, layout = (made.shape, made.layout) if made is not None else (None, None)
    tasks: dict[str, float] = {}
    on_paper: dict[str, Any] = {}
    if made is None and workers is not None:
        raise UsageError(
            Problem("CK107", "--workers needs DST: tasks are cut from a laid-out output", try_="ckptconv plan RULES SRC DST --workers 8")
        )
    if made is not None and (out is not None or chosen.task_size is not None or workers is not None):
        from ckptconv.stage.working import tasks_of

        cut = tasks_of(made)
        tasks = {"tasks": len(cut.tasks), "read_amplification": round(cut.read_amplification, 4)}
        if workers is not None:
            from ckptconv.stage.costing import figures

            on_paper = figures(made, cut, workers, store)
    if out is not None:
        from ckptconv.execute.small_files import refuse_to_overwrite, write_text
        from ckptconv.stage.planfile import plan_for_work

        refuse_to_overwrite(Path(out), [word for word in (rules, source, destination) if isinstance(word, (str, Path))])
        elsewhere = any(is_remote(word) for word in (source, destination or "", *also_words(chosen)))
        saved = saved_plan(prepared) if made is None or elsewhere else plan_for_work(made, Path(out))
        write_text(Path(out), json.dumps(saved, ensure_ascii=False, indent=1), force=chosen.force)
    manifest = prepared.plan.manifest
    report = _report("plan", prepared, chosen, {
        "path": named(destination or ""), "format": shape.format if shape else "", "files": [file.name for file in layout.files] if layout else [],
        "tensors": len(manifest), "nbytes": layout.nbytes if layout else manifest.nbytes, "written": False,
    })  # fmt: skip
    copied = sum(output.expr.spec.nbytes for output in prepared.plan.stored) - computed
    cost = {"copied_nbytes": copied, "computed_nbytes": computed, "peak_nbytes": peak, **tasks}
    return replace(report, cost=cost, on_paper=on_paper, seconds=time.monotonic() - started)


def convert(state_dict: Mapping[str, Tensor], rules: Rules, *, set: Any = (), config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:  # noqa: A002
    """The converted state_dict, in memory. Tensors that are only renamed are the given ones; ``_metadata`` is carried along.

    >>> import torch, ckptconv
    >>> list(ckptconv.convert({"module.bias": torch.zeros(2)}, "dataparallel").items())
    [('bias', tensor([0., 0.]))]
    """
    from collections import OrderedDict

    from ckptconv.execute.memory_run import evaluate
    from ckptconv.layout import renamed_versions
    from ckptconv.plan import Read
    from ckptconv.planner import make_plan
    from ckptconv.stage.opening import rule_file, variables

    made = make_plan(
        rule_file(rules), manifest_of_state_dict(state_dict), given=variables(set), config=config, shown_source="the state_dict"
    )
    out: OrderedDict[str, Tensor] = OrderedDict(evaluate(made, state_dict))
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:
        renamed = {output.expr.name: output.name for output in made.outputs if isinstance(output.expr, Read)}
        out._metadata = OrderedDict(renamed_versions(versions, renamed))  # type: ignore[attr-defined]
    return out


@_visiting
def load(
    model: nn.Module, path: str | Path, *, rules: Rules, set: Any = (), config: str | Path | None = None, select: Sequence[str] = (),  # noqa: A002
) -> RunReport:  # fmt: skip
    """Converts the checkpoint at ``path`` and loads it into ``model``, strictly; no file is written.

    Keys that the rule's ``allow: missing`` names may stay at their initial values, and the report says which. Raises
    :class:`~ckptconv.errors.FitError` when the result does not fit, and then the model is as it was.
    """
    from ckptconv import target
    from ckptconv.compare import compare, explain_missing_initial
    from ckptconv.execute.memory_run import LazyTensors, evaluate
    from ckptconv.execute.sources import Sources
    from ckptconv.stage.preparing import Options, prepare

    started = time.monotonic()
    chosen = Options(set=set, config=Path(config) if config is not None else None, select=select, use_rule_target=False)
    prepared = prepare(rules, near(path), chosen)
    wanted = manifest_of_state_dict(model.state_dict(keep_vars=True))
    comparison = compare(prepared.plan.manifest, wanted, prepared.allow)
    if not comparison.fits:
        raise FitError(comparison.problems())
    with Sources(prepared.source.files, prepared.source.contents.identities) as opened:
        state = evaluate(prepared.plan, LazyTensors(prepared.source.placed, opened))
    result = target.load_into(model, state, allow_missing=comparison.allowed_missing, allow_unexpected=comparison.allowed_unexpected)
    if not result.loaded:
        raise FitError(Problem("CK408", printable(result.error, 1000)))
    report = _report("load", prepared, chosen, {"path": type(model).__name__, "tensors": len(state), "written": False})
    return replace(
        report, target=type(model).__name__, comparison=comparison, allowed=explain_missing_initial(comparison, wanted),
        seconds=time.monotonic() - started,
    )  # fmt: skip


@_visiting
def inspect(source: str | Path, *, select: Sequence[str] = ()) -> Inspection:
    """What a checkpoint holds: every candidate state_dict (or the selected one). Reads headers only, never needs torch."""
    from ckptconv.report.model import Candidate, Inspection
    from ckptconv.stage.opening import choose, contents_of

    path = near(source)
    contents = contents_of(path)
    candidates = tuple(
        Candidate(container.path, container.manifest, dict(container.skipped), dict(container.unsupported))
        for container in ([choose(contents, select, path)] if select else contents.containers.values())
    )
    sizes = tuple((file.name, file.stat().st_size) for file in contents.files)
    return Inspection(named(source), contents.format, sizes, candidates, dict(contents.metadata), dict(contents.skipped), contents.warnings)


@_visiting
def save_manifest(source: str, out: str | Path, *, select: Sequence[str] = (), force: bool = False, timeout: float = 300.0) -> Manifest:
    """Writes the manifest of a checkpoint or target as JSON, to be a target or a side of :func:`diff` later."""
    from ckptconv.stage.opening import manifest_of_word

    manifest = manifest_of_word(source, select, timeout)
    from ckptconv.execute.small_files import refuse_to_overwrite, write_text

    refuse_to_overwrite(Path(out), [source])
    write_text(Path(out), json.dumps(manifest.to_json(), ensure_ascii=False, indent=1) + "\n", force=force)
    return manifest


@_visiting
def diff(left: str, right: str, *, select: Sequence[str] = (), timeout: float = 300.0) -> Difference:
    """Names, shapes, dtypes and ties of two checkpoints, saved manifests or targets compared. Files need no torch."""
    from ckptconv.report.model import difference
    from ckptconv.stage.opening import manifest_of_word

    return difference(named(left), manifest_of_word(left, select, timeout), named(right), manifest_of_word(right, select, timeout))


@_visiting
def explain(
    source: str | Path | None = None, target: str | None = None, *, error: str = "", select: Sequence[str] = (), set: Any = (),  # noqa: A002
    config: str | Path | None = None, timeout: float = 300.0,
) -> Explanation:  # fmt: skip
    """Why ``source`` does not load into ``target``: causes in words, a verdict, and the command that helps.

    ``error`` is the text of a message (``RuntimeError: Error(s) in loading state_dict for …``): with it either of the two may be left out. Without a
    target it says what the file is and which built-in rules are meant for it. A file that cannot be read is explained too, not raised.

    >>> import tempfile, torch, ckptconv
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"module.fc.weight": torch.ones(2, 3), "module.fc.bias": torch.ones(2)}, folder / "in.pth")
    >>> torch.save({"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}, folder / "model.pth")
    >>> report = ckptconv.explain(folder / "in.pth", str(folder / "model.pth"))
    >>> report.verdict, report.sentence
    ('convertible', 'by the built-in rule dataparallel: every key of the model is filled')
    """
    from ckptconv import asking

    return asking.explain(source, target, error=error, select=select, given=set, config=config, timeout=timeout)


@_visiting
def suggest(
    source: str | Path, target: str, out: str | Path | None = None, *, pairs: Sequence[str] = (), parity: Any = (), apply: str | Path | None = None,
    accept_ambiguous: bool = False, select: Sequence[str] = (), force: bool = False, timeout: float = 300.0, threads: int = 2,
) -> SuggestReport:  # fmt: skip
    """The rule file that makes ``source`` load into ``target``, how sure it is, and how far it is proved. ``out`` writes it.

    ``pairs`` are hints (``reduce=conv1``: parts of names); ``parity`` (as for :func:`run`) lets the models' outputs settle what shapes cannot, and
    a target that is a checkpoint with the same weights does so by its values. ``apply`` converts to a path by the rule, verified; it is refused
    while something stays ambiguous, unless ``accept_ambiguous``. What does not fit is in the report and not raised.

    >>> import tempfile, torch, ckptconv
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"net.fc.weight": torch.ones(2, 3), "net.fc.bias": torch.ones(2)}, folder / "in.pth")
    >>> torch.save({"out.weight": torch.ones(2, 3), "out.bias": torch.ones(2)}, folder / "model.pth")
    >>> report = ckptconv.suggest(folder / "in.pth", str(folder / "model.pth"), folder / "mine.yaml")
    >>> report.verdict, report.ladder.reached, list(ckptconv.convert(torch.load(folder / "in.pth"), folder / "mine.yaml"))
    ('convertible', 'L0 L1 L3', ['out.weight', 'out.bias'])
    """
    from ckptconv import asking
    from ckptconv.execute.small_files import refuse_to_overwrite

    for written in (out, apply):
        if written is not None:
            refuse_to_overwrite(Path(written), [source, target])
    words = asking.Words(pairs, parity, select, timeout, threads)
    return asking.suggest(run, source, target, out, words, apply=apply, accept_ambiguous=accept_ambiguous, force=force)


@_visiting
def verify(
    destination: str | Path, *, target_word: str | None = None, against: str | Path | None = None, rules: Rules | None = None,
    level: int | Literal["auto"] = "auto", progress: Progress | None = None, **options: Any,
) -> RunReport:  # fmt: skip
    """Climbs the verification ladder for a checkpoint that is already there; with ``against`` and ``rules`` also against its source.

    Without ``rules``, the built-in rule that the file recorded is taken, in the revision that it recorded. ``level`` is 3, or 5 where
    ``parity`` says what the model's outputs are compared with.
    """
    from ckptconv import formats, target
    from ckptconv.compare import compare
    from ckptconv.layout import written_like
    from ckptconv.plan import as_it_is
    from ckptconv.report.model import RunReport
    from ckptconv.stage.opening import open_source, rule_file
    from ckptconv.stage.parity import parity_words
    from ckptconv.stage.preparing import Options, prepare
    from ckptconv.stage.producing import Meter
    from ckptconv.stage.recorded import OURS, differing_rules, recorded, rules_of
    from ckptconv.verify import Evidence, climb

    started = time.monotonic()
    path = near(destination)
    if against is None and rules is not None:
        raise UsageError(Problem("CK107", "--rules needs --against: the source that was converted"))
    if against is None and target_word is None:
        raise UsageError(Problem("CK107", "verify needs a --target, or --against with --rules"))
    chosen = Options(**{**options, "target": target_word, "verify": level})
    written = open_source(path, chosen.select if against is None else ())
    kind = written_like(written.contents)
    meter = Meter(progress or (lambda _stage, _done, _total: None), written.manifest.nbytes)
    bare = Evidence(
        written.files,
        lambda: formats.read(path),
        kind,
        container=written.container.path,
        timeout=chosen.timeout,
        threads=chosen.threads,
        progress=meter.counted("verifying"),
    )
    about = {
        "path": named(destination), "format": kind, "files": [file.name for file in written.files], "tensors": len(written.manifest),
        "nbytes": written.manifest.nbytes, "written": False, "recorded": recorded(written.contents.metadata),
    }  # fmt: skip
    if against is not None:
        from ckptconv.execute.digest import digest_tensors
        from ckptconv.execute.sources import Sources

        made_by = rule_file(rules) if rules is not None else rules_of(written.contents.metadata, path)
        chosen = replace(chosen, optimizer=chosen.optimizer or recorded(written.contents.metadata).get(OURS + "optimizer"))
        with _with_report("verify", chosen, destination):
            prepared = prepare(made_by, near(against), chosen)
        carried = prepared.optimizer
        moments = None if carried is None else lambda contents: carried.read_back(contents, path if path.is_dir() else path.parent)
        wish = prepared.parity
        compared = wish.request(path, written.container.path, prepared.plan, prepared.source, prepared.comparison) if wish else None
        with Sources(prepared.source.files, prepared.source.contents.identities) as opened:
            meter.total += prepared.source.manifest.nbytes
            digests = digest_tensors(opened, prepared.source.placed, threads=chosen.threads, progress=meter.counted("reading"))
        evidence = replace(
            bare,
            plan=prepared.plan,
            source=prepared.source.placed,
            source_files=prepared.source.files,
            source_digests=digests,
            target=prepared.target,
            wanted=prepared.wanted,
            builder=prepared.builder,
            allow=prepared.allow,
            parity=compared,
            moments=moments,
        )
        report = _report("verify", prepared, chosen, about)
        report = replace(report, skipped={}, notes=differing_rules(written.contents.metadata, made_by) + report.notes)
    else:
        assert target_word is not None
        wanted_target = target.parse(target_word, origin="command line", base=None)
        wish = parity_words(chosen.parity, wanted_target, chosen.level)
        compared = wish.request(path, written.container.path) if wish else None
        builder = target.Builder(wanted_target) if wanted_target.is_model else None
        wanted = builder.manifest(chosen.timeout) if builder is not None else target.manifest_of(wanted_target, timeout=chosen.timeout)
        evidence = replace(bare, target=wanted_target, wanted=wanted, builder=builder, parity=compared)
        report = RunReport(
            "verify", {}, {}, about, (), written.contents.warnings, target=named(target_word), comparison=compare(written.manifest, wanted),
            plan=as_it_is(written.manifest),
        )  # fmt: skip
    ladder = climb(evidence, chosen.level or 0)
    return replace(report, ladder=ladder, seconds=time.monotonic() - started)


@_visiting
def invert(
    rules: Rules, like: str | Path, out: str | Path | None = None, *, set: Any = (), config: str | Path | None = None,  # noqa: A002
    select: Sequence[str] = (), lossy: bool = False, force: bool = False, timeout: float = 300.0,
) -> BackRule:  # fmt: skip
    """The way back as a rule file: what undoes ``rules`` for checkpoints with the names of ``like``. ``out`` writes it.

    It is proved before it is given back: planned on what the rules make of ``like``, it gives ``like`` again. Raises
    :class:`~ckptconv.errors.UsageError` CK212 for what cannot come back, by step, unless ``lossy`` leaves that out.
    """
    from ckptconv.backwards import Lossy, rule_back
    from ckptconv.ruleset.model import parse
    from ckptconv.stage.opening import config_for, manifest_of_word, rule_file, variables

    parsed = rule_file(rules)
    manifest = manifest_of_word(str(like), select or parsed.header.select, timeout)
    there = near(like)
    beside = config_for(there, Path(config) if config is not None else None) if config is not None or there.exists() else None
    try:
        back = rule_back(parsed, manifest, given=variables(set), config=beside, lossy=lossy)
    except Lossy as refusal:
        raise UsageError([
            Problem("CK212", f"{printable(names)} cannot come back: {reason}", where=step, try_="--lossy leaves it out")
            for step, names, reason in refusal.back.lost[:20]
        ]) from None  # fmt: skip
    except Refusal as refusal:
        raise UsageError(refusal.at(parsed.file)) from None
    if out is not None:
        from ckptconv.execute.small_files import refuse_to_overwrite, write_text

        stem = Path(out).stem
        text = re.sub(r"^name: .*$", f"name: {stem}", back.text, count=1, flags=re.MULTILINE)
        refuse_to_overwrite(Path(out), [like, *([rules] if isinstance(rules, (str, Path)) else [])])
        parse(text.encode(), str(out), stem=stem)  # what is written is a rule file, whatever the file is called
        write_text(Path(out), text, force=force)
        return replace(back, text=text)
    return back


def manifest_of_state_dict(state_dict: Mapping[str, Any]) -> Manifest:
    """Names, shapes, dtypes and ties of a state_dict's tensors; what is not a tensor is left out."""
    tensors: dict[str, TensorSpec] = {}
    shared: dict[Any, list[str]] = {}
    for name, value in state_dict.items():
        if not hasattr(value, "dtype") or not hasattr(value, "data_ptr"):
            continue
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DType.__members__:
            raise UsageError(Problem("CK305", f"{printable(name)} has dtype {dtype}, which cannot be converted"))
        tensors[name] = TensorSpec(tuple(value.shape), DType(dtype))
        if value.numel():
            place = id(value) if value.is_meta else (value.data_ptr(), tuple(value.stride()), dtype)
            shared.setdefault((place, tuple(value.shape)), []).append(name)
    return Manifest(tensors, tuple(tuple(names) for names in shared.values() if len(names) > 1))


def _prepared(rules: Rules | None, source: Path, options: Options, plan_file: str | Path | None) -> Prepared:
    from ckptconv.stage.preparing import prepare, prepare_saved

    if (rules is None) == (plan_file is None):
        raise UsageError(Problem("CK107", "give either RULES or --plan FILE"))
    return prepare(rules, source, options) if rules is not None else prepare_saved(Path(str(plan_file)), source, options)


def _ran(prepared: Prepared, options: Options, destination: str | Path, produced: Produced, started: float) -> RunReport:
    """The report of a conversion that was published."""
    from ckptconv.stage.producing import noticed

    report = _report("run", prepared, options, {
        "path": named(destination), "format": produced.shape.format, "files": [file.name for file in produced.layout.files],
        "tensors": len(prepared.plan.outputs), "nbytes": produced.layout.nbytes, "written": True,
    })  # fmt: skip
    left_out = (f"not carried along: {printable(', '.join(produced.left_out[:5]))}",) if produced.left_out else ()
    return replace(
        report, source={**report.source, "digest": produced.source_digest},
        notes=(*report.notes, *produced.notes, *noticed(produced.receipt), *left_out), ladder=produced.ladder,
        cost={"copied_nbytes": produced.receipt.copied_nbytes, "computed_nbytes": produced.receipt.computed_nbytes},
        seconds=time.monotonic() - started, workers=tuple(worker.to_json() for worker in produced.receipt.workers),
    )  # fmt: skip


def _report(command: str, prepared: Prepared, options: Options, destination: Mapping[str, Any]) -> RunReport:
    """What is known of a conversion before anything is written."""
    from ckptconv.report.changes import changes
    from ckptconv.report.model import RunReport

    return RunReport(
        command, _rules_json(prepared), _source_json(prepared), destination, tuple(changes(prepared.plan)), prepared.notes,
        _left_behind(prepared, options), prepared.target.text if prepared.target else "", prepared.comparison, prepared.allowed,
        plan=prepared.plan, rule_texts=prepared.rule_texts, optimizer=prepared.optimizer.to_json() if prepared.optimizer is not None else {},
    )  # fmt: skip


@contextmanager
def _with_report(command: str, options: Options | None, destination: str | Path) -> Iterator[None]:
    """An error that comes when the conversion is prepared says what was known by then, as a report."""
    from ckptconv.stage.preparing import Options, Prepared

    try:
        yield
    except CkptconvError as error:
        if isinstance(error.about, Prepared):
            manifest = error.about.plan.manifest
            planned = {"path": named(destination), "format": "", "tensors": len(manifest), "nbytes": manifest.nbytes, "written": False}
            error.about = _report(command, error.about, options or Options(), planned)
        raise


def _rules_json(prepared: Prepared) -> dict[str, Any]:
    return {"rules": prepared.label, "file": prepared.rules_file, "digest": f"sha256:{prepared.rules_digest}"}


def _source_json(prepared: Prepared) -> dict[str, Any]:
    source = prepared.source
    return {
        "path": named(source.path), "format": source.contents.format, "container": source.container.path, "tensors": len(source.manifest),
        "parameters": source.manifest.numel, "nbytes": source.manifest.nbytes,
    }  # fmt: skip


def _left_behind(prepared: Prepared, options: Options) -> dict[str, str]:
    """What the source holds beside the chosen state_dict, and is not written."""
    container = prepared.source.container
    skipped = {} if options.keep_extras and container.path == "." else container.skipped  # these are the others, which are kept
    found = {f"{container.path}: {name}": kind for name, kind in skipped.items()}
    found.update(prepared.source.contents.skipped)
    tree = prepared.source.contents.tree
    if isinstance(tree, Mapping) and container.path != "." and not options.keep_extras:
        head = container.path.split(".")[0]
        for key, value in tree.items():
            if str(key) != head and str(key) not in found:
                found[str(key)] = type(value).__name__ if not hasattr(value, "name") else str(value.name)
    return found
