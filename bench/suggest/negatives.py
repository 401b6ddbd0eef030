"""Pairs that must be refused: another size, another architecture, another network. None has a conversion that would be right."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import models
from models import Factory

from ckptconv.spec import Manifest


@dataclass(frozen=True)
class Negative:
    """A source that must not be converted into this target, and why."""

    name: str
    source: Factory
    target: Factory
    reason: str

    def build(self) -> tuple[Manifest, Manifest]:
        return models.manifest(self.source), models.manifest(self.target)


def negatives() -> list[Negative]:
    m, p = models, partial
    llama = p(m.hf_causal, "Llama")
    return [
        Negative("ResNet-50 → ResNet-18", p(m.torchvision_resnet, 50), p(m.timm_resnet, 18), "other blocks"),
        Negative("ResNet-18 → ResNet-50", p(m.torchvision_resnet, 18), p(m.hf_resnet, 50), "other blocks"),
        Negative("ResNet-50 → ResNet-34", p(m.timm_resnet, 50), p(m.torchvision_resnet, 34), "as deep, other blocks"),
        Negative(
            "ResNet-34 → ResNet-18", p(m.torchvision_resnet, 34), p(m.torchvision_resnet, 18), "all names are there, half of it is lost"
        ),
        Negative("ViT depth 12 → 24", m.timm_vit, p(m.hf_vit, depth=24), "half of the layers have no source"),
        Negative("ViT depth 24 → 12", p(m.timm_vit, depth=24), m.hf_vit, "every target has a source, half of the layers are lost"),
        Negative("ViT depth 24 → 12, same names", p(m.timm_vit, depth=24), m.timm_vit, "every name is there, half of the layers are lost"),
        Negative("ViT width 384 → 768", p(m.timm_vit, width=384, depth=2), p(m.hf_vit, width=768, depth=2), "another width"),
        Negative("ViT width 96 → 48, same names", p(m.timm_vit, width=96), m.timm_vit, "another width"),
        Negative("ViT patch 8 → patch 16", m.timm_vit, p(m.hf_vit, patch=16), "another patch and other positions"),
        Negative("ViT → Swin", m.timm_vit, m.timm_swin, "another architecture"),
        Negative("Swin → ViT", m.hf_swin, m.hf_vit, "another architecture"),
        Negative("BERT → GPT-2", p(m.hf_text, "BertForMaskedLM"), m.hf_gpt2, "another architecture of the same width"),
        Negative("GPT-2 → BERT", m.hf_gpt2, p(m.hf_text, "BertModel"), "another architecture of the same width"),
        Negative("BLOOM → GPT-NeoX", m.hf_bloom, m.hf_neox, "the same sizes, other norms"),
        Negative("ConvNeXt → ResNet-50", m.timm_convnext, p(m.timm_resnet, 50), "another architecture"),
        Negative(
            "MobileNet v2 → EfficientNet-B0", p(m.torchvision_model, "mobilenet_v2"), p(m.timm_model, "efficientnet_b0"), "no squeeze"
        ),
        Negative(
            "MobileNet v3 large → small", p(m.torchvision_model, "mobilenet_v3_large"), p(m.timm_model, "mobilenetv3_small_100"), "smaller"
        ),
        Negative("EfficientNet B0 → B3", p(m.torchvision_model, "efficientnet_b0"), p(m.timm_model, "efficientnet_b3"), "another size"),
        Negative("EfficientNet B3 → B0", p(m.torchvision_model, "efficientnet_b3"), p(m.timm_model, "efficientnet_b0"), "another size"),
        Negative("RegNet X → RegNet Y", p(m.torchvision_regnet, None), p(m.timm_regnet, 0.25), "no squeeze and excitation"),
        Negative("Llama → Mixtral", llama, p(m.experts, "Mixtral"), "no experts"),
        Negative("Mixtral → Llama", p(m.experts, "Mixtral"), llama, "experts"),
        Negative("Llama, 2 key heads → 4", llama, p(m.hf_causal, "Llama", num_key_value_heads=4), "other keys and values"),
        Negative("Llama → Qwen2", llama, p(m.hf_causal, "Qwen2", tie_word_embeddings=False), "no biases"),
        Negative("Llama 11 layers → 7", llama, p(m.hf_causal, "Llama", num_hidden_layers=7), "four layers are lost"),
        Negative("CLIP text → CLIP vision", p(m.hf_clip, "Text"), p(m.hf_clip, "Vision"), "the other tower, with the same layers"),
        Negative("CLIP vision → CLIP text", p(m.hf_clip, "Vision"), p(m.hf_clip, "Text"), "the other tower, with the same layers"),
        Negative("Adam's state → its model", _adam, m.timm_vit, "two tensors of every shape, and no weights"),
        Negative("LoRA adapter → its base", _lora, llama, "an adapter alone"),
    ]


def _adam() -> models.Made:
    return models.adam_of(models.timm_vit())


def _lora() -> models.Made:
    return models.lora_of(models.hf_causal("Llama"))
