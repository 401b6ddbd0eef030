"""What every step is: a few fields that a person writes, and ``lower``, which maps a table of expressions to a new one.

Inside one step all entries match at once against the names as they stood at its start, and each name is claimed at most once. A step
never raises for what it finds in a checkpoint: it notes every problem in its :class:`Context` and leaves what it could not do as it was.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Union

from msgspec import Meta, Struct, field

from ckptconv.errors import Problem, Refusal, printable
from ckptconv.fields import Fields, Parsed
from ckptconv.names import collapse, nearest, unusable
from ckptconv.plan import Dropped, Expr, Origin
from ckptconv.ruleset import expressions
from ckptconv.ruleset.expressions import Absent, Lookup
from ckptconv.ruleset.patterns import Capture, Pattern, PatternSet, Template
from ckptconv.spec import DType

#: docs/limits.md
MAX_RESULTS = 1_000_000  #: names after a step
MAX_VARIABLES_DEEP = 32  #: a variable that needs one that needs one


PASSED_THROUGH = Origin()


class Entry(Struct, frozen=True, gc=False):
    """One line of the table while the steps run."""

    expr: Expr
    origin: Origin = PASSED_THROUGH
    #: Which of several tensors of equal value this is: a copy and a fill get one of their own, so that only real ties stay tied.
    identity: str = ""


Table = Mapping[str, Entry]


def _pattern(value: Any) -> Pattern:
    if not isinstance(value, str):
        raise Refusal("a pattern is text", code="CK103", found=printable(value), try_="quote it")
    return Pattern.parse(value)


def _template(value: Any) -> Template:
    if not isinstance(value, str):
        raise Refusal("a name is text", code="CK103", found=printable(value), try_="quote it")
    return Template.parse(value)


def number(value: Any) -> expressions.Node:
    """An integer, or text that is an expression, as a rule file writes it. Refuses anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise Refusal("want an integer or an expression", code="CK104", found=printable(value))
    return expressions.parse(value) if isinstance(value, str) else expressions.Node("literal", value)


def parse_dtype(value: Any) -> DType:
    """A dtype from torch's own name for it; refuses anything else with the nearest."""
    if isinstance(value, str) and value in DType.__members__:
        return DType(value)
    close = nearest(str(value), DType.__members__)
    raise Refusal(
        f"there is no dtype {printable(value)!r}", code="CK102", try_=f"did you mean {close}?" if close else ", ".join(DType.__members__)
    )


def _many(parse: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def parsed(value: Any) -> tuple[Any, ...]:
        items = value if isinstance(value, list) else [value]
        if not items:
            raise Refusal("want at least one", code="CK102")
        return tuple(parse(item) for item in items)

    return parsed


def one_or_many(item: dict[str, Any]) -> dict[str, Any]:
    """What editors see of a field that takes one value or a list of them."""
    return {"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]}


# Text becomes an object at the border, once; the schema that editors use still says "text".
_TEXT = {"type": "string", "minLength": 1}
_DTYPES = {"enum": [dtype.value for dtype in DType]}
PatternField = Annotated[Pattern, Parsed(_pattern, _TEXT)]
TemplateField = Annotated[Template, Parsed(_template, _TEXT)]
Number = Annotated[expressions.Node, Parsed(number, {"type": ["integer", "string"]})]
Patterns = Annotated[tuple[Pattern, ...], Parsed(_many(_pattern), one_or_many(_TEXT))]
Templates = Annotated[tuple[Template, ...], Parsed(_many(_template), one_or_many(_TEXT))]
DTypeField = Annotated[DType, Parsed(parse_dtype, _DTYPES)]
DTypes = Annotated[tuple[DType, ...], Parsed(_many(parse_dtype), one_or_many(_DTYPES))]


class KeyCondition(Fields, frozen=True):
    """Which names must be there (``all``, ``any``) and which must not (``none``)."""

    all: Patterns | None = None
    any: Patterns | None = None
    none: Patterns | None = None

    def failure(self, names: Iterable[str]) -> str:
        """Why the condition does not hold, or empty text when it does."""
        names = tuple(names)

        def found(pattern: Pattern) -> str | None:
            return next((name for name in names if pattern.match(name) is not None), None)

        for pattern in self.all or ():
            if found(pattern) is None:
                return f"no name matches {pattern.text!r}"
        if self.any and all(found(pattern) is None for pattern in self.any):
            return "no name matches any of " + ", ".join(repr(pattern.text) for pattern in self.any)
        for pattern in self.none or ():
            name = found(pattern)
            if name is not None:
                return f"{printable(name)} matches {pattern.text!r}, which must not be there"
        return ""


def _condition(value: Any) -> KeyCondition | expressions.Node:
    if isinstance(value, str):
        return expressions.parse(value)
    if isinstance(value, bool):
        return expressions.Node("literal", value)
    return KeyCondition.validated(value)


Condition = Annotated[
    Union[KeyCondition, expressions.Node],
    Parsed(_condition, {
        "anyOf": [
            {"type": ["string", "boolean"]},
            {"type": "object", "additionalProperties": False, "properties": {
                key: {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]} for key in ("all", "any", "none")
            }},
        ]
    }),
]  # fmt: skip


class Scope(Struct):
    """The variables of a run: ``--set`` first, then the rule file's ``vars``, then ``config``; text in ``vars`` is an expression."""

    given: Mapping[str, Any] = field(default_factory=dict)
    declared: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    _busy: set[str] = field(default_factory=set)

    def lookup(self, captures: Mapping[str, Capture], table: Table, tensor: str | None = None) -> Lookup:
        """What a name means inside a step: its captures, then the variables. ``shape()`` is the shape of ``tensor``."""
        return _Names(self, captures, table, tensor)

    def variable(self, name: str, look: Lookup) -> Any:
        if name in self.given:
            return self.given[name]
        if name in self.declared:
            value = self.declared[name]
            if not isinstance(value, str):
                return value
            if name in self._busy:
                raise Refusal(f"variable {name!r} is defined by itself", code="CK104")
            if len(self._busy) >= MAX_VARIABLES_DEEP:
                raise Refusal(f"variables need each other more than {MAX_VARIABLES_DEEP} deep", code="CK104", found=printable(name))
            self._busy.add(name)
            try:
                return expressions.evaluate(expressions.parse(value), look)
            finally:
                self._busy.discard(name)
        if name == "config":
            if self.config is None:
                raise Absent("there is no config.json beside the source; name one with --config FILE")
            return self.config
        close = nearest(name, [*self.given, *self.declared])
        raise Absent(f"variable {printable(name)!r} has no value" + (f"; did you mean {close!r}?" if close else ""))


class _Names:
    """A lookup. An object rather than functions that know each other: half a million of those wait for the garbage collector."""

    __slots__ = ("_captures", "_known", "_scope", "_table", "_tensor")

    def __init__(self, scope: Scope, captures: Mapping[str, Capture], table: Table, tensor: str | None) -> None:
        self._scope, self._captures, self._table, self._tensor = scope, captures, table, tensor
        self._known: dict[str, Any] | None = None  # a variable is computed once: twice each for 40 of them would be for ever

    def __call__(self, name: str) -> Any:
        if name in self._captures:
            return self._captures[name]
        if name == "shape":
            return self._shape
        if name == "has":
            return self._table.__contains__
        if self._known is None:
            self._known = {}
        if name not in self._known:
            self._known[name] = self._scope.variable(name, self)
        return self._known[name]

    def _shape(self, name: str | None = None) -> list[int]:
        name = self._tensor if name is None else name
        if name is None:
            raise Absent("shape() wants the name of a tensor here")
        if name not in self._table:
            close = nearest(name, self._table)
            raise Absent(f"there is no tensor {printable(name)!r}" + (f"; the nearest name is {close!r}" if close else ""))
        return list(self._table[name].expr.spec.shape)


class Context(Struct):
    """What a step knows of its place, and where it notes what it finds."""

    origin: Origin
    where: str
    scope: Scope
    source: str = "SRC"  #: as the user named it, for `try` lines
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def problem(self, code: str, what: str, *, found: str = "", try_: str = "", place: str = "") -> None:
        self.problems.append(Problem(code, what, where=place or self.where, found=found, try_=try_))

    def too_many(self, count: int) -> bool:
        """Notes a step that would give more names than are allowed; asked before the first is made."""
        if count > MAX_RESULTS:
            self.problem("CK211", f"the step would give {count:,} names; at most {MAX_RESULTS:,} are allowed")
        return count > MAX_RESULTS

    def refused(self, refusal: Refusal, subject: str = "") -> None:
        """Notes a craft's refusal, with the user's name for what it was about."""
        what = f"{printable(subject)}: {refusal.what}" if subject else refusal.what
        self.problem(refusal.code, what, found=refusal.found, try_=refusal.try_)


class Step(Fields, frozen=True, kw_only=True, dict=True):
    """One step of a rule file. Adding one: one class with ``op``, its fields and ``lower``, and one line in ``steps.ALL``."""

    op: ClassVar[str]
    when: Annotated[Condition | None, Meta(description="do the step only if this holds: an expression, or patterns under all/any/none")] = (
        None
    )
    optional: Annotated[bool, Meta(description="matching nothing is no error")] = False
    note: Annotated[str, Meta(description="for people")] = ""

    @classmethod
    def short(cls, value: Any) -> Any:
        """The long form of what was written; a step with a short form overrides this."""
        return value

    @abstractmethod
    def lower(self, table: Table, context: Context) -> Table:
        """The table after the step. Problems go to ``context``."""

    @cached_property
    def patterns(self) -> PatternSet:
        """Everything that the step may match, in the order of its entries."""
        return PatternSet(self.matched())

    def matched(self) -> Sequence[Pattern]:
        """The step's patterns."""
        return ()

    def claims(self, table: Table, context: Context) -> list[tuple[str, int, dict[str, Capture]]]:
        """(name, entry, captures) for every name that the step claims; a name claimed twice, or no name at all, is a problem."""
        found: list[tuple[str, int, dict[str, Capture]]] = []
        used: set[int] = set()
        for name in table:
            matches = self.patterns.match(name)
            if len(matches) > 1:
                texts = " and ".join(repr(self.patterns.patterns[at].text) for at, _ in matches[:3])
                context.problem("CK203", f"two entries claim {printable(name)}", found=texts, try_="make one of them narrower")
            if matches:
                found.append((name, *matches[0]))
            for at, _ in matches:
                used.add(at)
        if not found:
            self.unmatched(table, context)
        elif len(used) < len(self.patterns.patterns):
            idle = [pattern.text for at, pattern in enumerate(self.patterns.patterns) if at not in used]
            shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
            context.notes.append(f"{context.where}: matched nothing: {shown}")
        return found

    def unmatched(self, table: Table, context: Context) -> None:
        """Notes that nothing matched, unless the step is optional, with the nearest names that are there."""
        if self.optional:
            return
        texts = [pattern.text for pattern in self.patterns.patterns]
        wanted = ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
        have = collapse(list(table))
        shown = ", ".join(str(template) for template in have[:4]) + (f" and {len(have) - 4} more" if len(have) > 4 else "")
        context.problem(
            "CK201", f"the step matched nothing: {printable(wanted)}", found=printable(shown) if have else "no names at all",
            try_=f"ckptconv inspect {context.source} --match '**', or add optional: true",
        )  # fmt: skip


#: What a person may write beside any step.
MODIFIERS = Step.written_names()


def replaced(table: Table, results: Mapping[str, Sequence[tuple[str, Entry]]], context: Context) -> Table:
    """The table with each name of ``results`` replaced, at its place, by what came of it; two results of one name are a problem."""
    out: dict[str, Entry] = {}
    clashes = 0
    for name, entry in table.items():
        made = results.get(name)
        for new_name, new_entry in ((name, entry),) if made is None else made:
            if new_name in out:
                clashes += 1
                if clashes <= 5:
                    context.problem(
                        "CK202", f"two results under one name: {printable(new_name)}",
                        found=f"{out[new_name].origin} and {new_entry.origin}",
                        try_="drop or rename one of them first",
                    )  # fmt: skip
                continue
            reason = unusable(new_name)
            if reason and new_name not in table:
                context.problem("CK209", f"{reason}: {printable(new_name)!r}", found=f"made from {printable(name)}")
                continue
            out[new_name] = new_entry
        if len(out) > MAX_RESULTS:
            context.problem("CK211", f"a step gives more than {MAX_RESULTS:,} names")
            break
    if clashes > 5:
        context.problem("CK202", f"and {clashes - 5} more names with two results")
    return out


def rendered(template: Template, lookup: Lookup, context: Context, subject: str) -> str | None:
    """The template's name, or None with the problem noted."""
    try:
        return template.render(lookup)
    except Refusal as refusal:
        context.refused(refusal, f"{subject} -> {template.text}")
        return None


def with_captures(lookup: Lookup, more: Mapping[str, Any]) -> Lookup:
    """``lookup`` with a few names more."""
    return lambda name: more[name] if name in more else lookup(name)


def integer(node: expressions.Node, lookup: Lookup, what: str, minimum: int | None = None) -> int:
    """The expression's value as an integer; refuses anything else and, where asked, anything below ``minimum``."""
    value = expressions.evaluate(node, lookup)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refusal(f"{what} must be an integer", code="CK104", found=printable(repr(value)))
    if minimum is not None and value < minimum:
        raise Refusal(f"{what} must be at least {minimum}", code="CK104", found=str(value))
    return int(value)
