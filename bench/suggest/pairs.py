"""Pairs of implementations of one architecture, with the truth: the plan of a shipped rule, which the tests prove on the real libraries.

The truth of the way back is the inverse of that plan, and is used only where nothing is lost. A pair whose target cannot be built here
(litgpt, torchtune, …) has what the plan makes as its target, sorted by name as in a file, so that the order gives nothing away.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import models
from models import Factory

from ckptconv.invert import invert
from ckptconv.plan import Plan
from ckptconv.planner import make_plan
from ckptconv.ruleset import builtin
from ckptconv.spec import Manifest
from ckptconv.stage.opening import open_source

#: The suggester may be built on these; all else is held out.
TUNED = frozenset({"vit", "deit", "swin", "resnet", "llama", "moe", "gpt2", "regnet", "siglip", "dinov2"})


@dataclass(frozen=True)
class Built:
    """What a suggester is given, and what it should find."""

    source: Manifest
    target: Manifest
    truth: Plan


@dataclass(frozen=True)
class Pair:
    """Two implementations. ``target`` None: the plan makes it. ``prefix``: what the rule wants before every name of the source."""

    family: str
    name: str
    rule: str
    source: Factory
    target: Factory | None
    given: Mapping[str, Any] = field(default_factory=dict)
    reverse: bool = False
    prefix: str = ""
    note: str = ""  #: what no manifest tells

    @property
    def held_out(self) -> bool:
        return self.family not in TUNED

    def build(self) -> Built:
        source = models.manifest(self.source)
        prefixed = Manifest({self.prefix + name: spec for name, spec in source.tensors.items()}) if self.prefix else source
        plan = make_plan(builtin.find(self.rule), prefixed, given=self.given)
        if self.prefix:
            plan = _without(self.prefix, plan)
        target = models.manifest(self.target) if self.target is not None else _sorted(plan.manifest)
        _check(self.name, plan.manifest, target)
        plan = _like(target, plan)
        if not self.reverse:
            return Built(source, target, plan)
        back = invert(plan)
        if back.lost:
            raise ValueError(f"{self.name}: there is no way back for {[lost.name for lost in back.lost][:5]}")
        return Built(target, source, back.plan)


def _like(target: Manifest, plan: Plan) -> Plan:
    """The same outputs in the target's order, with its ties: a file that does not know of a tie still loads into a model that has it."""
    outputs = {output.name: output for output in plan.outputs}
    return Plan(plan.source, tuple(outputs[name] for name in target if name in outputs), plan.ties, plan.dropped)


def _sorted(manifest: Manifest) -> Manifest:
    return Manifest(dict(sorted(manifest.tensors.items())), manifest.ties)


def _without(prefix: str, plan: Plan) -> Plan:
    data = plan.to_json()
    names = {name: name.removeprefix(prefix) for name in plan.source}
    source = data["source"]
    source["tensors"] = {names[name]: spec for name, spec in source["tensors"].items()}
    source["order"] = [names[name] for name in source["order"]]
    for node in data["nodes"]:
        if "read" in node:
            node["read"] = names[node["read"]]
    return Plan.from_json(data)


def _check(name: str, made: Manifest, target: Manifest) -> None:
    wrong = [each for each in target if each not in made or made[each] != target[each]]
    extra = [each for each in made if each not in target]
    if wrong or extra:
        raise ValueError(f"{name}: the truth does not fit the target: {wrong[:5]}, {extra[:5]}")


def _both(family: str, name: str, rule: str, source: Factory, target: Factory | None, **more: Any) -> list[Pair]:
    left, arrow, right = name.partition(" → ")
    return [
        Pair(family, name, rule, source, target, **more),
        Pair(family, f"{right}{arrow}{left}", rule, source, target, reverse=True, **more),
    ]


def published(kind: Factory) -> Factory:
    return _Published(kind)


@dataclass(frozen=True)
class _Published:
    kind: Factory

    def __call__(self) -> Manifest:
        return models.published(self.kind())


@functools.cache
def _of(function: Any, *arguments: Any, **more: Any) -> Factory:
    """A factory that is one object however often it is named, so that its model is built once."""
    return partial(function, *arguments, **more)


def _vision() -> list[Pair]:
    m = models
    pairs = [
        *_both("vit", "timm ViT → HF ViT", "timm-vit-to-hf-vit", m.timm_vit, m.hf_vit),
        *_both("vit", "torchvision ViT → timm ViT", "torchvision-vit-to-timm-vit", m.torchvision_vit, m.timm_vit),
        *_both("vit", "HF 4 ViT → HF 5 ViT", "hf-vit-4-to-5", published(m.hf_vit), m.hf_vit),
        *_both("deit", "timm DeiT → HF DeiT", "timm-deit-to-hf-deit", m.timm_deit, m.hf_deit),
        Pair("deit", "HF 4 DeiT → HF 5 DeiT", "hf-vit-4-to-5", published(m.hf_deit), m.hf_deit),
        Pair("mae", "HF MAE → timm ViT", "hf-vitmae-to-timm-vit", m.hf_mae, _of(m.timm_vit, num_classes=0)),
        Pair("mae", "HF 4 MAE → timm ViT", "hf-vitmae-to-timm-vit", published(m.hf_mae), _of(m.timm_vit, num_classes=0)),
        Pair("mae", "HF 4 MAE → HF 5 MAE", "hf-vit-4-to-5", published(m.hf_mae), m.hf_mae),
        Pair("beit", "timm BEiT → HF BEiT", "timm-beit-to-hf-beit", m.timm_beit, m.hf_beit),
        Pair("dinov2", "HF DINOv2 → timm DINOv2", "hf-dinov2-to-timm-dinov2", m.hf_dinov2, m.timm_dinov2),
        Pair("dinov2", "HF 4 DINOv2 → timm DINOv2", "hf-dinov2-to-timm-dinov2", published(m.hf_dinov2), m.timm_dinov2),
        Pair("dinov2", "HF DINOv2 gated → timm", "hf-dinov2-to-timm-dinov2", _of(m.hf_dinov2, gated=True), _of(m.timm_dinov2, gated=True)),
        Pair("dinov2", "HF DINOv2 registers → timm", "hf-dinov2-registers-to-timm", _of(m.hf_dinov2, registers=True),
             _of(m.timm_dinov2, registers=True), note="adds the class token's position to the token"),
        *_both("siglip", "timm SigLIP → HF SigLIP", "timm-siglip-to-hf-siglip", m.timm_siglip, m.hf_siglip),
        *_both("swin", "HF Swin → timm Swin", "hf-swin-to-timm-swin", m.hf_swin, m.timm_swin),
        Pair("swin", "HF 4 Swin → timm Swin", "hf-swin-to-timm-swin", published(m.hf_swin), m.timm_swin),
        Pair("swin", "torchvision Swin → timm Swin", "torchvision-swin-to-timm-swin", m.torchvision_swin, m.timm_swin),
        *_both("convnext", "torchvision ConvNeXt → timm", "torchvision-convnext-to-timm-convnext", m.torchvision_convnext, m.timm_convnext),
        *_both("convnext", "torchvision ConvNeXt → HF", "torchvision-convnext-to-hf-convnext", m.torchvision_convnext, m.hf_convnext),
        *_both("convnext", "timm ConvNeXt → HF ConvNeXt", "timm-convnext-to-hf-convnext", m.timm_convnext, m.hf_convnext),
        Pair("convnext", "timm ConvNeXt conv_mlp → HF", "timm-convnext-to-hf-convnext", _of(m.timm_convnext, convolutional=True), m.hf_convnext),
        Pair("moco", "MoCo → torchvision ResNet-18", "moco-to-torchvision-resnet", m.moco, m.torchvision_trunk,
             note="of two encoders alike, which one is meant"),
        Pair("mobilenet", "torchvision MobileNet v2 → timm", "torchvision-mobilenet-v2-to-timm-mobilenet-v2",
             _of(m.torchvision_model, "mobilenet_v2"), _of(m.timm_model, "mobilenetv2_100")),
        Pair("efficientnet", "torchvision EfficientNet-B0 → timm", "torchvision-efficientnet-to-timm-efficientnet",
             _of(m.torchvision_model, "efficientnet_b0"), _of(m.timm_model, "efficientnet_b0")),
        Pair("efficientnet", "timm EfficientNet-B0 → torchvision", "torchvision-efficientnet-to-timm-efficientnet",
             _of(m.torchvision_model, "efficientnet_b0"), _of(m.timm_model, "efficientnet_b0"), reverse=True),
    ]  # fmt: skip
    for size in ("large", "small"):
        pairs += _both(
            "mobilenet", f"torchvision MobileNet v3 {size} → timm", "torchvision-mobilenet-v3-to-timm-mobilenet-v3",
            _of(m.torchvision_model, f"mobilenet_v3_{size}"), _of(m.timm_model, f"mobilenetv3_{size}_100"),
        )  # fmt: skip
    for kind, squeeze in (("X", None), ("Y", 0.25)):
        pairs += _both(
            "regnet", f"torchvision RegNet {kind} → timm", "torchvision-regnet-to-timm-regnet", _of(m.torchvision_regnet, squeeze),
            _of(m.timm_regnet, squeeze),
        )  # fmt: skip
    for layers in (18, 50):
        torchvision, timm, hf = (_of(make, layers) for make in (m.torchvision_resnet, m.timm_resnet, m.hf_resnet))
        pairs += [
            Pair("resnet", f"torchvision ResNet-{layers} → timm", "torchvision-resnet-to-timm-resnet", torchvision, timm),
            *_both("resnet", f"torchvision ResNet-{layers} → HF", "torchvision-resnet-to-hf-resnet", torchvision, hf),
            *_both("resnet", f"timm ResNet-{layers} → HF", "timm-resnet-to-hf-resnet", timm, hf),
        ]
    return pairs


def _language() -> list[Pair]:
    m = models
    llama, heads = _of(m.hf_causal, "Llama"), {"H": 4, "G": 2}
    rotary = "the order of rows within a head"
    return [
        *_both("gpt2", "HF GPT-2 → linear GPT", "gpt2-conv1d-to-linear", m.hf_gpt2, m.LinearGpt, note="a square weight is transposed"),
        *_both("llama", "HF Llama → torchtune", "hf-llama-to-torchtune-llama", llama, None, given=heads, note=rotary),
        *_both("llama", "HF Llama → litgpt", "hf-llama-to-litgpt", llama, None),
        *_both("llama", "Meta Llama → HF Llama", "meta-llama-to-hf-llama", m.meta_llama, llama, given=heads, prefix="00::", note=rotary),
        *_both("llama", "Megatron → HF Llama", "megatron-qkv-to-llama", m.megatron_llama, llama, given=heads, note="rows go group by group"),
        Pair("llama", "Megatron padded → HF Llama", "megatron-qkv-to-llama", _of(m.megatron_llama, rows=160), llama,
             given={**heads, "V": 131}, note="rows go group by group"),
        *_both("llama", "HF Qwen2 → torchtune", "hf-qwen2-to-torchtune-qwen2", _of(m.hf_causal, "Qwen2", tie_word_embeddings=False), None,
               given={"tied": False}),
        Pair("llama", "HF Qwen2 tied → torchtune", "hf-qwen2-to-torchtune-qwen2", _of(m.hf_causal, "Qwen2", tie_word_embeddings=True), None),
        *_both("moe", "Mixtral published → HF 5", "mixtral-to-fused-experts", published(_of(m.experts, "Mixtral")), _of(m.experts, "Mixtral")),
        *(Pair("moe", f"{kind} published → HF 5", "qwen2-moe-to-fused-experts", published(_of(m.experts, kind)), _of(m.experts, kind))
          for kind in ("Qwen2Moe", "Qwen3Moe", "Olmoe")),
        *_both("neox", "HF GPT-NeoX → split qkv", "gpt-neox-split-qkv", m.hf_neox, None, given={"H": 4}, note="rows go head by head"),
        *_both("bloom", "HF BLOOM → split qkv", "bloom-split-qkv", m.hf_bloom, None, given={"H": 4}, note="rows go head by head"),
        Pair("bert", "BERT of 2018 → HF masked LM", "bert-pretraining-to-hf-masked-lm", m.old_bert, _of(m.hf_text, "BertForMaskedLM")),
        Pair("bert", "BERT pretraining → HF masked LM", "bert-pretraining-to-hf-masked-lm", _of(m.hf_text, "BertForPreTraining"),
             _of(m.hf_text, "BertForMaskedLM")),
        Pair("bert", "BERT of 2018 → encoder", "hf-bert-to-encoder", m.old_bert, _of(m.hf_text, "BertModel")),
        Pair("bert", "BERT masked LM → encoder", "hf-bert-to-encoder", _of(m.hf_text, "BertForMaskedLM"),
             _of(m.hf_text, "BertModel", add_pooling_layer=False)),
        Pair("bert", "RoBERTa masked LM → encoder", "hf-bert-to-encoder", _of(m.hf_text, "RobertaForMaskedLM"),
             _of(m.hf_text, "RobertaModel", add_pooling_layer=False)),
    ]  # fmt: skip


def pairs() -> list[Pair]:
    """Every pair that the installed libraries make."""
    return [*_vision(), *_language()]


#: Reference conversions in a folder of one's own (`--cases`): family, rule, the source within its folder, variables. Those that compute
#: new values (dequantise, merge, resample) or only take a file apart are not asked of a suggester.
CASES: Mapping[str, tuple[str, str, str, Mapping[str, Any]]] = {
    "bert_old_gamma_beta": ("bert", "bert-pretraining-to-hf-masked-lm", "pytorch_model.bin", {}),
    "encodec_to_hf": ("encodec", "encodec-to-hf-encodec", "encodec.th", {}),
    "hf_dinov2reg_to_timm": ("dinov2", "hf-dinov2-registers-to-timm", "model.safetensors", {}),
    "hf_gpt2_to_linear_gpt": ("gpt2", "gpt2-conv1d-to-linear", "pytorch_model.bin", {}),
    "hf_llama_to_litgpt": ("llama", "hf-llama-to-litgpt", "model.safetensors.index.json", {}),
    "hf_llama_to_torchtune": ("llama", "hf-llama-to-torchtune-llama", "model.safetensors", {"H": 4, "G": 2}),
    "hf_qwen2_to_torchtune_tied": ("llama", "hf-qwen2-to-torchtune-qwen2", "pytorch_model.bin", {}),
    "hf_swin_to_timm": ("swin", "hf-swin-to-timm-swin", "model.safetensors", {}),
    "ldm_vae_to_diffusers": ("vae", "ldm-vae-to-diffusers-vae", "model.ckpt", {}),
    "mae_to_timm": ("mae", "hf-vitmae-to-timm-vit", "model.safetensors", {}),
    "megatron_tp2_to_hf": ("llama", "megatron-tp-to-hf-llama", "iter_0000100", {"H": 8, "G": 4, "V": 101}),
    "meta_llama_tp2_to_hf": ("llama", "meta-llama-to-hf-llama", ".", {"H": 4, "G": 2, "float32": True}),
    "moco_to_torchvision": ("moco", "moco-to-torchvision-resnet", "checkpoint_0199.pth.tar", {}),
    "moe_published_to_hf5": ("moe", "mixtral-to-fused-experts", "model.safetensors", {}),
    "openai_clip_jit_to_hf": ("clip", "openai-clip-to-hf-clip", "ViT-tiny.pt", {}),
    "openclip_to_hf": ("clip", "openclip-to-hf-clip", "epoch_3.pt", {}),
    "timm_beit_to_hf": ("beit", "timm-beit-to-hf-beit", "beit.pth", {}),
    "timm_siglip_to_hf": ("siglip", "timm-siglip-to-hf-siglip", "model.safetensors", {}),
    "timm_vit_to_hf": ("vit", "timm-vit-to-hf-vit", "model.safetensors", {}),
    "torchtune_llama_to_hf": ("llama", "torchtune-llama-to-hf-llama", "hf_model_0001_0.pt", {"H": 4, "G": 2}),
    "torchvision_convnext_to_hf": ("convnext", "torchvision-convnext-to-hf-convnext", "convnext.pth", {}),
    "torchvision_resnet_to_hf": ("resnet", "torchvision-resnet-to-hf-resnet", "resnet-legacy.pth", {}),
    "torchvision_swin_to_timm": ("swin", "torchvision-swin-to-timm-swin", "swin.pth", {}),
    "torchvision_vit_to_timm": ("vit", "torchvision-vit-to-timm-vit", "vit_tiny-deadbeef.pth", {}),
    "whisper_openai_to_hf": ("whisper", "openai-whisper-to-hf-whisper", "tiny.pt", {}),
    "wrappers_stacked": ("wrappers", "wrapper-stack", "latest.pt", {"float32": True}),
}  # fmt: skip


def cases(folder: Path) -> list[Pair]:
    """The reference conversions in ``folder`` that the table knows, as pairs."""
    found = []
    for name, (family, rule, file, given) in CASES.items():
        place = folder / name
        if (place / "expected.safetensors").is_file():
            found.append(Pair(family, f"case {name}", rule, _Case(place / file, rule), _Case(place / "expected.safetensors", ""), given))
    return found


@dataclass(frozen=True)
class _Case:
    path: Path
    rule: str

    def __call__(self) -> Manifest:
        return open_source(self.path, builtin.find(self.rule).header.select if self.rule else ()).manifest


if __name__ == "__main__":
    print(json.dumps({pair.name: len(pair.build().truth.outputs) for pair in pairs()}, indent=1, ensure_ascii=False))
