"""Tensors that are there under the right name and have another shape: what each difference usually means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import isqrt

from ckptconv.errors import printable
from ckptconv.explain.sides import Cause, Shape, Sides, count_of
from ckptconv.names import collapse

Mismatch = tuple[str, Shape, Shape]

_HEAD = re.compile(
    r"(?:^|\.)(?:head|heads|fc|classifier|classif|last_linear|logits|cls|cls_head|score|predictions?|linear_head|aux\w*|head_dist|cls_pred|"
    r"bbox_pred|class_embed|out|output|proj_head|fc_cls|mlp_head)(?:\.\w+)*\.(?:weight|bias)$|^(?:weight|bias)$"
)
_WORDS = re.compile(
    r"(?:^|\.)(?:wte|embed_tokens|word_embeddings?|tok_embeddings|token_embedding|embed_in|embed_out|lm_head|shared|embeddings?|vocab\w*|"
    r"decoder\.(?:weight|bias)$|predictions\.(?:bias|decoder)|tokens_embed|word_emb\w*|output$)"
)
_POSITIONS = re.compile(
    r"(?:^|\.)(?:pos_?embed\w*|position_?embeddings?|positional_embedding|absolute_pos_embed|wpe|embed_positions|pos_emb\w*|"
    r"relative_position_bias_table|position_ids|pos_encoder\w*|pe)(?:\.|$)"
)


def _where(names: Sequence[str], most: int = 3) -> str:
    templates = collapse(names)
    return ", ".join(printable(template) for template in templates[:most]) + (
        f" and {len(templates) - most} more" if len(templates) > most else ""
    )


def _shapes(mismatch: Mismatch) -> str:
    return f"{list(mismatch[1])} in the checkpoint, {list(mismatch[2])} in the model"


def _rows_only(found: Shape, wanted: Shape) -> bool:
    return len(found) == len(wanted) > 0 and found[0] != wanted[0] and found[1:] == wanted[1:]


def _bare(shape: Shape) -> Shape:
    """A shape without its axes of size 1."""
    return tuple(size for size in shape if size != 1)


def words(sides: Sides) -> Cause | None:
    """Rows of the vocabulary."""
    hits = [each for each in sides.sizes if _rows_only(*each[1:]) and _WORDS.search(each[0]) and not _POSITIONS.search(each[0])]
    hits = [each for each in hits if len(each[1]) == 2 or any(each[1][0] == other[1][0] for other in hits if len(other[1]) == 2)]
    if not hits or not any(len(each[1]) == 2 for each in hits):
        return None
    name, found, wanted = next(each for each in hits if len(each[1]) == 2)
    have, want = found[0], wanted[0]
    more, less = max(have, want), min(have, want)
    padded = next((step for step in (128, 64, 16, 8) if more % step == 0 and more - less < step), 0)
    if padded:
        which, other = ("checkpoint", "model") if more == have else ("model", "checkpoint")
        why = (
            f"the {which} pads its {less:,} words to a multiple of {padded}"
            if less % padded
            else f"{more - less:,} rows more in the {which}"
        )
        why += f", the {other} does not" if less % padded else ""
    else:
        side = "checkpoint" if have > want else "model"
        why = f"{more - less:,} words more in the {side}: added tokens, or another tokenizer"
    return Cause(
        "vocabulary", f"the vocabulary has {have:,} rows in the checkpoint and {want:,} in the model ({_where([each[0] for each in hits])}): {why}",
        tuple(each[0] for each in hits),
        f"same tokenizer? then `- resize_rows: {{keys: {printable(name)}, rows: {want}}}`; else no rows mean the same words", soft=True,
    )  # fmt: skip


def head(sides: Sides) -> Cause | None:
    """Another number of classes."""
    hits = [
        each for each in sides.sizes
        if _rows_only(*each[1:]) and not _POSITIONS.search(each[0]) and (_HEAD.search(each[0]) or _is_last(each[0], sides))
    ]  # fmt: skip
    weights = [each for each in hits if len(each[1]) >= 2]
    if not weights:
        return None
    keys = ", ".join(
        sorted({f'"{printable(name.rpartition(".")[0])}.{{p}}"' if "." in name else f'"{printable(name)}"' for name, *_ in hits})
    )
    have, want = weights[0][1][0], weights[0][2][0]
    return Cause(
        "head",
        f"the last layer is for {have:,} classes in the checkpoint and {want:,} in the model: {_where([each[0] for each in hits])} "
        f"({_shapes(weights[0])}); left out, it stays random and has to be trained",
        tuple(each[0] for each in hits),
        f"- drop: [{keys}] with target: {{allow: {{missing: [{keys}]}}}}; or the rule new-classes (--set classes={want}), which keeps the first rows",
        soft=True,
    )  # fmt: skip


def _is_last(name: str, sides: Sides) -> bool:
    """Whether it belongs to the last module of the model: the head of a network without a name for it."""
    last = next(reversed(list(sides.wanted)), "")
    return name.rpartition(".")[0] == last.rpartition(".")[0] and len(sides.wanted) > 2


def positions(sides: Sides) -> Cause | None:
    """Position embeddings of another resolution or length."""
    hits = [
        each for each in sides.sizes
        if _POSITIONS.search(each[0]) and len(each[1]) == len(each[2]) and sum(a != b for a, b in zip(each[1], each[2], strict=True)) in (1, 2)
    ]  # fmt: skip
    if not hits or any(each[1][-1] != each[2][-1] for each in hits if "relative" not in each[0] and len(each[1]) < 4):
        return None
    name, found, wanted = hits[0]
    axis = next(at for at, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    have, want = found[axis], wanted[axis]
    grid = _grids(have, want)
    if grid:
        tokens, a, b = grid
        what = f"{a}×{a} patches against {b}×{b}" + (
            f", with {tokens} prefix token{'s' if tokens > 1 else ''} before them" if tokens else ""
        )
        why, step = f"another resolution or patch size: {what}", f"- resize: {{keys: {printable(name)}, …}} resamples them"
    else:
        why, step = (
            f"{have:,} positions against {want:,}: another length",
            f"- slice or pad {printable(name)}, if the first positions mean the same",
        )
    return Cause(
        "positions", f"position embeddings {_where([each[0] for each in hits])} have {_shapes(hits[0])}: {why}",
        tuple(each[0] for each in hits), step, soft=True,
    )  # fmt: skip


def _grids(have: int, want: int) -> tuple[int, int, int] | None:
    """(prefix tokens, side, other side): how many tokens must stand before both for the rest to be squares. Few are likelier."""
    for tokens in (0, 1, 2, 4, 5, 8, 16):
        sides = [isqrt(max(count - tokens, 0)) for count in (have, want)]
        if all(side > 1 and side * side == count - tokens for side, count in zip(sides, (have, want), strict=True)):
            return tokens, sides[0], sides[1]
    return None


def channels(sides: Sides) -> Cause | None:
    """Input channels of the first convolution."""
    convolutions = [name for name, spec in sides.wanted.tensors.items() if len(spec.shape) in (4, 5)]
    hits = [
        each for each in sides.sizes
        if len(each[1]) == len(each[2]) >= 4 and each[1][1] != each[2][1] and each[1][:1] + each[1][2:] == each[2][:1] + each[2][2:]
        and each[0] in convolutions[:2] and min(each[1][1], each[2][1]) <= 16
    ]  # fmt: skip
    if not hits:
        return None
    name, found, wanted = hits[0]
    return Cause(
        "channels",
        f"the first convolution takes {found[1]} input channels in the checkpoint and {wanted[1]} in the model: {printable(name)} ({_shapes(hits[0])})",
        tuple(each[0] for each in hits), f"- adapt_channels: {{keys: {printable(name)}, channels: {wanted[1]}}}", soft=True,
    )  # fmt: skip


def transposed(sides: Sides) -> Cause | None:
    """Weights stored input by output: Conv1D of GPT-2, TensorFlow, JAX."""
    hits = [each for each in sides.sizes if len(each[1]) == 2 and each[1] == each[2][::-1]]
    if not hits:
        return None
    names = {each[0] for each in hits}
    leaves = {name.rpartition(".")[0].rpartition(".")[2] for name in names}
    square = [
        name for name, spec in sides.found.tensors.items()
        if len(spec.shape) == 2 and spec.shape[0] == spec.shape[1] and name in sides.wanted and name.rpartition(".")[0].rpartition(".")[2] in leaves
    ]  # fmt: skip
    also = f"; square ones ({_where(square, 2)}) have to be turned too, which no shape can show" if square else ""
    return Cause(
        "transposed", f"{len(hits):,} matrices are stored the other way round, as GPT-2's Conv1D or TensorFlow do: {_where([each[0] for each in hits])} "
        f"({_shapes(hits[0])}){also}", tuple(names), "- rearrange: {keys: …, pattern: i o -> o i}; the rule gpt2-conv1d-to-linear for GPT-2",
    )  # fmt: skip


def squeezed(sides: Sides) -> Cause | None:
    """The same elements with axes of size 1 more or less: a 1×1 convolution for a linear layer, a scale [C, 1, 1] for [C]."""

    hits = [each for each in sides.sizes if _bare(each[1]) == _bare(each[2])]
    if not hits:
        return None
    return Cause(
        "squeezed", f"{count_of(len(hits), 'tensor', 'have')} axes of size 1 more or less (a 1×1 convolution for a linear layer): "
        f"{_where([each[0] for each in hits])} ({_shapes(hits[0])})", tuple(each[0] for each in hits), "- reshape: {keys: …, shape: …}",
    )  # fmt: skip


def parallel(sides: Sides) -> Cause | None:
    """One rank of a tensor-parallel set: many matrices are a whole fraction along one axis, and norms are whole."""
    ratios: Counter[int] = Counter()
    hits: list[Mismatch] = []
    for each in sides.sizes:
        _, found, wanted = each
        different = [(a, b) for a, b in zip(found, wanted, strict=False) if a != b]
        if len(found) == len(wanted) and len(different) == 1 and different[0][0] and different[0][1] % different[0][0] == 0:
            ratios[different[0][1] // different[0][0]] += 1
            hits.append(each)
    matrices = [name for name, spec in sides.wanted.tensors.items() if len(spec.shape) == 2 and name in sides.found]
    whole_norms = any(
        name in sides.found and sides.found[name].shape == spec.shape for name, spec in sides.wanted.tensors.items() if len(spec.shape) == 1
    )
    if not ratios or not whole_norms or len(matrices) < 4:
        return None
    ranks, count = ratios.most_common(1)[0]
    axes = {next(at for at, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b) for _, found, wanted in hits if len(found) == 2}
    if ranks not in (2, 4, 8, 16, 32) or count < 0.6 * len(matrices) or len(axes) < 2:
        return None
    return Cause(
        "parallel", f"this is one rank of a tensor-parallel set of {ranks}: {count:,} tensors are 1/{ranks} of the model's along one axis, norms are whole "
        f"({printable(hits[0][0])}: {_shapes(hits[0])})",
        tuple(each[0] for each in hits), f"name the folder that holds all {ranks} ranks (consolidated.NN.pth, mp_rank_NN/): ckptconv reads them together",
    )  # fmt: skip


def width(sides: Sides) -> Cause | None:
    """Another width: most shapes differ, and the sizes that differ do so alike."""
    wrong = [each for each in sides.sizes if each[1] != each[2][::-1] and _bare(each[1]) != _bare(each[2])]
    same_name = [name for name in sides.found if name in sides.wanted and name not in sides.unknown and sides.found[name].shape]
    if len(wrong) < 3 or len(wrong) < 0.6 * len(same_name):
        return None
    pairs: Counter[tuple[int, int]] = Counter()
    for _, found, wanted in wrong:
        if len(found) == len(wanted):
            pairs.update({(a, b) for a, b in zip(found, wanted, strict=True) if a != b})
    if not pairs:
        return None
    (have, want), count = pairs.most_common(1)[0]
    if count < 0.3 * len(wrong):
        return None
    return Cause(
        "width", f"the width is another: {len(sides.sizes):,} of {count_of(len(same_name), 'tensor')} differ in size, most by {have:,} against {want:,} "
        f"({_where([each[0] for each in sides.sizes], 2)}); no renaming can help", tuple(each[0] for each in sides.sizes),
        "build the model with the sizes that the checkpoint was trained with (its config), or find the file of this size", fatal=True,
    )  # fmt: skip


def other_sizes(sides: Sides) -> Cause | None:
    """What no other recogniser explains."""
    if not sides.sizes:
        return None
    names = [each[0] for each in sides.sizes]
    keys = f"[{', '.join(f'{chr(34)}{printable(name)}{chr(34)}' for name in names[:4])}{', …' if len(names) > 4 else ''}]"
    what = "a layer was changed" if len(collapse(names)) <= 3 else "layers were changed"
    return Cause(
        "size", f"{what}: {_where(names)} ({_shapes(sides.sizes[0])})", tuple(names),
        f"build the model as it was when the file was saved; or let it stay random: - drop: {keys} with target: {{allow: {{missing: {keys}}}}}", soft=True,
    )  # fmt: skip


RECOGNISERS: tuple[Callable[[Sides], Cause | None], ...] = (
    parallel, width, transposed, squeezed, words, positions, channels, head, other_sizes,
)  # fmt: skip
