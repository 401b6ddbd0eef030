"""Tensor names: how they sort, how many of them are said in one line, and which are unusable."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from msgspec import Struct

MAX_NAME = 1024
#: An index. A longer run of digits is text: it counts nothing, and Python refuses to read it as a number.
_DIGITS = re.compile(r"(?<!\d)\d{1,18}(?!\d)")
_RUNS = re.compile(r"\d+")
_PARTS = re.compile(r"(\d+)")
DIGITS_TO_ZEROS = bytes.maketrans(b"123456789", b"000000000")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which ``layer.2`` comes before ``layer.10``."""
    return tuple((0, int(part), part) if part.isdigit() and part.isascii() else (1, 0, part) for part in _PARTS.split(name) if part)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The most similar of ``words``, or None when nothing is close enough to be meant.

    >>> nearest("strip_prefx", ["strip_prefix", "split"])
    'strip_prefix'
    """
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return found[0] if found else None


def unusable(name: object) -> str | None:
    """Why ``name`` cannot be a tensor's name, or None when it can."""
    if not isinstance(name, str):
        return f"a name must be text, not {type(name).__name__}"
    if not name:
        return "the name is empty"
    if len(name) > MAX_NAME:
        return f"the name has {len(name):,} characters; at most {MAX_NAME:,} are allowed"
    if not name.isprintable() and any(ord(ch) < 32 or ord(ch) == 127 or 0xD800 <= ord(ch) < 0xE000 for ch in name):
        return "the name holds control characters or lone surrogates"
    if name == "__metadata__":
        return "the name __metadata__ is reserved by safetensors"
    return None


def skeleton(name: str) -> str:
    """The name without its numbers: names with one skeleton may be said as one template.

    >>> skeleton("layers.11.fc1.weight")
    'layers.#.fc#.weight'
    """
    # Half a million names are a few dozen when all their digits are the same.
    return _without_indices(name.encode("utf-8", "surrogatepass").translate(DIGITS_TO_ZEROS)) or _DIGITS.sub("#", name)


@lru_cache(maxsize=65536)
def _without_indices(zeros: bytes) -> str | None:
    """The skeleton, unless it has digits that are text: which ones, ``zeros`` does not tell."""
    found = _DIGITS.sub("#", zeros.decode("utf-8", "surrogatepass"))
    return None if _RUNS.search(found) else found


class Template(Struct, frozen=True):
    """Many names said as one: ``layers.{0-11}.attn.qkv.weight`` stands for the twelve in ``names``."""

    text: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.text} ×{len(self.names)}" if len(self.names) > 1 else self.text


def collapse(names: Sequence[str]) -> list[Template]:
    """Group names that differ only in their numbers, in order of first appearance.

    Digits count as an index only where they vary: ``{0-11}`` for a run, ``{0,2,5}`` for a set with gaps.

    >>> [str(t) for t in collapse(["layers.0.w", "layers.1.w", "layers.2.w", "head.w"])]
    ['layers.{0-2}.w ×3', 'head.w']
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(skeleton(name), []).append(name)
    return [template for members in groups.values() for template in _templates(members)]


def _templates(members: list[str]) -> list[Template]:
    """One template for members of one skeleton, or several when the numbers do not form a full grid."""
    if len(members) == 1:
        return [Template(members[0], (members[0],))]
    # Where the skeleton has no digit left, every run of digits is an index.
    rows = list(map((_DIGITS if _RUNS.search(skeleton(members[0])) else _RUNS).findall, members))
    columns = [sorted(set(column), key=int) for column in zip(*rows, strict=True)]
    count = 1
    for column in columns:
        count *= len(column)
    if count != len(members):
        # Not a grid (layer 0 has 3 blocks, layer 1 has 4): say each value of the first varying number apart.
        at = next(i for i, column in enumerate(columns) if len(column) > 1)
        split: dict[str, list[str]] = {}
        for name, row in zip(members, rows, strict=True):
            split.setdefault(row[at], []).append(name)
        return [template for part in split.values() for template in _templates(part)]
    numbers = iter(_span(column) for column in columns)
    return [Template(_DIGITS.sub(lambda _: next(numbers), members[0]), tuple(members))]


def _span(values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    numbers = [int(value) for value in values]
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{{{values[0]}-{values[-1]}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs) + "}"
