"""DeepSpeed ZeRO folders: the fp32 weights put together from the flat partitions of the ranks, without DeepSpeed's classes.

Stages 1 and 2 cut one flat row of all parameters of a group into equal partitions, the last one padded. Stage 3 cuts every parameter into
equal parts, the last one padded, and each rank's rows, one after the other, hold its part of each. Which parameter is where follows from
``param_shapes`` in the model file, in order. Buffers and frozen parameters come from the model files, in the dtype that the model computes
in; shared parameters are one tensor under several names. Layout: ``deepspeed/utils/zero_to_fp32.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Composite, Container, Contents, Foreign, Placed
from ckptconv.formats.joining import plain_files
from ckptconv.places.presence import bring, look_into
from ckptconv.spec import TensorSpec, contiguous_strides

_OPTIMIZER = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_([0-9]{1,6})_mp_rank_00_optim_states\.pt")
_MODEL = "mp_rank_00_model_states.pt"
_OTHER = re.compile(r"(?:zero_pp_rank_[0-9]+_)?mp_rank_0*[1-9][0-9]*_model_states\.pt")
_PARTS = re.compile(r"layer_[0-9]+.*model_states\.pt")
Shapes = Mapping[str, tuple[int, ...]]


def _bad(what: str, found: str = "", try_: str = "") -> Refusal:
    return Refusal(what, code="CK308", found=found, try_=try_)


def folder_of(folder: Path) -> Path | None:
    """The step's folder that ``folder`` means (it, or the one that ``latest`` names), or None where it is no ZeRO checkpoint."""
    if any(_OPTIMIZER.fullmatch(name) for name in plain_files(folder)):
        return folder
    latest = folder / "latest"
    if not latest.is_file() or latest.stat().st_size > 1000:
        return None
    name = bring(latest).read_text(encoding="utf-8", errors="replace").strip()
    inside = folder / name
    if not name or "/" in name or "\\" in name or name in (".", "..") or inside.is_symlink() or not inside.is_dir():
        return None
    return inside if any(_OPTIMIZER.fullmatch(each) for each in plain_files(inside)) else None


class _Optimizer(Struct, frozen=True):
    """What an optimizer file says."""

    stage: int
    rows: list[Placed]
    partitions: tuple[int, ...]  #: how many ranks share each row
    paddings: Any  #: elements behind each parameter, by group; None where there are none


class _Model(Struct, frozen=True):
    """What a model file says."""

    module: Mapping[Any, Any]
    groups: list[Shapes]
    buffers: frozenset[str]
    frozen: Shapes
    fragments: Mapping[Any, Any]
    shared: list[tuple[str, str]]


def read(folder: Path, read_file: Callable[[Path], Contents]) -> Contents:
    """The fp32 state_dict of a step's folder. Raises :class:`~ckptconv.errors.Refusal` CK308 where something is missing or unknown."""
    names = plain_files(folder)
    if any(_OTHER.fullmatch(name) for name in names):
        raise _bad("the checkpoint is cut over tensor-parallel ranks too, which is not read", try_="DeepSpeed's own ds_to_universal")
    if any(_PARTS.fullmatch(name) for name in names):
        raise _bad("layers or experts are in files of their own, which are not read", try_="DeepSpeed's own ds_to_universal")
    found = [(int(match[1]), folder / name) for name in names if (match := _OPTIMIZER.fullmatch(name))]
    ranks = dict(found)
    if len(ranks) != len(found) or sorted(ranks) != list(range(len(ranks))):
        raise _bad("files of the ZeRO checkpoint are missing, or there twice", printable(", ".join(path.name for _, path in found)))
    look_into(folder / name for name in names if name.endswith("_states.pt"))
    optimizers = [_optimizer(read_file(ranks[rank]).tree, number=1 + rank) for rank in range(len(ranks))]
    stage = optimizers[0].stage
    if any(other.stage != stage or other.partitions != optimizers[0].partitions for other in optimizers):
        raise _bad("the optimizer files do not belong together")
    if set(optimizers[0].partitions) != {len(ranks)}:
        if max(optimizers[0].partitions) == len(ranks):
            raise _bad(
                "a group of parameters is cut over some of the ranks only, which is not read", try_="DeepSpeed's own ds_to_universal"
            )
        raise _bad("files of ranks are missing", f"{len(ranks)} of {max(optimizers[0].partitions)} are there")
    files = [folder / (f"zero_pp_rank_0_{_MODEL}" if stage == 3 else _MODEL), *(ranks[rank] for rank in range(len(ranks)))]
    model = _model(files[0], 0, read_file)
    models = [model]
    if stage == 3 and model.frozen:  # every rank's own part
        for rank in range(1, len(ranks)):
            files.append(folder / f"zero_pp_rank_{rank}_{_MODEL}")
            models.append(_model(files[-1], len(files) - 1, read_file))
    whole: dict[str, Placed | Composite] = dict(_buffers(model))
    whole |= _frozen(models, stage)
    whole |= _trained(model.groups, optimizers)
    for name, other in model.shared:
        if other in whole:
            whole[name] = whole[other]
    container = Container(
        ".", {name: each for name, each in whole.items() if isinstance(each, Placed)},
        composites={name: each for name, each in whole.items() if isinstance(each, Composite)},
    )  # fmt: skip
    return Contents("deepspeed-zero", tuple(files), {".": container}, tree=None, warnings=())


def _optimizer(tree: Any, number: int) -> _Optimizer:
    state = tree.get("optimizer_state_dict") if isinstance(tree, dict) else None
    if not isinstance(state, dict):
        raise _bad("an optimizer file holds no optimizer_state_dict")
    stage = state.get("zero_stage")
    if isinstance(stage, Foreign) and stage.arguments:  # DeepSpeed's enum of stages
        stage = stage.arguments[0]
    rows = state.get("single_partition_of_fp32_groups") if stage in (1, 2) else state.get("fp32_flat_groups")
    if stage not in (1, 2, 3) or not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, Placed) for row in rows):
        raise _bad("an optimizer file has no flat fp32 weights of ZeRO stage 1, 2 or 3", printable(stage))
    if len({row.spec.dtype for row in rows}) > 1:
        raise _bad("the flat weights of an optimizer file are of different dtypes")
    count = state.get("partition_count")
    counts = tuple(count) if isinstance(count, (list, tuple)) and count else (count,)
    if any(type(each) is not int or each < 1 for each in counts):
        raise _bad("an optimizer file does not say how many ranks there are", printable(count))
    return _Optimizer(stage, [_at_file(row, number) for row in rows], counts, state.get("param_alignment_paddings"))


def _at_file(placed: Placed, file: int) -> Placed:
    return replace(placed, storage=replace(placed.storage, file=file))


def _model(path: Path, number: int, read_file: Callable[[Path], Contents]) -> _Model:
    if path.is_symlink() or not path.is_file():
        raise _bad("files of the ZeRO checkpoint are missing", printable(path.name))
    tree = read_file(path).tree
    if not isinstance(tree, dict):
        raise _bad("the model file holds no dict", printable(path.name))
    groups = tree.get("param_shapes")
    shared = tree.get("shared_params") or {}
    pairs = list(shared.items()) if isinstance(shared, dict) else shared  # older files have pairs
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise _bad("shared_params is no table of names", printable(path.name))
    names = tree.get("buffer_names") or ()
    module, fragments = tree.get("module"), tree.get("frozen_param_fragments")
    return _Model(
        _placed(module, number),
        [_shapes(group) for group in (groups if isinstance(groups, list) else [groups])],
        frozenset(name for name in names if isinstance(name, str)) if isinstance(names, (list, tuple)) else frozenset(),
        _shapes(tree.get("frozen_param_shapes") or {}),
        _placed(fragments, number),
        [(first, second) for first, second in pairs],
    )


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(name, str) for name in pair)


def _placed(table: Any, number: int) -> dict[str, Placed]:
    entries = table.items() if isinstance(table, dict) else ()
    return {name: _at_file(value, number) for name, value in entries if isinstance(name, str) and isinstance(value, Placed)}


def _shapes(table: Any) -> Shapes:
    if not isinstance(table, dict):
        raise _bad("param_shapes is no table of shapes")
    for name, shape in table.items():
        if not isinstance(name, str) or not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
            raise _bad("param_shapes is no table of shapes", printable(name))
    return table


def _buffers(model: _Model) -> dict[str, Placed]:
    return {name: placed for name, placed in model.module.items() if name in model.buffers}


def _frozen(models: Sequence[_Model], stage: int) -> dict[str, Placed | Composite]:
    """Parameters that are not trained: whole in the model file, or in stage 3 a part in that of each rank.

    Where stages 1 and 2 do not list them, they are what else the module has.
    """
    first = models[0]
    if stage < 3:
        known = {name for group in first.groups for name in group} | first.buffers | {name for name, _ in first.shared}
        rest = {name: placed for name, placed in first.module.items() if name not in known}
        listed = {name: first.fragments.get(name) or rest.get(name) for name in first.frozen}
        for name, placed in listed.items():
            if placed is None or placed.spec.shape != first.frozen[name]:
                raise _bad(f"the frozen parameter {printable(name)} is missing, or has another shape", printable(placed and placed.spec))
        return {**rest, **{name: placed for name, placed in listed.items() if placed is not None}}
    found: dict[str, Placed | Composite] = {}
    for name, shape in first.frozen.items():
        flats = [[model.fragments[name]] for model in models if name in model.fragments]
        if len(flats) < len(models):
            raise _bad(f"the frozen parameter {printable(name)} has no part in some rank")
        found[name] = _joined(name, shape, _parts(flats, 0, prod(shape)), flats[0][0])
    return found


def _trained(groups: Sequence[Shapes], optimizers: Sequence[_Optimizer]) -> dict[str, Placed | Composite]:
    found: dict[str, Placed | Composite] = {}
    rows = [optimizer.rows for optimizer in optimizers]
    if optimizers[0].stage == 3:
        at = 0
        for group in groups:
            for name, shape in group.items():
                found[name] = _joined(name, shape, _parts(rows, at, prod(shape)), rows[0][0])
                at += -(-prod(shape) // len(rows))
        for row in rows:
            _check_end(at, sum(flat.spec.numel for flat in row), 1)
        return found
    if any(len(row) != len(groups) for row in rows):
        raise _bad("the optimizer files have other groups of parameters than the model file", f"{len(groups)} and {len(rows[0])}")
    for number, group in enumerate(groups):
        flats = [row[number] for row in rows]
        paddings = _paddings(optimizers[0].paddings, number, len(group))
        at = 0
        for (name, shape), padding in zip(group.items(), paddings, strict=True):
            found[name] = _joined(name, shape, list(_across(flats, at, prod(shape))), flats[0])
            at += prod(shape) + padding
        _check_end(at, sum(flat.spec.numel for flat in flats), 2 * len(rows))
    return found


def _paddings(paddings: Any, number: int, count: int) -> list[int]:
    if paddings is None:
        return [0] * count
    group = paddings[number] if isinstance(paddings, list) and number < len(paddings) else None
    if not isinstance(group, (list, tuple)) or len(group) != count or any(type(each) is not int or each < 0 for each in group):
        raise _bad("param_alignment_paddings does not fit the parameters")
    return list(group)


def _check_end(used: int, there: int, step: int) -> None:
    """What is left over is padding, of less than a step: more of it, and the shapes are not those of these rows."""
    if -(-used // step) != -(-there // step):
        raise _bad("the parameters' shapes do not use the flat partitions up", f"{used:,} of {there:,} elements")


def _parts(rows: Sequence[Sequence[Placed]], at: int, count: int) -> list[Placed]:
    """The ranks' equal parts of ``count`` elements, each from ``at`` of its rows."""
    width = -(-count // len(rows))
    found: list[Placed] = []
    for rank, flats in enumerate(rows):
        found += _across(flats, at, min(width, max(0, count - rank * width)))
    return found


def _across(flats: Sequence[Placed], start: int, count: int) -> Iterator[Placed]:
    """The ranges of ``count`` elements from ``start`` of the row that these make up."""
    ends = accumulate(flat.spec.numel for flat in flats)
    for flat, end in zip(flats, ends, strict=True):
        before = end - flat.spec.numel
        low, high = max(start - before, 0), min(start + count - before, flat.spec.numel)
        if low < high and len(flat.spec.shape) == 1 and flat.contiguous:
            width = flat.spec.dtype.nbytes
            yield replace(flat, spec=TensorSpec((high - low,), flat.spec.dtype), offset=flat.offset + low * width)


def _joined(name: str, shape: tuple[int, ...], pieces: Sequence[Placed], row: Placed) -> Placed | Composite:
    if sum(piece.spec.numel for piece in pieces) != prod(shape):
        raise _bad(f"the flat partitions end before {printable(name)}", f"{prod(shape):,} elements wanted")
    if not pieces:
        return replace(row, spec=TensorSpec(shape, row.spec.dtype), strides=contiguous_strides(shape))
    return Composite("flat", TensorSpec(shape, pieces[0].spec.dtype), {str(number): piece for number, piece in enumerate(pieces)})
