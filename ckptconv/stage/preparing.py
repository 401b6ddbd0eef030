"""A conversion up to the moment before the first byte is written: source opened, rules read, planned, compared with the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct, field
from msgspec.structs import force_setattr, replace

from ckptconv import target
from ckptconv.compare import Allow, Comparison, allowed_by, compare, explain_missing_initial
from ckptconv.errors import FitError, InputError, Problem, Refusal, UsageError, printable
from ckptconv.names import collapse
from ckptconv.plan import Plan
from ckptconv.planner import make_plan
from ckptconv.ruleset.model import RuleFile
from ckptconv.spec import Manifest
from ckptconv.stage.opening import (
    MAX_PLAN,
    Source,
    config_for,
    manifest_of_word,
    named_paths,
    open_source,
    parse_target,
    read_json,
    rule_file,
    variables,
)

if TYPE_CHECKING:
    from ckptconv.ruleset.model import Allow as AllowField
    from ckptconv.stage.optimizing import Carried
    from ckptconv.stage.parity import Parity
    from ckptconv.target.building import Builder


class Options(Struct, frozen=True):
    """How a conversion is done: the options of the command line, under the same names."""

    target: str | None = None
    set: Mapping[str, Any] | Sequence[str] = field(default_factory=dict)
    config: Path | None = None
    select: Sequence[str] = ()
    also: Mapping[str, Any] | Sequence[str] = field(default_factory=dict)  #: further sources by name
    format: str | None = None  #: torch, safetensors or dcp; from the destination's suffix or the source where nothing is said
    shard_size: str | None = None
    verify: int | Literal["auto"] | None = "auto"  #: the highest rung to climb, see ``level``; None: none at all
    parity: Mapping[str, Any] | Sequence[str] = ()  #: what the models' outputs are compared with: source, golden, inputs, tolerance
    force: bool = False
    threads: int = 2
    keep_extras: bool = False
    optimizer: str | None = None  #: follow, drop, or where in the file the optimizer's state is that follows; keeps the extras
    optimizer_file: str | Path | None = None  #: the state is in a file of its own, and is written to one
    source_model: str | Manifest | None = None  #: the model that was trained, or its target word: its parameters have the state's numbers
    optimizer_order: Manifest | Literal["target", "outputs"] = "target"  #: whose parameters give the written state's numbers
    untie: bool = False
    max_memory: str | None = None
    max_output: str | None = None
    task_size: str | None = None  #: of a conversion in tasks
    resume: bool = False  #: go on with what an interrupted run with this option did
    forbid_nonfinite: bool = False
    allow_code: bool = False  #: the rule file may name a ``py:`` target
    sync: bool = True
    timeout: float = 300.0  #: seconds that the building of a target may take
    reverse: bool = False  #: run the rules backwards
    like: str | None = (
        None  #: with reverse: what the result must be like (a checkpoint, manifest or target in the rules' own source layout)
    )
    lossy: bool = False  #: with reverse: leave out what cannot come back
    use_rule_target: bool = True  #: False: compare with nothing, the caller has a model of its own

    def __post_init__(self) -> None:
        if self.optimizer is None and (self.optimizer_file is not None or self.source_model is not None):
            option = "--optimizer-file" if self.optimizer_file is not None else "--source-model"
            raise UsageError(Problem("CK107", f"{option} is about the optimizer's state", try_=f"--optimizer follow {option} …"))
        if self.optimizer == "drop" and self.optimizer_file is not None:
            raise UsageError(Problem("CK107", "nothing is read of an optimizer's state that is dropped", try_="leave --optimizer-file out"))
        if self.optimizer is not None and self.optimizer_file is None:
            force_setattr(self, "keep_extras", True)

    @property
    def level(self) -> int | None:
        """How far to climb. Who says what to compare the outputs with wants them compared."""
        return (5 if self.parity else 3) if self.verify == "auto" else self.verify


class Prepared(Struct, frozen=True):
    """Everything that is known before anything is written."""

    label: str  #: rule name and revision
    rules_file: str
    rules_digest: str
    source: Source
    plan: Plan
    target: target.Target | None
    wanted: Manifest | None
    allow: Allow
    comparison: Comparison | None
    allowed: str  #: the sentence on what stays at its initial values
    parity: Parity | None = None
    rule_texts: Mapping[str, str] = field(default_factory=dict)  #: file -> text, of the rules and those that they include
    allowed_names: Mapping[str, Sequence[str]] = field(default_factory=dict)  #: what ``allow`` was made of: missing, … -> patterns
    builder: Builder | None = None  #: of a target that is a model, until it is verified
    optimizer: Carried | None = None  #: what becomes of the optimizer's state, where something is wished

    @property
    def notes(self) -> tuple[str, ...]:
        notes = self.plan.notes + self.source.contents.warnings + (self.optimizer.notes if self.optimizer is not None else ())
        return notes + (self.comparison.notes if self.comparison is not None else ())


def prepare(rules: str | Path | RuleFile, source: Path, options: Options) -> Prepared:
    """Opens, plans and compares. Raises every problem of the first of these that has any; nothing is written."""
    parsed = rule_file(rules)
    opened = open_source(source, options.select or parsed.header.select, also=named_paths(options.also))
    given = {**{name: {"config": config_for(path, None) or {}} for name, path in opened.also.items()}, **variables(options.set)}
    make = partial(make_plan, parsed, given=given, config=config_for(source, options.config), untie=options.untie)
    if options.reverse:
        plan = _backwards(make, opened, parsed, options)
        return _against_target(None, f"{parsed.label} reversed", parsed.file, parsed.digest, opened, plan, options)
    try:
        plan = make(opened.manifest, shown_source=printable(source), composites=opened.composites)
    except Refusal as refusal:  # chunks that do not make up their tensor: the source is at fault, not a step
        raise InputError(refusal.at(printable(source))) from None
    return _against_target(parsed, parsed.label, parsed.file, parsed.digest, opened, plan, options)


def _backwards(make: Callable[..., Plan], opened: Source, rules: RuleFile, options: Options) -> Plan:
    """The inverse of the plan that made ``opened`` out of something like ``options.like``. Refuses what would be lost, unless told."""
    from ckptconv.invert import invert

    if options.like is None:
        raise UsageError(
            Problem("CK107", "--reverse needs --like: a checkpoint, manifest or target with the names that the result must have",
                    try_="ckptconv run --reverse RULES SRC DST --like OLD")
        )  # fmt: skip
    forward = make(manifest_of_word(options.like, rules.header.select, options.timeout), shown_source=printable(options.like))
    comparison = compare(opened.container.manifest, forward.manifest, Allow(unexpected=lambda _name: False))
    if not comparison.fits:
        where = f"{printable(opened.path)} is not what {rules.label} makes of {printable(options.like)}"
        raise FitError([problem.at(where) for problem in comparison.problems()])
    inversion = invert(forward)
    if inversion.lost and not options.lossy:
        raise UsageError([
            Problem("CK212", f"{printable(template)} cannot come back: {reason}", where=rules.file, try_="--lossy leaves it out")
            for reason in dict.fromkeys(each.reason for each in inversion.lost)
            for template in collapse([each.name for each in inversion.lost if each.reason == reason])
        ][:20])  # fmt: skip
    notes = tuple(f"left out, because it cannot come back: {printable(each.name)} ({each.reason})" for each in inversion.lost[:20])
    return replace(inversion.plan, source=opened.manifest, notes=notes)


def prepare_saved(plan_file: Path, source: Path, options: Options) -> Prepared:
    """A conversion by a plan that ``plan --out`` saved. Refuses when the source's names, shapes, dtypes or ties are not the plan's."""
    return prepare_read(read_json(plan_file, "the plan", MAX_PLAN), plan_file, source, options)


def prepare_read(data: Any, plan_file: Path, source: Path, options: Options) -> Prepared:
    """The same for a plan file that was read already."""
    try:
        saved = data["plan"]
        plan = Plan.from_json(saved)
        label, file, digest, select = (str(data[key]) for key in ("rules", "rules_file", "rules_digest", "select"))
        allowed = _allowed(data.get("allow", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(Problem("CK107", f"not a plan of `ckptconv plan --out`: {printable(error)}", where=printable(plan_file))) from None
    opened = open_source(source, [select], also=named_paths(options.also))
    if opened.manifest.fingerprint != plan.source.fingerprint:
        different = sum(opened.manifest.tensors.get(name) != spec for name, spec in plan.source.tensors.items())
        extra = sum(name not in plan.source for name in opened.manifest.tensors)
        raise InputError(
            Problem("CK311", "the source is not the one that the plan was made for", where=printable(source),
                    found=f"{different} tensors missing or different, {extra} new", try_="ckptconv plan … --out again")
        )  # fmt: skip
    return _against_target(None, label, file, digest, opened, plan, options, allowed)


def _allowed(data: Any) -> AllowField:
    """The differences from the target that the rules of a saved plan allow. Raises ``ValueError`` for anything else."""
    from ckptconv.ruleset.model import Allow as Field

    return Field.validated(data)


def saved_plan(prepared: Prepared) -> dict[str, Any]:
    """What ``plan --out`` writes: the plan of the weights, which the optimizer's state will follow again."""
    plan = prepared.plan if prepared.optimizer is None else prepared.optimizer.bare
    return {
        "rules": prepared.label, "rules_file": prepared.rules_file, "rules_digest": prepared.rules_digest,
        "select": prepared.source.container.path, "source_fingerprint": plan.source.fingerprint,
        "plan_fingerprint": plan.fingerprint, "allow": {word: list(texts) for word, texts in prepared.allowed_names.items()},
        "plan": plan.to_json(),
    }  # fmt: skip


def _against_target(
    rules: RuleFile | None, label: str, file: str, digest: str, source: Source, plan: Plan, options: Options, allowed_field: AllowField | None = None
) -> Prepared:  # fmt: skip
    field_ = rules.header.target if rules is not None else None
    if field_ is not None:
        allowed_field = field_.allow
    allow = allowed_by(allowed_field) if allowed_field is not None else Allow()
    wanted_target = None
    if options.target is not None:
        wanted_target = parse_target(options.target, None, source.path)
    elif options.use_rule_target and field_ is not None and field_.model is not None:
        wanted_target = parse_target(field_.model, rules, source.path, allow_code=options.allow_code)
    texts = rules.texts if rules is not None else {}
    parity = None
    if options.parity:
        from ckptconv.stage.parity import parity_words

        parity = parity_words(options.parity, wanted_target, options.level)
    wanted = comparison = builder = None
    allowed = ""
    if wanted_target is not None:
        if wanted_target.is_model:
            builder = target.Builder(wanted_target)
        wanted = builder.manifest(options.timeout) if builder is not None else target.manifest_of(wanted_target, timeout=options.timeout)
        comparison = compare(plan.manifest, wanted, allow)
        allowed = explain_missing_initial(comparison, wanted)
    prepared = Prepared(
        label, file, digest, source, plan, wanted_target, wanted, allow, comparison, allowed, parity, texts, _texts(allowed_field), builder
    )
    if wanted_target is not None and comparison is not None and not comparison.fits:
        problems = [problem if problem.where else problem.at(wanted_target.text) for problem in comparison.problems()]
        raise FitError(problems, about=prepared)
    if options.optimizer is not None:
        from ckptconv.stage.optimizing import with_optimizer

        prepared = with_optimizer(prepared, options)
    elif options.keep_extras:
        from ckptconv.stage.optimizing import kept_as_it_is

        note = kept_as_it_is(plan, source.contents)
        prepared = replace(prepared, plan=replace(plan, notes=(*plan.notes, note))) if note else prepared
    return prepared


def _texts(allowed: AllowField | None) -> dict[str, tuple[str, ...]]:
    patterns = ((word, getattr(allowed, word)) for word in ("missing", "unexpected", "shape", "dtype")) if allowed is not None else ()
    return {word: tuple(pattern.text for pattern in found) for word, found in patterns if found}
