"""Models that are mutated by a seed, so that the truth is known by construction.

The target is the model as it is, the source the same model after two or three mutations. Names and order are never destroyed together:
where modules are called by words that mean nothing, their order stays, and where the order is shuffled, the words stay recognisable.
Otherwise nothing would tell a query from a key, and the truth would be a guess.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import models
from models import Factory
from pairs import Built

from ckptconv.plan import Output, Plan, Read
from ckptconv.spec import DType, Manifest, TensorSpec

COUNT = 20

#: Words that people use for one another.
SYNONYMS = {
    "attn": ("attention", "self_attention", "mha"), "attention": ("attn", "self_attn"), "self_attn": ("attention", "attn"),
    "mlp": ("ffn", "feed_forward"), "fc1": ("lin1", "w_in", "dense_in"), "fc2": ("lin2", "w_out", "dense_out"), "c_fc": ("fc1", "up"),
    "q_proj": ("query", "wq", "to_q"), "k_proj": ("key", "wk", "to_k"), "v_proj": ("value", "wv", "to_v"), "o_proj": ("out_proj", "wo", "to_out"),
    "query": ("q_proj", "wq"), "key": ("k_proj", "wk"), "value": ("v_proj", "wv"), "qkv": ("in_proj", "c_attn"), "c_attn": ("qkv", "in_proj"),
    "c_proj": ("out", "proj"), "proj": ("out", "projection"), "norm1": ("ln_1", "layernorm_before"), "norm2": ("ln_2", "layernorm_after"),
    "ln_1": ("norm1", "input_layernorm"), "ln_2": ("norm2", "post_attention_layernorm"), "ln_f": ("final_norm", "norm"),
    "norm": ("final_norm", "ln_post"), "input_layernorm": ("norm1", "ln_1"), "post_attention_layernorm": ("norm2", "ln_2"),
    "gate_proj": ("w1", "gate"), "up_proj": ("w3", "up"), "down_proj": ("w2", "down"), "blocks": ("layers", "h", "encoder_layers"),
    "layers": ("blocks", "h"), "layer": ("blocks", "layers"), "h": ("blocks", "layers"), "stages": ("levels", "groups"),
    "conv1": ("conv_a", "convolution1"), "conv2": ("conv_b", "convolution2"), "conv3": ("conv_c", "convolution3"),
    "bn1": ("norm_a", "batchnorm1"), "bn2": ("norm_b", "batchnorm2"), "bn3": ("norm_c", "batchnorm3"), "downsample": ("shortcut", "skip"),
    "fc": ("classifier", "linear_head"), "head": ("classifier", "fc"), "lm_head": ("output", "decoder_head"), "wte": ("tok_embeddings", "token_embedding"),
    "wpe": ("pos_embeddings", "position_embedding"), "embed_tokens": ("tok_embeddings", "word_embeddings"), "embeddings": ("embed",),
    "word_embeddings": ("tok_embeddings",), "position_embeddings": ("pos_embeddings",), "LayerNorm": ("norm", "layer_norm"),
    "dense": ("linear",), "intermediate": ("ffn_in",), "patch_embed": ("patch_embeddings", "patchify"), "conv_dw": ("dwconv", "depthwise"),
    "transformer": ("backbone",), "model": ("decoder",), "encoder": ("trunk",),
}  # fmt: skip
WRAPPERS = ("module.", "model.", "_orig_mod.", "net.backbone.", "student.module.", "ema_model.module.")
SYLLABLES = ("ka", "lo", "mi", "ne", "pu", "ra", "si", "to", "ve", "zu")

Names = dict[str, str]  #: of a target's tensor, as the source calls it; in the source's order


@dataclass(frozen=True)
class Mutation:
    """One base model with a seed and what is done to it."""

    base: str
    seed: int
    kinds: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.base} #{self.seed}: {', '.join(self.kinds)}"

    def build(self) -> Built:
        target = models.manifest(BASES[self.base])
        chosen = random.Random(f"{self.base} {self.seed}")
        names: Names = {name: name for name in target}
        for kind in self.kinds:
            if kind != "inserted layers":
                names = KINDS[kind](names, chosen)
        tensors = {names[name]: target[name] for name in names}
        if "inserted layers" in self.kinds:
            tensors = inserted(tensors, chosen)
        order = {name: at for at, name in enumerate(tensors)}
        source = Manifest(tensors, tuple(tuple(sorted((names[name] for name in group), key=order.__getitem__)) for group in target.ties))
        outputs = (Output(name, Read(source.aliases.get(names[name], names[name]), spec)) for name, spec in target.tensors.items())
        return Built(source, target, Plan(source, tuple(outputs), target.ties))


def renamed(names: Names, chosen: random.Random) -> Names:
    """Every second word that has one gets a synonym, the same everywhere; two that stand side by side never get the same."""
    return _worded(names, lambda word: chosen.choice(SYNONYMS[word]) if word in SYNONYMS and chosen.random() < 0.7 else word)


def reworded(names: Names, chosen: random.Random) -> Names:
    """Every second module gets a word that means nothing, the same everywhere. What parameters are called stays."""
    return _worded(names, lambda word: "".join(chosen.choices(SYLLABLES, k=3)) if chosen.random() < 0.5 else word)


def _worded(names: Names, word_for: Callable[[str], str]) -> Names:
    """Where a choice would give two modules one name, the next choice is taken: none of these may swap two modules' names."""
    there = {part for name in names.values() for part in name.split(".")}
    modules = sorted({part for name in names.values() for part in name.split(".")[:-1] if not part.isdigit()})
    said: dict[str, str] = {}
    for word in modules:
        for _ in range(20):
            said[word] = word_for(word)
            if said[word] == word or (said[word] not in there and list(said.values()).count(said[word]) == 1):
                break
        else:
            said[word] = word
    found = {}
    for target, name in names.items():
        *parents, last = name.split(".")
        found[target] = ".".join([*(said.get(part, part) for part in parents), last])
    assert len(set(found.values())) == len(found)
    return found


def shuffled(names: Names, chosen: random.Random) -> Names:
    """The modules are registered in another order, at every level of the tree; a module's own parameters stay as they are."""
    rank: dict[str, float] = {}

    def place(name: str) -> tuple[float, ...]:
        parts = name.split(".")
        paths = [".".join(parts[: at + 1]) for at in range(len(parts) - 1)]
        return tuple(int(path.rpartition(".")[2]) if path.rpartition(".")[2].isdigit() else rank[path] for path in paths)

    for name in names.values():
        parts = name.split(".")
        for at in range(len(parts) - 1):
            rank.setdefault(".".join(parts[: at + 1]), chosen.random())
    order = sorted(names, key=lambda target: place(names[target]))
    return {target: names[target] for target in order}


def offset(names: Names, chosen: random.Random) -> Names:
    """The indices of the longest list start at another number than 0."""
    step = chosen.randint(1, 3)
    lists: dict[str, set[str]] = {}
    for name in names.values():
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part.isdigit():
                lists.setdefault(".".join(parts[:at]), set()).add(part)
                break
    if not lists:
        return names
    word = max(lists, key=lambda each: len(lists[each])) + "."
    found = {}
    for target, name in names.items():
        head, _, rest = name.removeprefix(word).partition(".")
        found[target] = f"{word}{int(head) + step}.{rest}" if name.startswith(word) and head.isdigit() else name
    return found


def wrapped(names: Names, chosen: random.Random) -> Names:
    prefix = chosen.choice(WRAPPERS)
    return {target: prefix + name for target, name in names.items()}


def inserted(tensors: dict[str, TensorSpec], chosen: random.Random) -> dict[str, TensorSpec]:
    """Modules that the target does not have: a projector at the end, an adapter in a third of the blocks, a counter at the start."""
    blocks = sorted({name[: at + len(part) + 1] for name in tensors for at, part in _indices(name)})
    places = chosen.sample(blocks, max(1, len(blocks) // 3)) if blocks else []
    found: dict[str, TensorSpec] = {"training_step": TensorSpec((), DType.int64)}
    waiting = set(places)
    for name, spec in tensors.items():
        found[name] = spec
        for place in sorted(waiting):
            if name.startswith(place + "."):
                waiting.discard(place)
                found[f"{place}.side_adapter.down.weight"] = TensorSpec((7, 13), spec.dtype)
                found[f"{place}.side_adapter.up.weight"] = TensorSpec((13, 7), spec.dtype)
    return found | {"projector.0.weight": TensorSpec((37, 29), DType.float32), "projector.0.bias": TensorSpec((37,), DType.float32)}


def _indices(name: str) -> list[tuple[int, str]]:
    found, at = [], 0
    for part in name.split("."):
        if part.isdigit():
            found.append((at - 1, "." + part))
            break
        at += len(part) + 1
    return found


KINDS: dict[str, Callable[[Names, random.Random], Names]] = {
    "synonyms": renamed, "new words": reworded, "shuffled order": shuffled, "index offset": offset, "wrapper": wrapped,
}  # fmt: skip
BASES: dict[str, Factory] = {
    "ViT": models.timm_vit, "ResNet-18": lambda: models.torchvision_resnet(18), "ConvNeXt": models.timm_convnext, "GPT-2": models.LinearGpt,
    "Llama": lambda: models.hf_causal("Llama"), "BERT": lambda: models.hf_text("BertForMaskedLM"), "Swin": models.timm_swin,
}  # fmt: skip
_RECIPES: tuple[tuple[str, ...], ...] = (
    ("synonyms", "wrapper"),
    ("new words", "index offset"),
    ("synonyms", "shuffled order"),
    ("new words", "inserted layers", "wrapper"),
    ("index offset", "shuffled order"),
    ("synonyms", "inserted layers", "index offset"),
    ("shuffled order", "inserted layers", "wrapper"),
)


def mutations() -> list[Mutation]:
    bases = list(BASES)
    return [Mutation(bases[at % len(bases)], at, _RECIPES[(at + at // len(bases)) % len(_RECIPES)]) for at in range(COUNT)]
