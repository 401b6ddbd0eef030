"""Name patterns and templates: how a rule file says which tensors it means, and what they become.

A pattern is a full match, literal by default and aware of the dots. Matching is linear in the name's length (RE2), whoever wrote it.

>>> pattern = Pattern.parse("blocks.{i:int}.attn.{x:wq=q|wk=k}.{p}")
>>> captures = pattern.match("blocks.10.attn.wk.weight")
>>> Template.parse("layers.{i + 1}.{x}_proj.{p}").render(captures.__getitem__)
'layers.11.k_proj.weight'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from math import prod
from typing import Any, Union

from msgspec import Struct

from ckptconv.errors import Refusal, printable
from ckptconv.ruleset import expressions
from ckptconv.ruleset.expressions import Lookup

MAX_PATTERN = 1024
MAX_FAN = 1000  #: names that one template may stand for
_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_BACK_REFERENCE = re.compile(r"\\(?:([0-9])|g<([A-Za-z_0-9]+)>)")
_RESERVED = frozenset({"config", *expressions.FUNCTIONS, "if", "else", "and", "or", "not", "in", "true", "false", "null"})


class Index(int):
    """An integer capture that remembers how it was written, so that ``{i}`` gives ``007`` back as ``007``."""

    text: str

    def __new__(cls, text: str) -> Index:
        self = int.__new__(cls, text)
        self.text = text
        return self


Capture = Union[str, Index]
_index = lru_cache(maxsize=65536)(Index)  # the names of one block have one number


def _text(group: str | None) -> str:
    return group or ""  # a group may have no part in a match


Captures = Mapping[str, Capture]


def _bad(what: str, text: str, try_: str = "") -> Refusal:
    return Refusal(what, code="CK103", found=printable(text), try_=try_)


def _whole_text(text: str) -> None:
    """Refuses half characters (lone surrogates) and control characters: no name can have them, and neither can its pattern."""
    if any(0xD800 <= ord(ch) < 0xE000 or ord(ch) < 32 for ch in text):
        raise _bad("a pattern holds no control characters and no lone surrogates", text)


class Placeholder(Struct, frozen=True, dict=True):
    """``{p}``, ``{i:int}``, ``{m:**}`` or ``{x:q|k|v}``; ``name`` is empty for a bare ``**``."""

    name: str
    kind: str  #: ``part``, ``int``, ``deep``, ``choice`` or ``expression``
    choices: tuple[tuple[str, str], ...] = ()  #: (as matched, as rendered)
    expression: expressions.Node | None = None

    @cached_property
    def asked(self) -> expressions.Node:
        """What is evaluated where it stands in a template."""
        return self.expression or expressions.Node("name", self.name)


def _pieces(text: str) -> Iterator[Union[str, tuple[str, str]]]:
    """Literal text and ``("{…}", inside)`` in order; ``{{`` and ``}}`` are literal braces."""
    literal, at = "", 0
    while at < len(text):
        ch = text[at]
        if text[at : at + 2] in ("{{", "}}"):
            literal += ch
            at += 2
        elif ch == "{":
            end, depth, quote = at + 1, 1, ""
            while end < len(text) and depth:
                inner = text[end]
                if quote:
                    quote = "" if inner == quote else quote
                elif inner in "'\"":
                    quote = inner
                else:
                    depth += (inner == "{") - (inner == "}")
                end += 1
            if depth:
                raise _bad("a `{` is never closed", text, "write {{ for a brace in a name")
            if literal:
                yield literal
            literal = ""
            yield ("{}", text[at + 1 : end - 1])
            at = end
        elif ch == "}":
            raise _bad("a `}` without `{`", text, "write }} for a brace in a name")
        else:
            literal += ch
            at += 1
    if literal:
        yield literal


def _placeholder(inside: str, whole: str) -> Placeholder:
    name, colon, kind = inside.partition(":")
    name = name.strip()
    if not _NAME.fullmatch(name):
        raise _bad(f"{{{inside}}} is not a placeholder", whole, "{p}, {i:int}, {m:**} or {x:q|k|v}")
    if name in _RESERVED:
        raise _bad(f"{name!r} cannot name a placeholder: the word has a meaning of its own", whole)
    if not colon:
        return Placeholder(name, "part")
    if kind == "int":
        return Placeholder(name, "int")
    if kind == "**":
        return Placeholder(name, "deep")
    pairs = [choice.partition("=") for choice in kind.split("|")]
    choices = tuple((left, right if equals else left) for left, equals, right in pairs)
    if any(not left or not right for left, right in choices) or len({left for left, _ in choices}) < len(choices):
        raise _bad(f"{{{inside}}}: the choices must be different and not empty", whole, "{x:q|k|v} or {x:wq=q_proj|wk=k_proj}")
    return Placeholder(name, "choice", choices)


class Pattern(Struct, frozen=True, dict=True):
    """A compiled pattern. Equal texts are one object."""

    text: str
    placeholders: tuple[Placeholder, ...]
    expression: str  #: for RE2
    head: str  #: every match starts with this
    tail: str  #: and ends with this
    is_regex: bool = False
    #: At most one open placeholder per part of the name and one `**`: a backtracking matcher needs at most length² steps on names of
    #: at most 1,024 characters, and Python's own is ten times faster here than the bindings of RE2.
    is_simple: bool = False

    @staticmethod
    @lru_cache(maxsize=65536)
    def parse(text: str) -> Pattern:
        """Raises :class:`~ckptconv.errors.Refusal` CK103 that says what is malformed."""
        if len(text) > MAX_PATTERN:
            raise _bad(f"a pattern has at most {MAX_PATTERN:,} characters; this one has {len(text):,}", text)
        if not text:
            raise _bad("a pattern must not be empty", text)
        _whole_text(text)
        return _parse_regex(text) if text.startswith("regex:") else _parse_template(text)

    @cached_property
    def literal(self) -> str | None:
        """The one name that matches, where the pattern has no placeholder."""
        return self.head if not self.placeholders and not self.is_regex else None

    @cached_property
    def parts(self) -> tuple[str | None, ...] | None:
        """The parts that every match has between its dots, None for an open one; None where their number is not fixed."""
        if self.is_regex:
            return None
        text = ""
        for piece in _pieces(self.text):
            if isinstance(piece, str):
                text += piece
                continue
            placeholder = _placeholder(piece[1], self.text)
            if placeholder.kind == "deep" or any("." in word for word, _ in placeholder.choices):
                return None
            text += "\0"
        return None if "**" in text else tuple(None if "\0" in part else part for part in text.split("."))

    @cached_property
    def _compiled(self) -> Any:
        if self.is_simple:
            return re.compile(self.expression, re.DOTALL)
        import re2

        options = re2.Options()
        options.max_mem = 8 << 20
        options.log_errors = False
        options.dot_nl = True
        try:
            return re2.compile(self.expression, options=options)
        except re2.error as error:
            reason = error.args[0] if error.args else ""
            reason = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
            raise _bad(
                f"the regular expression does not compile: {reason}", self.text,
                "RE2 has no look-around, back-references or possessive repeats; use a template with {x:a|b} or two entries",
            ) from None  # fmt: skip

    @cached_property
    def _reads(self) -> tuple[tuple[str, Callable[[Any], Capture] | None], ...]:
        """Of each placeholder: its name, and what it makes of its group where that is not the text itself."""
        found: list[tuple[str, Callable[[Any], Capture] | None]] = []
        for placeholder in self.placeholders:
            if placeholder.kind == "int":
                found.append((placeholder.name, _index))
            elif placeholder.kind == "choice":
                found.append((placeholder.name, dict(placeholder.choices).__getitem__))
            else:
                found.append((placeholder.name, _text if self.is_regex or placeholder.kind == "deep" else None))
        return tuple(found)

    def match(self, name: str) -> dict[str, Capture] | None:
        """What the placeholders capture when ``name`` matches as a whole, else None. A choice captures its right-hand word."""
        if not name.startswith(self.head) or not name.endswith(self.tail):
            return None
        if "::" in name and "::" not in self.text:  # the tensors of another source are matched only by patterns that name one
            return None
        if self.literal is not None:
            return {} if name == self.literal else None
        found = self._compiled.fullmatch(name)
        if found is None:
            return None
        captures: dict[str, Capture] = {}
        for (key, read), text in zip(self._reads, found.groups(), strict=True):
            if key:  # a bare `**` captures nothing
                captures[key] = text if read is None else read(text)
        return captures

    @property
    def names(self) -> tuple[str, ...]:
        """The placeholders' names, in order."""
        return tuple(placeholder.name for placeholder in self.placeholders if placeholder.name)


def _parse_regex(text: str) -> Pattern:
    body = text.removeprefix("regex:")
    pattern = Pattern(text, (), f"(?:{body})", "", "", is_regex=True)
    compiled = pattern._compiled  # compile now: a broken expression is an error of the rule file
    by_number = {number: name for name, number in compiled.groupindex.items()}
    groups = tuple(Placeholder(by_number.get(number, str(number)), "part") for number in range(1, compiled.groups + 1))
    return Pattern(text, groups, pattern.expression, "", "", is_regex=True)


def _parse_template(text: str) -> Pattern:
    tokens: list[Union[str, Placeholder]] = []
    for piece in _pieces(text):
        if isinstance(piece, tuple):
            tokens.append(_placeholder(piece[1], text))
            continue
        stars = piece.split("**")
        for at, part in enumerate(stars):
            if at:
                tokens.append(Placeholder("", "deep"))
            if "*" in part:
                raise _bad("`*` alone matches nothing", text, "{p} for a part of a name, ** for any number of parts")
            if part:
                tokens.append(part)
    placeholders = tuple(token for token in tokens if isinstance(token, Placeholder))
    names = [placeholder.name for placeholder in placeholders if placeholder.name]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise _bad(f"placeholder {twice!r} stands twice", text, "give the second one a name of its own")
    expression = ""
    for at, token in enumerate(tokens):
        if isinstance(token, str):
            expression += re.escape(token)
            continue
        if token.kind == "deep":
            before, after = tokens[at - 1] if at else None, tokens[at + 1] if at + 1 < len(tokens) else None
            starts = before is None or (isinstance(before, str) and before.endswith((".", "::")))
            ends = after is None or (isinstance(after, str) and after.startswith("."))
            if not starts or not ends:
                raise _bad("`**` stands for whole parts of a name: a dot, or the name's end, must be on both sides", text)
            expression += "\0" + ("(.*)" if before is None and after is None else "(.+)") + "\0"
        else:
            expression += {"part": "([^.]+)", "int": "([0-9]+)"}.get(token.kind) or _one_of(token)
    # "any number of parts" includes none, and then its dot goes too: a.**.b matches a.b, and pooler.** matches pooler.
    expression = expression.replace("\0(.+)\0\\.", "(?:(.+)\\.)?")
    expression = expression.replace("\\.\0(.+)\0", "(?:\\.(.+))?")
    expression = expression.replace("\0", "")
    first, last = tokens[0], tokens[-1]
    head = first if isinstance(first, str) else ""
    tail = last if isinstance(last, str) else ""
    if len(tokens) > 1 and isinstance(tokens[1], Placeholder) and tokens[1].kind == "deep":
        head = head.removesuffix(".")
    if len(tokens) > 1 and isinstance(tokens[-2], Placeholder) and tokens[-2].kind == "deep":
        tail = tail.removeprefix(".")
    return Pattern(text, placeholders, expression, head, tail, is_simple=_is_simple(tokens))


def _is_simple(tokens: Sequence[Union[str, Placeholder]]) -> bool:
    deep = sum(token.kind == "deep" for token in tokens if isinstance(token, Placeholder))
    open_in_part = 0
    for token in tokens:
        if isinstance(token, str):
            open_in_part = 0 if "." in token else open_in_part
        elif token.kind != "deep":
            open_in_part += 1
            if open_in_part > 1:
                return False
    return deep <= 1


def _one_of(placeholder: Placeholder) -> str:
    return "(" + "|".join(re.escape(left) for left, _ in placeholder.choices) + ")"


class Template(Struct, frozen=True, dict=True):
    """What a name becomes: literal text, captures, arithmetic over them, and ``{x:q|k|v}`` for one name per choice."""

    text: str
    parts: tuple[Union[str, Placeholder], ...]

    @staticmethod
    @lru_cache(maxsize=65536)
    def parse(text: str) -> Template:
        """Raises :class:`~ckptconv.errors.Refusal` CK103 that says what is malformed."""
        if len(text) > MAX_PATTERN:
            raise _bad(f"a template has at most {MAX_PATTERN:,} characters; this one has {len(text):,}", text)
        if not text:
            raise _bad("a name must not be empty", text)
        _whole_text(text)
        parts: list[Union[str, Placeholder]] = []
        for piece in _pieces(text):
            if isinstance(piece, str):
                parts.extend(_back_references(piece))
            elif _NAME.fullmatch(piece[1].strip()):
                parts.append(Placeholder(piece[1].strip(), "part"))
            elif ":" in piece[1] and _NAME.fullmatch(piece[1].partition(":")[0].strip()):
                parts.append(_placeholder(piece[1], text))
            else:
                parts.append(Placeholder("", "expression", (), expressions.parse(piece[1])))
        return Template(text, tuple(parts))

    @cached_property
    def mentions(self) -> frozenset[str]:
        """Every capture or variable that the template uses."""
        found: set[str] = set()
        for part in self.parts:
            if isinstance(part, Placeholder):
                found |= part.expression.names() if part.expression is not None else {part.name}
        return frozenset(found)

    def fan(self, bound: Sequence[str]) -> tuple[Placeholder, ...]:
        """The choices that ``bound`` (the pattern's placeholders) lacks: the template stands for one name per combination.

        Raises CK211 for more than a thousand of them.
        """
        found = tuple(part for part in self.parts if isinstance(part, Placeholder) and part.kind == "choice" and part.name not in bound)
        count = prod(len(part.choices) for part in found)
        if count > MAX_FAN:
            raise Refusal(
                f"a template stands for {count:,} names; at most {MAX_FAN:,} are allowed", code="CK211", found=printable(self.text)
            )
        return found

    def filled(self, captures: Captures) -> str | None:
        """What :meth:`render` gives, where the template is text and captures, none of them empty; else None."""
        out: list[str] = []
        for part in self.parts:
            if isinstance(part, str):
                out.append(part)
                continue
            value = captures.get(part.name, "")
            text = value.text if isinstance(value, Index) else value
            if not text:
                return None
            out.append(text)
        return "".join(out)

    def render(self, lookup: Lookup) -> str:
        """The name. An empty ``{m:**}`` capture takes its dot along. Raises CK104 for a value that is missing."""
        out: list[str] = []
        skip_dot = False
        for part in self.parts:
            if isinstance(part, str):
                out.append(part[1:] if skip_dot and part.startswith(".") else part)
                skip_dot = False
                continue
            value = expressions.evaluate(part.asked, lookup)
            text: str | None
            if isinstance(value, Index):
                text = value.text
            else:
                text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
            if text is None:
                raise _bad(f"a part of a name must be text or an integer, not {printable(value)!r}", self.text)
            if not text:
                # nothing captured: drop the dot that follows, or, at the end of the template, the one before
                skip_dot = not out or out[-1].endswith(".")
                if part is self.parts[-1] and out and out[-1].endswith("."):
                    out[-1] = out[-1][:-1]
            else:
                skip_dot = False
            out.append(text)
        return "".join(out)


def _back_references(text: str) -> Iterator[Union[str, Placeholder]]:
    at = 0
    for found in _BACK_REFERENCE.finditer(text):
        if found.start() > at:
            yield text[at : found.start()]
        yield Placeholder(found[1] or found[2], "part")
        at = found.end()
    if at < len(text):
        yield text[at:]


_FEW = 3


class _Crowd:
    """Patterns that begin alike, told apart by the number of a name's parts and by one of these, the one that differs most."""

    def __init__(self, patterns: Sequence[Pattern], group: Sequence[int]) -> None:
        self._always = [at for at in group if patterns[at].parts is None]
        by_count: dict[int, list[tuple[int, tuple[str | None, ...]]]] = {}
        for at in group:
            parts = patterns[at].parts
            if parts is not None:
                by_count.setdefault(len(parts), []).append((at, parts))
        #: number of parts -> the telling one, what may match where it is none of those below, and by what it is
        self._by_count: dict[int, tuple[int, list[int], dict[str, list[int]]]] = {}
        for count, members in by_count.items():
            column = max(range(count), key=lambda column: len({parts[column] for _, parts in members}))
            open_ = self._always + [at for at, parts in members if parts[column] is None]
            told: dict[str, list[int]] = {}
            for at, parts in members:
                word = parts[column]
                if word is not None:
                    told.setdefault(word, [*open_]).append(at)
            self._by_count[count] = column, open_, told

    def candidates(self, name: str) -> list[int]:
        """The patterns that may match."""
        parts = name.split(".")
        if len(parts) not in self._by_count:
            return self._always
        column, open_, told = self._by_count[len(parts)]
        return told.get(parts[column], open_)


class PatternSet:
    """Several patterns asked at once: one look at a name's first part rules most of them out.

    20,000 names against 100 patterns must not be 2,000,000 matches.
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self.patterns = tuple(patterns)
        self._literal: dict[str, list[int]] = {}
        self._by_part: dict[str, list[int]] = {}
        self._any: list[int] = []
        for at, pattern in enumerate(self.patterns):
            first, dot, _ = pattern.head.partition(".")
            if pattern.literal is not None:
                self._literal.setdefault(pattern.literal, []).append(at)
            elif dot:
                self._by_part.setdefault(first, []).append(at)
            else:
                self._any.append(at)
        self._crowds = {first: _Crowd(self.patterns, group) for first, group in self._by_part.items() if len(group) > _FEW}

    def match(self, name: str) -> list[tuple[int, dict[str, Capture]]]:
        """Every pattern that matches, as (its position, its captures), in order."""
        found: list[tuple[int, dict[str, Capture]]] = [(at, {}) for at in self._literal[name]] if name in self._literal else []
        first = name.partition(".")[0]
        near = self._crowds[first].candidates(name) if first in self._crowds else self._by_part.get(first, ())
        for at in chain(near, self._any) if self._any else near:
            captures = self.patterns[at].match(name)
            if captures is not None:
                found.append((at, captures))
        if len(found) > 1:
            found.sort(key=lambda item: item[0])
        return found
