"""Another variant or another family: what no renaming can mend. Told from blocks that repeat, their number, and what they are made of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from msgspec import Struct

from ckptconv.errors import printable
from ckptconv.explain.sides import Cause, Sides
from ckptconv.spec import Manifest

#: Words that stand before a block's number where stages have numbers too.
_BLOCK_WORDS = frozenset({"blocks", "block", "layers", "layer", "resblocks", "resnets", "attentions", "transformer_blocks", "m"})
_NUMBERED = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


class Kind(Struct, frozen=True):
    """What a model seems to be, in words: a family, and what tells its members apart."""

    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


#: Family -> names that all must occur somewhere; the first that holds is it. Regular expressions on whole parts of names.
_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA adapter", (r"lora_(?:A|B|down|up)\b",)),
    ("a mixture of experts", (r"\bexperts\b", r"\b(?:gate|router|mlp\.gate|block_sparse_moe)\b")),
    ("Whisper", (r"\bencoder\.conv1\b", r"\bdecoder\.(?:layers|blocks)\b")),
    ("CLIP", (r"\b(?:visual|vision_model)\b", r"\b(?:logit_scale|text_projection|text_model)\b")),
    ("Swin", (r"\brelative_position_bias_table\b",)),
    ("ConvNeXt", (r"\b(?:dwconv|conv_dw|layer_scale(?:_parameter)?|gamma)\b", r"\bstages?\b|\bfeatures\b", r"\b(?:pwconv1|fc1|block)\b")),
    (
        "a UNet of a diffusion model",
        (r"\b(?:input_blocks|down_blocks)\b", r"\b(?:output_blocks|up_blocks)\b", r"\b(?:middle_block|mid_block)\b"),
    ),
    ("an autoencoder (VAE)", (r"\bencoder\.(?:down|down_blocks)\b", r"\bdecoder\.(?:up|up_blocks)\b")),
    ("YOLO", (r"^(?:model\.)?\d+\.(?:conv|cv1|m)\b", r"\bcv2\b")),
    ("an EfficientNet or MobileNet", (r"\b(?:conv_dw|conv_pwl|bn3|se|features)\b", r"\b(?:conv_stem|features\.0\.0|blocks\.0\.0)\b")),
    (
        "ResNet with bottleneck blocks",
        (r"\b(?:layer1|stages\.0|encoder\.stages\.0)\b", r"\b(?:layer1\.0\.conv3|stages\.0\.layers\.0\.layer\.2)\b"),
    ),
    (
        "ResNet with basic blocks",
        (r"\b(?:layer1|stages\.0|encoder\.stages\.0)\b", r"\b(?:layer1\.0\.conv2|stages\.0\.layers\.0\.layer\.1)\b"),
    ),
    ("a ViT", (r"\b(?:cls_token|class_token|patch_embed|patch_embeddings|conv_proj)\b", r"\b(?:blocks|layers?|encoder_layer_0|layer)\b")),
    ("GPT-2", (r"\b(?:wte)\b", r"\bh\.\d+\b")),
    ("GPT-NeoX", (r"\bembed_in\b", r"\bquery_key_value\b")),
    ("BERT", (r"\b(?:word_embeddings|tok_embeddings)\b", r"\b(?:LayerNorm|token_type_embeddings|attention\.self)\b")),
    ("a Llama-like language model", (r"\b(?:embed_tokens|tok_embeddings|wte)\b", r"\b(?:gate_proj|w1|fc_1|linear_fc1)\b")),
)


def kind_of(manifest: Manifest) -> Kind | None:
    """The family of a model by its names, with its blocks, or None where it is none of those that are known.

    >>> from ckptconv.spec import DType, TensorSpec
    >>> names = ["conv1.weight", *(f"layer{s}.{i}.conv{c}.weight" for s in (1, 2) for i in range(s) for c in (1, 2))]
    >>> str(kind_of(Manifest({name: TensorSpec((4, 4, 3, 3), DType.float32) for name in names})))
    'ResNet with basic blocks (stages of 1, 2)'
    """
    text = "\n".join(dict.fromkeys(_NUMBERED.sub(lambda match: "0" if match.group() != "1" else "1", name) for name in manifest))
    whole = "\n".join(manifest) if len(manifest) < 20_000 else text
    for name, patterns in _FAMILIES:
        if all(re.search(pattern, whole, re.MULTILINE) for pattern in patterns):
            return Kind(name, _blocks_text(manifest))
    return None


def _blocks_text(manifest: Manifest) -> str:
    counts = stacks(manifest)
    if not counts:
        return ""
    if len(counts) == 1:
        return f"{next(iter(counts.values()))} blocks"
    values = list(counts.values())
    return "stages of " + ", ".join(map(str, values)) if len(values) <= 6 else f"{sum(values)} blocks"


def stacks(manifest: Manifest) -> dict[str, int]:
    """The stacks of blocks that hold most of a model: path -> how many. Of stacks within stacks, the inner ones.

    >>> from ckptconv.spec import DType, TensorSpec
    >>> stacks(Manifest({f"blocks.{i}.fc.weight": TensorSpec((4, 4), DType.float32) for i in range(3)}))
    {'blocks': 3}
    """
    indices: dict[str, set[str]] = {}
    tensors: Counter[str] = Counter()
    for name in manifest:
        parts = name.split(".")
        numbered = [at for at, part in enumerate(parts) if part.isdigit() and at and at < len(parts) - 1]
        if not numbered:
            continue
        # Of stages.1.blocks.2.mlp.fc.weight the block is meant: the second number, where the word before it means blocks.
        at = next((each for each in numbered[1:2] if parts[each - 1] in _BLOCK_WORDS), numbered[0])
        path = ".".join(parts[:at])
        indices.setdefault(path, set()).add(parts[at])
        tensors[path] += 1
    most = max(tensors.values(), default=0)
    return {path: len(found) for path, found in indices.items() if tensors[path] * 8 >= most}


def blocks(sides: Sides) -> Cause | None:
    """Bottleneck against basic blocks, and other families, told by name."""
    here, there = kind_of(sides.found), kind_of(sides.wanted)
    if here is None or there is None or here.name == there.name:
        return None
    if "blocks" in here.name and "blocks" in there.name:
        return Cause(
            "blocks", f"the file is {_a(here)}, the model {_a(there)}: other blocks, so no renaming can help", _most(sides),
            "build the model that the file was trained as, or find the file for this one", fatal=True,
        )  # fmt: skip
    if here.name == "a LoRA adapter" or _shared(sides) >= 0.5:
        return None
    return Cause(
        "family", f"the file is {_a(here)}, the model {_a(there)}: another architecture, so no renaming can help", _most(sides),
        "build the model that the file was trained as, or find the file for this one", fatal=True,
    )  # fmt: skip


def depth(sides: Sides) -> Cause | None:
    """Another number of blocks."""
    here, there = stacks(sides.found), stacks(sides.wanted)
    if not here or not there or list(here.values()) == list(there.values()) or len(here) != len(there):
        return None
    pairs = [(a, b) for a, b in zip(here.values(), there.values(), strict=True) if a != b]
    if not sides.missing and not sides.unexpected:
        return None
    if len(here) == 1:
        have, want = pairs[0]
        what = f"the depth is another: the file has {have} blocks ({printable(next(iter(here)))}.*), the model {want} ({printable(next(iter(there)))}.*)"
    else:
        what = f"the depth is another: the file has stages of {_listed(here)} blocks, the model of {_listed(there)}"
    lost = "the rest of the model would stay random" if sum(here.values()) < sum(there.values()) else "the rest of the file would be lost"
    return Cause(
        "depth", f"{what}; {lost}, so no renaming can help", _most(sides),
        "build the model with as many blocks as the file has, or find the file of this size", fatal=True,
    )  # fmt: skip


def stranger(sides: Sides) -> Cause | None:
    """Hardly any shape in common: another network, whatever both are called."""
    if sides.unknown or len(sides.wanted) < 4:
        return None
    share = _shared(sides)
    if share >= 0.3 or not sides.missing:
        return None
    here, there = kind_of(sides.found), kind_of(sides.wanted)
    who = f" (the file looks like {_a(here)}, the model like {_a(there)})" if here is not None and there is not None else ""
    return Cause(
        "family", f"it is another network: only {share:.0%} of the model's parameters have a tensor of their shape in the file{who}; no renaming can help",
        _most(sides), "build the model that the file was trained as, or find the file for this one", fatal=True,
    )  # fmt: skip


def _shared(sides: Sides) -> float:
    """The share of the model's parameters for which the file has elements enough of the like: the same shape, or the same rows' length."""
    if sides.unknown:
        return 1.0
    here: Counter[int] = Counter()
    for spec in sides.found.stored.values():
        here[_signature(spec.shape)] += spec.numel
    total = covered = 0
    for signature, elements in _elements(sides.wanted).items():
        total += elements
        covered += min(elements, here[signature])
    return covered / total if total else 1.0


def _elements(manifest: Manifest) -> Counter[int]:
    found: Counter[int] = Counter()
    for spec in manifest.stored.values():
        found[_signature(spec.shape)] += spec.numel
    return found


def _signature(shape: tuple[int, ...]) -> int:
    """What fusing, splitting, transposing and squeezing leave as it is: the shortest axis that is no 1, and whether it is a kernel."""
    sizes = [size for size in shape if size > 1]
    if len(sizes) == 3 and sizes[-1] > 11:  # no kernel is that long: matrices in a stack
        sizes = sizes[1:]
    return 0 if not sizes else min(sizes) if len(sizes) <= 2 else -min(sizes[:2]) * 1000 - sizes[-1]


def _most(sides: Sides) -> tuple[str, ...]:
    return (*sides.unexpected, *sides.missing, *(name for name, _, _ in sides.sizes))


def _listed(found: dict[str, int]) -> str:
    return ", ".join(map(str, found.values()))


def _a(kind: Kind) -> str:
    text = str(kind)
    return text if text.startswith(("a ", "an ")) else f"a {text}"


RECOGNISERS: tuple[Callable[[Sides], Cause | None], ...] = (blocks, depth, stranger)
