"""YAML, strictly: plain data with the place of everything, or all that is wrong with the file.

One pass over the parser's event stream. Anchors, aliases, merge keys, tags, several documents, duplicate keys and words that YAML
silently turns into something else (``no``, ``1e3``, ``017``, dates) are errors that explain themselves; depth and size are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from msgspec import Struct

from ckptconv.errors import Problem, UsageError, printable

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_PROBLEMS = 15
_TOO_DEEP = f"nested deeper than {MAX_DEPTH}"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+(e[-+][0-9]+)?")
_NUMBER_LIKE = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)|0[xob][0-9a-f_]+|[0-9]{1,4}(:[0-5]?[0-9])+|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*",
    re.IGNORECASE,
)
_SURPRISES = frozenset({"yes", "no", "on", "off", "=", "<<"})
_CONSTANTS: Mapping[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}

Place = tuple[int, int]  #: line and column, counted from 1
Path = tuple[str | int, ...]


class YamlFile(Struct, frozen=True):
    """Plain data and where each value (by its path of keys and indices) stands."""

    name: str
    data: Any
    places: Mapping[Path, Place]

    def where(self, path: Path) -> str:
        """``file:line:column`` of the value at ``path``, or of the nearest thing around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                line, column = self.places[path[:end]]
                return f"{self.name}:{line}:{column}"
        return self.name


def load(raw: bytes, name: str) -> YamlFile:
    """The one document in ``raw``. Raises :class:`~ckptconv.errors.UsageError` CK101 with every problem found."""
    if len(raw) > MAX_BYTES:
        raise UsageError(Problem("CK101", f"a rule file has at most {MAX_BYTES:,} bytes; this one has {len(raw):,}", where=name))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            Problem("CK101", "a rule file is UTF-8 text", where=name, found=f"byte {raw[error.start]:#04x} at offset {error.start:,}")
        ) from None
    builder = _Builder(name)
    try:
        builder.read(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        hint = "indent with spaces, not tabs" if "cannot start any token" in str(error.problem) else ""
        # libyaml has a limit of its own since 0.2.6, and reads ahead: it may refuse a bomb before its events get here.
        what = _TOO_DEEP if "nesting depth" in str(error.problem) else f"not YAML: {error.problem or error.context}"
        builder.problems.append(Problem("CK101", what, where=where, try_=hint))
    except yaml.YAMLError as error:
        builder.problems.append(Problem("CK101", f"not YAML: {printable(error)}", where=name))
    if builder.problems:
        raise UsageError(builder.problems)
    return YamlFile(name, builder.document, builder.places)


def _place(event: yaml.Event) -> Place:
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)


class _Builder:
    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[Path, Place] = {}
        self.problems: list[Problem] = []
        self.document: Any = None

    def problem(self, event: yaml.Event, what: str, found: str = "", try_: str = "") -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem("CK101", what, where=self._where(event), found=found, try_=try_))

    def read(self, events: Iterator[yaml.Event]) -> None:
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.problem(event, "a rule file holds one document", "a second `---`")
                    return
            elif isinstance(event, yaml.NodeEvent):
                self.document = self.value(event, events, (), 0)
                if len(self.problems) >= MAX_PROBLEMS:
                    return

    def value(self, event: yaml.Event, events: Iterator[yaml.Event], path: Path, depth: int) -> Any:
        self.places.setdefault(path, _place(event))
        if len(self.places) > MAX_VALUES:
            raise UsageError([*self.problems, Problem("CK101", f"a rule file has at most {MAX_VALUES:,} values", where=self._where(event))])
        if isinstance(event, yaml.AliasEvent):
            self.problem(event, "aliases are not allowed", f"*{printable(event.anchor)}", "write the value out")
            return None
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor:
            self.problem(event, "anchors are not allowed", f"&{printable(anchor)}", "write the value out where it is used")
        if tag and tag != "!":
            self.problem(event, "tags are not allowed", printable(tag))
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if depth >= MAX_DEPTH:
            # nothing below is read: nesting from a stranger must not become our recursion
            raise UsageError([*self.problems, Problem("CK101", _TOO_DEEP, where=self._where(event))])
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(events, path, depth)
        return self.mapping(events, path, depth)

    def _where(self, event: yaml.Event) -> str:
        line, column = _place(event)
        return f"{self.name}:{line}:{column}"

    def sequence(self, events: Iterator[yaml.Event], path: Path, depth: int) -> list[Any]:
        items: list[Any] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self.value(event, events, (*path, len(items)), depth + 1))
        return items

    def mapping(self, events: Iterator[yaml.Event], path: Path, depth: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        first: dict[str, int] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            if not isinstance(event, yaml.ScalarEvent):
                self.problem(event, "a key must be text")
                self.value(event, events, (*path, "?"), depth + 1)
                self.value(next(events), events, (*path, "?"), depth + 1)
                continue
            key = self.scalar(event)
            if not isinstance(key, str):
                self.problem(event, "a key must be text", printable(event.value), f'quote it: "{printable(event.value)}"')
                key = event.value
            if key == "<<" and event.implicit[0]:
                self.problem(event, "merge keys are not allowed", "<<", "write the entries out")
            if key in first:
                self.problem(event, f"key {printable(key)!r} stands twice", f"first on line {first[key]}")
            first.setdefault(key, _place(event)[0])
            self.places[(*path, key)] = _place(event)
            entries[key] = self.value(next(events), events, (*path, key), depth + 1)
        return entries

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted, or a block of text
            return text
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INTEGER.fullmatch(text):
            if len(text) > 20:
                self.problem(event, "an integer has at most 20 digits", printable(text))
                return 0
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        lowered = text.lower()
        if lowered in _SURPRISES or lowered in _CONSTANTS:
            if lowered != "<<":
                self.problem(event, f"{printable(text)!r} means different things to different YAML readers", try_=f'"{printable(text)}" '
                             "for the text, or true, false, null in lower case")  # fmt: skip
            return text
        if _NUMBER_LIKE.fullmatch(text):
            number = "" if not re.fullmatch(r"-?[0-9.]+[eE][-+]?[0-9]+", text) else ", or 1.0e-3 form for the number"
            self.problem(event, f"{printable(text)!r} looks like a number or a date, and YAML readers disagree on which",
                         try_=f'"{printable(text)}" for the text{number}')  # fmt: skip
            return text
        return text
