"""The model rules, proved on the installed libraries: strict loading into the real model, and equal forward outputs.

Weights are seeded and perturbed: with fresh ones (zero biases, norms of one) half of all mistakes would not show.
"""

import json

import pytest
import torch
from torch import nn

import ckptconv
from ckptconv.target.torchvision_ops import import_with_torchvision


def perturbed(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def close(left, right):
    assert left.abs().max() > 1e-3, "a degenerate output proves nothing"
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(left.abs().max()))


def test_timm_vit_into_transformers(tmp_path, cli):
    timm = import_with_torchvision("timm")
    transformers = import_with_torchvision("transformers")
    model = perturbed(
        timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=11)
    )
    torch.save(model.state_dict(), tmp_path / "in.pth")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8, num_labels=11,
        layer_norm_eps=1e-6, architectures=["ViTForImageClassification"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "hf")
    result = cli(
        "run", "timm-vit-to-hf-vit", tmp_path / "in.pth", tmp_path / "out.safetensors", "--target", f"hf:{tmp_path / 'hf'}", "--json"
    )
    assert result.code == 0, result.err + result.out
    assert result.json["verification"]["reached"] == "L0 L1 L2 L3"
    from safetensors.torch import load_file

    target = transformers.ViTForImageClassification(config).eval()
    target.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(model(image), target(pixel_values=image).logits)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvision_resnet_into_timm(tmp_path, cli, name):
    torchvision = import_with_torchvision("torchvision")
    timm = import_with_torchvision("timm")
    model = perturbed(getattr(torchvision.models, name)(num_classes=10))
    torch.save(model.state_dict(), tmp_path / "in.pth")
    result = cli("run", "torchvision-resnet-to-timm-resnet", tmp_path / "in.pth", tmp_path / "out.pth",
                 "--target", f"timm:{name}?num_classes=10", "--json")  # fmt: skip
    assert result.code == 0, result.err + result.out
    assert result.json["verification"]["reached"] == "L0 L1 L2 L3"
    target = timm.create_model(name, num_classes=10).eval()
    target.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(model(image), target(image))


class Block(nn.Module):
    """GPT-2's block with nn.Linear, written from the paper's equations for this test."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.attn["c_attn"](self.ln_1(x)).split(width, -1)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class LinearGpt(nn.Module):
    def __init__(self, vocabulary=61, width=32, layers=2, heads=4, context=16):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocabulary, width), "wpe": nn.Embedding(context, width),
            "h": nn.ModuleList(Block(width, heads) for _ in range(layers)), "ln_f": nn.LayerNorm(width),
        })  # fmt: skip
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids):
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def test_gpt2_conv1d_into_linear(tmp_path):
    transformers = import_with_torchvision("transformers")
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=16, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    )
    model = perturbed(transformers.GPT2LMHeadModel(config))
    torch.save(model.state_dict(), tmp_path / "in.pth")
    target = LinearGpt().eval()
    report = ckptconv.load(target, tmp_path / "in.pth", rules="gpt2-conv1d-to-linear")
    assert report.comparison.fits
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(model(input_ids=ids).logits, target(ids))
    assert target.lm_head.weight is target.transformer["wte"].weight


def test_gpt2_written_and_loaded_strictly(tmp_path, cli):
    transformers = import_with_torchvision("transformers")
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    model = perturbed(transformers.GPT2LMHeadModel(config))
    model.save_pretrained(tmp_path / "gpt2")
    result = cli("run", "gpt2-conv1d-to-linear", tmp_path / "gpt2", tmp_path / "linear", "--json")
    assert result.code == 0, result.err + result.out
    assert json.loads((tmp_path / "linear" / "config.json").read_text())["model_type"] == "gpt2"
    from safetensors.torch import load_file

    written = load_file(tmp_path / "linear" / "model.safetensors")
    for name, value in model.state_dict().items():
        if name in written:
            transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            assert torch.equal(written[name], value.T if transposed else value), name


def torchvision_models():
    """(rule, torchvision model, target model, how the target is called), small ones with the real classes."""
    torchvision = import_with_torchvision("torchvision")
    timm = import_with_torchvision("timm")
    transformers = import_with_torchvision("transformers")
    models = torchvision.models

    def plain(model, image):
        return model(image)

    def logits(model, image):
        return model(pixel_values=image).logits

    blocks = [
        models.convnext.CNBlockConfig(16, 24, 2),
        models.convnext.CNBlockConfig(24, 32, 1),
        models.convnext.CNBlockConfig(32, None, 2),
    ]
    return {
        "torchvision-vit-to-timm-vit": (
            models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=7),
            timm.create_model(
                "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, num_classes=7
            ),
            plain,
        ),
        "torchvision-swin-to-timm-swin": (
            models.swin_transformer.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=7),
            timm.models.swin_transformer.SwinTransformer(
                img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=7
            ),
            plain,
        ),
        "torchvision-convnext-to-hf-convnext": (
            models.convnext.ConvNeXt(blocks, num_classes=7),
            transformers.ConvNextForImageClassification(
                transformers.ConvNextConfig(num_stages=3, depths=[2, 1, 2], hidden_sizes=[16, 24, 32], num_labels=7, layer_norm_eps=1e-6)
            ),
            logits,
        ),
        "torchvision-resnet-to-hf-resnet": (
            models.resnet18(num_classes=7),
            transformers.ResNetForImageClassification(
                transformers.ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", num_labels=7)
            ),
            logits,
        ),
    }


@pytest.mark.parametrize(
    "rule",
    [
        "torchvision-vit-to-timm-vit",
        "torchvision-swin-to-timm-swin",
        "torchvision-convnext-to-hf-convnext",
        "torchvision-resnet-to-hf-resnet",
    ],
)
def test_torchvision_into_its_neighbours(tmp_path, rule):
    source, target, call = torchvision_models()[rule]
    perturbed(source)
    torch.save(source.state_dict(), tmp_path / "in.pth")
    report = ckptconv.run(rule, tmp_path / "in.pth", tmp_path / "out.pth", verify=4)
    assert report.ladder.reached == "L0 L1 L3 L4"
    target.eval().load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(source(image), call(target, image))


def test_mixtral_experts_are_stacked_in_numeric_order_and_load_into_transformers(tmp_path):
    transformers = import_with_torchvision("transformers")
    config = transformers.MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=11, max_position_embeddings=32,
    )  # fmt: skip
    model = perturbed(transformers.MixtralForCausalLM(config))
    fused = model.state_dict()
    published = {}
    for name, value in fused.items():
        layer, _, rest = name.partition(".mlp.")
        if rest == "gate.weight":
            published[f"{layer}.block_sparse_moe.gate.weight"] = value
        elif rest == "experts.gate_up_proj":
            for e, both in enumerate(value):
                (
                    published[f"{layer}.block_sparse_moe.experts.{e}.w1.weight"],
                    published[f"{layer}.block_sparse_moe.experts.{e}.w3.weight"],
                ) = both.chunk(2)
        elif rest == "experts.down_proj":
            published |= {f"{layer}.block_sparse_moe.experts.{e}.w2.weight": each for e, each in enumerate(value)}
        else:
            published[name] = value
    names = sorted(published)  # as text, so that expert 10 stands before expert 2
    target = transformers.MixtralForCausalLM(config).eval()
    torch.save({name: published[name].clone() for name in names}, tmp_path / "in.pth")
    ckptconv.load(target, tmp_path / "in.pth", rules="mixtral-to-fused-experts")
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(model(input_ids=ids).logits, target(input_ids=ids).logits)


def test_torchtune_rotary_rows_are_the_interleaved_halves(tmp_path):
    """Both layouts rotate the same pairs: row j of a head's first half goes with row j of its second, or with its neighbour."""
    heads, groups, width = 4, 2, 8
    state = {"model.embed_tokens.weight": torch.randn(5, heads * width)}
    for name, count in (("q", heads), ("k", groups)):
        state[f"model.layers.0.self_attn.{name}_proj.weight"] = torch.randn(count * width, heads * width)
    found = ckptconv.convert(state, "hf-llama-to-torchtune-llama", set={"H": heads, "G": groups})
    for name, count in (("q", heads), ("k", groups)):
        before = state[f"model.layers.0.self_attn.{name}_proj.weight"].view(count, width, -1)
        after = found[f"layers.0.attn.{name}_proj.weight"].view(count, width, -1)
        for j in range(width // 2):
            assert torch.equal(after[:, 2 * j], before[:, j])
            assert torch.equal(after[:, 2 * j + 1], before[:, width // 2 + j])
