"""The rule file: what may stand in it, and how it is read.

``load`` gives a :class:`RuleFile`, or raises every problem of the file at once, each with file, line, column and the nearest word that
exists.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field
from msgspec.structs import replace
from pydantic_core import ValidationError

from ckptconv._version import __version__
from ckptconv.errors import Problem, Refusal, UsageError, printable
from ckptconv.fields import Checked, Fields, Parsed
from ckptconv.names import nearest
from ckptconv.ruleset import steps, yamlfile
from ckptconv.ruleset.expressions import parse as parse_expression
from ckptconv.ruleset.steps.base import MODIFIERS, Condition, Patterns, Step, parse_dtype
from ckptconv.ruleset.steps.naming import Texts
from ckptconv.ruleset.yamlfile import YamlFile
from ckptconv.spec import DType, TensorSpec

MAX_STEPS = 10_000
MAX_INCLUDES = 8
_VERSION = re.compile(r"(>=|<=|==|!=|<|>)\s*([0-9]+(?:\.[0-9]+){0,2})")


class Allow(Fields, frozen=True):
    """Differences from the target that are meant, by name."""

    missing: Annotated[Patterns | None, Meta(description="stay at their initial values")] = None
    unexpected: Annotated[Patterns | None, Meta(description="written, though the target does not know them")] = None
    shape: Patterns | None = None
    dtype: Patterns | None = None


_MODEL = (
    "timm:NAME, hf:FOLDER (from the source's folder), or a saved manifest beside the rule file; py:module:factory only with --allow-code"
)


class TargetField(Fields, frozen=True):
    """What the result must load into, and the differences that are meant."""

    model: Annotated[str | None, Meta(description=_MODEL)] = None
    allow: Allow = Allow()


def _spec(value: Any) -> TensorSpec:
    """``[2, 3]`` (float32) or ``{shape: [2, 3], dtype: int64}``."""
    shape, dtype = (value.get("shape"), value.get("dtype", "float32")) if isinstance(value, Mapping) else (value, "float32")
    if (
        not isinstance(shape, list)
        or any(type(size) is not int or size < 0 for size in shape)
        or (isinstance(value, Mapping) and set(value) - {"shape", "dtype"})
    ):
        raise Refusal("want [sizes] or {shape: [sizes], dtype: NAME}", code="CK102", found=printable(value))
    return TensorSpec(tuple(shape), parse_dtype(dtype))


_SPEC_SCHEMA = {"anyOf": [
    {"type": "array", "items": {"type": "integer", "minimum": 0}},
    {"type": "object", "additionalProperties": False, "required": ["shape"], "properties": {
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}}, "dtype": {"enum": [dtype.value for dtype in DType]},
    }},
]}  # fmt: skip
SpecField = Annotated[TensorSpec, Parsed(_spec, _SPEC_SCHEMA)]


class RuleTest(Fields, frozen=True):
    """Names and shapes in, names and shapes out. ``expect: same``: the rule must not touch them. ``refuses``: the code of the problem."""

    name: Annotated[str, Meta(min_length=1)]
    given: Annotated[dict[str, SpecField], Meta(min_length=1)]
    expect: dict[str, SpecField] | Literal["same"] | None = None
    refuses: Annotated[Annotated[str, Meta(pattern=r"^CK[0-9]{3}$")] | None, Meta(description="the rule must refuse, with this code")] = (
        None
    )
    set: Annotated[dict[str, Any], Meta(description="variables")] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    todo: Annotated[bool, Meta(description="a known gap: fails, and may")] = False


def _expressions_parse(values: dict[str, Any]) -> dict[str, Any]:
    for value in values.values():
        if isinstance(value, str):
            parse_expression(value)
    return values


def _new_enough(value: str) -> str:
    if value and not _VERSION.fullmatch(value):
        raise Refusal("want a comparison such as '>=0.1'", code="CK102", found=printable(value))
    if value and not _holds(value):
        raise Refusal(f"the rule requires ckptconv {value}; this is {__version__}", code="CK102", try_="pip install -U ckptconv")
    return value


class Header(Fields, frozen=True, kw_only=True):
    """Everything of a rule file but its steps."""

    version: Annotated[Literal[1], Meta(description="of the language")]
    name: Annotated[str, Meta(pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*$", max_length=100, description="the file's stem")]
    revision: Annotated[int, Meta(ge=1, description="of this rule: raised whenever its result changes")] = 1
    summary: Annotated[str, Meta(min_length=1, max_length=300)]
    description: str = ""
    requires: Annotated[str, Checked(_new_enough), Meta(description="ckptconv versions that can read it, as in '>=0.1'")] = ""
    select: Annotated[Texts, Meta(description="container of the checkpoint; the first that exists")] = ()
    when: Annotated[Condition | None, Meta(description="otherwise the rule refuses the checkpoint")] = None
    vars: Annotated[dict[Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z_0-9]*$")], Any], Checked(_expressions_parse)] = field(
        default_factory=dict
    )
    expect_all: Annotated[bool, Meta(description="a name that no step touches is an error")] = False
    target: TargetField = TargetField()
    tests: tuple[RuleTest, ...] = ()


class RuleStep(Struct, frozen=True):
    """A step with its place in the file."""

    step: Step
    number: int
    line: int
    where: str
    included: RuleFile | None = None  #: of an `include`: the rule file that it means


class RuleFile(Struct, frozen=True):
    """A validated rule file."""

    header: Header
    steps: tuple[RuleStep, ...]
    file: str  #: as the user named it
    folder: Path | None  #: where `target` and `include` look
    digest: str  #: sha256 of what the rule means: its data without tests, notes and comments
    builtin: bool = False
    test_places: tuple[str, ...] = ()  #: file:line:column of each of the header's tests
    text: str = ""  #: as it was written

    @property
    def path(self) -> Path | None:
        """Where the file is; None for one that was read from bytes."""
        return None if self.folder is None else self.folder / Path(self.file).name

    @property
    def label(self) -> str:
        """``name@revision``, as it is recorded in outputs."""
        return f"{self.header.name}@{self.header.revision}"

    @property
    def texts(self) -> dict[str, str]:
        """File -> text, of this rule and of those that it includes: what the lines of origins stand in."""
        found = {self.file: self.text}
        for each in self.steps:
            found.update(each.included.texts if each.included is not None else {})
        return found


def load(path: Path, *, shown: str | None = None, builtin: bool = False, within: tuple[Path, ...] = ()) -> RuleFile:
    """Reads and validates a rule file. Raises :class:`~ckptconv.errors.UsageError` with every problem in it."""
    name = shown or str(path)
    try:
        if not path.is_file():
            raise UsageError(Problem("CK105", "this is not a file", where=name, try_="ckptconv rules list"))
        with path.open("rb") as stream:
            raw = stream.read(yamlfile.MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(Problem("CK105", f"the rule file cannot be read: {error.strerror}", where=name)) from None
    return parse(raw, name, stem=path.stem, folder=path.parent, builtin=builtin, within=(*within, path.resolve()))


def parse(
    raw: bytes, name: str, *, stem: str | None = None, folder: Path | None = None, builtin: bool = False, within: tuple[Path, ...] = ()
) -> RuleFile:
    """A rule file from its bytes; ``name`` is what messages call it, ``within`` the files that are including it."""
    document = yamlfile.load(raw, name)
    data = document.data
    if not isinstance(data, dict):
        raise UsageError(Problem("CK102", "a rule file is a mapping that starts with `version: 1`", where=name, found=printable(data)))
    problems: list[Problem] = []
    header = _header(document, {key: value for key, value in data.items() if key != "steps"}, problems)
    parsed = _steps(document, data.get("steps"), problems)
    if header is not None and stem is not None and header.name != stem:
        problems.append(
            Problem("CK102", f"name must be the file's stem: {stem!r}", where=document.where(("name",)), found=repr(header.name))
        )
    parsed = _with_included(document, parsed, folder, within, problems)
    if problems or header is None:
        raise UsageError(problems)
    meaning: dict[str, Any] = {key: value for key, value in data.items() if key not in ("tests", "summary", "description", "revision")}
    included = [each.included.digest for each in parsed if each.included is not None]
    if included:  # what an included rule means is part of what this one means
        meaning = {"rule": meaning, "included": included}
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
    places = tuple(document.where(("tests", at)) for at in range(len(header.tests)))
    return RuleFile(header, parsed, name, folder, digest, builtin, places, raw.decode("utf-8", "replace"))


def _with_included(
    document: YamlFile, found: Sequence[RuleStep], folder: Path | None, within: tuple[Path, ...], problems: list[Problem]
) -> tuple[RuleStep, ...]:
    """The steps, each `include` with the rule file that it means: in the rule's own folder, or built in."""
    whole = []
    for each in found:
        included = None
        if isinstance(each.step, steps.Include):
            try:
                included = _included(each.step.rules, folder, within)
            except Refusal as refusal:
                problems.append(refusal.at(document.where(("steps", each.number - 1))))
            except UsageError as error:
                problems.extend(error.problems)
        whole.append(replace(each, included=included))
    return tuple(whole)


def _included(word: str, folder: Path | None, within: tuple[Path, ...]) -> RuleFile:
    from ckptconv.ruleset import builtin

    if len(within) > MAX_INCLUDES:
        raise Refusal(f"rule files include each other more than {MAX_INCLUDES} deep", code="CK102", found=printable(word))
    if word.endswith((".yaml", ".yml")):
        path = Path(word)
        if folder is None or path.is_absolute() or ".." in path.parts:
            raise Refusal(
                "an included file lies in the rule's own folder", code="CK102", found=printable(word), try_="a plain relative path"
            )
        path = folder / path
        if not path.resolve().is_relative_to(folder.resolve()):
            raise Refusal("an included file lies in the rule's own folder, also behind links", code="CK102", found=printable(word))
        is_builtin = False
    else:
        path, is_builtin = builtin.path_of(word), True
    if path.resolve() in within:
        raise Refusal("a rule file includes itself", code="CK102", found=printable(word))
    return load(path, shown=printable(str(path)) if not is_builtin else f"rules/{path.name}", builtin=is_builtin, within=within)


def _header(document: YamlFile, data: dict[str, Any], problems: list[Problem]) -> Header | None:
    try:
        return Header.validated(data)
    except ValidationError as error:
        problems.extend(explained(error, document, (), [*Header.written_names(), "steps"]))
        return None


def _steps(document: YamlFile, items: Any, problems: list[Problem]) -> tuple[RuleStep, ...]:
    where = document.where(("steps",))
    if not isinstance(items, list) or not items:
        problems.append(Problem("CK102", "a rule file has a list of steps", where=where, found=printable(items)))
        return ()
    if len(items) > MAX_STEPS:
        problems.append(Problem("CK211", f"a rule file has at most {MAX_STEPS:,} steps", where=where, found=f"{len(items):,}"))
        return ()
    found = []
    for at, item in enumerate(items):
        step = _step(document, at, item, problems)
        if step is not None:
            found.append(step)
    return tuple(found)


def _step(document: YamlFile, at: int, item: Any, problems: list[Problem]) -> RuleStep | None:
    path: tuple[str | int, ...] = ("steps", at)
    where = document.where(path)
    words = [key for key in item if key not in MODIFIERS] if isinstance(item, dict) else []
    if len(words) != 1:
        problems.append(
            Problem("CK102", 'a step is one word with its fields, as in `- drop: ["head.{p}"]`', where=where, found=printable(item))
        )
        return None
    op = words[0]
    kind = steps.ALL.get(op)
    if kind is None:
        close = nearest(op, steps.ALL)
        hint = f"did you mean {close}?" if close else "ckptconv schema lists them: " + ", ".join(steps.ALL)
        problems.append(Problem("CK102", f"there is no step {printable(op)!r}", where=document.where((*path, op)), try_=hint))
        return None
    try:
        body = kind.short(item[op])
        if not isinstance(body, dict):
            raise Refusal(f"{op} wants its fields: {_field_names(kind)}", code="CK102", found=printable(body))
        body = {**body, **{key: value for key, value in item.items() if key in MODIFIERS}}
        step = kind.validated(body)
    except Refusal as refusal:
        problems.append(refusal.at(document.where((*path, op))))
        return None
    except ValidationError as error:
        problems.extend(explained(error, document, (*path, op), kind.written_names()))
        return None
    line = document.places.get((*path, op), (0, 0))[0]
    return RuleStep(step, at + 1, line, f"{document.where((*path, op))}  {op} (step {at + 1})")


def _field_names(kind: type[Step]) -> str:
    return ", ".join(name for name in kind.written_names() if name not in MODIFIERS)


def explained(error: ValidationError, document: YamlFile, base: tuple[str | int, ...], known: Iterable[str]) -> list[Problem]:
    """pydantic's errors in the words of this house: the user's line, the user's field, what was found, what to try."""
    found: dict[tuple[str, str], Problem] = {}
    for item in error.errors(include_url=False):
        path = _real_path(document, base, item["loc"])
        where = document.where(path)
        field = ".".join(str(part) for part in path[len(base) :]) or (str(base[-1]) if base else "rule file")
        reason = item.get("ctx", {}).get("error")
        value = printable(item["input"]) if not isinstance(item["input"], (dict, list)) or len(str(item["input"])) < 80 else ""
        if isinstance(reason, Refusal):
            problem = Problem(reason.code, reason.what, where=where, found=reason.found, try_=reason.try_)
        elif item["type"] == "extra_forbidden":
            fields = [*RuleTest.written_names()] if item["loc"][0] == "tests" and len(item["loc"]) == 3 else [*known]
            close = nearest(str(item["loc"][-1]), fields)
            hint = f"did you mean {close}?" if close else "fields: " + ", ".join(fields)
            problem = Problem("CK102", f"unknown field {printable(item['loc'][-1])!r}", where=where, try_=hint)
        elif item["type"] == "missing":
            problem = Problem("CK102", f"field {printable(item['loc'][-1])!r} is missing", where=where)
        else:
            message = str(reason) if reason is not None else (item["msg"][:1].lower() + item["msg"][1:]).replace("tuple", "list")
            problem = Problem("CK102", f"{printable(field)}: {printable(message)}", where=where, found=value)
        found.setdefault((where, problem.what), problem)
    return list(found.values())


def _real_path(document: YamlFile, base: tuple[str | int, ...], loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """``loc`` without the parts that pydantic adds (union tags, ``[key]``) and the file does not have."""
    path = base
    for part in loc:
        if (*path, part) in document.places:
            path = (*path, part)
    return path


def _holds(requirement: str) -> bool:
    match = _VERSION.fullmatch(requirement)
    assert match is not None
    wanted = tuple(int(part) for part in match[2].split("."))
    have = tuple(int(re.match(r"[0-9]+", part)[0]) for part in __version__.split(".")[:3])  # type: ignore[index]
    wanted, have = (*wanted, 0, 0)[:3], (*have, 0, 0)[:3]
    return {
        ">=": have >= wanted, "<=": have <= wanted, "==": have == wanted, "!=": have != wanted, "<": have < wanted, ">": have > wanted,
    }[match[1]]  # fmt: skip
