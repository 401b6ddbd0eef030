"""The verdict: from causes, tried rules and a suggestion to one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ckptconv.compare import explain_missing_initial
from ckptconv.explain.sides import Cause, Sides
from ckptconv.explain.trying import PLAIN, Tried
from ckptconv.names import collapse
from ckptconv.plan import Apply, Fill, walk
from ckptconv.transforms import Pad, Resize

LOADS, CONVERTIBLE, LOSS, NOT = "loads as it is", "convertible", "convertible with loss", "not convertible"
#: What is said where there are no two sides to compare: a file that cannot be read, no target, a message that names no keys.
UNREADABLE, UNKNOWN, MESSAGE = "cannot be read", "no target", "a known message"
#: Causes that are worth knowing and keep nothing from loading.
NOTES = frozenset({"metadata", "averaged", "networks", "tied"})
#: Causes for which the file has to be rewritten, or opened in another way, though all names fit.
PACKED = frozenset({"container", "layout", "module", "weights-only"})
#: Of a rule's result less than this of the model, the rule is for something else.
ENOUGH = 0.5


class Verdict(Struct, frozen=True):
    """What can be done."""

    word: str
    sentence: str
    rule: Tried | None = None  #: the built-in rule that does it
    suggested: bool = False  #: a rule file has to be written: `ckptconv suggest`


def judge(
    raw: Sides, packed: Sequence[Cause], best: Tried | None, causes: Sequence[Cause], suggestion: tuple[str, str] | None = None,
    waiting: Tried | None = None,
) -> Verdict:  # fmt: skip
    """The verdict on one state_dict and a target.

    ``packed`` are the file's causes, ``causes`` those of what is left after the ``best`` rule, ``suggestion`` the verdict and the reason of
    :func:`ckptconv.suggest.suggest`, where it was asked, ``waiting`` a rule that only wants a value of a variable. A suggestion proves what it calls convertible, and outweighs what only looks otherwise.
    """
    if raw.comparison.fits and not any(cause.kind in PACKED for cause in packed):
        if raw.comparison.tied:
            return Verdict(
                LOADS,
                "with strict=False, which is right here: what is missing are aliases of tensors that are there, and the model ties them",
            )
        return Verdict(LOADS, "every key of the model is there, with its shape")
    if best is not None and best.fits and best.both is not None:
        stays = explain_missing_initial(best.both.comparison, best.both.wanted) or _made_up(best)
        if stays:
            return Verdict(LOSS, f"{_by(best)}; {stays}", best)
        return Verdict(CONVERTIBLE, _by(best) if best.names == (PLAIN,) else f"{_by(best)}: every key of the model is filled", best)
    alone = next((cause for cause in packed if cause.fatal), None)
    if alone is not None:
        return Verdict(NOT, f"because {alone.sentence}")
    if waiting is not None:  # it knows what shapes do not show: an order of heads, say
        what = f"by the built-in rule {waiting.names[-1]}, as it seems, once it is told more: {waiting.reason}"
        return Verdict(CONVERTIBLE, what, waiting)
    if suggestion is not None and suggestion[0] in (CONVERTIBLE, LOADS):
        return Verdict(CONVERTIBLE, "by a rule that `ckptconv suggest` writes; it was planned on this file, and fits", suggested=True)
    fatal = next((cause for cause in causes if cause.fatal), None)
    if fatal is not None:
        return Verdict(NOT, f"because {fatal.sentence}")
    if suggestion is not None and suggestion[0] == LOSS:
        return Verdict(LOSS, f"by a rule that `ckptconv suggest` writes: {suggestion[1]}", suggested=True)
    left = [cause for cause in causes if cause.kind not in NOTES]
    coverage = max(raw.comparison.coverage, best.coverage if best is not None else 0.0)
    if coverage >= ENOUGH and all(cause.soft for cause in left):
        kinds = ", ".join(dict.fromkeys(cause.kind for cause in left))
        return Verdict(
            LOSS,
            f"{coverage:.1%} of the model can be filled; what is left ({kinds}) stays random, or is resized by a rule of your own",
            best,
        )
    if suggestion is not None:
        return Verdict(NOT, f"because {suggestion[1]}")
    if _renames(left):
        return Verdict(CONVERTIBLE, "by a rule that `ckptconv suggest` writes, once the model itself is named (--target)", suggested=True)
    return Verdict(UNKNOWN, "the message alone does not tell: name the file and the model")


def _made_up(tried: Tried) -> str:
    """What of a rule's result is not, or not all, the file's; empty text where everything is."""
    if tried.names[-1] == "new-classes":
        return "classes that are new begin at zero and have to be trained, and those that are too many are cut off"
    names = [
        output.name for output in (tried.plan.outputs if tried.plan is not None else ())
        if isinstance(output.expr, Fill) or any(isinstance(node, Apply) and isinstance(node.transform, (Pad, Resize)) for node in walk([output.expr]))
    ]  # fmt: skip
    return f"not all of {', '.join(map(str, collapse(names)[:3]))} is the file's: it is resampled, padded or filled" if names else ""


def _renames(causes: Sequence[Cause]) -> bool:
    return any(cause.kind in ("renamed", "wrapper", "prefix", "attention", "experts", "weight-norm", "flattened") for cause in causes)


def _by(tried: Tried) -> str:
    if tried.names == (PLAIN,):
        return "every key of the model is there, once it is taken out of the file (by the built-in rule plain-tensors)"
    names = " and then ".join(tried.names)
    return f"by the built-in rule {names}" if len(tried.names) == 1 else f"by the built-in rules {names}"
