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
