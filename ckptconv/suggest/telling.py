"""What a person or the values tell beyond names and shapes: hints, and fingerprints that survive every reordering of a tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Union

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.suggest.changes import Outcome
from ckptconv.suggest.units import Module

#: Of a tensor's name, something that is equal for equal values in whatever order; None where it is not known.
Fingerprints = Union[Mapping[str, str], Callable[[str], Union[str, None]]]
_SURE = 8.0  #: more than all names and order can say
_LOOKED_AT = 4  #: modules of a part


class Told(Struct, frozen=True, dict=True):
    """Hints (fragments of names that belong together) and fingerprints of both sides."""

    hints: tuple[tuple[str, str], ...] = ()
    source: Fingerprints | None = None
    target: Fingerprints | None = None

    @property
    def silent(self) -> bool:
        return not self.hints and not self.knows_values

    @property
    def knows_values(self) -> bool:
        return self.source is not None and self.target is not None

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
        return [(_fragment(left), _fragment(right)) for left, right in self.hints]

    def of_names(self, one: str, other: str) -> float:
        """Above 0 where a hint says that the two belong together, below where it says that they do not.

        >>> told = Told((("reduce", "conv1"),))
        >>> told.of_names("layers.0.reduce", "b.0.conv1"), told.of_names("layers.0.reduce", "b.0.conv2"), told.of_names("a", "b")
        (8.0, -8.0, 0.0)
        """
        said = 0.0
        for left, right in self._patterns:
            ours, theirs = left.search(one) is not None, right.search(other) is not None
            said += _SURE if ours and theirs else -_SURE if ours != theirs else 0.0
        return said

    def of_values(self, ours: Sequence[Module], theirs: Sequence[Module]) -> float:
        """Above 0 where the values of two parts are the same, below where none are, 0 where they are not known."""
        if not self.knows_values:
            return 0.0
        one = {each for module in ours[:_LOOKED_AT] for each in self._seen(self.source, module)}
        other = {each for module in theirs[:_LOOKED_AT] for each in self._seen(self.target, module)}
        if not one or not other:
            return 0.0
        return _SURE * (2 * len(one & other) / min(len(one), len(other)) - 1)

    def _seen(self, values: Fingerprints | None, module: Module) -> Iterable[str]:
        for unit in module.units:
            found = None if unit.joined else of(values, unit.name)
            if found is not None:
                yield found

    def settle(self, outcome: Outcome) -> None:
        """Raises what the values prove, and lowers what they contradict; the order of rows they cannot tell."""
        if not self.knows_values:
            return
        for at, made in enumerate(outcome.made):
            if made.source.joined or made.target.joined or made.change:
                continue
            one, other = of(self.source, made.source.name), of(self.target, made.target.name)
            if one is None or other is None:
                continue
            if one == other and made.level != "certain" and not made.why:
                outcome.made[at] = replace(made, level="certain", others=())
            elif one != other:
                outcome.made[at] = replace(made, level="ambiguous", why="its values are other than the target's")


def of(values: Fingerprints | None, name: str) -> str | None:
    """The fingerprint of a tensor, if it is known."""
    if values is None:
        return None
    return values.get(name) if isinstance(values, Mapping) else values(name)


def _fragment(text: str) -> re.Pattern[str]:
    """A part of a name on the borders of its segments; `{…}`, `*` and `#` stand for anything in one segment."""
    inner = "".join("[^.]+" if piece in ("*", "#") or piece.startswith("{") else re.escape(piece)
                    for piece in re.split(r"(\{[^}]*\}|\*|#)", text.strip(".")))  # fmt: skip
    return re.compile(rf"(?:^|\.){inner}(?:\.|$)")
