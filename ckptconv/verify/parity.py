"""Rungs L5 and L6: both models are run on the same inputs. Are their outputs equal, and if not, which module is the first to differ?

Names, shapes and even values can all be right while the model computes something else: q and k of one shape may be exchanged, and an eps
is in no checkpoint. Only running the model shows it. That is the user's code with real weights, so it runs in a child process with a
time limit, see :mod:`ckptconv.verify.parity_child`; nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from msgspec import Struct, field
from msgspec.structs import asdict

from ckptconv.errors import CkptconvError, FitError, InputError, Problem, UsageError, printable
from ckptconv.plan import Plan, reads
from ckptconv.target import Target, parse
from ckptconv.target.building import _collected, _end, _environment, _Tail

Verdict = Literal["equal", "mapping wrong", "hyper-parameters differ", "differs"]
#: Largest difference that is taken for rounding, relative to the largest magnitude of the reference; by the dtype of the weights.
TOLERANCES: Mapping[str, float] = {"float64": 1e-9, "float32": 1e-4, "float16": 3e-2, "bfloat16": 3e-2}


class Side(Struct, frozen=True):
    """One of the two models: how it is built, and the checkpoint that it loads strictly."""

    word: Union[str, Target]  #: ``py:module:factory``, ``timm:NAME`` or ``hf:FOLDER``
    weights: Path
    container: str = ""  #: which state_dict of the file; may be empty where there is only one
    allow_missing: Sequence[str] = ()
    allow_unexpected: Sequence[str] = ()

    @property
    def target(self) -> Target:
        """The parsed word. Raises :class:`~ckptconv.errors.UsageError` for what is no model."""
        found = self.word if isinstance(self.word, Target) else parse(self.word, origin="command line")
        if not found.is_model:
            raise UsageError(
                Problem("CK107", "only a model can be run", where=printable(found.text), try_="py:module:factory, timm:NAME or hf:FOLDER")
            )
        return found


class ParityRequest(Struct, frozen=True):
    """What is run, on what. Either ``source`` or ``golden`` says what the output should be.

    ``golden`` is a .pt file with ``{"inputs": …, "output": …}``, or a .safetensors file with tensors ``output`` and ``inputs.NAME`` (or
    ``inputs.0``, ``inputs.1``, …). ``inputs`` is a .pt file with a tensor, a list or a dict, or a .safetensors file with named tensors.
    Inputs are given by name where the model's ``forward`` has these names, else in order; a ``py:`` module that has ``run(model, inputs)``
    calls its model itself, and gets the list or the dict. Without inputs, timm and hf models are given seeded ones.

    ``mapping`` says from which source parameters each target parameter was made (see :func:`correspondence`); without it, modules are paired
    by their order and shapes.
    """

    target: Side
    source: Side | None = None
    golden: Path | None = None
    inputs: Path | None = None
    mapping: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tolerance: float | None = None  #: None: by the dtype, see TOLERANCES
    dtype: str = ""  #: compute in ``float64`` (and with its tolerance) to see what float32 hides; empty: as the weights are
    seed: int = 0
    sensitivity: int = 64  #: how many target parameters are disturbed, to see which the output depends on; 0: none


class Divergence(Struct, frozen=True):
    """L6: the first pair of modules whose outputs differ."""

    source: str  #: the module's name; empty for the whole model
    target: str
    max_abs: float
    max_rel: float
    inputs_agree: bool  #: False: what differs lies before this pair, in code that belongs to no paired module
    detail: str = ""

    def __str__(self) -> str:
        names = f"{printable(self.source) or '(the model)'} / {printable(self.target) or '(the model)'}"
        inputs = "on equal inputs" if self.inputs_agree else "and its inputs differ already"
        how = f"by {self.max_rel:.2g} of its range" if math.isfinite(self.max_rel) else "in shape, or in what is finite"
        return f"{names} is the first to differ: {how}, {inputs}{'; ' + self.detail if self.detail else ''}"


class ParityReport(Struct, frozen=True):
    """What running both models shows, and what it cannot show.

    ``verdict`` is ``differs`` where only an expected output was there, with which nobody can tell why.
    """

    equal: bool
    verdict: Verdict
    max_abs: float
    max_rel: float  #: ``max_abs`` over the largest magnitude of the reference
    tolerance: float
    dtype: str
    where: str  #: which output was compared
    degenerate: tuple[str, ...] = ()  #: target tensors with one value everywhere: exchanged with another of the kind, nothing would show
    unseen: tuple[str, ...] = ()  #: disturbed target parameters on which the output does not depend
    probed: int = 0  #: how many were disturbed
    differences: tuple[str, ...] = ()
    diverges: Divergence | None = None
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The result in one line; the caveats are in ``warnings``."""
        size = f"largest difference {self.max_abs:.3g}, {self.max_rel:.2g} of the output's range; {self.dtype}, {printable(self.where)}"
        if self.equal:
            return f"outputs are equal within {self.tolerance:g} ({size})"
        why = {"differs": "", "mapping wrong": "; the mapping is wrong"}.get(self.verdict, f"; {self.verdict}")
        return f"outputs differ by more than {self.tolerance:g} ({size}){why}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an equal output does not vouch for."""
        found = [
            (self.degenerate, "degenerate: one value everywhere"),
            (self.unseen, f"unseen: no effect on the output ({self.probed} tried)"),
        ]
        return tuple(f"{what}: {_few(names)}" for names, what in found if names)

    def to_json(self) -> dict[str, Any]:
        """The fields, with null for a difference in what is not finite: JSON has no infinity."""
        diverges = None if self.diverges is None else _finite(asdict(self.diverges))
        return {**_finite(asdict(self)), "diverges": diverges, "sentence": self.sentence}


def correspondence(plan: Plan) -> dict[str, tuple[str, ...]]:
    """From which source tensors each output of ``plan`` is made: the ``mapping`` of a request."""
    return {output.name: reads(output.expr) for output in plan.outputs}


def parity(request: ParityRequest, timeout: float = 300.0) -> ParityReport:
    """Runs both models (or the target against its golden output) in a child process and compares.

    Raises :class:`~ckptconv.errors.FitError` where a model cannot be built (CK406), loaded (CK408) or run (CK411), which includes taking
    longer than ``timeout`` seconds; a difference is no error but the report's verdict.
    """
    if (request.source is None) == (request.golden is None):
        raise UsageError(Problem("CK107", "give either a source model or a golden output to compare with"))
    return _report(_ask(_data(request, timeout), timeout))


def _data(request: ParityRequest, timeout: float) -> dict[str, Any]:
    """The request as the child gets it."""
    return {
        "target": _side(request.target), "source": _side(request.source), "golden": _path(request.golden), "inputs": _path(request.inputs),
        "mapping": {name: list(sources) for name, sources in request.mapping.items()}, "tolerance": request.tolerance,
        "tolerances": dict(TOLERANCES), "dtype": request.dtype, "seed": request.seed, "sensitivity": request.sensitivity,
        "working_folder": os.getcwd(), "seconds": timeout,
    }  # fmt: skip


def _report(answer: Mapping[str, Any]) -> ParityReport:
    """The child's answer as a report."""
    diverges = None if answer["diverges"] is None else Divergence(**answer["diverges"])
    lists = {name: tuple(value) for name, value in answer.items() if isinstance(value, list)}
    return ParityReport(**{**answer, **lists, "diverges": diverges})


def _side(side: Side | None) -> dict[str, Any] | None:
    if side is None:
        return None
    target = side.target
    return {
        "kind": target.kind, "name": target.name, "text": target.text, "path": str(target.path.absolute()) if target.kind == "hf" else "",
        "arguments": list(target.arguments), "weights": str(side.weights.absolute()), "container": side.container,
        "allow_missing": list(side.allow_missing), "allow_unexpected": list(side.allow_unexpected),
    }  # fmt: skip


def _path(path: Path | None) -> str:
    return "" if path is None else str(path.absolute())


#: The child's first lines, as in ckptconv.target.building: the working folder goes off the path before anything is imported from it.
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append(sys.argv.pop(1)); "
    "from ckptconv.verify.parity_child import main; main()"
)


def _ask(request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """One request to a child process, and its answer. What the child is doing stands in a third file, for when it never answers."""
    answer_read, answer_write = os.pipe()
    start = [sys.executable, "-c", _START, str(Path(__file__).parent.parent.parent)]
    with tempfile.TemporaryFile() as request_file, tempfile.TemporaryFile() as stage_file:
        request_file.write(json.dumps(request).encode())
        request_file.seek(0)
        given = (request_file.fileno(), answer_write, stage_file.fileno())
        try:
            child = subprocess.Popen(
                [*start, *map(str, given)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=given, start_new_session=True, env=_environment(),
            )  # fmt: skip
        finally:
            os.close(answer_write)
        said = _Tail(child)
        try:
            raw = _collected(answer_read, child, timeout)
        finally:
            os.close(answer_read)
            _end(child)
            said.close()
        doing, where = _stage(stage_file.fileno())
        tail = said.text()
    if raw is None:
        what = f"comparing the outputs took longer than {timeout:g} s, and was stopped while {doing}"
        raise FitError(Problem("CK411", what, where=printable(where), try_="--timeout SECONDS"))
    try:
        answer: dict[str, Any] = json.loads(raw)
    except ValueError:
        found = printable(tail.strip().splitlines()[-1]) if tail.strip() else ""
        code = child.returncode
        ended = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        hint = "memory may have run out" if code == -signal.SIGKILL else ""
        what = f"the process ended {ended} while {doing}, without an answer"
        raise FitError(Problem("CK411", what, where=printable(where), found=found, try_=hint)) from None
    if "failed" in answer:
        raise _error(answer)
    return answer


def _stage(descriptor: int) -> tuple[str, str]:
    """What the child wrote that it is doing, and with which word; user code may have written there too."""
    try:
        doing, where = json.loads(os.pread(descriptor, 1 << 16, 0))
        return printable(doing), str(where)
    except ValueError:
        return "starting", ""


def _error(answer: Mapping[str, Any]) -> CkptconvError:
    problem = Problem(answer["code"], printable(answer["failed"], 600), where=printable(answer["where"]), found=printable(answer["found"]),
                      try_=printable(answer["try"], 300))  # fmt: skip
    kinds: Mapping[str, type[CkptconvError]] = {"CK1": UsageError, "CK3": InputError}
    return kinds.get(problem.code[:3], FitError)(problem)


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()}


def _few(names: Sequence[str], most: int = 5) -> str:
    from ckptconv.names import collapse

    templates = collapse(names)
    shown = ", ".join(printable(template) for template in templates[:most])
    return shown + (f" and {len(templates) - most} more" if len(templates) > most else "")
