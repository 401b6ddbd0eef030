"""The `expect` of a test written anew, in the text of its file: entries change, and every comment and all other text stays.

The text is edited, not printed from data. What cannot be edited without losing a word of the author's is refused, and the result is read
back before it is handed out: it must say what was meant, and nothing else may have changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from ckptconv.errors import Problem, Refusal, UsageError, printable
from ckptconv.ruleset import yamlfile
from ckptconv.spec import DType, TensorSpec

Specs = Mapping[str, TensorSpec]

_WIDTH = 140
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})  # what some YAML readers take for something else


def rewritten(path: Path, expectations: Mapping[int, Specs]) -> str:
    """The text of a file with tests, where the test number ``n`` of each of ``expectations`` expects what stands there.

    Raises :class:`~ckptconv.errors.UsageError` for a test that has to be changed by hand.
    """
    name = printable(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(Problem("CK105", f"the file cannot be read: {error.strerror}", where=name)) from None
    document = yamlfile.load(raw, name)
    mark = "\ufeff" if raw.startswith(b"\xef\xbb\xbf") else ""
    text = raw.decode("utf-8-sig")
    root = yaml.compose(text, Loader=yaml.SafeLoader)  # the marks of this one are offsets into the text
    edits: list[Edit] = []
    for at, specs in expectations.items():
        try:
            edits += _Editor(text, _below(_below(root, "tests"), at)).edits(specs)
        except Refusal as refusal:
            raise UsageError(refusal.at(document.where(("tests", at)))) from None
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end), reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    _check(text, name, document.data, expectations)
    return mark + text


class Edit(Struct, frozen=True):
    """``text`` in place of what stands from ``start`` to ``end``."""

    start: int
    end: int
    text: str


def _check(text: str, name: str, before: Any, expectations: Mapping[int, Specs]) -> None:
    """The edited text must be the old data with the new expectations, or it is not written."""
    after = yamlfile.load(text.encode(), name).data
    for at, specs in expectations.items():
        found = after["tests"][at].pop("expect", None)
        before["tests"][at].pop("expect", None)
        plain = {key: value if isinstance(value, dict) else {"shape": value} for key, value in (found or {}).items()}
        wanted = {key: {"shape": list(spec.shape), "dtype": spec.dtype.value} for key, spec in specs.items()}
        if {key: {"dtype": "float32", **value} for key, value in plain.items()} != wanted:
            raise UsageError(Problem("CK108", "the expectation cannot be rewritten in this text: change it by hand", where=name))
    if after != before:
        raise UsageError(Problem("CK108", "the expectation cannot be rewritten without touching other text: change it by hand", where=name))


class _Editor:
    """The edits of one test."""

    def __init__(self, text: str, test: yaml.MappingNode) -> None:
        self.text, self.test = text, test
        self.newline = "\r\n" if "\r\n" in text else "\n"

    def edits(self, specs: Specs) -> list[Edit]:
        expect = _below(self.test, "expect")
        if isinstance(expect, yaml.MappingNode) and expect.value:
            return self._in_flow(expect, specs) if expect.flow_style else self._in_block(expect, specs)
        return self._whole(expect, specs)

    def _whole(self, expect: yaml.Node | None, specs: Specs) -> list[Edit]:
        """In place of `same`, of `{}`, of nothing, or where no expect is yet."""
        flow = "{" + ", ".join(f"{_key(name)}: {_spec(spec)}" for name, spec in specs.items()) + "}"
        if self.test.flow_style:
            if expect is None:
                end = self._end(_below(self.test, "given"))
                return [Edit(end, end, f", expect: {flow}")]
            return [self._value(expect, flow)]
        indent = " " * self.test.value[0][0].start_mark.column
        lines = "".join(f"{indent}  {_key(name)}: {_spec(spec)}{self.newline}" for name, spec in specs.items())
        is_short = len(indent) + len("expect: ") + len(flow) <= _WIDTH
        if expect is not None:
            if is_short:
                return [self._value(expect, flow)]
            return [Edit(expect.start_mark.index, self._end(expect), ""), self._line_after(self._end(expect), lines)]
        after = self._end(_below(self.test, "given"))
        whole = f"{indent}expect: {flow}{self.newline}" if is_short else f"{indent}expect:{self.newline}{lines}"
        return [self._line_after(after, whole)]

    def _value(self, node: yaml.Node, text: str) -> Edit:
        """``text`` in place of a value; an empty one stands right behind its colon."""
        start, end = node.start_mark.index, self._end(node)
        return Edit(start, end, f" {text}" if start == end else text)

    def _in_block(self, expect: yaml.MappingNode, specs: Specs) -> list[Edit]:
        edits, kept = [], set()
        for key, value in expect.value:
            if key.value in specs:
                kept.add(key.value)
                edits += self._changed(value, specs[key.value])
            else:
                edits.append(self._without_line(key, value))
        indent = " " * expect.value[0][0].start_mark.column
        lines = "".join(f"{indent}{_key(name)}: {_spec(spec)}{self.newline}" for name, spec in specs.items() if name not in kept)
        return [*edits, self._line_after(self._end(expect), lines)] if lines else edits

    def _in_flow(self, expect: yaml.MappingNode, specs: Specs) -> list[Edit]:
        """Entries go with the comma behind them; new ones follow the last that stays."""
        edits: list[Edit] = []
        known = {key.value for key, _ in expect.value}
        new = ", ".join(f"{_key(name)}: {_spec(spec)}" for name, spec in specs.items() if name not in known)
        following = [*(key.start_mark.index for key, _ in expect.value[1:]), expect.end_mark.index - 1]
        last: tuple[int, int | None] | None = None  # of the last that stays: its end, and the comma behind it
        for (key, value), after in zip(expect.value, following, strict=True):
            end = self._end(value)
            comma = self._comma(end, after)
            if key.value in specs:
                edits += self._changed(value, specs[key.value])
                last = end, comma
                continue
            self._refuse_comment(key.end_mark.index, end)
            edits.append(Edit(key.start_mark.index, end, ""))
            if comma is not None:
                edits.append(self._with_space(comma))
        if last is None:
            return [*edits, Edit(expect.start_mark.index + 1, expect.start_mark.index + 1, new)]
        end, comma = last
        if new:
            edits.append(Edit(end, end, f", {new}"))
        if comma is not None and expect.value[-1][0].value not in specs:  # what it stood before is gone
            edits.append(self._with_space(comma))
        return edits

    def _with_space(self, comma: int) -> Edit:
        """A comma goes with the spaces that follow it; before a comment one has to stay."""
        end = comma + 1
        while self.text[end : end + 1] == " ":
            end += 1
        return Edit(comma, end, " " if self.text[end : end + 1] == "#" else "")

    def _changed(self, value: yaml.Node, spec: TensorSpec) -> list[Edit]:
        """A spec in place of another; a `{shape, dtype}` keeps its form."""
        if isinstance(value, yaml.MappingNode):
            shape, dtype = _below(value, "shape"), _below(value, "dtype")
            edits = self._replaced(shape, _shape(spec)) if _numbers(shape) != list(spec.shape) else []
            if dtype is not None:
                return edits + (self._replaced(dtype, spec.dtype.value) if dtype.value != spec.dtype.value else [])
            if spec.dtype is DType.float32:
                return edits
            end = self._end(shape)
            if value.flow_style:
                return [*edits, Edit(end, end, f", dtype: {spec.dtype.value}")]
            indent = " " * value.value[0][0].start_mark.column
            return [*edits, self._line_after(end, f"{indent}dtype: {spec.dtype.value}{self.newline}")]
        if _numbers(value) == list(spec.shape) and spec.dtype is DType.float32:
            return []
        return self._replaced(value, _spec(spec))

    def _replaced(self, node: yaml.Node, text: str) -> list[Edit]:
        start, end = node.start_mark.index, self._end(node)
        self._refuse_comment(start, end)
        return [Edit(start, end, text)]

    def _without_line(self, key: yaml.Node, value: yaml.Node) -> Edit:
        """An entry of a block goes with its line; a comment at its end stays, on a line of its own."""
        start = self.text.rfind("\n", 0, key.start_mark.index) + 1
        end = self._end(value)
        self._refuse_comment(key.end_mark.index, end)
        line_end = self._line_end(end)
        rest = self.text[end:line_end].strip()
        if self.text[start : key.start_mark.index].strip() or (rest and not rest.startswith("#")):
            raise _by_hand("an entry shares its line with another")
        if rest:
            return Edit(key.start_mark.index, end + len(self.text[end:line_end]) - len(self.text[end:line_end].lstrip()), "")
        return Edit(start, line_end, "")

    def _line_after(self, at: int, lines: str) -> Edit:
        """``lines`` below the line in which ``at`` stands."""
        place = self._line_end(at)
        if place == len(self.text) and not self.text.endswith("\n"):
            return Edit(place, place, self.newline + lines.removesuffix(self.newline))
        return Edit(place, place, lines)

    def _line_end(self, at: int) -> int:
        """Where the next line begins."""
        found = self.text.find("\n", at)
        return len(self.text) if found < 0 else found + 1

    def _end(self, node: yaml.Node | None) -> int:
        """Where a value ends. A block's own mark lies behind the comments and empty lines that follow it."""
        assert node is not None, "the model asks for it"
        if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
            last = node.value[-1]
            return self._end(last[1] if isinstance(node, yaml.MappingNode) else last)
        return int(node.end_mark.index)

    def _comma(self, start: int, end: int) -> int | None:
        """The comma between two entries, outside of comments."""
        at = start
        while at < end:
            if self.text[at] == ",":
                return at
            at = self._line_end(at) if self.text[at] == "#" else at + 1
        return None

    def _refuse_comment(self, start: int, end: int) -> None:
        if "#" in self.text[start:end]:
            raise _by_hand("a comment stands inside an entry that changes")


def _by_hand(why: str) -> Refusal:
    return Refusal(f"{why}: change this expectation by hand", code="CK108")


def _below(node: yaml.Node | None, step: str | int) -> Any:
    """The value of a key, or the item at an index; None where there is none."""
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == step), None)
    return node.value[step] if isinstance(node, yaml.SequenceNode) and isinstance(step, int) else None


def _numbers(node: yaml.Node) -> list[int]:
    return [int(item.value) for item in node.value]


def _key(name: str) -> str:
    return name if _PLAIN.fullmatch(name) and name.lower() not in _WORDS else json.dumps(name, ensure_ascii=not name.isprintable())


def _shape(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"


def _spec(spec: TensorSpec) -> str:
    return _shape(spec) if spec.dtype is DType.float32 else f"{{shape: {_shape(spec)}, dtype: {spec.dtype.value}}}"
