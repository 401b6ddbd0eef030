r"""Python's regular expressions, as transformers searches with them, said in RE2 as full matches.

transformers replaces the *first* match inside a name; a rule's pattern matches the whole name. So ``OLD`` becomes ``(.*?)OLD(.*)``. RE2
has no look-around, but "not preceded by one of these words" and "not followed by one of these words" are themselves regular: they are
said of the text before and after the match, as the complement of a small tree of words.

>>> whole_of(["(?<!up_)proj"], "x").pattern
'(?P<a>(?:|.*?[^_]|(?:|.*?[^p]|(?:|.*?[^u])p)_))proj(?P<z>(?:|[^0-9A-Z_a-z].*))'
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import Struct

from ckptconv.errors import Refusal, printable

_NEW = sys.version_info >= (3, 11)
sre: Any = importlib.import_module("re._constants" if _NEW else "sre_constants")
sre_parse: Any = importlib.import_module("re._parser" if _NEW else "sre_parse")

Letters = frozenset[str]
_WORD: Letters = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_DIGITS: Letters = frozenset("0123456789")
_MAX_WORDS = 200
_BOUNDARY = (_WORD,)  #: transformers ends a pattern on a name's boundary: `weight` is not the start of `weight_scale`


class Whole(Struct, frozen=True):
    """A full-match pattern and the name that it becomes, in the rule language (without ``regex:``)."""

    pattern: str
    to: str


def whole_of(sources: Sequence[str], target: str, scope: str = "") -> Whole:
    r"""The rename of ``sources`` by ``target`` (which may use ``\1``) in names that start with ``scope``, a regular expression.

    Of several sources the longest is tried first, as transformers does. Raises :class:`~ckptconv.errors.Refusal` CK108 for what RE2
    cannot say.
    """
    sources = sorted(sources, key=len, reverse=True)
    parts = [_Part.read(source) for source in sources]
    first = parts[0]
    if any((part.anchored, part.before, part.after) != (first.anchored, first.before, first.after) for part in parts):
        raise Refusal(f"{printable(' | '.join(sources))}: alternatives with different surroundings are not one pattern", code="CK110")
    if len(parts) > 1 and r"\1" in target:
        raise Refusal(f"{printable(target)}: a group of several alternatives has no one name", code="CK110")
    before = "" if first.anchored else _not_ending(first.before)
    body = first.body if len(parts) == 1 else "(?:" + "|".join(part.body for part in parts) + ")"
    after = f"(?P<z>{_not_starting(first.after)})"
    to = _template(target) + r"\g<z>"
    group = _leading_group(body) if to.startswith(r"\g<x>") else ""
    if group:  # one capture for both: an empty one before it would take the dot that follows it along
        inner = "(?:" + group.removeprefix("(?P<x>")
        return Whole(f"(?P<a>{scope}{before}{inner}){body.removeprefix(group)}{after}", r"\g<a>" + to.removeprefix(r"\g<x>"))
    if not scope and first.anchored:
        return Whole(body + after, to)
    return Whole(f"(?P<a>{scope}{before}){body}{after}", r"\g<a>" + to)


def _leading_group(body: str) -> str:
    """The text of the group ``x`` where a pattern starts with it, else nothing."""
    if not body.startswith("(?P<x>"):
        return ""
    depth = at = 0
    in_class = False
    while at < len(body):
        letter = body[at]
        if letter == "\\":
            at += 1
        elif in_class:
            in_class = letter != "]"
        elif letter == "[":
            in_class = True
        else:
            depth += (letter == "(") - (letter == ")")
            if not depth:
                return body[: at + 1]
        at += 1
    return ""


def _template(target: str) -> str:
    plain = target.removeprefix("^").replace(r"\.", ".").replace("{", "{{").replace("}", "}}")
    if re.search(r"\\[02-9]", plain):
        raise Refusal(f"{printable(target)}: more than one group", code="CK110")
    return plain.replace(r"\1", r"\g<x>")


class _Part(Struct, frozen=True):
    anchored: bool
    before: tuple[tuple[Letters, ...], ...]
    body: str
    after: tuple[tuple[Letters, ...], ...]

    @staticmethod
    def read(source: str) -> _Part:
        text = source.replace("*.", r".*\.")  # transformers' own shorthand
        tree = list(_flat(sre_parse.parse(text)))
        anchored = bool(tree) and tree[0] == (sre.AT, sre.AT_BEGINNING)
        tree = tree[1:] if anchored else tree
        before: list[tuple[Letters, ...]] = []
        while tree and tree[0][0] is sre.ASSERT_NOT and tree[0][1][0] < 0:
            before += _words(tree.pop(0)[1][1])
        after: list[tuple[Letters, ...]] = []
        while tree and tree[-1][0] is sre.ASSERT_NOT and tree[-1][1][0] > 0:
            after += _words(tree.pop()[1][1])
        if not after and re.search(r"[a-zA-Z0-9]$", text):
            after = [_BOUNDARY]
        if anchored and before:
            raise Refusal(f"{printable(source)}: an anchor and a look-behind together", code="CK110")
        emitter = _Emitter(source)
        return _Part(anchored, tuple(before), emitter.all(tree), tuple(after))


def _flat(tree: Any) -> Iterator[Any]:
    """The pattern's items, with groups that capture nothing opened where that changes nothing."""
    for op, argument in tree:
        if op is sre.SUBPATTERN and argument[0] is None:
            yield from _flat(argument[3])
        else:
            yield op, argument


def _words(tree: Any) -> list[tuple[Letters, ...]]:
    """Every word that a look-around may stand for, each a sequence of sets of letters."""
    words: list[tuple[Letters, ...]] = [()]
    for op, argument in tree:
        if op is sre.SUBPATTERN:
            choices = _words(argument[3])
        elif op is sre.BRANCH:
            choices = [word for branch in argument[1] for word in _words(branch)]
        else:
            choices = [(_letters(op, argument),)]
        words = [word + choice for word in words for choice in choices]
        if len(words) > _MAX_WORDS:
            raise Refusal("a look-around over too many words", code="CK110")
    return words


def _letters(op: Any, argument: Any) -> Letters:
    if op is sre.LITERAL:
        return frozenset(chr(argument))
    if op is sre.CATEGORY:
        found = {sre.CATEGORY_DIGIT: _DIGITS, sre.CATEGORY_WORD: _WORD}.get(argument)
        if found is not None:
            return found
    if op is sre.RANGE:
        return frozenset(map(chr, range(argument[0], argument[1] + 1)))
    if op is sre.ANY:
        return frozenset(map(chr, range(32, 127)))
    if op is sre.IN and argument[0][0] is not sre.NEGATE:
        return frozenset().union(*(_letters(*item) for item in argument))
    raise Refusal(f"RE2 cannot say this look-around ({str(op).lower()})", code="CK110")


def _not_starting(words: Sequence[tuple[Letters, ...]]) -> str:
    """Text that starts with none of ``words``."""
    return _complement(words, lambda other, rest: f"{other}{rest}", ".*")


def _not_ending(words: Sequence[tuple[Letters, ...]]) -> str:
    """Text that ends in none of ``words``, as little of it as possible."""
    return _complement([word[::-1] for word in words], lambda other, rest: f"{rest}{other}", ".*?")


def _complement(words: Sequence[tuple[Letters, ...]], join: Any, anything: str) -> str:
    if not words:
        return anything
    taken = frozenset().union(*(word[0] for word in words))
    choices = [join(_class(taken, negated=True), anything)]
    groups: dict[tuple[tuple[Letters, ...], ...], set[str]] = {}
    for letter in sorted(taken):
        tails = tuple(word[1:] for word in words if letter in word[0])
        if () not in tails:
            groups.setdefault(tails, set()).add(letter)
    choices += [join(_class(frozenset(letters)), _complement(tails, join, anything)) for tails, letters in groups.items()]
    # no text at all comes first: of several places, transformers takes the leftmost
    return "(?:|" + "|".join(choices) + ")"


def other_part(word: str) -> str:
    """Any part of a name but ``word``."""
    longer, found = "[^.]+", ""
    for letter in reversed(word):
        found = f"(?:|[^{_in_class(letter)}.][^.]*|{_literal(letter)}{found or longer})"
    return found


def _class(letters: Letters, *, negated: bool = False) -> str:
    if len(letters) == 1 and not negated:
        return _literal(next(iter(letters)))
    runs: list[list[str]] = []
    for letter in sorted(letters):
        if runs and ord(letter) == ord(runs[-1][1]) + 1:
            runs[-1][1] = letter
        else:
            runs.append([letter, letter])
    inside = "".join(
        "".join(map(_in_class, dict.fromkeys(run))) if ord(run[1]) - ord(run[0]) < 2 else f"{_in_class(run[0])}-{_in_class(run[1])}"
        for run in runs
    )
    return f"[{'^' if negated else ''}{inside}]"


def _literal(letter: str) -> str:
    return letter if letter.isalnum() or letter in "_-" else "\\" + letter


def _in_class(letter: str) -> str:
    return "\\" + letter if letter in "\\]^-[" else letter


class _Emitter:
    """A parsed Python pattern written for RE2, its one capturing group named ``x``."""

    def __init__(self, source: str) -> None:
        self.source, self.groups = source, 0

    def all(self, tree: Any) -> str:
        return "".join(self.one(op, argument) for op, argument in tree)

    def one(self, op: Any, argument: Any) -> str:
        if op is sre.LITERAL:
            return _literal(chr(argument))
        if op is sre.ANY:
            return "."
        if op is sre.IN:
            negated = argument[0][0] is sre.NEGATE
            return _class(frozenset().union(*(_letters(*item) for item in argument if item[0] is not sre.NEGATE)), negated=negated)
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, inner = argument
            times = {(0, 1): "?", (0, sre.MAXREPEAT): "*", (1, sre.MAXREPEAT): "+"}.get((low, high), f"{{{low},{high}}}")
            body = self.all(inner)
            body = body if len(inner) == 1 and inner[0][0] in (sre.IN, sre.LITERAL, sre.ANY) else f"(?:{body})"
            return f"{body}{times}{'?' if op is sre.MIN_REPEAT else ''}"
        if op is sre.BRANCH:
            return "(?:" + "|".join(self.all(branch) for branch in argument[1]) + ")"
        if op is sre.SUBPATTERN:
            return self.group(argument)
        if op is sre.AT and argument is sre.AT_BEGINNING:
            return "^"
        if op is sre.AT and argument is sre.AT_END:
            return "$"
        raise Refusal(f"RE2 cannot say {printable(self.source)!r} ({str(op).lower()})", code="CK110")

    def group(self, argument: Any) -> str:
        number, _, _, inner = argument
        if number is None:
            return f"(?:{self.all(inner)})"
        self.groups += 1
        return f"(?P<x>{self.all(inner)})" if self.groups == 1 else f"(?:{self.all(inner)})"
