"""Safe arithmetic for rule files: integers, truth values, text, lists and tables; nothing of Python is ever evaluated.

    expression := or [ "if" or "else" expression ]
    or, and, not, comparison (== != < <= > >= in "not in"), + -, * // %, unary -, then x.name, x[i], f(x), literals

Every value is bounded (integers to 64 bits, lists and text to a fixed length), so an expression from a stranger costs at most its
own length. ``**`` and ``/`` do not exist.

>>> evaluate(parse("hidden // heads if heads else 0"), {"hidden": 768, "heads": 12}.__getitem__)
64
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Union

from msgspec import Struct

from ckptconv.errors import Refusal, printable

MAX_TEXT = 1024
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1
MAX_LENGTH = 100_000

Value = Union[int, bool, float, str, None, list[Any], Mapping[str, Any]]
Lookup = Callable[[str], Any]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+)|(?P<text>'[^'\\]*'|\"[^\"\\]*\")|(?P<name>[A-Za-z_][A-Za-z_0-9]*)"
    r"|(?P<sign>==|!=|<=|>=|//|\*\*|[-+*/%<>()\[\]{},.:]))"
)
_BINDING = {"==": 3, "!=": 3, "<": 3, "<=": 3, ">": 3, ">=": 3, "in": 3, "+": 4, "-": 4, "*": 5, "//": 5, "%": 5}


def _bad(what: str, text: str) -> Refusal:
    return Refusal(what, code="CK104", found=printable(text))


class Node(Struct, frozen=True):
    """One node of a parsed expression: an operation and its operands (nodes or literals)."""

    kind: str
    value: Any = None
    parts: tuple[Node, ...] = ()

    def names(self) -> set[str]:
        """The variables that the expression mentions; functions are not among them."""
        found, left = set(), [self]
        while left:  # a long sum is a deep tree: no recursion over what a stranger wrote
            node = left.pop()
            left.extend(node.parts)
            if node.kind == "name":
                found.add(node.value)
        return found


@lru_cache(maxsize=4096)
def parse(text: str) -> Node:
    """The expression as a tree. Raises :class:`~ckptconv.errors.Refusal` CK104 for anything malformed or too large."""
    if len(text) > MAX_TEXT:
        raise _bad(f"an expression has at most {MAX_TEXT:,} characters; this one has {len(text):,}", text)
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            token = _TOKEN.match(text, at)
            if token is None:
                raise _bad(f"{printable(text[at:].strip()[:1])!r} cannot stand in an expression", text)
            at = token.end()
            self.tokens.append((str(token.lastgroup), token[token.lastgroup or 0]))
        self.at = 0
        self.depth = 0

    def peek(self) -> str:
        kind, text = self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")
        return text if kind in ("sign", "name") else kind

    def take(self) -> tuple[str, str]:
        if self.at >= len(self.tokens):
            raise _bad("the expression ends too early", self.text)
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, sign: str) -> None:
        if self.peek() != sign:
            raise _bad(f"expected {sign!r}", self.text)
        self.at += 1

    def whole(self) -> Node:
        node = self.choice()
        if self.at < len(self.tokens):
            kind, text = self.tokens[self.at]
            hint = "; `**` does not exist here" if text == "**" else "; use // for division" if text == "/" else ""
            raise _bad(f"unexpected {text if kind != 'end' else 'end'!r}{hint}", self.text)
        return node

    def choice(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _bad(f"an expression nests at most {MAX_DEPTH} deep", self.text)
        node = self.either()
        if self.peek() == "if":
            self.at += 1
            condition = self.either()
            self.expect("else")
            node = Node("if", None, (condition, node, self.choice()))
        self.depth -= 1
        return node

    def either(self) -> Node:
        node = self.both()
        while self.peek() == "or":
            self.at += 1
            node = Node("or", None, (node, self.both()))
        return node

    def both(self) -> Node:
        node = self.negation()
        while self.peek() == "and":
            self.at += 1
            node = Node("and", None, (node, self.negation()))
        return node

    def negation(self) -> Node:
        count = 0
        while self.peek() == "not":
            self.at += 1
            count += 1
        node = self.operation(3)
        return Node("not", None, (node,)) if count % 2 else node

    def operation(self, binding: int) -> Node:
        node = self.unary()
        while True:
            sign = self.peek()
            if sign == "not" and self.at + 1 < len(self.tokens) and self.tokens[self.at + 1][1] == "in" and binding <= 3:
                self.at += 2
                node = Node("not", None, (Node("op", "in", (node, self.operation(4))),))
                continue
            if _BINDING.get(sign, -1) < binding:
                return node
            self.at += 1
            node = Node("op", sign, (node, self.operation(_BINDING[sign] + 1)))

    def unary(self) -> Node:
        count = 0
        while self.peek() == "-":
            self.at += 1
            count += 1
        node = self.postfix()
        return Node("minus", None, (node,)) if count % 2 else node

    def postfix(self) -> Node:
        node = self.atom()
        while True:
            sign = self.peek()
            if sign == ".":
                self.at += 1
                kind, name = self.take()
                if kind != "name":
                    raise _bad("a field's name must follow the dot", self.text)
                node = Node("field", name, (node,))
            elif sign == "[":
                self.at += 1
                node = Node("item", None, (node, self.choice()))
                self.expect("]")
            elif sign == "(" and node.kind == "name":
                self.at += 1
                if node.value not in FUNCTIONS:
                    known = ", ".join(sorted(FUNCTIONS))
                    raise _bad(f"there is no function {printable(node.value)!r} (there are {known})", self.text)
                node = Node("call", node.value, self.listed(")"))
            else:
                return node

    def listed(self, end: str) -> tuple[Node, ...]:
        parts: list[Node] = []
        while self.peek() != end:
            parts.append(self.choice())
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != end:
                raise _bad(f"expected ',' or {end!r}", self.text)
        self.at += 1
        return tuple(parts)

    def atom(self) -> Node:
        kind, text = self.take()
        if kind == "number":
            if len(text) > 19 or int(text) > MAX_INTEGER:
                raise _bad("an integer must fit into 64 bits", self.text)
            return Node("literal", int(text))
        if kind == "text":
            return Node("literal", text[1:-1])
        if kind == "name":
            if text in ("true", "True", "false", "False"):
                return Node("literal", text.lower() == "true")
            if text in ("null", "None"):
                return Node("literal", None)
            if text in ("if", "else", "and", "or", "in", "not"):
                raise _bad(f"unexpected {text!r}", self.text)
            return Node("name", text)
        if text == "(":
            node = self.choice()
            self.expect(")")
            return node
        if text == "[":
            return Node("list", None, self.listed("]"))
        if text == "{":
            return self.table()
        raise _bad(f"unexpected {text!r}", self.text)

    def table(self) -> Node:
        parts: list[Node] = []
        while self.peek() != "}":
            parts.append(self.choice())
            self.expect(":")
            parts.append(self.choice())
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != "}":
                raise _bad("expected ',' or '}'", self.text)
        self.at += 1
        return Node("table", None, tuple(parts))


class Absent(Exception):  # noqa: N818  (not an error by itself: `first` goes on to its next argument)
    """A variable or field has no value."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integers(name: str, values: Sequence[Any]) -> list[int]:
    if not values or not all(map(_is_integer, values)):
        raise Refusal(f"{name}() takes integers", code="CK104", found=printable(values))
    return list(values)


def _spread(values: Sequence[Any]) -> Sequence[Any]:
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _length(*values: Any) -> int:
    if len(values) != 1 or not isinstance(values[0], (list, str, Mapping)):
        raise Refusal("len() takes one list, table or text", code="CK104", found=printable(values))
    return len(values[0])


def _count_below(*values: Any) -> int:
    if len(values) != 2 or not isinstance(values[0], list):
        raise Refusal("count_below() takes a list and a number", code="CK104", found=printable(values))
    limit = _integers("count_below", [values[1]])[0]
    return sum(item < limit for item in _integers("count_below", values[0])) if values[0] else 0


def _by_name(*values: Any) -> Any:
    """``by_name(table, text, default)``: the value whose key the text ends with, a key being a regular expression, as PEFT reads it."""
    if len(values) != 3 or not isinstance(values[0], Mapping) or not isinstance(values[1], str):
        raise Refusal("by_name() takes a table, text, and what else", code="CK104", found=printable(values))
    import re2

    for key, value in values[0].items():
        try:
            if re2.fullmatch(rf"(?:.*\.)?(?:{key})", values[1]) is not None:
                return value
        except (re2.error, UnicodeEncodeError):
            raise Refusal("by_name(): a key of the table is no regular expression", code="CK104", found=printable(key)) from None
    return values[2]


#: ``first`` and ``shape`` are handled by :func:`evaluate`: one is lazy, the other needs the table of tensors.
FUNCTIONS: Mapping[str, Callable[..., Any] | None] = {
    "first": None,
    "shape": None,
    "has": None,
    "len": _length,
    "min": lambda *values: min(_integers("min", _spread(values))),
    "max": lambda *values: max(_integers("max", _spread(values))),
    "count_below": _count_below,
    "by_name": _by_name,
}


def evaluate(node: Node, lookup: Lookup) -> Any:
    """The value of a parsed expression.

    ``lookup`` gives a variable's value and raises :class:`Absent` (or ``KeyError``) where there is none; it is also asked for
    ``shape`` and ``has``, which must be functions of a tensor's name. Raises :class:`~ckptconv.errors.Refusal` CK104.
    """
    try:
        return _value(node, lookup)
    except (Absent, KeyError) as absent:
        what = absent.what if isinstance(absent, Absent) else f"variable {printable(absent.args[0])!r} has no value"
        raise Refusal(what, code="CK104", try_="give it with --set NAME=VALUE, --config FILE, or vars: in the rule file") from None


def _value(node: Node, lookup: Lookup) -> Any:
    kind, parts = node.kind, node.parts
    if kind == "literal":
        return node.value
    if kind == "name":
        return lookup(node.value)
    if kind == "op":
        return _operate(node.value, _value(parts[0], lookup), _value(parts[1], lookup))
    if kind == "if":
        return _value(parts[1] if _value(parts[0], lookup) else parts[2], lookup)
    if kind in ("and", "or"):
        left = _value(parts[0], lookup)
        return _value(parts[1], lookup) if bool(left) == (kind == "and") else left
    if kind == "not":
        return not _value(parts[0], lookup)
    if kind == "minus":
        return -_integers("-", [_value(parts[0], lookup)])[0]
    if kind == "list":
        return _bounded([_value(part, lookup) for part in parts])
    if kind == "table":
        keys = [_key(_value(key, lookup)) for key in parts[::2]]
        return _bounded({key: _value(value, lookup) for key, value in zip(keys, parts[1::2], strict=True)})
    if kind == "field":
        return _item(_value(parts[0], lookup), node.value)
    if kind == "item":
        return _item(_value(parts[0], lookup), _value(parts[1], lookup))
    return _call(node, lookup)


def _bounded(made: Any) -> Any:
    """``made``, unless written out it would be too long: lists of lists of the same list double with each line of a rule file."""
    count, left = 0, [made]
    while left:
        node = left.pop()
        inner = node.values() if isinstance(node, Mapping) else node
        count += len(inner)
        if count > MAX_LENGTH:
            raise Refusal(f"a list or table has at most {MAX_LENGTH:,} values, those in its lists included", code="CK104")
        left.extend(item for item in inner if isinstance(item, (list, Mapping)))
    return made


def _key(value: Any) -> Any:
    if isinstance(value, (list, Mapping)):
        raise Refusal("a list or table cannot be the key of a table", code="CK104", found=printable(value))
    return value


def _item(holder: Any, key: Any) -> Any:
    if isinstance(holder, Mapping):
        if _key(key) not in holder:
            raise Absent(f"there is no {printable(key)!r} (there are {printable(', '.join(map(str, holder)))})")
        return holder[key]
    if isinstance(holder, (list, tuple)) and _is_integer(key):
        if not -len(holder) <= key < len(holder):
            raise Refusal(f"index {key} is outside a list of {len(holder)}", code="CK104")
        return holder[key]
    raise Refusal(f"{printable(key)!r} cannot be looked up in {printable(holder)!r}", code="CK104")


def _call(node: Node, lookup: Lookup) -> Any:
    name, parts = node.value, node.parts
    if name == "first":
        for part in parts:
            try:
                value = _value(part, lookup)
            except (Absent, KeyError):
                continue
            if value is not None:
                return value
        raise Absent("none of first()'s arguments has a value")
    values = [_value(part, lookup) for part in parts]
    if name in ("shape", "has"):
        if len(values) > 1 or not all(isinstance(value, str) for value in values) or (name == "has" and not values):
            raise Refusal(f"{name}() takes the name of one tensor, as text", code="CK104", found=printable(values))
        function = lookup(name)
        if not callable(function):  # a variable of that name
            raise Refusal(f"{name} is a variable here, and cannot be called", code="CK104", try_="another name for the variable")
        return function(*values)
    function = FUNCTIONS[name]
    assert function is not None
    return function(*values)


def _operate(sign: str, left: Any, right: Any) -> Any:
    if sign == "==":
        return left == right
    if sign == "!=":
        return left != right
    if sign == "in":
        if not isinstance(right, (list, str, Mapping)):
            raise Refusal("`in` looks into lists, tables and text", code="CK104", found=printable(right))
        if isinstance(right, str) and not isinstance(left, str):
            raise Refusal("only text can be in a text", code="CK104", found=f"{printable(left)} in {printable(right)!r}")
        return (_key(left) if isinstance(right, Mapping) else left) in right
    both_text = isinstance(left, str) and isinstance(right, str)
    both_lists = isinstance(left, list) and isinstance(right, list)
    if sign == "+" and (both_text or both_lists):
        result = left + right
        if len(result) > (MAX_TEXT if both_text else MAX_LENGTH):
            raise Refusal("the result of + is too long", code="CK104")
        return result
    if not (_is_integer(left) and _is_integer(right)):
        raise Refusal(f"`{sign}` takes integers", code="CK104", found=f"{printable(left)} {sign} {printable(right)}")
    if sign in ("//", "%") and right == 0:
        raise Refusal("division by zero", code="CK104", found=f"{left} {sign} 0")
    result = _INTEGER[sign](left, right)
    if not isinstance(result, bool) and abs(result) > MAX_INTEGER:
        raise Refusal("a result must fit into 64 bits", code="CK104", found=f"{left} {sign} {right}")
    return result


_INTEGER: Mapping[str, Callable[[int, int], Any]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "//": lambda a, b: a // b, "%": lambda a, b: a % b,
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
}  # fmt: skip
