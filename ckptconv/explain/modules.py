"""Keys that one side has and the other has not: what libraries add, drop, fuse, split, tie, stack and rename."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from math import prod

from ckptconv.errors import printable
from ckptconv.explain.sides import Cause, Sides, count_of
from ckptconv.names import collapse
from ckptconv.spec import Manifest

#: What a library computes itself and once saved: the name's end -> what it is.
_BUFFERS: tuple[tuple[str, str], ...] = (
    (r"(?:^|\.)num_batches_tracked$", "batch norm's counter"),
    (r"(?:^|\.)position_ids$", "0, 1, 2, …, which transformers stopped saving in 4.31"),
    (r"(?:^|\.)token_type_ids$", "zeros, which transformers stopped saving"),
    (
        r"(?:^|\.)(?:inv_freq|original_inv_freq|rope\.freqs|freqs_cis|freqs_cos|freqs_sin|cos_cached|sin_cached|rotary_pos_emb\S*)$",
        "rotary frequencies",
    ),
    (r"(?:^|\.)(?:relative_position_index|relative_coords_table|attn_mask)$", "window indices and masks"),
    (r"(?:^|\.)(?:attn|attention|self_attn)\.(?:bias|masked_bias|mask|causal_mask|tril)$", "a causal mask"),
    (r"(?:^|\.)(?:total_ops|total_params)$", "counters that thop left behind"),
    (r"(?:^|\.)(?:_extra_state|_metadata)$", "a module's extra state"),
    (
        r"(?:^|\.)(?:anchors|anchor_grid|stride|dfl\.conv\.weight|mean|std|pixel_mean|pixel_std|logit_bias_buffer)$",
        "constants of the model",
    ),
)
#: What is one tensor here and several there: names of the one, and of the several.
_FUSED: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...] = (
    (
        re.compile(r"(?:^|\.)(?:qkv\w*|\w+_qkv|in_proj(?:_weight|_bias)?|c_attn|query_key_value|Wqkv|qkv_proj|kv|to_kv)(?:\.|$)"),
        re.compile(
            r"(?:^|\.)(?:q|k|v|query|key|value|wq|wk|wv|to_q|to_k|to_v|[qkv]_proj|[qkv]_lin|query_proj|key_proj|value_proj)(?:\.|$)"
        ),
    ),
    (re.compile(r"(?:^|\.)(?:gate_up_proj|w13|linear_fc1)(?:\.|$)"), re.compile(r"(?:^|\.)(?:gate_proj|up_proj|w1|w3)(?:\.|$)")),
)
_EXPERT = re.compile(r"\.experts\.\d+\.")
_STACKED = re.compile(r"\.experts\.(?!\d)\w+|\.experts$")
_OLD_NORM, _NEW_NORM = re.compile(r"(?:^|\.)weight_([gv])$"), re.compile(r"\.parametrizations\.(\w+)\.original([01])$")
_HEADS = re.compile(r"(?:^|\.)(?:lm_head|proj_out|embed_out|decoder|output|cls\.predictions\.decoder|generator)\.weight$")
_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:wte|embed_tokens|word_embeddings?|tok_embeddings|shared|embed_in|tokens_embed|token_embedding|embed)\.weight$"
)


def _where(names: Sequence[str], most: int = 3) -> str:
    templates = collapse(names)
    return ", ".join(printable(template) for template in templates[:most]) + (
        f" and {len(templates) - most} more" if len(templates) > most else ""
    )


def _both(sides: Sides) -> tuple[tuple[str, tuple[str, ...]], tuple[str, tuple[str, ...]]]:
    return ("checkpoint", sides.unexpected), ("model", sides.missing)


def buffers(sides: Sides) -> Cause | None:
    """What is no weight: computed by the module itself."""
    found: dict[tuple[str, str], list[str]] = {}
    for side, names in _both(sides):
        for name in names:
            what = next((what for pattern, what in _BUFFERS if re.search(pattern, name)), None)
            manifest = sides.found if side == "checkpoint" else sides.wanted
            shape = sides.shape(name, manifest)
            if what == "a causal mask" and name.endswith(".bias") and (shape is None or len(shape) < 3):
                continue  # a bias, as its name says
            if what is None and name in sides.wanted.buffers and name in sides.missing:
                what = "buffers"
            if what is not None:
                found.setdefault((side, what), []).append(name)
    if not found:
        return None
    parts = [f"{_where(names, 2)} ({what}) only in the {side}" for (side, what), names in found.items()]
    extra = any(side == "checkpoint" for side, _ in found)
    step = (
        "- drop: the keys, they are no weights"
        if extra
        else "allow them as missing: target: {allow: {missing: […]}}; the model makes them itself"
    )
    return Cause(
        "buffers", "buffers that a library added or dropped: " + "; ".join(parts), tuple(name for names in found.values() for name in names), step, soft=True,
    )  # fmt: skip


def tied(sides: Sides) -> Cause | None:
    """A second name of a tensor that is there, and was left out because it is one."""
    pairs = list(sides.comparison.tied)
    alias_of = {name: first for group in sides.wanted.ties for first in group[:1] for name in group[1:]}
    missing = [name for name in sides.missing if _HEADS.search(name) and name not in alias_of]
    for name in missing:
        shape = sides.shape(name, sides.wanted)
        partner = next(
            (other for other in (*sides.found, *sides.missing) if _EMBEDDINGS.search(other) and other != name
             and (shape is None or shape in (sides.shape(other, sides.found), sides.shape(other, sides.wanted), None))), None,
        )  # fmt: skip
        if partner is not None:
            pairs.append((name, partner))
    if not pairs:
        return None
    count = f"{len(pairs)} missing keys are aliases" if len(pairs) > 1 else "1 missing key is an alias"
    shown = "; ".join(f"{printable(name)} is {printable(first)}" for name, first in pairs[:2])
    return Cause(
        "tied", f"{count} of what is there (tied weights, of which files keep one name): {shown}", tuple(name for name, _ in pairs),
        f"- tie: {{from: {printable(pairs[0][1])}, to: {printable(pairs[0][0])}}}, or the rule hf-tie-lm-head",
    )  # fmt: skip


def attention(sides: Sides) -> Cause | None:
    """Queries, keys and values (or gate and up) in one tensor here, in several there."""
    for ((side, fused_in), (other, split_in)), (one_name, several) in product((_both(sides), _both(sides)[::-1]), _FUSED):
        fused = [name for name in fused_in if one_name.search(name)]
        split = [name for name in split_in if several.search(name) and not one_name.search(name)]
        if not fused or len(split) <= len(fused):
            continue
        manifests = (sides.found, sides.wanted) if side == "checkpoint" else (sides.wanted, sides.found)
        one, many = sides.shape(fused[0], manifests[0]), sides.shape(split[0], manifests[1])
        shapes = f" ({list(one)} against {list(many)})" if one is not None and many is not None else ""
        verb = "- split" if side == "checkpoint" else "- concat"
        return Cause(
            "attention", f"the {side} fuses what the {other} keeps apart: {_where(fused, 1)} against {_where(split, 3)}{shapes}; whether rows go "
            "by q, k, v or head by head shows only when the models run", (*fused, *split), f"{verb}: {{from: …, to: …}}, proved with --parity",
        )  # fmt: skip
    return None


def weight_norm(sides: Sides) -> Cause | None:
    """weight_g and weight_v, their newer spelling, or folded."""

    def spelling(names: Sequence[str]) -> tuple[str, list[str]]:
        old = [name for name in names if _OLD_NORM.search(name)]
        new = [name for name in names if _NEW_NORM.search(name)]
        return ("weight_g/weight_v", old) if old else ("parametrizations.weight.original0/1", new) if new else ("plain weights", [])

    (here, found), (there, wanted) = spelling(sides.unexpected), spelling(sides.missing)
    if here == there or not (found or wanted):
        return None
    bases = {_NEW_NORM.sub(".", _OLD_NORM.sub("", name)).rstrip(".") for name in (*found, *wanted)}
    plain = [
        name
        for name in (*sides.missing, *sides.unexpected)
        if name.removesuffix(".weight").rstrip(".") in {base.rstrip(".") for base in bases}
    ]
    if not wanted and not any(name in sides.missing for name in plain):
        return None  # of a part that the model does not have at all
    rule = {
        ("weight_g/weight_v", "parametrizations.weight.original0/1"): "weight-norm-to-parametrizations",
        ("parametrizations.weight.original0/1", "weight_g/weight_v"): "weight-norm-from-parametrizations",
        ("weight_g/weight_v", "plain weights"): "weight-norm-fold",
        ("plain weights", "weight_g/weight_v"): "a rule with - weight_norm: split",
    }.get((here, there), "a rule with - weight_norm")
    return Cause(
        "weight-norm", f"weight normalisation is stored as {here} in the checkpoint ({_where(found or plain, 1)}) and as {there} in the model "
        f"({_where(wanted or plain, 1)})", (*found, *wanted, *plain), f"the rule {rule}" if not rule.startswith("a ") else rule,
    )  # fmt: skip


def experts(sides: Sides) -> Cause | None:
    """One tensor per expert here, one for all experts there."""
    for (side, each_in), (other, stacked_in) in (_both(sides), _both(sides)[::-1]):
        single = [name for name in each_in if _EXPERT.search(name)]
        stacked = [name for name in stacked_in if _STACKED.search(name) and not _EXPERT.search(name)]
        if single and stacked:
            numbers = {int(match.group().split(".")[2]) for name in single if (match := _EXPERT.search(name))}
            return Cause(
                "experts", f"the {side} has one tensor for each of {len(numbers)} experts ({_where(single, 1)}), the {other} one for all "
                f"({_where(stacked, 2)})", (*single, *stacked),
                "- stack (in numeric order), and - concat where gate and up are joined; rules mixtral-to-fused-experts, qwen2-moe-to-fused-experts"
                if side == "checkpoint" else "- unstack",
            )  # fmt: skip
    return None


def renamed(sides: Sides) -> Cause | None:
    """The same tensors under other names: a refactoring, or another library's words."""
    here = _signatures(sides, sides.unexpected, sides.found)
    there = _signatures(sides, sides.missing, sides.wanted)
    if here is None or there is None or not here or not there:
        return None
    shared = sum((here & there).values())
    if shared < 0.8 * sum(there.values()):
        return None
    shapes = set(here & there)
    names = [name for name in sides.unexpected if (sides.shape(name, sides.found),) in {(shape,) for shape in shapes}]
    names += [name for name in sides.missing if (sides.shape(name, sides.wanted),) in {(shape,) for shape in shapes}]
    return Cause(
        "renamed", f"{shared:,} of {len(sides.missing):,} missing tensors are there under other names, with the same shapes: {_where(sides.unexpected, 2)} "
        f"against {_where(sides.missing, 2)}", tuple(names), "`ckptconv suggest` finds which is which",
    )  # fmt: skip


def _signatures(sides: Sides, names: Sequence[str], of: Manifest) -> Counter[tuple[int, ...]] | None:
    shapes = [sides.shape(name, of) for name in names]
    return None if any(shape is None for shape in shapes) else Counter(shape for shape in shapes if shape is not None)


def left_over(sides: Sides) -> Cause | None:
    """What nothing explains: keys that are only in the checkpoint."""
    if not sides.unexpected:
        return None
    return Cause(
        "unexpected", f"{count_of(len(sides.unexpected), 'key', 'be')} only in the checkpoint, and nothing in the model is like them: {_where(sides.unexpected)}",
        sides.unexpected, "- drop: […] in a rule, if they are not needed (a head, a decoder, a loss); strict=False would drop them silently", soft=True,
    )  # fmt: skip


def lacking(sides: Sides) -> Cause | None:
    """What nothing explains: keys that are only in the model."""
    if not sides.missing:
        return None
    known = [name for name in sides.missing if name not in sides.unknown]
    elements = sum(prod(sides.wanted[name].shape) for name in known)
    share = f", {elements / sides.wanted.numel:.1%} of its parameters" if known and sides.wanted.numel and not sides.unknown else ""
    return Cause(
        "missing", f"{count_of(len(sides.missing), 'key', 'be')} only in the model{share}: {_where(sides.missing)}; strict=False would leave them random, silently",
        sides.missing, "another file holds them, or they are trained anew: allow them by name, target: {allow: {missing: […]}}", soft=True,
    )  # fmt: skip


def dtypes(sides: Sides) -> Cause | None:
    """Dtypes that would lose values."""
    if not sides.comparison.dtypes:
        return None
    _, found, wanted = sides.comparison.dtypes[0]
    names = tuple(name for name, _, _ in sides.comparison.dtypes)
    return Cause(
        "dtype", f"{count_of(len(names), 'tensor', 'be')} {found.dtype} in the checkpoint and {wanted.dtype} in the model: load_state_dict rounds them without a word",
        names, f"- cast: {{keys: '**', dtype: {wanted.dtype}}}, which counts what changes",
    )  # fmt: skip


RECOGNISERS: tuple[Callable[[Sides], Cause | None], ...] = (
    buffers, tied, weight_norm, experts, attention, renamed,
)  # fmt: skip
LEFTOVERS: tuple[Callable[[Sides], Cause | None], ...] = (left_over, lacking, dtypes)
