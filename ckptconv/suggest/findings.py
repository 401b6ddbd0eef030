"""What was found on the way to a conversion, as sentences: wrappers, joined and transposed tensors, lists that are stacked, buffers, ties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ckptconv.names import collapse
from ckptconv.suggest.changes import Made, Outcome, is_buffer
from ckptconv.suggest.verdict import Cause


def findings(outcome: Outcome) -> list[Cause]:
    """One finding for each kind of difference that there is."""
    made = outcome.made
    found = [Cause(kind, sentence, _templates(name for each in hits for name in each.target.names))
             for kind, sentence, holds in _KINDS if (hits := [each for each in made if holds(each)])]  # fmt: skip
    prefix = wrapper(made)
    if prefix:
        found.insert(0, Cause("wrapper", f"the names of the source start with {prefix}, those of the target do not", (f"{prefix}**",)))
    dropped, random = ([unit for unit in units if is_buffer(unit)] for units in (outcome.unused, outcome.missing))
    if dropped:
        found.append(Cause("buffers", "the source has buffers that the target makes itself", _templates(unit.name for unit in dropped)))
    if random:
        found.append(
            Cause(
                "buffers", "the target has buffers that the source lacks, and makes them itself", _templates(unit.name for unit in random)
            )
        )
    rest = [unit for unit in outcome.unused if not is_buffer(unit)]
    if rest:
        found.append(Cause("unexpected", "the source has parts that the target does not know", _templates(unit.name for unit in rest)))
    return found


def wrapper(made: Sequence[Made]) -> str:
    """The prefix that all names of the source carry and none of the target, if the names are the same without it."""
    if not made:
        return ""
    first = made[0].source.name.split(".")
    for cut in range(1, len(first)):
        prefix = ".".join(first[:cut]) + "."
        if all(name.startswith(prefix) for each in made for name in each.source.names):
            same = sum(tuple(name.removeprefix(prefix) for name in each.source.names) == each.target.names for each in made)
            if 3 * same >= len(made):
                return prefix
    return ""


def _is_reshaped(made: Made) -> bool:
    one, other = made.source, made.target
    return not (one.joined or other.joined or made.change) and one.turned == other.turned and one.shape != other.shape


_KINDS: Sequence[tuple[str, str, Callable[[Made], bool]]] = (
    ("ranks", "the source is in parts of several ranks", lambda made: "::" in made.source.name),
    ("stacked", "members of a list are one stacked tensor in the target", lambda made: bool(made.source.count)),
    ("unstacked", "one stacked tensor is a list of members in the target", lambda made: bool(made.target.count)),
    ("fused", "several tensors are joined in the target", lambda made: bool(made.source.sizes) and "::" not in made.source.name),
    ("split", "a joined tensor is several tensors in the target", lambda made: bool(made.target.sizes)),
    ("transposed", "matrices are stored the other way round", lambda made: made.source.turned != made.target.turned),
    ("reshaped", "the same elements have axes of size 1 more or less", _is_reshaped),
    ("dtype", "numbers are stored in another dtype", lambda made: made.source.dtype != made.target.dtype),
    ("tied", "the source lacks a tensor that is most likely tied to another", lambda made: made.change == "tie"),
)


def _templates(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(template.text for template in collapse(list(names))[:12])
