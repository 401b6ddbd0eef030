"""The words of ``--parity``: what the converted model is compared with, checked before the first byte is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from ckptconv import target
from ckptconv.compare import Comparison
from ckptconv.errors import Problem, UsageError, printable
from ckptconv.names import nearest
from ckptconv.places.presence import bring
from ckptconv.plan import Plan
from ckptconv.stage.opening import Source
from ckptconv.verify.parity import ParityRequest, Side, correspondence

_WORDS = ("source", "golden", "inputs", "tolerance")
_EXPECTED = "source=py:module:factory or golden=FILE"


class Parity(Struct, frozen=True):
    """What the words say. Either ``source`` or ``golden`` is there."""

    wanted: target.Target  #: the model that the output is for
    source: target.Target | None = None  #: the model that the source's weights belong to
    golden: Path | None = None
    inputs: Path | None = None
    tolerance: float | None = None

    def request(
        self, weights: Path, container: str, plan: Plan | None = None, source: Source | None = None, comparison: Comparison | None = None
    ) -> ParityRequest:
        """With the checkpoints that the models load: ``weights`` is what was written, staged or published.

        What the rule lets the target miss, the loader is told; and what a step drops need not belong to the source's model.
        """
        for file in (*(source.files if source is not None else ()), *(weights.glob("*") if weights.is_dir() else (weights,))):
            bring(file)  # another process reads them
        theirs = None
        if self.source is not None:
            if plan is None or source is None:
                raise UsageError(
                    Problem("CK107", "a source model needs its weights, and how they were converted", where=printable(self.source.text),
                            try_="--against SRC --rules RULES, or --parity golden=FILE")
                )  # fmt: skip
            dropped = [name for drop in plan.dropped for name in drop.sources]
            theirs = Side(self.source, source.path, source.container.path, allow_unexpected=dropped)
        allowed = (comparison.allowed_missing, comparison.allowed_unexpected) if comparison is not None else ((), ())
        return ParityRequest(
            Side(self.wanted, weights, container, *allowed), theirs, self.golden, self.inputs,
            mapping=correspondence(plan) if plan is not None else {}, tolerance=self.tolerance,
        )  # fmt: skip


def parity_words(items: Iterable[str] | Mapping[str, Any], wanted: target.Target | None, level: int | None) -> Parity | None:
    """``--parity source=py:module:factory --parity tolerance=1e-4``; None where there are none.

    They come from the command line or from Python, never from a rule file: a source may therefore be code. Raises
    :class:`~ckptconv.errors.UsageError` CK107 for everything that would otherwise show only after the whole output was written.
    """
    found = _pairs(items)
    if not found:
        return None
    if level is None or level < 5:
        raise UsageError(
            Problem("CK107", "the models are run on rung 5, and --parity was given to stop before it", try_="--verify 5 (or 6)")
        )
    if ("source" in found) == ("golden" in found):
        what = "--parity compares with either a source model or a golden output" + (", not with both" if "source" in found else "")
        raise UsageError(Problem("CK107", what, try_=f"--parity {_EXPECTED}"))
    if wanted is None or not wanted.is_model:
        raise UsageError(
            Problem("CK107", "--parity needs a target that is a model: only a model can be run", where=printable(wanted.text) if wanted else "",
                    try_="--target py:module:factory, timm:NAME or hf:FOLDER")
        )  # fmt: skip
    source = target.parse(str(found["source"]), origin="command line") if "source" in found else None
    if source is not None:
        source = Side(source, Path()).target  # refuses what is no model
    golden, inputs = (_file(found, word) for word in ("golden", "inputs"))
    if source is not None and source.kind == wanted.kind == "py" and inputs is None:
        raise UsageError(
            Problem("CK107", "there are no inputs to run the models on, and none can be made up for py: models",
                    try_="--parity inputs=FILE, a .pt or .safetensors file with the arguments of forward()")
        )  # fmt: skip
    return Parity(wanted, source, golden, inputs, _tolerance(found))


def _pairs(items: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    pairs: Sequence[tuple[str, Any]] = list(items.items()) if isinstance(items, Mapping) else [_pair(item) for item in items]
    found: dict[str, Any] = {}
    for word, value in pairs:
        if word not in _WORDS or word in found or value is None or not str(value):
            close = nearest(word, _WORDS)
            raise UsageError(
                Problem("CK107", f"--parity {printable(word)}={printable('' if value is None else value)}: want NAME=VALUE, each name once",
                        found="" if word in _WORDS else f"the names are {', '.join(_WORDS)}",
                        try_=f"--parity {_EXPECTED}" if close in (None, "source", "golden") else f"--parity {close}=…")
            )  # fmt: skip
        found[word] = value
    return found


def _pair(item: str) -> tuple[str, str]:
    word, _, value = item.partition("=")
    return word, value


def _file(found: Mapping[str, Any], word: str) -> Path | None:
    if word not in found:
        return None
    path = Path(str(found[word]))
    if not path.is_file():
        raise UsageError(Problem("CK107", f"--parity {word}=…: there is no such file", where=printable(path),
                                 try_=f"--parity {word}=FILE, a .pt or .safetensors file"))  # fmt: skip
    return path


def _tolerance(found: Mapping[str, Any]) -> float | None:
    if "tolerance" not in found:
        return None
    try:
        tolerance = float(found["tolerance"])
    except (TypeError, ValueError):
        tolerance = math.nan
    if not 0 <= tolerance < math.inf:
        shown = printable(found["tolerance"])
        raise UsageError(Problem("CK107", f"--parity tolerance={shown}: want a number, 0 or more", try_="--parity tolerance=1e-4"))
    return tolerance
