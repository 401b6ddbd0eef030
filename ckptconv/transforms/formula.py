"""Formulas over named tensors: ``w + s * (b @ a)``. Parsed here, shapes checked before a byte is read; nothing of Python is evaluated.

    sum := product (("+" | "-") product)*      product := factor (("*" | "/" | "@") factor)*      factor := "-" factor | atom
    atom := number | name | function "(" sum ["," axes "=" "(" int ["," int | "," "..."] ")"] ")" | "(" sum ")"

Broadcasting is never silent: the two sides of an operation have equal shapes, or equal ranks where one side's axis is 1, or one of them
is a number. ``rows(x, w)`` stands a vector along the first axis of ``w``, ``columns(x, w)`` along the second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Union

from msgspec import Struct

from ckptconv.errors import Refusal, printable

if TYPE_CHECKING:
    from torch import Tensor

MAX_TEXT, MAX_DEPTH = 1024, 32
REDUCING = ("norm", "sum", "mean")
FUNCTIONS = (*REDUCING, "sqrt", "transpose", "rows", "columns")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|(?P<sign>\.\.\.|[-+*/@(),=]))"
)

Shape = tuple[int, ...]


class Term(Struct, frozen=True):
    """One node of a parsed formula."""

    kind: str  #: ``number``, ``name``, ``minus``, an operator's sign, or a function's name
    value: Any = None
    parts: tuple[Term, ...] = ()

    def names(self) -> tuple[str, ...]:
        """The names that the formula mentions, in order, each once."""
        own = (self.value,) if self.kind == "name" else ()
        return tuple(dict.fromkeys([*own, *(name for part in self.parts for name in part.names())]))


def _bad(what: str, text: str, try_: str = "") -> Refusal:
    return Refusal(what, code="CK104", found=printable(text), try_=try_)


@lru_cache(maxsize=1024)
def parse(text: str) -> Term:
    """The formula as a tree. Raises :class:`~ckptconv.errors.Refusal` CK104 for anything else.

    >>> parse("w + s * (b @ a)").names()
    ('w', 's', 'b', 'a')
    """
    if len(text) > MAX_TEXT:
        raise _bad(f"a formula has at most {MAX_TEXT:,} characters; this one has {len(text):,}", text)
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.tokens: list[tuple[str, str]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            token = _TOKEN.match(text, at)
            if token is None:
                raise _bad(f"{printable(text[at:].strip()[:1])!r} cannot stand in a formula", text)
            self.tokens.append((str(token.lastgroup), token[token.lastgroup or 0]))
            at = token.end()

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self) -> tuple[str, str]:
        if self.at >= len(self.tokens):
            raise _bad("the formula ends too early", self.text)
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, sign: str) -> None:
        if self.peek() != sign:
            raise _bad(f"expected {sign!r}" + (f" before {self.peek()!r}" if self.peek() else ""), self.text)
        self.at += 1

    def whole(self) -> Term:
        term = self.sum()
        if self.at < len(self.tokens):
            raise _bad(f"unexpected {self.peek()!r}", self.text)
        return term

    def sum(self) -> Term:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _bad(f"a formula nests at most {MAX_DEPTH} deep", self.text)
        term = self.product()
        while self.peek() in ("+", "-"):
            term = Term(self.take()[1], None, (term, self.product()))
        self.depth -= 1
        return term

    def product(self) -> Term:
        term = self.factor()
        while self.peek() in ("*", "/", "@"):
            term = Term(self.take()[1], None, (term, self.factor()))
        return term

    def factor(self) -> Term:
        signs = 0
        while self.peek() == "-":
            self.at += 1
            signs += 1
        term = self.atom()
        return Term("minus", None, (term,)) if signs % 2 else term

    def atom(self) -> Term:
        kind, text = self.take()
        if kind == "number":
            return Term("number", float(text))
        if text == "(":
            term = self.sum()
            self.expect(")")
            return term
        if kind != "name":
            raise _bad(f"unexpected {text!r}", self.text)
        if self.peek() != "(":
            return Term("name", text)
        if text not in FUNCTIONS:
            raise _bad(f"there is no function {printable(text)!r}", self.text, ", ".join(FUNCTIONS))
        self.at += 1
        return self.call(text)

    def call(self, function: str) -> Term:
        parts = [self.sum()]
        axes: tuple[Union[int, str], ...] = ("...",)
        while self.peek() == ",":
            self.at += 1
            if self.peek() == "axes" and self.at + 1 < len(self.tokens) and self.tokens[self.at + 1][1] == "=":
                self.at += 2
                axes = self.axes()
            else:
                parts.append(self.sum())
        self.expect(")")
        if len(parts) != (2 if function in ("rows", "columns") else 1):
            raise _bad(f"{function}() takes {'two tensors' if function in ('rows', 'columns') else 'one tensor'}", self.text)
        if function not in REDUCING and axes != ("...",):
            raise _bad(f"{function}() takes no axes", self.text)
        return Term(function, axes if function in REDUCING else None, tuple(parts))

    def axes(self) -> tuple[Union[int, str], ...]:
        self.expect("(")
        found: list[Union[int, str]] = []
        while self.peek() != ")":
            minus = self.peek() == "-"
            self.at += minus
            kind, text = self.take()
            if text == "..." and not minus:
                found.append("...")
            elif kind == "number" and text.isdigit() and len(text) < 3:
                found.append(-int(text) if minus else int(text))
            else:
                raise _bad("axes are integers, and ... for all that follow", self.text, "axes=(1, ...)")
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != ")":
                raise _bad("expected ',' or ')'", self.text)
        self.at += 1
        if not found or "..." in found[:-1]:
            raise _bad("axes are integers, and ... for all that follow", self.text, "axes=(1, ...)")
        return tuple(found)


def axes_of(axes: tuple[Union[int, str], ...], shape: Shape, text: str) -> tuple[int, ...]:
    """The axes that ``axes=(1, ...)`` means for a tensor of this shape."""
    rank = len(shape)
    found: list[int] = []
    for axis in axes:
        if isinstance(axis, str):
            start = found[-1] + 1 if found else 0
            found += range(start, rank)
        elif -rank <= axis < rank:
            found.append(axis % rank)
        else:
            raise Refusal(f"there is no axis {axis} in a tensor of rank {rank}", code="CK206", found=f"{list(shape)} in {printable(text)}")
    if len(set(found)) < len(found):
        raise Refusal("an axis is named twice", code="CK206", found=printable(text))
    return tuple(found)


def shape_of(term: Term, shapes: Mapping[str, Shape], text: str) -> Shape | None:
    """The shape of a formula's value, None for a plain number. Raises CK206 where shapes do not fit each other."""
    parts = [shape_of(part, shapes, text) for part in term.parts]
    kind = term.kind
    if kind == "number":
        return None
    if kind == "name":
        return shapes.get(term.value)
    if kind in ("minus", "sqrt"):
        return parts[0]
    if kind == "@":
        return _product_shape(parts[0], parts[1], text)
    if kind in ("+", "-", "*", "/"):
        return _together(kind, parts[0], parts[1], text)
    first = parts[0]
    if first is None:
        raise Refusal(f"{kind}() takes a tensor, not a number", code="CK206", found=printable(text))
    if kind == "transpose":
        if len(first) < 2:
            raise Refusal("transpose() takes a tensor of rank 2 or more", code="CK206", found=f"{list(first)} in {printable(text)}")
        return (*first[:-2], first[-1], first[-2])
    if kind in ("rows", "columns"):
        like, at = parts[1], int(kind == "columns")
        if like is None or len(first) != 1 or len(like) <= at or like[at] != first[0]:
            raise Refusal(f"{kind}() takes a vector as long as axis {at} of its second tensor", code="CK206",
                          found=f"{list(first)} and {list(like) if like is not None else 'a number'} in {printable(text)}")  # fmt: skip
        return tuple(first[0] if axis == at else 1 for axis in range(len(like)))
    axes = axes_of(term.value, first, text)
    return tuple(1 if axis in axes else size for axis, size in enumerate(first))


def _together(sign: str, left: Shape | None, right: Shape | None, text: str) -> Shape | None:
    if left is None or right is None:
        return right if left is None else left
    if len(left) != len(right) or any(a != b and 1 not in (a, b) for a, b in zip(left, right, strict=True)):
        raise Refusal(f"the two sides of `{sign}` do not fit", code="CK206", found=f"{list(left)} and {list(right)} in {printable(text)}",
                      try_="rows(x, w) stands a vector along the first axis of w")  # fmt: skip
    return tuple(b if a == 1 else a for a, b in zip(left, right, strict=True))


def _product_shape(left: Shape | None, right: Shape | None, text: str) -> Shape:
    if left is None or right is None or len(left) < 2 or len(left) != len(right) or left[:-2] != right[:-2] or left[-1] != right[-2]:
        shown = " and ".join("a number" if shape is None else str(list(shape)) for shape in (left, right))
        raise Refusal("the two sides of `@` do not fit", code="CK206", found=f"{shown} in {printable(text)}")
    return (*left[:-1], right[-1])


def value_of(term: Term, values: Mapping[str, Any], text: str) -> Tensor | float:
    """The formula's value over tensors (all of one dtype) and numbers."""
    parts = [value_of(part, values, text) for part in term.parts]
    if term.kind == "number":
        return float(term.value)
    if term.kind == "name":
        found: Tensor | float = values[term.value]
        return found
    made: Tensor | float = _KERNELS[term.kind](term, parts, text)
    return made


def _reduced(term: Term, parts: list[Any], text: str) -> Any:
    (x,) = parts
    axes = axes_of(term.value, tuple(x.shape), text)
    if term.kind == "norm":
        return x.square().sum(axes, keepdim=True).sqrt() if axes else x.abs()
    return (x.sum(axes, keepdim=True) if term.kind == "sum" else x.mean(axes, keepdim=True)) if axes else x


def _along(term: Term, parts: list[Any], text: str) -> Any:  # noqa: ARG001  (the same signature for all)
    vector, like = parts
    return vector.view([-1 if axis == int(term.kind == "columns") else 1 for axis in range(like.dim())])


_KERNELS: Mapping[str, Callable[[Term, list[Any], str], Any]] = {
    "+": lambda _term, parts, _text: parts[0] + parts[1],
    "-": lambda _term, parts, _text: parts[0] - parts[1],
    "*": lambda _term, parts, _text: parts[0] * parts[1],
    "/": lambda _term, parts, _text: parts[0] / parts[1],
    "@": lambda _term, parts, _text: parts[0] @ parts[1],
    "minus": lambda _term, parts, _text: -parts[0],
    "sqrt": lambda _term, parts, _text: parts[0] ** 0.5,
    "transpose": lambda _term, parts, _text: parts[0].transpose(-1, -2),
    "rows": _along,
    "columns": _along,
    **dict.fromkeys(REDUCING, _reduced),
}
