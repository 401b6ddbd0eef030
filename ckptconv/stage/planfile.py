"""The plan file as everybody who works by it reads it: which source, which destination, how it is laid out and cut.

It may come from anywhere. It is validated strictly, its paths must lie in folders that the command line names, it can name no code, and
nothing that it says about places in a file is believed: everybody lays out anew.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Struct
from msgspec.structs import replace
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError

from ckptconv import formats, target
from ckptconv.errors import InputError, Problem, UsageError, printable
from ckptconv.spec import Manifest
from ckptconv.stage.opening import MAX_PLAN, read_json
from ckptconv.stage.preparing import Options, Prepared, prepare_read, saved_plan
from ckptconv.stage.producing import Conversion, begin
from ckptconv.stage.working import Job, identities

_Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Size = Annotated[str, StringConstraints(max_length=32)]


def _writable(format: str) -> str:  # noqa: A002  (the field's own word)
    if format not in formats.WRITERS:
        raise PydanticCustomError("format", f"there is no output format of this name: {', '.join(formats.WRITERS)}")
    return format


class WorkField(BaseModel):
    """What ``work`` needs beside the plan itself. Relative paths start at the plan file's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    source: _Text
    also: Annotated[dict[_Text, _Text], Field(max_length=64)] = {}
    destination: _Text
    format: Annotated[str, AfterValidator(_writable)] | None = None
    shard_size: _Size | None = None
    task_size: _Size | None = None
    keep_extras: bool = False
    optimizer: _Text | None = None
    optimizer_file: _Text | None = None
    max_output: _Size | None = None
    forbid_nonfinite: bool = False
    verify: Annotated[int, Field(ge=0, le=6)] | Literal["auto"] | None = "auto"
    target: _Text | None = None
    files: Annotated[list[tuple[_Text, int, int]], Field(max_length=1_000_000)]  #: name, bytes, time of the last change of each source file


class How(Struct, frozen=True):
    """What the command line of ``work``, ``finish`` or ``status`` says: the rest stands in the plan file."""

    roots: Sequence[Path] = ()  #: where sources and destination may lie, beside the plan file's folder and the current one
    options: Mapping[str, Any] | None = None  #: fields of Options that are the worker's own: threads, force, …
    compare: bool = False  #: build the target and compare with it: `finish` does


def plan_for_work(made: Conversion, plan_file: Path) -> dict[str, Any]:
    """What ``plan RULES SRC DST --out`` writes: the plan, and where, how and from what it is carried out."""
    options, source, folder = made.options, made.prepared.source, Path(os.path.abspath(plan_file)).parent
    carried = made.prepared.optimizer
    wanted = made.prepared.target
    field_ = WorkField(
        source=_told(source.path, folder), also={name: _told(path, folder) for name, path in source.also.items()},
        destination=_told(made.destination, folder), format=options.format, shard_size=options.shard_size, task_size=options.task_size,
        keep_extras=options.keep_extras, max_output=options.max_output, forbid_nonfinite=options.forbid_nonfinite, verify=options.verify,
        target=None if wanted is None else _target_text(wanted, folder), files=identities(made), optimizer=options.optimizer,
        optimizer_file=None if options.optimizer_file is None else _told(Path(options.optimizer_file), folder),
    )  # fmt: skip
    saved = {**saved_plan(made.prepared), "work": field_.model_dump(mode="json", exclude_defaults=True)}
    if carried is not None:  # a worker builds neither model, and gives the parameters the same numbers
        saved["optimizer"] = {
            word: None if found is None else found.to_json() for word, found in (("model", carried.model), ("order", carried.order))
        }
    return saved


def open_job(plan_file: Path, how: How | None = None) -> Job:
    """The job that a plan file tells of; headers are read, nothing is written.

    Raises :class:`~ckptconv.errors.UsageError` for a file that is no plan with a destination, or whose paths leave the roots, and
    :class:`~ckptconv.errors.InputError` CK311 where the source is another than the one that was planned for.
    """
    how = how or How()
    data = read_json(plan_file, "the plan", MAX_PLAN)
    if not isinstance(data, dict) or "work" not in data:
        raise UsageError(
            Problem(
                "CK107", "the plan names no destination to work on", where=printable(plan_file), try_="ckptconv plan RULES SRC DST --out"
            )
        )
    try:
        field_ = WorkField.model_validate(_with_tuples(data["work"]))
    except ValidationError as error:
        raise UsageError([
            Problem("CK107", f"not a plan of `ckptconv plan --out`: {printable(each['msg'])}",
                    where=f"{printable(plan_file)}: work.{printable('.'.join(map(str, each['loc'])))}")
            for each in error.errors(include_url=False, include_context=False, include_input=False)[:10]
        ]) from None  # fmt: skip
    folder = Path(os.path.abspath(plan_file)).parent
    roots = [Path(os.path.realpath(root)) for root in (folder, Path.cwd(), *how.roots)]
    upwards = [
        path
        for path in (field_.source, *field_.also.values(), field_.destination, field_.optimizer_file or "")
        if os.pardir in Path(path).parts
    ]
    if upwards:  # behind a link it means something else to the system than to whoever reads it
        raise UsageError(
            Problem("CK106", "a path of a plan file does not lead upwards", where=printable(plan_file), found=printable(upwards[0]),
                    try_="the whole path from /, with --root")
        )  # fmt: skip
    source, also, destination = (
        folder / field_.source,
        {name: folder / path for name, path in field_.also.items()},
        folder / field_.destination,
    )
    own = [folder / field_.optimizer_file] if field_.optimizer_file is not None else []
    _confine([source, *also.values(), destination, *own], roots, plan_file)
    options = Options(
        also=also, format=field_.format, shard_size=field_.shard_size, task_size=field_.task_size, keep_extras=field_.keep_extras,
        max_output=field_.max_output, forbid_nonfinite=field_.forbid_nonfinite, **{"verify": field_.verify, **(how.options or {})},
    )  # fmt: skip
    if field_.optimizer is not None:
        options = _with_optimizer(options, field_.optimizer, own[0] if own else None, data, plan_file)
    if not how.compare:
        options = _without_target(options)
    elif options.target is None and field_.target is not None:
        options = _with_target(options, field_.target, folder, roots, plan_file)
    prepared = prepare_read(data, plan_file, source, options)
    _confine([*prepared.source.files, *prepared.source.contents.neighbours], roots, plan_file)
    made = begin(prepared, destination, options)
    _same_files(made, field_, prepared)
    return Job(made, way_on=f"ckptconv finish {shlex.quote(printable(plan_file))}")


def _with_optimizer(options: Options, word: str, file: Path | None, data: Mapping[str, Any], plan_file: Path) -> Options:
    """The options with the optimizer's state as it was planned: its parameters in the order of the models that were built then."""
    try:
        found = data["optimizer"]
        model, order = (None if found[each] is None else Manifest.from_json(found[each]) for each in ("model", "order"))
    except (KeyError, TypeError, ValueError) as error:
        what = f"not a plan of `ckptconv plan --out`: {printable(error)}"
        raise UsageError(Problem("CK107", what, where=f"{printable(plan_file)}: optimizer")) from None
    return replace(
        options, optimizer=word, optimizer_file=file, source_model=model, optimizer_order=order if order is not None else "outputs"
    )


def _without_target(options: Options) -> Options:
    return replace(options, target=None, use_rule_target=False, parity=())


def _with_target(options: Options, text: str, folder: Path, roots: Sequence[Path], plan_file: Path) -> Options:
    if text.startswith("py:"):
        raise UsageError(
            Problem("CK106", "a plan file cannot name code as its target", where=printable(plan_file), found=printable(text),
                    try_="--target with the same word, if you trust it")
        )  # fmt: skip
    parsed = target.parse(text, origin="command line", base=folder)
    if parsed.kind in ("hf", "manifest", "checkpoint"):
        _confine([parsed.path], roots, plan_file)
        text = _target_text(parsed, None)
    return replace(options, target=text)


def _confine(paths: Iterable[Path], roots: Sequence[Path], plan_file: Path) -> None:
    """Raises :class:`~ckptconv.errors.UsageError` CK106 for paths that lead out of the roots, by links or otherwise."""
    for path in paths:
        real = Path(os.path.realpath(path))
        if not any(root == real or root in real.parents for root in roots):
            raise UsageError(
                Problem("CK106", "the plan file names a path outside of the folders that it may use", where=printable(plan_file),
                        found=printable(real), try_=f"--root {shlex.quote(printable(real.parent))}, if that is meant")
            )  # fmt: skip


def _same_files(made: Conversion, field_: WorkField, prepared: Prepared) -> None:
    found = identities(made)
    other = [name for (name, *_), theirs in zip(found, field_.files, strict=False) if (name, *_) != theirs]
    if other or len(found) != len(field_.files):
        raise InputError(
            Problem("CK311", "the source is not the one that the plan was made for: a file has another size or was written since",
                    where=printable(prepared.source.path), found=printable(", ".join(other[:3]) or f"{len(found)} files, not {len(field_.files)}"),
                    try_="ckptconv plan … --out again")
        )  # fmt: skip


def _told(path: Path, folder: Path) -> str:
    """A path as the plan file has it: relative to its folder where it lies below, so that both can be moved together."""
    whole = os.path.abspath(path)
    relative = os.path.relpath(whole, folder)
    return whole if relative.split(os.sep)[0] == os.pardir else relative


def _target_text(wanted: target.Target, folder: Path | None) -> str:
    if wanted.kind not in ("hf", "manifest", "checkpoint"):
        return wanted.text
    path = os.path.abspath(wanted.path) if folder is None else _told(wanted.path, folder)
    classes = dict(wanted.arguments).get("class")
    return (f"hf:{path}" + (f"#{classes}" if classes else "")) if wanted.kind == "hf" else path


def _with_tuples(data: Any) -> Any:
    """JSON has no tuples, and strict models take no lists for them."""
    if isinstance(data, dict) and isinstance(data.get("files"), list):
        return {**data, "files": [tuple(each) if isinstance(each, list) else each for each in data["files"]]}
    return data
