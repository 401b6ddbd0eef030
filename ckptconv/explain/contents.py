"""What the file itself is, whatever it should load into: an adapter, an optimizer's state, a shard, a training checkpoint, a pickled model."""

from __future__ import annotations

import re
from collections.abc import Callable

from ckptconv.errors import printable
from ckptconv.explain.sides import Cause, FileFacts, Part, count_of
from ckptconv.explain.wrapping import unwrapped
from ckptconv.names import collapse
from ckptconv.spec import Manifest

#: Words in a container's path that mean averaged weights.
_AVERAGED = re.compile(r"ema|average|swa|shadow", re.IGNORECASE)
_ADAPTER = re.compile(r"(?:^|\.)(?:lora_[AB]|lora_(?:down|up|mid|magnitude_vector|embedding_[AB])|hada_w\d\w*|alpha|ia3_l)(?:\.|$)")
_ADAPTER_ONLY = re.compile(r"(?:^|\.)(?:lora_|hada_w|ia3_l)")
_RANK = re.compile(r"(?:^|/)(?:consolidated\.\d+\.pth$|mp_rank_\d+)")
_FLAT = re.compile(r"(?:^|\.)_?flat_param(?:_\d+)?$")
_MOMENTS = re.compile(r"(?:^|\.)(?:exp_avg|exp_avg_sq|momentum_buffer|max_exp_avg_sq|master_param)$")
#: What quantisers leave beside a weight: the name's end -> (whose, what helps).
_QUANTISED: tuple[tuple[str, str, str], ...] = (
    (r"\.weight_scale_inv$", "block-scaled fp8 (DeepSeek's layout)", "the rule fp8-blocks-to-float decodes it exactly"),
    (r"_(?:blocks|scales)$", "mxfp4 experts (gpt-oss)", "the rule mxfp4-experts-to-float decodes it exactly"),
    (r"\.(?:SCB|weight_format)$", "bitsandbytes int8", "- decode: {layout: int8, …} with the scales in SCB / 127"),
    (
        r"\.(?:absmax|quant_map|nested_absmax|quant_state\.\S+)$",
        "bitsandbytes 4 bit",
        "load it with bitsandbytes and save it dequantised (model.dequantize())",
    ),
    (
        r"\.(?:qweight|qzeros|g_idx)$",
        "GPTQ or AWQ",
        "load it with the library that made it and save it dequantised, or take the unquantised file",
    ),
    (
        r"\.(?:weight_packed|weight_shape)$",
        "compressed-tensors",
        "load it with transformers and save it dequantised (run_compressed=False)",
    ),
    (r"\.(?:_packed_params\S*|zero_point)$", "torch.ao quantisation", "the rule torch-dynamic-quant-to-float"),
    (r"\.(?:weight_scale|input_scale|k_scale|v_scale)$", "fp8 with one scale a tensor or channel", "- decode, or the unquantised file"),
)


def is_average(path: str) -> bool:
    """Whether a state_dict's place says that it is an averaged copy.

    >>> is_average("state_dict_ema"), is_average("model")
    (True, False)
    """
    return _AVERAGED.search(path) is not None


def optimizer(file: FileFacts, part: Part | None, _wanted: Manifest | None) -> Cause | None:
    """Nothing but an optimizer's state."""
    if file.optimizer is not None:
        parameters, groups = file.optimizer
        return Cause(
            "optimizer", f"this is an optimizer's state ({parameters:,} parameters in {groups} group{'s' if groups != 1 else ''}), not a model: it holds "
            "moments, and knows parameters by number only", (), "name the file with the model's weights; ckptconv run … --optimizer-file takes this state along",
            fatal=True,
        )  # fmt: skip
    names = [name for name in part.manifest if _MOMENTS.search(name)] if part is not None else []
    if part is not None and names and len(names) * 3 >= len(part.manifest):
        return Cause("optimizer", f"{len(names):,} of {len(part.manifest):,} tensors are an optimizer's moments (exp_avg and the like), not weights",
                     tuple(names), "name the state_dict or the file with the model's weights", fatal=True)  # fmt: skip
    return None


def adapter(_file: FileFacts, part: Part | None, wanted: Manifest | None) -> Cause | None:
    """A LoRA without its base."""
    if part is None:
        return None
    names = [name for name in part.manifest if _ADAPTER.search(name)]
    if not any(_ADAPTER_ONLY.search(name) for name in names) or len(names) * 2 < len(part.manifest):
        return None
    apply = sum(name in wanted for name in names) if wanted is not None else 0
    kohya = any(name.startswith(("lora_unet_", "lora_te")) for name in names)
    where = f": {apply:,} of {len(names):,} adapter keys would apply" if wanted is not None else f" ({count_of(len(names), 'key')})"
    more = ", and load_state_dict(strict=False) would silently leave the base model as it is" if wanted is not None and not apply else ""
    try_ = (
        "its names are kohya's: the rule kohya-to-peft-lora first" if kohya else "ckptconv run peft-lora-merge BASE DST --also adapter=SRC"
    )
    return Cause(
        "adapter", f"this is a LoRA adapter alone{where}{more}; it changes a base model, which is another file", tuple(names), try_, fatal=not apply,
    )  # fmt: skip


def quantised(_file: FileFacts, part: Part | None, wanted: Manifest | None) -> Cause | None:
    """Scales and packed numbers of a quantiser, which the model does not have."""
    if part is None:
        return None
    for pattern, whose, helps in _QUANTISED:
        names = [name for name in part.manifest if re.search(pattern, name) and (wanted is None or name not in wanted)]
        if pattern.startswith("_(?:blocks") and not any(name.endswith("_blocks") for name in names):
            continue
        if pattern.startswith(r"\.(?:qweight") and not any(name.endswith("qweight") for name in names):
            continue
        if names:
            count = count_of(len(names), "key", "be")
            return Cause("quantised", f"the weights are quantised, {whose}: {count} scales and the like, which no plain model has ({_few(names)})",
                         tuple(names), helps, fatal=True)  # fmt: skip
    if wanted is not None and part.composites and any(kind == "int8" for kind in part.composites.values()):
        return Cause("quantised", f"{count_of(len(part.composites), 'tensor', 'be')} quantised by torch itself; they are written out as floats",
                     tuple(part.composites), "ckptconv run plain-tensors SRC DST")  # fmt: skip
    return None


def flat(_file: FileFacts, part: Part | None, _wanted: Manifest | None) -> Cause | None:
    """FSDP1's flat parameters."""
    names = [name for name in part.manifest if _FLAT.search(name)] if part is not None else []
    if not names:
        return None
    return Cause(
        "flat", f"{count_of(len(names), 'tensor', 'be')} flat parameters of FSDP1, in which each rank keeps a piece of all weights in one row ({_few(names)}); their names "
        "and shapes are in the training program only", tuple(names),
        "save again with StateDictType.FULL_STATE_DICT, or with torch.distributed.checkpoint, which ckptconv reads", fatal=True,
    )  # fmt: skip


#: Formats that torch.load and load_file do not read -> what they are.
_FOLDERS = {
    "torch-distributed": "a folder of torch.distributed.checkpoint, whose tensors lie in pieces over its files",
    "deepspeed-zero": "a folder of DeepSpeed ZeRO, in which every rank holds flat pieces of the optimizer's float32 weights",
    "tensor-parallel": "a tensor-parallel set: every rank holds a part of most tensors",
}


def layout(file: FileFacts, part: Part | None, _wanted: Manifest | None) -> Cause | None:
    """Weights in a layout that a plain load does not read: folders of trainings, sparse and quantised tensors, scripted modules."""
    if part is None:
        return None
    what = _FOLDERS.get(file.format, "")
    kinds = sorted({kind for kind in part.composites.values() if kind in ("coo", "csr")})
    if not what and kinds:
        what = f"a file with {len(part.composites):,} sparse tensors ({', '.join(kinds)}), which a model's parameters are not"
    if not what:
        return None
    return Cause("layout", f"this is {what}; ckptconv reads it and writes plain tensors", (), "ckptconv run plain-tensors SRC DST")


def rank(file: FileFacts, part: Part | None, _wanted: Manifest | None) -> Cause | None:
    """One file of a tensor-parallel set, by its name."""
    match = _RANK.search(file.path)
    if part is None or match is None or file.files > 1:
        return None
    return Cause(
        "parallel", f"by its name ({printable(match[0].strip('/'))}) this is one rank of a tensor-parallel set, and most of its tensors may be parts", (),
        "name the folder that holds all ranks: ckptconv reads them together",
    )  # fmt: skip


def container(file: FileFacts, part: Part | None, _wanted: Manifest | None) -> Cause | None:
    """Weights inside a training checkpoint."""
    if part is None or part.path == "." or part.is_module or file.format in _FOLDERS:
        return None
    beside = ", ".join(printable(name) for name in file.beside[:5] if name != part.path) + (", …" if len(file.beside) > 5 else "")
    return Cause(
        "container", f"the weights are in {printable(part.path)!r} of a training checkpoint" + (f", beside {beside}" if beside else "")
        + "; load_state_dict(torch.load(…)) is given all of it", (),
        f"torch.load(…){''.join(f'[{key!r}]' for key in part.path.split('.'))} in Python; ckptconv takes it out",
    )  # fmt: skip


def averaged(file: FileFacts, part: Part | None, _wanted: Manifest | None) -> Cause | None:
    """Several copies of one model's weights."""
    if part is None or len(file.parts) < 2:
        return None
    mine = {unwrapped(name)[0]: spec.shape for name, spec in part.manifest.tensors.items()}
    copies = [other for other in file.parts if other is not part and _is_copy(other.manifest, mine)]
    if not copies:
        return None
    averages = [copy.path for copy in (part, *copies) if is_average(copy.path)]
    listed = ", ".join(printable(copy.path) for copy in (part, *copies))
    which = (
        f"{printable(' and '.join(averages))} {'is' if len(averages) == 1 else 'are'} averaged by its name (EMA)"
        if averages
        else "none says that it is averaged"
    )
    return Cause(
        "averaged", f"the file holds {len(copies) + 1} sets of weights of the same names and shapes: {listed}; {which}. They load alike and score differently",
        (), f"say which is meant: --select {printable((averages or [copies[0].path])[0])}",
    )  # fmt: skip


def _is_copy(manifest: Manifest, mine: dict[str, tuple[int, ...]]) -> bool:
    bare = {unwrapped(name)[0]: spec.shape for name, spec in manifest.tensors.items()}
    same = sum(bare.get(name) == shape for name, shape in mine.items())
    return same >= 0.9 * len(mine)


def networks(_file: FileFacts, part: Part | None, _wanted: Manifest | None) -> Cause | None:
    """Several networks of the same names under attributes of one state_dict."""
    if part is None:
        return None
    groups: dict[str, set[str]] = {}
    for name in part.manifest:
        head, dot, rest = name.partition(".")
        if dot and head.isidentifier():
            groups.setdefault(head, set()).add(rest)
    twins = [
        (one, other)
        for one in groups
        for other in groups
        if one < other and len(groups[one]) >= 3 and len(groups[one] ^ groups[other]) <= 0.1 * len(groups[one])
    ]
    if not twins or any(other.startswith("layer") for _, other in twins):
        return None
    names = sorted({name for pair in twins for name in pair})
    return Cause(
        "networks", f"one state_dict holds {len(names)} networks with the same names, under {_and([f'{name}.' for name in names])}: they fit equally well",
        (), f"say which is meant: ckptconv run lightning-network SRC DST --set network={printable(names[0])}",
    )  # fmt: skip


def pickled(file: FileFacts, part: Part | None, _wanted: Manifest | None) -> Cause | None:
    """A whole module, or objects that torch's safe loader refuses."""
    if part is not None and part.is_module:
        return Cause(
            "module", "the whole model was pickled, not its state_dict: torch.load needs the author's classes (No module named …); its tensors are "
            "recovered here without running anything", (), "save model.state_dict() next time",
        )  # fmt: skip
    if not file.strangers or not file.format.startswith("torch"):
        return None
    classes = list(dict.fromkeys(file.strangers.values()))
    shown = ", ".join(printable(name) for name in classes[:3]) + (f" and {len(classes) - 3} more" if len(classes) > 3 else "")
    if file.format == "torch-distributed":
        return None
    return Cause(
        "weights-only", f"torch.load(weights_only=True) refuses the file (Unsupported global): it holds objects of {shown} "
        f"({printable(next(iter(file.strangers)))}); the tensors are read here without running anything", (),
        "convert it once: what ckptconv writes loads with weights_only=True",
    )  # fmt: skip


def unsupported(_file: FileFacts, part: Part | None, _wanted: Manifest | None) -> Cause | None:
    """Tensors of a kind that cannot be converted."""
    if part is None or not part.unsupported:
        return None
    kinds = ", ".join(dict.fromkeys(printable(kind) for kind in part.unsupported.values()))
    return Cause("unsupported", f"{count_of(len(part.unsupported), 'tensor', 'be')} of a kind that is not read ({kinds}): {_few(list(part.unsupported))}",
                 tuple(part.unsupported), "load and save them as plain tensors where the file was made", fatal=True)  # fmt: skip


def metadata(file: FileFacts, _part: Part | None, _wanted: Manifest | None) -> Cause | None:
    """safetensors without the word by which transformers knows torch's."""
    if file.format != "safetensors" or file.metadata.get("format"):
        return None
    return Cause("metadata", "the safetensors file does not say {\"format\": \"pt\"} in its metadata: older transformers refuse it (metadata.get('format'))",
                 (), "what ckptconv writes says it: ckptconv run plain-tensors SRC DST")  # fmt: skip


def _few(names: list[str], most: int = 2) -> str:
    found = collapse(names)
    return ", ".join(printable(template) for template in found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


RECOGNISERS: tuple[Callable[[FileFacts, Part | None, Manifest | None], Cause | None], ...] = (
    optimizer, flat, layout, rank, adapter, unsupported, container, averaged, networks, pickled, quantised, metadata,
)  # fmt: skip
