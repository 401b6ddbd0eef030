"""DeepSpeed ZeRO folders: the fp32 weights put together from the flat partitions of the ranks, without DeepSpeed's classes.

Stages 1 and 2 cut one flat row of all parameters of a group into equal partitions, the last one padded. Stage 3 cuts every parameter into
equal parts, the last one padded, and each rank's row holds its part of each. Which parameter is where follows from ``param_shapes`` in the
model file, in order. Buffers come from the model file; shared parameters are one tensor under several names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Composite, Container, Contents, Foreign, Placed
from ckptconv.formats.joining import plain_files, shifted
from ckptconv.spec import TensorSpec

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_([0-9]+)_mp_rank_00_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_00_model_states\.pt")
_OTHER = re.compile(r"(?:zero_pp_rank_[0-9]+_)?mp_rank_0*[1-9][0-9]*_model_states\.pt")


def _bad(what: str, found: str = "", try_: str = "") -> Refusal:
    return Refusal(what, code="CK308", found=found, try_=try_)


def folder_of(folder: Path) -> Path | None:
    """The step's folder that ``folder`` means (it, or the one that ``latest`` names), or None where it is no ZeRO checkpoint."""
    if any(_OPTIMIZER.fullmatch(name) for name in plain_files(folder)):
        return folder
    latest = folder / "latest"
    if not latest.is_file() or latest.stat().st_size > 1000:
        return None
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    inside = folder / name
    if not name or "/" in name or "\\" in name or name in (".", "..") or inside.is_symlink() or not inside.is_dir():
        return None
    return inside if any(_OPTIMIZER.fullmatch(each) for each in plain_files(inside)) else None


def read(folder: Path, read_file: Callable[[Path], Contents]) -> Contents:
    """The fp32 state_dict of a step's folder. Raises :class:`~ckptconv.errors.Refusal` CK308 where something is missing or unknown."""
    names = plain_files(folder)
    if any(_OTHER.fullmatch(name) for name in names):
        raise _bad("the checkpoint is cut over tensor-parallel ranks too, which is not read", try_="DeepSpeed's own ds_to_universal")
    ranks = {int(match[1]): folder / name for name in names if (match := _OPTIMIZER.fullmatch(name))}
    model = next((folder / name for name in names if _MODEL.fullmatch(name)), None)
    if model is None or sorted(ranks) != list(range(len(ranks))):
        raise _bad("files of the ZeRO checkpoint are missing", printable(", ".join(names)))
    head = read_file(model)
    parts = [read_file(ranks[rank]) for rank in sorted(ranks)]
    if not isinstance(head.tree, dict):
        raise _bad("the model file holds no dict", printable(model.name))
    stage, rows = _rows([part.tree for part in parts])
    if len(rows) != len(parts):
        raise _bad("the optimizer files do not belong together", f"{len(parts)} files, {len(rows)} ranks")
    # The model file is file number 0; rank r is number r + 1.
    rows = [[_at_file(row, at + 1) for row in groups] for at, groups in enumerate(rows)]
    shapes = head.tree.get("param_shapes")
    groups = [group for group in (shapes if isinstance(shapes, list) else [shapes]) if isinstance(group, dict)]
    composites: dict[str, Composite] = {}
    for number, group in enumerate(groups):
        flats = (
            [row[number] if stage < 3 else row[0] for row in rows] if all(len(row) > (number if stage < 3 else 0) for row in rows) else []
        )
        if not flats:
            raise _bad(f"group {number} of the parameters has no partition in every rank")
        composites.update(_whole(group, flats, stage, "" if number == 0 else f"group {number}, "))
    for pair in head.tree.get("shared_params") or ():
        if isinstance(pair, (list, tuple)) and len(pair) == 2 and pair[1] in composites:
            composites[str(pair[0])] = composites[pair[1]]
    tensors = _buffers(head, groups)
    container = Container(".", tensors, composites=composites)
    files = (model, *(ranks[rank] for rank in sorted(ranks)))
    return Contents("deepspeed-zero", files, {".": container}, tree=None, warnings=())


def _rows(trees: Sequence[Any]) -> tuple[int, list[list[Placed]]]:
    """The ZeRO stage, and each rank's flat rows, one per group."""
    found: list[list[Placed]] = []
    stages = set()
    for tree in trees:
        state = tree.get("optimizer_state_dict") if isinstance(tree, dict) else None
        if not isinstance(state, dict):
            raise _bad("an optimizer file holds no optimizer_state_dict")
        stage = state.get("zero_stage")
        if isinstance(stage, Foreign) and stage.arguments:  # DeepSpeed's enum of stages
            stage = stage.arguments[0]
        rows = state.get("single_partition_of_fp32_groups") if stage in (1, 2) else state.get("fp32_flat_groups")
        if stage not in (1, 2, 3) or not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, Placed) for row in rows):
            raise _bad("an optimizer file has no flat fp32 weights of ZeRO stage 1, 2 or 3", printable(stage))
        stages.add(stage)
        found.append(list(rows))
    if len(stages) > 1:
        raise _bad("the optimizer files are of different ZeRO stages")
    return stages.pop(), found


def _at_file(placed: Placed, file: int) -> Placed:
    return replace(placed, storage=replace(placed.storage, file=file))


def _whole(group: Mapping[Any, Any], flats: Sequence[Placed], stage: int, what: str) -> Iterator[tuple[str, Composite]]:
    at = 0
    for name, shape in group.items():
        if not isinstance(name, str) or not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
            raise _bad("param_shapes is no table of shapes", printable(name))
        count = prod(shape)
        if stage == 3:
            width = -(-count // len(flats))
            pieces = [_range(flat, at, min(width, max(0, count - rank * width))) for rank, flat in enumerate(flats)]
            at += width
        else:
            pieces = list(_across(flats, at, count))
            at += count
        taken = [piece for piece in pieces if piece is not None and piece.spec.numel]
        if sum(piece.spec.numel for piece in taken) != count:
            raise _bad(f"the flat partitions end before {what}{printable(name)}", f"{count:,} elements wanted")
        yield name, Composite("flat", TensorSpec(shape, flats[0].spec.dtype), {str(number): piece for number, piece in enumerate(taken)})


def _across(flats: Sequence[Placed], start: int, count: int) -> Iterator[Placed | None]:
    """The ranges of ``count`` elements from ``start`` of the row that the partitions make up."""
    before = 0
    for flat in flats:
        size = flat.spec.numel
        low, high = max(start - before, 0), min(start + count - before, size)
        if low < high:
            yield _range(flat, low, high - low)
        before += size


def _range(flat: Placed, start: int, count: int) -> Placed | None:
    if count <= 0:
        return None
    if len(flat.spec.shape) != 1 or start + count > flat.spec.numel or not flat.contiguous:
        return None
    return replace(flat, spec=TensorSpec((count,), flat.spec.dtype), offset=flat.offset + start * flat.spec.dtype.nbytes)


def _buffers(head: Contents, groups: Sequence[Mapping[Any, Any]]) -> dict[str, Placed]:
    """What the model file holds beside the parameters, by ``buffer_names``."""
    named = head.tree.get("buffer_names") or ()
    module = shifted(head.containers["module"], 0).tensors if "module" in head.containers else {}
    parameters = {name for group in groups for name in group}
    return {name: module[name] for name in named if isinstance(name, str) and name in module and name not in parameters}
