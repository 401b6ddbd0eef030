"""Manifests of mixtures of experts as large as one likes: no weights, no libraries."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout that this file lies in is the one that is measured

from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.suggest import suggest

_MATRICES = (("w1", "gate", (112, 48)), ("w2", "down", (48, 112)), ("w3", "up", (112, 48)))


def one_by_one(layers: int, experts: int, *, renamed: bool) -> Manifest:
    """A tensor for every matrix of every expert, in one of two spellings."""
    made: dict[str, TensorSpec] = {}

    def put(name: str, *shape: int) -> None:
        made[name] = TensorSpec(shape, DType.bfloat16)

    put("tok_embeddings.weight" if renamed else "model.embed_tokens.weight", 131, 48)
    for layer in range(layers):
        block = f"layers.{layer}" if renamed else f"model.layers.{layer}"
        for letter in "qkvo":
            put(f"{block}.attention.w{letter}.weight" if renamed else f"{block}.self_attn.{letter}_proj.weight", 48, 48)
        put(f"{block}.moe.router.weight" if renamed else f"{block}.mlp.gate.weight", experts, 48)
        for expert in range(experts):
            for plain, spoken, shape in _MATRICES:
                put(f"{block}.moe.experts.{expert}.{spoken}.weight" if renamed else f"{block}.mlp.experts.{expert}.{plain}.weight", *shape)
        put(f"{block}.attention_norm.weight" if renamed else f"{block}.input_layernorm.weight", 48)
        put(f"{block}.ffn_norm.weight" if renamed else f"{block}.post_attention_layernorm.weight", 48)
    put("norm.weight" if renamed else "model.norm.weight", 48)
    return Manifest(made)


def stacked(layers: int, experts: int) -> Manifest:
    """All experts of a layer in two tensors."""
    made: dict[str, TensorSpec] = {}
    for name, spec in one_by_one(layers, 0, renamed=True).tensors.items():
        if name.endswith("router.weight"):
            block = name.removesuffix(".router.weight")
            made[name] = TensorSpec((experts, 48), spec.dtype)
            made[f"{block}.experts.gate_up"] = TensorSpec((experts, 224, 48), spec.dtype)
            made[f"{block}.experts.down"] = TensorSpec((experts, 48, 112), spec.dtype)
        else:
            made[name] = spec
    return Manifest(made)


def shown() -> None:
    """Seconds of processor time for a few sizes, printed."""
    print(f"{'source':>10}{'target':>10}{'steps':>7}{'seconds':>9}")
    for layers, experts in ((60, 110), (60, 2_750)):
        source = one_by_one(layers, experts, renamed=False)
        for target in (one_by_one(layers, experts, renamed=True), stacked(layers, experts)):
            started = time.process_time()
            found = suggest(source, target, name="large")
            seconds = time.process_time() - started
            if found.verdict != "convertible" or found.missing or found.unexpected:
                raise SystemExit(f"{found.verdict}: {found.reason}; {len(found.missing):,} missing, {len(found.unexpected):,} unexpected")
            steps = sum(line.startswith("  - ") for line in found.text.partition("tests:")[0].splitlines())
            print(f"{len(source):>10,}{len(target):>10,}{steps:>7}{seconds:>9.2f}")
