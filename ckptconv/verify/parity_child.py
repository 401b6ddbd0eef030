"""The process in which models are run: both are built for real (not on meta), loaded strictly, and given the same inputs.

Reads one request (JSON) from the first descriptor on its command line, writes one answer to the second, and keeps what it is doing in the
third. Checkpoints are read by ckptconv's own readers and golden files with ``weights_only=True``: no pickle is run here.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict

from ckptconv.errors import CkptconvError, Problem, Refusal, printable
from ckptconv.target.child import Unbuildable, _hf_factory, _py_factory, _said, _timm_factory

if TYPE_CHECKING:
    from torch import Tensor, nn

CODE = "CK411"
_LENGTH = 12  #: token ids of a made-up input
_FOR_SENSITIVITY = 0.6  #: of the time limit; what is disturbed after that is not tried


class Failed(Exception):  # noqa: N818  (an answer, not a fault)
    """Why there is nothing to compare."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.what)
        self.problem = problem


class Subject(Struct, frozen=True):
    """A model, ready to run."""

    role: str  #: ``source`` or ``target``
    word: str
    side: Mapping[str, Any]
    model: nn.Module
    run: Callable[[Any], Any]


class Stage:
    """What is being done, with which word: kept where the parent finds it when we never answer."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.doing, self.where = "starting", ""

    @contextmanager
    def __call__(self, doing: str, where: str, code: str = CODE, try_: str = "") -> Iterator[None]:
        """Whatever is raised inside gets its sentence: "running the source model failed: ValueError: …"."""
        self.doing, self.where = doing, where
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps([doing, where]).encode(), 0)
        try:
            yield
        except Failed:
            raise
        except Unbuildable as reason:
            raise Failed(Problem(reason.code, reason.what, where=where, try_=reason.try_)) from None
        except Refusal as refusal:
            raise Failed(refusal.at(where)) from None
        except CkptconvError as error:
            raise Failed(error.problems[0]) from None
        except Exception as error:
            raise Failed(Problem(code, f"{doing} failed: {_said(error)}", where=where, try_=try_)) from None


def main() -> None:
    """Answers one request."""
    request_fd, answer_fd, stage_fd = map(int, sys.argv[1:4])
    with os.fdopen(request_fd, "rb") as stream:
        request = json.load(stream)
    sides = [side for side in (request["source"], request["target"]) if side is not None]
    if any(side["kind"] == "py" for side in sides):
        sys.path.append(request["working_folder"])  # last: what lies there never shadows an installed library
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    stage = Stage(stage_fd)
    try:
        answer = answered(request, stage)
    except Failed as reason:
        answer = _failure(reason.problem)
    except BaseException as error:
        what = f"ended the process (exit code {error.code})" if isinstance(error, SystemExit) else f"failed: {_said(error)}"
        answer = _failure(Problem(CODE, f"{stage.doing} {what}", where=stage.where))
    with os.fdopen(answer_fd, "wb") as stream:
        stream.write(json.dumps(answer).encode())
    os._exit(0)  # threads or exit handlers of user code must not keep us


def _failure(problem: Problem) -> dict[str, str]:
    return {"failed": problem.what, "code": problem.code, "where": problem.where, "found": problem.found, "try": problem.try_}


def answered(request: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """The fields of the report."""
    import torch

    deadline = time.monotonic() + _FOR_SENSITIVITY * float(request["seconds"])
    notes: list[str] = []
    torch.manual_seed(request["seed"])
    target = _subject("target", request["target"], stage, notes)
    source = None if request["source"] is None else _subject("source", request["source"], stage, notes)
    subjects = [subject for subject in (source, target) if subject is not None]
    given, expected = _given(request, subjects, stage)
    dtypes = [dtype for subject in subjects for dtype in _dtypes(subject.model)]
    dtypes += [expected.dtype] if expected is not None else []
    dtype = request["dtype"] or str(_narrowest(dtypes)).removeprefix("torch.")
    tolerance = request["tolerance"] if request["tolerance"] is not None else request["tolerances"].get(dtype, 3e-2)
    compute = torch.float64 if dtype == "float64" else torch.float32
    for subject in subjects:
        _cast(subject.model, compute)
    inputs = _map(given, lambda value: value.to(compute) if value.is_floating_point() else value)

    def run(subject: Subject) -> Any:
        with stage(f"running the {subject.role} model", subject.word, try_="give the inputs that it wants, or a run(model, inputs)"):
            torch.manual_seed(request["seed"])
            with torch.no_grad():
                return subject.run(_map(inputs, lambda value: value.clone()))  # a model may write into its inputs

    reference = {"the golden output": expected} if expected is not None else None
    outputs = _floating(run(source)) if source is not None else reference
    assert outputs is not None
    where, left, right = _chosen(outputs, _floating(run(target)), target.word)
    max_abs, max_rel = _difference(left, right, notes)
    equal = max_rel <= tolerance
    traced = _traced(request, source, target, run, tolerance, equal, stage)
    state = _tensors_of(target.model)
    unseen, probed = _unseen(lambda: _like(run(target), where), state, request["sensitivity"], tolerance, deadline)
    return {
        "equal": equal, "verdict": "equal" if equal else traced["verdict"], "max_abs": max_abs, "max_rel": max_rel, "tolerance": tolerance,
        "dtype": dtype, "where": where, "degenerate": [name for name, value in state.items() if _constant(value)], "unseen": unseen,
        "probed": probed, "differences": traced["differences"], "diverges": traced["diverges"], "notes": notes,
    }  # fmt: skip


def _traced(
    request: Mapping[str, Any], source: Subject | None, target: Subject, run: Callable[[Subject], Any], tolerance: float, equal: bool,
    stage: Stage,
) -> dict[str, Any]:  # fmt: skip
    """L6, and the hyper-parameters that differ; models with equal outputs are compared by their attributes only."""
    from ckptconv.verify.parity_trace import Models, recorded, sample_size

    if source is None:
        return {"verdict": "differs", "differences": [], "diverges": None}
    models = Models(source.model, target.model, request["mapping"])
    if equal:
        return {"verdict": "equal", "differences": models.differences(), "diverges": None}
    size = sample_size(source.model, target.model)
    calls = [recorded(subject.model, lambda subject=subject: run(subject), size) for subject in (source, target)]  # type: ignore[misc]
    with stage("looking for the first module that differs", target.word):
        verdict, differences, diverges = models.verdict(calls[0], calls[1], tolerance)
    return {"verdict": verdict, "differences": differences, "diverges": None if diverges is None else asdict(diverges)}


# Models


def _subject(role: str, side: Mapping[str, Any], stage: Stage, notes: list[str]) -> Subject:
    """The model, built on the CPU: buffers that no checkpoint holds (rotary tables, say) must have their values."""
    import torch

    from ckptconv.target.loading import load_into, tie
    from ckptconv.target.torchvision_ops import with_torchvision

    with stage(f"building the {role} model", side["text"], "CK406"):
        model = with_torchvision({"py": _py_factory, "timm": _timm_factory, "hf": _hf_factory}[side["kind"]](side))
        if not isinstance(model, torch.nn.Module):
            raise Unbuildable(f"the factory gives a {type(model).__name__}, not an nn.Module")
        tie(model)
    with stage(f"reading the {role}'s weights", side["weights"], "CK310"):
        state = _weights(Path(side["weights"]), side["container"])
    with stage(f"loading the {role} model", side["text"], "CK408"):
        result = load_into(model, state, allow_missing=side["allow_missing"], allow_unexpected=side["allow_unexpected"], assign=True)
        if not result.loaded:
            raise Failed(
                Problem("CK408", f"{side['weights']} does not load strictly into the {role} model: {result.error}", where=side["text"])
            )
    notes += [f"{role}: {note}" for note in result.notes]
    model.eval()
    return Subject(role, side["text"], side, model, _runner(side, model))


def _weights(path: Path, container: str) -> dict[str, Tensor]:
    """The tensors of one state_dict of a checkpoint, by ckptconv's own readers."""
    from ckptconv import formats
    from ckptconv.execute.memory_run import LazyTensors, evaluate
    from ckptconv.execute.sources import Sources
    from ckptconv.plan import Output, Plan
    from ckptconv.planner import initial_table

    contents = formats.read(path)
    found = contents.containers
    name = container or ("." if "." in found else next(iter(found), ""))
    if name not in found or (not container and "." not in found and len(found) > 1):
        raise Refusal(f"the file has no state_dict {printable(name)!r}" if container or not found else "several state_dicts, and none was chosen",
                      code="CK309", found=", ".join(map(printable, found)))  # fmt: skip
    chosen = found[name]
    # What is stored in parts (sparse, quantised, chunks) is put together as a conversion that changes nothing would do it.
    table = initial_table(chosen.stored_manifest, chosen.composites)
    whole = Plan(chosen.stored_manifest, tuple(Output(key, entry.expr) for key, entry in table.items()))
    with Sources(contents.files) as opened:
        return evaluate(whole, LazyTensors(chosen.stored, opened))


def _runner(side: Mapping[str, Any], model: nn.Module) -> Callable[[Any], Any]:
    """How the model is called: by its module's own ``run(model, inputs)``, else by name or in order, as ``forward`` wants."""
    if side["kind"] == "py":
        own = getattr(importlib.import_module(side["name"].partition(":")[0]), "run", None)
        if callable(own):
            return lambda inputs: own(model, inputs)

    def call(inputs: Any) -> Any:
        if isinstance(inputs, Mapping) and _by_name(model, inputs):
            return model(**inputs)
        return model(*(inputs.values() if isinstance(inputs, Mapping) else inputs))

    return call


def _by_name(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """True where ``forward`` takes inputs of these names. One input under another name (``pixel_values`` for ``x``) goes in order."""
    import inspect

    parameters = inspect.signature(model.forward).parameters
    if all(name in parameters for name in inputs):
        return True
    return len(inputs) > 1 and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict's floating-point tensors, each under its first name."""
    import torch

    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach()
    return found


def _dtypes(model: nn.Module) -> list[Any]:
    return [value.dtype for value in _tensors_of(model).values()]


def _narrowest(dtypes: list[Any]) -> Any:
    import torch

    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps if dtype.is_floating_point else 0.0, default=torch.float32)


def _cast(model: nn.Module, dtype: Any) -> None:
    """Floating-point tensors, and only these: ``Module.to`` would cut complex tables down to their real part."""
    if any(value.is_floating_point() and value.dtype != dtype for value in (*model.parameters(), *model.buffers())):
        model._apply(lambda value: value.to(dtype) if value.is_floating_point() else value)  # type: ignore[no-untyped-call]


# Inputs


def _given(request: Mapping[str, Any], subjects: list[Subject], stage: Stage) -> tuple[Any, Tensor | None]:
    """The inputs (a list or a dict) and, from a golden file, the expected output."""
    expected = None
    if request["golden"]:
        with stage("reading the golden file", request["golden"], "CK301"):
            golden = _file(Path(request["golden"]))
            golden = _nested(golden) if isinstance(golden, dict) else {}
            outputs = next((_floating(golden[key]) for key in ("output", "outputs", "expected") if key in golden), {})
            if not outputs:
                raise Refusal("the golden file has no floating-point output", code="CK301", found=printable(", ".join(map(str, golden))),
                              try_='{"inputs": …, "output": …}')  # fmt: skip
            expected = next(iter(outputs.values()))
            inputs = golden.get("inputs", golden.get("input"))
        if inputs is not None:
            return _listed(inputs), expected
    if request["inputs"]:
        with stage("reading the inputs", request["inputs"], "CK301"):
            return _listed(_file(Path(request["inputs"]))), expected
    target = subjects[-1]
    with stage("making inputs", target.word):
        if not request["golden"]:
            for subject in reversed(subjects):
                made = _made(subject, request["seed"])
                if made:
                    return made, expected
        raise Refusal("there are no inputs to run the models on, and none can be made up for them", code="CK107",
                      try_="--parity inputs=FILE, a .pt or .safetensors file with the arguments of forward()")  # fmt: skip


def _file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``inputs.NAME`` of a flat file as ``inputs: {NAME: …}``; numbered names are a list.

    >>> _nested({"inputs.1": "b", "inputs.0": "a", "output": "c"})
    {'inputs': ['a', 'b'], 'output': 'c'}
    """
    found: dict[str, Any] = {}
    for key, value in flat.items():
        head, dot, name = str(key).partition(".")
        if dot:
            found.setdefault(head, {})[name] = value
        else:
            found[head] = value
    for key, value in found.items():
        if isinstance(value, dict) and value and all(str(name).isdecimal() for name in value):
            found[key] = [value[name] for name in sorted(value, key=int)]
    return found


def _listed(inputs: Any) -> Any:
    import torch

    if isinstance(inputs, torch.Tensor):
        return [inputs]
    return {str(name): value for name, value in inputs.items()} if isinstance(inputs, Mapping) else list(inputs)


def _map(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    import torch

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, torch.Tensor) else value

    return {name: changed(value) for name, value in inputs.items()} if isinstance(inputs, dict) else [changed(value) for value in inputs]


def _made(subject: Subject, seed: int) -> Any:
    """Seeded inputs for what says itself what it takes: an image for timm, token ids or pixels for transformers; else nothing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    if subject.side["kind"] == "timm":
        shape = _timm_shape(subject.model, dict(subject.side["arguments"]))
        return [torch.randn(2, *shape, generator=generator)]
    if subject.side["kind"] == "hf":
        return _hf_inputs(subject.model, generator)
    return None


def _timm_shape(model: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, 224, 224)
    size = arguments.get("img_size") or getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    return int(arguments.get("in_chans", channels)), int(height), int(width)


def _hf_inputs(model: Any, generator: Any) -> dict[str, Tensor]:
    """What ``forward`` names and the config (or its text and vision parts) knows the size of."""
    import inspect

    import torch

    config = model.config
    parts = [config, *(part for part in (getattr(config, f"{name}_config", None) for name in ("text", "vision")) if part is not None)]

    def first(*names: str) -> Any:
        values = (getattr(part, name, None) for part in parts for name in names)
        return next((value for value in values if value is not None), None)

    wanted = inspect.signature(model.forward).parameters
    made: dict[str, Tensor] = {}
    vocabulary, image = first("vocab_size"), first("image_size")
    if "input_ids" in wanted and vocabulary is not None:
        context = first("max_position_embeddings", "n_positions")
        # Some libraries lose two positions to padding.
        length = min(_LENGTH, context - 2) if isinstance(context, int) and context > 4 else _LENGTH
        low = 4 if vocabulary > 16 else 0  # below stand padding and the like
        made["input_ids"] = torch.randint(low, vocabulary, (1, length), generator=generator)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in wanted:
            made["decoder_input_ids"] = torch.randint(low, vocabulary, (1, length // 2), generator=generator)
    if "pixel_values" in wanted and image is not None:
        height, width = (image, image) if isinstance(image, int) else tuple(image)[:2]
        made["pixel_values"] = torch.randn(2 if not made else 1, first("num_channels") or 3, height, width, generator=generator)
    return made


# Outputs


def _floating(value: Any, path: str = "", found: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The floating-point tensors of an output, each with where it stands: ``output``, ``logits``, ``[0]``, ``hidden_states[1]``."""
    import torch

    found = {} if found is None else found
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            found[path or "output"] = value.detach()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _floating(item, f"{path}.{key}" if path else str(key), found)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _floating(item, f"{path}[{index}]", found)
    return found


def _chosen(left: Mapping[str, Tensor], right: Mapping[str, Tensor], word: str) -> tuple[str, Tensor, Tensor]:
    """The first output of the source, and the first of the target that has its shape."""
    for kind, outputs in (("source", left), ("target", right)):
        if not outputs:
            raise Failed(Problem(CODE, f"the {kind} model's output holds no floating-point tensor", where=word))
    name, wanted = next(iter(left.items()))
    for where, found in right.items():
        if found.shape == wanted.shape:
            return (where if where == name else f"{where} (against {name})"), wanted, found
    shapes = ", ".join(f"{where}: {list(found.shape)}" for where, found in list(right.items())[:4])
    raise Failed(Problem(CODE, f"no output of the target has the shape of {name}: {list(wanted.shape)}", where=word, found=shapes,
                         try_="a run(model, inputs) in the module of a py: model can choose"))  # fmt: skip


def _like(output: Any, where: str) -> Tensor:
    outputs = _floating(output)
    return outputs.get(where.partition(" (")[0], next(iter(outputs.values())))


def _difference(left: Tensor, right: Tensor, notes: list[str]) -> tuple[float, float]:
    """Largest difference, absolute and relative to the largest magnitude of ``left``. What is not finite must be so on both sides."""
    import torch

    wide, other = left.to(torch.float64), right.to(torch.float64)
    finite = torch.isfinite(wide) & torch.isfinite(other)
    if not finite.all():
        notes.append(f"{int((~finite).sum()):,} of {finite.numel():,} output values are not finite")
    odd = ~finite & ~((wide == other) | (wide.isnan() & other.isnan()))
    if odd.any() or not finite.any():
        return math.inf, math.inf
    biggest = float(wide[finite].abs().max())
    apart = float((wide[finite] - other[finite]).abs().max())
    if biggest < 1e-12:
        notes.append("the reference output is zero everywhere: equality with it proves nothing")
    return apart, apart / max(biggest, 1e-300) if apart else 0.0


# What an equal output does not vouch for


def _constant(value: Tensor) -> bool:
    """True for fresh norms, zero biases and the like: another tensor of this kind in its place would change nothing."""
    return value.numel() > 1 and bool((value == value.reshape(-1)[0]).all())


def _unseen(run: Callable[[], Tensor], state: Mapping[str, Tensor], most: int, tolerance: float, deadline: float) -> tuple[list[str], int]:
    """Of at most ``most`` tensors, evenly chosen: those that may be wholly wrong without the output changing beyond the tolerance."""
    import torch

    names = list(state)
    chosen = names if len(names) <= most else [names[index * len(names) // most] for index in range(most)]
    generator = torch.Generator().manual_seed(1)
    reference = run() if chosen else None
    unseen, probed = [], 0
    for name in chosen:
        if time.monotonic() > deadline:
            break
        value = state[name]
        kept = value.clone()
        size = float(kept.to(torch.float64).square().mean().sqrt()) if kept.numel() else 0.0
        noise = torch.randn(value.shape, generator=generator).to(value.dtype) * (size or 0.1)
        value.add_(noise.abs() if name.endswith("running_var") else noise)  # a variance below zero gives NaN, not an answer
        try:
            changed = _difference(reference, run(), []) if reference is not None else (0.0, 0.0)
        except Failed:
            changed = (math.inf, math.inf)  # the model noticed by itself
        finally:
            value.copy_(kept)
        probed += 1
        if changed[1] <= tolerance:
            unseen.append(name)
    return unseen, probed
