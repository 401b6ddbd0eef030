"""The models that the benchmark is made of, as manifests: the real classes of the installed libraries, narrow but as deep as they are.

Nothing is downloaded. Layouts whose library is not installed (Megatron, Meta's Llama, MoCo) are written out here by name and shape.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout that this file lies in is the one that is measured

import torch
from safetensors import safe_open
from torch import nn

from ckptconv.api import manifest_of_state_dict
from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.target.torchvision_ops import import_with_torchvision

Made = Manifest | nn.Module | Mapping[str, torch.Tensor]
Factory = Callable[[], Made]


def manifest_of(made: Made) -> Manifest:
    """Names, shapes, dtypes, ties and, of a module, which names are buffers."""
    if isinstance(made, Manifest):
        return made
    if not isinstance(made, nn.Module):
        return manifest_of_state_dict(made)
    found = manifest_of_state_dict(made.state_dict(keep_vars=True))
    parameters = {name for name, _ in made.named_parameters(remove_duplicate=False)}
    return Manifest(found.tensors, found.ties, frozenset(name for name in found if name not in parameters))


@functools.cache
def manifest(factory: Factory) -> Manifest:
    """What ``factory`` makes, made once."""
    return manifest_of(factory())


def named(shapes: Mapping[str, tuple[int, ...]]) -> Manifest:
    return Manifest({name: TensorSpec(tuple(shape), DType.float32) for name, shape in shapes.items()})


@functools.cache
def library(name: str) -> Any:
    import_with_torchvision("torchvision")
    found = import_with_torchvision(name)
    if name == "transformers":
        found.utils.logging.set_verbosity_error()
        found.utils.logging.disable_progress_bar()
    return found


def published(model: nn.Module) -> Manifest:
    """What transformers writes into a file: the names of the hub, not those of its own modules."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            return manifest_of_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (it is no mapping)


# Vision transformers.


def timm_vit(depth: int = 12, width: int = 48, patch: int = 8, **more: Any) -> nn.Module:
    settings = {"img_size": 32, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": 4, "num_classes": 11, **more}
    return library("timm").create_model("vit_tiny_patch16_224", **settings)


def hf_vit(depth: int = 12, width: int = 48, patch: int = 8) -> nn.Module:
    transformers = library("transformers")
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=4 * width, image_size=32, patch_size=patch,
            num_labels=11,
        )
    )  # fmt: skip


def torchvision_vit() -> nn.Module:
    return library("torchvision").models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=12, num_heads=4, hidden_dim=48, mlp_dim=192, num_classes=11
    )


def timm_deit() -> nn.Module:
    return library("timm").create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=12, num_heads=4, num_classes=11
    )


def hf_deit() -> nn.Module:
    transformers = library("transformers")
    return transformers.DeiTForImageClassificationWithTeacher(
        transformers.DeiTConfig(
            hidden_size=48, num_hidden_layers=12, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8, num_labels=11
        )
    )


def hf_mae() -> nn.Module:
    transformers = library("transformers")
    return transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=48, num_hidden_layers=12, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8,
            decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=40,
        )
    )  # fmt: skip


def timm_beit() -> nn.Module:
    return library("timm").models.beit.Beit(
        img_size=32, patch_size=8, embed_dim=48, depth=12, num_heads=4, use_abs_pos_emb=False, use_rel_pos_bias=True,
        init_values=0.1, num_classes=11,
    )  # fmt: skip


def hf_beit() -> nn.Module:
    transformers = library("transformers")
    return transformers.BeitForImageClassification(
        transformers.BeitConfig(
            hidden_size=48, num_hidden_layers=12, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8, num_labels=11,
            use_relative_position_bias=True, use_absolute_position_embeddings=False,
        )
    )  # fmt: skip


def hf_dinov2(gated: bool = False, registers: bool = False) -> nn.Module:
    transformers = library("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, num_hidden_layers=12, num_attention_heads=4, image_size=56, patch_size=14, use_swiglu_ffn=gated
    )
    return getattr(transformers, f"{kind}Model")(config)


def timm_dinov2(gated: bool = False, registers: bool = False) -> nn.Module:
    name = f"vit_{'giant' if gated else 'small'}_patch14{'_reg4' if registers else ''}_dinov2"
    wide = {"mlp_ratio": 256 / 48} if gated else {}
    return library("timm").create_model(name, img_size=56, embed_dim=48, depth=12, num_heads=4, **wide)


def timm_siglip() -> nn.Module:
    return library("timm").create_model("vit_base_patch16_siglip_224", img_size=48, embed_dim=48, depth=12, num_heads=4, num_classes=0)


def hf_siglip() -> nn.Module:
    transformers = library("transformers")
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=48, num_hidden_layers=12, num_attention_heads=4, intermediate_size=192, image_size=48, patch_size=16
        )
    )


DEPTHS, HEADS = (2, 2, 6, 2), (1, 2, 4, 8)


def hf_swin() -> nn.Module:
    transformers = library("transformers")
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=128, patch_size=4, embed_dim=16, depths=list(DEPTHS), num_heads=list(HEADS), window_size=4, num_labels=11
        )
    )


def timm_swin() -> nn.Module:
    return library("timm").models.swin_transformer.SwinTransformer(
        img_size=128, patch_size=4, embed_dim=16, depths=DEPTHS, num_heads=HEADS, window_size=4, num_classes=11
    )


def torchvision_swin() -> nn.Module:
    return library("torchvision").models.swin_transformer.SwinTransformer(
        [4, 4], 16, list(DEPTHS), list(HEADS), [4, 4], num_classes=11
    )  # fmt: skip


# Convolutions.

CONVNEXT_DEPTHS, CONVNEXT_WIDTHS = (3, 3, 9, 3), (16, 24, 32, 40)


def torchvision_convnext() -> nn.Module:
    convnext = library("torchvision").models.convnext
    widths = (*CONVNEXT_WIDTHS, None)
    blocks = [convnext.CNBlockConfig(widths[at], widths[at + 1], depth) for at, depth in enumerate(CONVNEXT_DEPTHS)]
    return convnext.ConvNeXt(blocks, num_classes=11)


def timm_convnext(convolutional: bool = False) -> nn.Module:
    return library("timm").create_model(
        "convnext_tiny", depths=CONVNEXT_DEPTHS, dims=CONVNEXT_WIDTHS, num_classes=11, conv_mlp=convolutional
    )


def hf_convnext() -> nn.Module:
    transformers = library("transformers")
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(depths=list(CONVNEXT_DEPTHS), hidden_sizes=list(CONVNEXT_WIDTHS), num_labels=11)
    )


RESNETS = {18: ("basic", (2, 2, 2, 2)), 34: ("basic", (3, 4, 6, 3)), 50: ("bottleneck", (3, 4, 6, 3))}


def torchvision_resnet(layers: int, classes: int = 11) -> nn.Module:
    return getattr(library("torchvision").models, f"resnet{layers}")(num_classes=classes)


def timm_resnet(layers: int) -> nn.Module:
    return library("timm").create_model(f"resnet{layers}", num_classes=11)


def hf_resnet(layers: int) -> nn.Module:
    transformers = library("transformers")
    kind, depths = RESNETS[layers]
    widths = [(4 if kind == "bottleneck" else 1) * width for width in (64, 128, 256, 512)]
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(depths=list(depths), hidden_sizes=widths, layer_type=kind, num_labels=11)
    )


def moco() -> Mapping[str, torch.Tensor]:
    """The state_dict of a MoCo trainer: two encoders, of which one is meant, and the queue."""
    encoder = {**torchvision_resnet(18, 16).state_dict()}
    both = {f"module.{which}.{name}": value.clone() for which in ("encoder_q", "encoder_k") for name, value in encoder.items()}
    return both | {"module.queue": torch.zeros(16, 24), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}


def torchvision_trunk() -> nn.Module:
    model = torchvision_resnet(18)
    model.fc = nn.Identity()
    return model


def torchvision_model(name: str) -> nn.Module:
    return getattr(library("torchvision").models, name)(num_classes=11)


def timm_model(name: str) -> nn.Module:
    return library("timm").create_model(name, num_classes=11)


REGNET = {"depth": 13, "w0": 24, "wa": 36.44, "wm": 2.49}


def torchvision_regnet(squeeze: float | None) -> nn.Module:
    regnet = library("torchvision").models.regnet
    parameters = regnet.BlockParams.from_init_params(depth=13, w_0=24, w_a=36.44, w_m=2.49, group_width=8, se_ratio=squeeze)
    return regnet.RegNet(parameters, num_classes=11)


def timm_regnet(squeeze: float | None) -> nn.Module:
    regnet = library("timm").models.regnet
    return regnet.RegNet(regnet.RegNetCfg(w0=24, wa=36.44, wm=2.49, group_size=8, depth=13, se_ratio=squeeze or 0.0), num_classes=11)


# Language models.


class Block(nn.Module):
    """GPT-2's block with nn.Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})


class LinearGpt(nn.Module):
    """GPT-2 as nanoGPT and its kin have it: only names and shapes are asked of it here."""

    def __init__(self, vocabulary: int = 131, width: int = 48, layers: int = 12, context: int = 40) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocabulary, width), "wpe": nn.Embedding(context, width),
            "h": nn.ModuleList(Block(width) for _ in range(layers)), "ln_f": nn.LayerNorm(width),
        })  # fmt: skip
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight


def hf_gpt2(layers: int = 12) -> nn.Module:
    transformers = library("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=131, n_embd=48, n_layer=layers, n_head=4, n_positions=40))


def hf_neox() -> nn.Module:
    transformers = library("transformers")
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=131, hidden_size=48, num_hidden_layers=12, num_attention_heads=4, intermediate_size=192, max_position_embeddings=40
        )
    )


def hf_bloom() -> nn.Module:
    transformers = library("transformers")
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=131, hidden_size=48, n_layer=12, n_head=4))


CAUSAL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 11, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def hf_causal(kind: str, **more: Any) -> nn.Module:
    """Llama, Qwen2, Mixtral, Qwen2Moe, …"""
    transformers = library("transformers")
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**CAUSAL, **more}))


EXPERTS: Mapping[str, Mapping[str, Any]] = {
    "Mixtral": {"num_local_experts": 11, "num_hidden_layers": 3},
    "Qwen2Moe": {
        "num_experts": 11, "num_hidden_layers": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0],
    },
    "Qwen3Moe": {"num_experts": 11, "num_hidden_layers": 3, "moe_intermediate_size": 8, "head_dim": 8},
    "Olmoe": {"num_experts": 11, "num_hidden_layers": 3},
}  # fmt: skip


def experts(kind: str) -> nn.Module:
    return hf_causal(kind, **EXPERTS[kind])


def meta_llama(layers: int = 11) -> Manifest:
    """Meta's reference layout of the Llama above, as one rank holds it."""
    width, keys, inner = 48, 24, 112
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (131, width)}
    for i in range(layers):
        at = f"layers.{i}."
        shapes |= {f"{at}attention.wq.weight": (width, width), f"{at}attention.wk.weight": (keys, width)}
        shapes |= {f"{at}attention.wv.weight": (keys, width), f"{at}attention.wo.weight": (width, width)}
        shapes |= {f"{at}feed_forward.w1.weight": (inner, width), f"{at}feed_forward.w2.weight": (width, inner)}
        shapes |= {f"{at}feed_forward.w3.weight": (inner, width), f"{at}attention_norm.weight": (width,), f"{at}ffn_norm.weight": (width,)}
    return named(shapes | {"norm.weight": (width,), "output.weight": (131, width)})


def megatron_llama(layers: int = 11, rows: int = 131) -> Manifest:
    """Megatron-core's layout of the Llama above, as Transformer Engine's modules hold it."""
    width, inner = 48, 112
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (rows, width)}
    for i in range(layers):
        at = f"decoder.layers.{i}."
        shapes |= {f"{at}self_attention.linear_proj.weight": (width, width)}
        shapes |= {
            f"{at}self_attention.linear_qkv.layer_norm_weight": (width,),
            f"{at}self_attention.linear_qkv.weight": (2 * width, width),
        }
        shapes |= {f"{at}mlp.linear_fc1.layer_norm_weight": (width,), f"{at}mlp.linear_fc1.weight": (2 * inner, width)}
        shapes |= {f"{at}mlp.linear_fc2.weight": (width, inner)}
    return named(shapes | {"decoder.final_layernorm.weight": (width,), "output_layer.weight": (rows, width)})


TEXT = {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 192,
        "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def hf_text(architecture: str, **more: Any) -> nn.Module:
    """BertForMaskedLM, RobertaModel, …"""
    transformers = library("transformers")
    kind = "Roberta" if architecture.startswith("Roberta") else "Bert"
    return getattr(transformers, architecture)(getattr(transformers, f"{kind}Config")(**TEXT), **more)


def old_bert() -> Mapping[str, torch.Tensor]:
    """BertForPreTraining as it was published in 2018."""
    found = {}
    for name, value in hf_text("BertForPreTraining").state_dict().items():
        if not name.endswith(("position_ids", "decoder.bias")):
            found[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = value
    return found


def hf_clip(part: str) -> nn.Module:
    transformers = library("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 12, "num_attention_heads": 4}
    if part == "Text":
        more = {"vocab_size": 131, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    else:
        more = {"image_size": 32, "patch_size": 8}
    return getattr(transformers, f"CLIP{part}Model")(getattr(transformers, f"CLIP{part}Config")(**sizes, **more))


def adam_of(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """The optimizer's state of a model, flattened: two tensors of every parameter's shape, and counters."""
    found = {}
    for at, value in enumerate(model.parameters()):
        found |= {
            f"state.{at}.step": torch.zeros(()),
            f"state.{at}.exp_avg": value.detach(),
            f"state.{at}.exp_avg_sq": value.detach().clone(),
        }
    return found


def lora_of(model: nn.Module, rank: int = 4) -> Manifest:
    """A LoRA adapter alone, without its base."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[f"base_model.model.{name}.lora_A.weight"] = (rank, module.in_features)
            shapes[f"base_model.model.{name}.lora_B.weight"] = (module.out_features, rank)
    return named(shapes)
