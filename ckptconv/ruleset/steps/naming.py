"""Steps that change names and nothing else: prefixes, wrapper segments, tables of patterns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from ckptconv.errors import Refusal, printable
from ckptconv.fields import Parsed
from ckptconv.names import collapse
from ckptconv.ruleset.patterns import Pattern, Template
from ckptconv.ruleset.steps.base import (
    Context,
    Entry,
    PatternField,
    Patterns,
    Step,
    Table,
    TemplateField,
    one_or_many,
    rendered,
    replaced,
)  # fmt: skip


def _texts(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    if not items or any(not isinstance(item, str) or not item for item in items):
        raise Refusal("want text, or a list of texts", code="CK102", found=printable(value))
    return tuple(items)


Texts = Annotated[tuple[str, ...], Parsed(_texts, one_or_many({"type": "string", "minLength": 1}))]


def _renamed(table: Table, new_names: dict[str, str], context: Context) -> Table:
    results = {
        name: ((new, Entry(entry.expr, context.origin, entry.identity)),) for name, new in new_names.items() for entry in (table[name],)
    }
    return replaced(table, results, context)


class StripPrefix(Step, frozen=True):
    """Takes a prefix off the names, if all of them carry it."""

    op: ClassVar[str] = "strip_prefix"
    prefix: Annotated[Texts, Meta(description="the prefix, with its dot; of a list, whichever all names carry")]
    where: Annotated[Literal["all", "some"], Meta(description="some: names without the prefix stay as they are")] = "all"
    repeat: Annotated[bool, Meta(description="again and again, as long as all names carry one of the prefixes (wrappers in any order)")] = (
        False
    )

    @classmethod
    def short(cls, value: Any) -> Any:
        return {"prefix": value} if isinstance(value, (str, list)) else value

    def lower(self, table: Table, context: Context) -> Table:
        stripped = {name: name for name in table}
        done = False
        while stripped:
            prefix = self._carried(list(stripped.values()))
            if prefix is None:
                break
            stripped = {name: new.removeprefix(prefix) for name, new in stripped.items()}
            done = True
            if not self.repeat:
                break
        if done:
            return _renamed(table, {name: new for name, new in stripped.items() if new != name}, context)
        self._none_carried(table, context)
        return table

    def _carried(self, names: Sequence[str]) -> str | None:
        for prefix in self.prefix:
            carry = sum(name.startswith(prefix) and len(name) > len(prefix) for name in names)
            if carry == len(names) or (carry and self.where == "some"):
                return prefix
        return None

    def _none_carried(self, table: Table, context: Context) -> None:
        names = list(table)
        wanted = " or ".join(map(repr, self.prefix))
        with_it = [name for name in names if name.startswith(self.prefix)]
        if not with_it:
            if not self.optional:
                shown = ", ".join(str(template) for template in collapse(names)[:4])
                context.problem("CK201", f"no name starts with {wanted}", found=printable(shown) or "no names at all",
                                try_=f"ckptconv inspect {context.source}, or add optional: true")  # fmt: skip
            return
        without = [name for name in names if not name.startswith(self.prefix)]
        shown = ", ".join(str(template) for template in collapse(without)[:4])
        context.problem(
            "CK204", f"not all names start with {wanted}: {len(with_it)} do, {len(without)} do not",
            found=f"without it: {printable(shown)}", try_="drop these first, or add where: some",
        )  # fmt: skip


class AddPrefix(Step, frozen=True):
    """Puts a prefix before the names."""

    op: ClassVar[str] = "add_prefix"
    prefix: Annotated[str, Meta(min_length=1, description="the prefix, with its dot")]
    keys: Annotated[Patterns, Meta(description="which names; all, where nothing is said")] = (Pattern.parse("**"),)

    @classmethod
    def short(cls, value: Any) -> Any:
        return {"prefix": value} if isinstance(value, str) else value

    def matched(self) -> Sequence[Pattern]:
        return self.keys

    def lower(self, table: Table, context: Context) -> Table:
        return _renamed(table, {name: self.prefix + name for name, _, _ in self.claims(table, context)}, context)


class StripInfix(Step, frozen=True):
    """Takes wrapper segments out of the names, wherever they stand (``_fsdp_wrapped_module``)."""

    op: ClassVar[str] = "strip_infix"
    infix: Annotated[Texts, Meta(description="whole segments, without dots around them")]

    @classmethod
    def short(cls, value: Any) -> Any:
        return {"infix": value} if isinstance(value, (str, list)) else value

    def lower(self, table: Table, context: Context) -> Table:
        wrappers = tuple(infix.strip(".").split(".") for infix in self.infix)
        new_names = {}
        for name in table:
            parts = name.split(".")
            kept: list[str] = []
            at = 0
            while at < len(parts):
                hit = next(
                    (wrapper for wrapper in wrappers if parts[at : at + len(wrapper)] == wrapper and at + len(wrapper) < len(parts)), None
                )
                at += len(hit) if hit else 1
                if not hit:
                    kept.append(parts[at - 1])
            if len(kept) < len(parts):
                new_names[name] = ".".join(kept)
        if not new_names and not self.optional:
            wanted = " or ".join(map(repr, self.infix))
            context.problem("CK201", f"no name has the segment {wanted}", try_=f"ckptconv inspect {context.source}, or add optional: true")
        return _renamed(table, new_names, context)


class Rename(Step, frozen=True):
    """A table of pattern -> template. All entries match at once, so swapping two names works and chains cannot happen."""

    op: ClassVar[str] = "rename"
    table: Annotated[dict[str, str], Meta(min_length=1, description="pattern: template")]

    @classmethod
    def short(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise Refusal("rename wants a table of pattern: template", code="CK102", found=printable(value))
        if {"from", "to"} <= value.keys() <= {"from", "to", "when", "optional", "note"}:
            rest = {key: value[key] for key in value if key not in ("from", "to")}
            sources = value["from"] if isinstance(value["from"], list) else [value["from"]]
            return {"table": dict.fromkeys(sources, value["to"]), **rest}
        return {"table": value}

    def __post_init__(self) -> None:
        problems = []
        for pattern, template in self.entries:
            fan = template.fan(pattern.names)
            if fan:
                problems.append(f"{template.text!r} stands for several names ({fan[0].name!r} is not in {pattern.text!r})")
        if problems:
            raise Refusal("; ".join(problems), code="CK103", try_="split, unstack or copy give several names")

    @cached_property
    def entries(self) -> tuple[tuple[PatternField, TemplateField], ...]:
        """The table, parsed."""
        return tuple((Pattern.parse(source), Template.parse(to)) for source, to in self.table.items())

    def matched(self) -> Sequence[Pattern]:
        return [pattern for pattern, _ in self.entries]

    def lower(self, table: Table, context: Context) -> Table:
        entries, new_names = self.entries, dict[str, str]()
        for name, at, captures in self.claims(table, context):
            template = entries[at][1]
            new = template.filled(captures)
            if new is None:
                new = rendered(template, context.scope.lookup(captures, table, name), context, name)
            if new is not None:
                new_names[name] = new
        return _renamed(table, new_names, context)
