"""The rules that read what other programs write, proved on the installed libraries: strict loading, equal outputs, and the way back.

Weights are seeded and perturbed. Where a library is not installed (Meta's code, Megatron, PEFT, OpenAI's CLIP and Whisper), its layout is
made here by arithmetic of its own, or its forward pass is written down here from what it publishes.
"""

import argparse
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import ckptconv
from ckptconv.errors import CkptconvError
from ckptconv.target.torchvision_ops import import_with_torchvision


def library(name):
    import_with_torchvision("torchvision")
    return import_with_torchvision(name)


@pytest.fixture(scope="module")
def transformers():
    return library("transformers")


def perturbed(model, seed=0):
    """Every value moved; matrices scaled by their fan-in, so that attention is sharp enough for a wrong head to show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            if value.is_floating_point() and value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
            elif value.is_floating_point():
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model.eval()


def close(left, right):
    assert left.abs().max() > 1e-3, "a degenerate output proves nothing"
    assert (left[0] - left[1]).abs().max() > 1e-3 * left.abs().max(), "an output that does not depend on its input proves nothing"
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(left.abs().max()))


def equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(high, length=9):
    return torch.randint(0, high, (2, length), generator=torch.Generator().manual_seed(1))


def converted(rule, source, folder, **options):
    """Runs the rule with every byte proved (L4), and gives back what a strict loader would see."""
    report = ckptconv.run(rule, source, folder / "out.pth", verify=4, force=True, **options)
    assert "L4" in report.ladder.reached, report.ladder.reached
    return torch.load(folder / "out.pth", weights_only=True)


def saved(state, folder):
    torch.save(state, folder / "in.pth")
    return folder / "in.pth"


def refused(rule, source, folder, **options):
    with pytest.raises(CkptconvError) as caught:
        ckptconv.run(rule, source, folder / "refused.pth", **options)
    assert not (folder / "refused.pth").exists()
    return {problem.code for problem in caught.value.problems}


SMALL = {"vocab_size": 36, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def llama(transformers, seed=0, **more):
    return perturbed(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **more})), seed)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


# Meta's Llama


def interleaved(weight, heads):
    """Rotary pairs side by side, as Meta has them: row 2j of a head is transformers' row j, row 2j + 1 is its row j + half."""
    half = weight.shape[0] // heads // 2
    return torch.stack([weight[(2 * head + second) * half + j] for head in range(heads) for j in range(half) for second in (0, 1)])


META = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo", "gate_proj": "feed_forward.w1",
        "up_proj": "feed_forward.w3", "down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings", "lm_head": "output", "norm": "norm"}  # fmt: skip


def meta_of(model):
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    out = {}
    for name, value in model.state_dict().items():
        *parents, last, _ = name.split(".")
        layer = f"layers.{parents[parents.index('layers') + 1]}." if "layers" in parents else ""
        out[f"{layer}{META[last]}.weight"] = interleaved(value, heads[last]) if last in heads else value
    return out


def meta_forward(state, ids, heads, groups):
    """Meta's model.py: complex rotation of neighbouring pairs, keys and values repeated per group."""

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]

    def apply(x, name):
        return functional.linear(x, state[f"{name}.weight"])

    x = state["tok_embeddings.weight"][ids]
    batch, length, width = x.shape
    each = width // heads
    angles = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, each, 2).float() / each))
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    for i in range(len({name.split(".")[1] for name in state if name.startswith("layers.")})):
        y, at = norm(x, f"layers.{i}.attention_norm"), f"layers.{i}.attention."
        q, k = (apply(y, at + w).view(batch, length, -1, each) for w in ("wq", "wk"))
        q, k = (torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2))) * turns).flatten(3) for z in (q, k))
        v = apply(y, at + "wv").view(batch, length, groups, each)
        k, v = (z.repeat_interleave(heads // groups, 2) for z in (k, v))
        mixed = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + apply(mixed.transpose(1, 2).flatten(2), at + "wo")
        y, at = norm(x, f"layers.{i}.ffn_norm"), f"layers.{i}.feed_forward."
        x = x + apply(functional.silu(apply(y, at + "w1")) * apply(y, at + "w3"), at + "w2")
    return apply(norm(x, "norm"), "output")


def meta_rank(state, rank, ranks, by_columns):
    """A rank's part: of wo and w2, and of the embedding before Llama 3, some columns; of the other matrices some rows; norms whole."""
    out = {"rope.freqs": torch.ones(2)}
    for name, value in state.items():
        columns = name.endswith(("wo.weight", "w2.weight")) or (by_columns and name.startswith("tok_embeddings"))
        size = value.shape[1 if columns else 0] // ranks
        mine = slice(rank * size, (rank + 1) * size)
        out[name] = (value if value.ndim == 1 else value[:, mine] if columns else value[mine]).clone()
    return out


def save_meta(folder, state, ranks, by_columns, change=None):
    folder.mkdir()
    for rank in range(ranks):
        part = meta_rank(state, rank, ranks, by_columns)
        if change and rank == ranks - 1:
            change(part)
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps({"dim": 32, "n_heads": 8, "n_kv_heads": 4, "n_layers": 2, "norm_eps": 1e-6}))
    return folder


@pytest.mark.parametrize("by_columns", [False, True], ids=["vocabulary cut by rows", "embedding cut by columns"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_metas_llama_into_transformers(tmp_path, transformers, ranks, by_columns):
    model, target = llama(transformers), llama(transformers, seed=5)
    theirs, ids = meta_of(model), words(36)
    state = converted("meta-llama-to-hf-llama", save_meta(tmp_path / "meta", theirs, ranks, by_columns), tmp_path)
    equal(state, model.state_dict())
    target.load_state_dict(state, strict=True)
    close(meta_forward(theirs, ids, 8, 4), logits(target, ids))


def test_metas_llama_in_half_precision_is_widened_on_demand(tmp_path, transformers):
    theirs = {name: value.bfloat16() for name, value in meta_of(llama(transformers)).items()}
    folder = save_meta(tmp_path / "meta", theirs, 2, True)
    assert {value.dtype for value in converted("meta-llama-to-hf-llama", folder, tmp_path).values()} == {torch.bfloat16}
    state = converted("meta-llama-to-hf-llama", folder, tmp_path, set={"float32": True})
    target = llama(transformers, seed=5)
    target.load_state_dict(state, strict=True)
    assert {value.dtype for value in state.values()} == {torch.float32}
    close(meta_forward({name: value.float() for name, value in theirs.items()}, words(36), 8, 4), logits(target, words(36)))


@pytest.mark.parametrize("name", ["norm", "layers.1.ffn_norm", "layers.0.attention_norm"])
def test_metas_ranks_that_disagree_are_refused(tmp_path, transformers, name):
    def change(part):
        part[f"{name}.weight"][3] += 1e-3

    folder = save_meta(tmp_path / "meta", meta_of(llama(transformers)), 2, False, change)
    assert refused("meta-llama-to-hf-llama", folder, tmp_path) == {"CK207"}


def test_metas_set_without_one_of_its_ranks_is_refused(tmp_path, transformers):
    folder = save_meta(tmp_path / "meta", meta_of(llama(transformers)), 4, False)
    (folder / "consolidated.02.pth").unlink()
    assert refused("meta-llama-to-hf-llama", folder, tmp_path) == {"CK308"}


# Megatron


def megatron_rank(model, rank, ranks, padded):
    """What rank ``rank`` of Megatron-core holds of a transformers Llama: some groups, some columns of what comes back, gate above up."""
    config, theirs, out = model.config, model.state_dict(), {}
    groups, each = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    width = theirs["model.layers.0.self_attn.k_proj.weight"].shape[0] // groups
    mine = range(rank * groups // ranks, (rank + 1) * groups // ranks)

    def part(value, dim):
        size = value.shape[dim] // ranks
        return value.narrow(dim, rank * size, size).clone()

    def vocabulary(value):
        return part(torch.cat([value, torch.full((padded - value.shape[0], value.shape[1]), 9.0)]), 0)

    out["embedding.word_embeddings.weight"] = vocabulary(theirs["model.embed_tokens.weight"])
    for i in range(config.num_hidden_layers):
        there, here = f"model.layers.{i}.", f"decoder.layers.{i}."
        q, k, v = (theirs[f"{there}self_attn.{x}_proj.weight"] for x in "qkv")
        rows = []
        for group in mine:
            rows += [q[(group * each + j) * width + d] for j in range(each) for d in range(width)]
            rows += [one[group * width + d] for one in (k, v) for d in range(width)]
        out[f"{here}self_attention.linear_qkv.weight"] = torch.stack(rows)
        out[f"{here}self_attention.linear_qkv.layer_norm_weight"] = theirs[f"{there}input_layernorm.weight"].clone()
        out[f"{here}self_attention.linear_qkv._extra_state"] = torch.zeros(5, dtype=torch.uint8)
        out[f"{here}self_attention.linear_proj.weight"] = part(theirs[f"{there}self_attn.o_proj.weight"], 1)
        out[f"{here}mlp.linear_fc1.layer_norm_weight"] = theirs[f"{there}post_attention_layernorm.weight"].clone()
        out[f"{here}mlp.linear_fc1.weight"] = torch.cat([part(theirs[f"{there}mlp.{x}_proj.weight"], 0) for x in ("gate", "up")])
        out[f"{here}mlp.linear_fc2.weight"] = part(theirs[f"{there}mlp.down_proj.weight"], 1)
    out["decoder.final_layernorm.weight"] = theirs["model.norm.weight"].clone()
    out["output_layer.weight"] = vocabulary(theirs["lm_head.weight"])
    return out


def save_megatron(folder, model, ranks, padded=64, change=None):
    for rank in range(ranks):
        part = megatron_rank(model, rank, ranks, padded)
        if change and rank == ranks - 1:
            change(part)
        (folder / f"iter/mp_rank_{rank:02}").mkdir(parents=True)
        checkpoint = {
            "model": part,
            "iteration": 100,
            "checkpoint_version": 3.0,
            "args": argparse.Namespace(tensor_model_parallel_size=ranks),
        }
        torch.save(checkpoint, folder / f"iter/mp_rank_{rank:02}/model_optim_rng.pt")
    (folder / "hf").mkdir()
    model.config.save_pretrained(folder / "hf")
    return folder / "iter"


@pytest.mark.parametrize("ranks", [2, 4])
def test_megatrons_ranks_into_transformers(tmp_path, transformers, ranks):
    """Heads of 12, so that hidden_size / heads is the wrong width; 31 words padded to 64."""
    sizes = {"vocab_size": 31, "head_dim": 12}
    model, target = llama(transformers, **sizes), llama(transformers, seed=5, **sizes)
    source = save_megatron(tmp_path, model, ranks)
    state = converted("megatron-tp-to-hf-llama", source, tmp_path, config=tmp_path / "hf/config.json")
    state = state.get("model", state)
    equal(state, model.state_dict())
    target.load_state_dict(state, strict=True)
    close(logits(model, words(31)), logits(target, words(31)))


def test_megatrons_ranks_compute_together_what_the_merged_model_does(transformers):
    """A column-parallel layer's outputs stand side by side, a row-parallel layer's are added up: the MLP, rank by rank."""
    model = llama(transformers)
    mlp, x, total = model.model.layers[1].mlp, noise(2, 32), 0
    for rank in range(4):
        part = megatron_rank(model, rank, 4, 36)
        gate, up = functional.linear(x, part["decoder.layers.1.mlp.linear_fc1.weight"]).chunk(2, -1)
        total = total + functional.linear(functional.silu(gate) * up, part["decoder.layers.1.mlp.linear_fc2.weight"])
    with torch.no_grad():
        close(mlp(x), total)


def test_megatrons_ranks_whose_norms_differ_are_refused(tmp_path, transformers):
    def change(part):
        part["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"][0] += 1e-3

    source = save_megatron(tmp_path, llama(transformers), 2, change=change)
    assert refused("megatron-tp-to-hf-llama", source, tmp_path, config=tmp_path / "hf/config.json") == {"CK207"}


# DINO


@pytest.mark.parametrize(("name", "gated"), [("vit_small_patch14_reg4_dinov2", False), ("vit_giant_patch14_reg4_dinov2", True)])
def test_transformers_dinov2_with_registers_into_timm(tmp_path, transformers, name, gated):
    timm = library("timm")
    source = perturbed(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14, use_swiglu_ffn=gated
    )))  # fmt: skip
    target = timm.create_model(name, img_size=56, embed_dim=48, depth=3, num_heads=4, **({"mlp_ratio": 256 / 48} if gated else {}))
    rule = "hf-dinov2-registers-to-timm"
    perturbed(target, 9).load_state_dict(converted(rule, saved(source.state_dict(), tmp_path), tmp_path), strict=True)
    image = noise(2, 3, 56, 56)
    with torch.no_grad():
        close(source(pixel_values=image).last_hidden_state, target.forward_features(image))
    with pytest.raises(CkptconvError) as caught:
        ckptconv.run(rule, tmp_path / "out.pth", tmp_path / "back.pth", reverse=True, like=str(tmp_path / "in.pth"))
    assert {problem.code for problem in caught.value.problems} == {"CK212"}
    lost = [problem.what.split(" cannot come back")[0] for problem in caught.value.problems]
    assert set(lost) == {"embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings"}, lost


def dino(transformers, wrapper=""):
    """The file that DINO's main_dino.py writes: two networks with their heads; the student in DDP."""
    timm = library("timm")
    networks, checkpoint = {}, {"epoch": 3, "args": argparse.Namespace(arch="vit_small"), "optimizer": {"state": {}, "param_groups": []}}
    for seed, (name, prefix) in enumerate([("student", "module."), ("teacher", wrapper)]):
        network = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0)
        head = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 16)), "last_layer": nn.Linear(16, 40)})
        networks[name] = perturbed(network, seed)
        checkpoint[name] = perturbed(nn.ModuleDict({"backbone": network, "head": head}), seed).state_dict(prefix=prefix)
    return networks, checkpoint


@pytest.mark.parametrize(("select", "wrapper"), [("teacher", ""), ("teacher", "module."), ("student", "")])
def test_dino_into_timm(tmp_path, transformers, select, wrapper):
    timm = library("timm")
    networks, checkpoint = dino(transformers, wrapper)
    more = {} if select == "teacher" else {"select": [select]}
    state = converted("dino-to-timm-vit", saved(checkpoint, tmp_path), tmp_path, **more)
    target = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0).eval()
    target.load_state_dict(state, strict=True)
    image = noise(2, 3, 32, 32)
    with torch.no_grad():
        close(networks[select](image), target(image))


@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (5, 7)])
def test_dino_into_timm_at_another_resolution(tmp_path, transformers, grid):
    timm = library("timm")
    networks, checkpoint = dino(transformers)
    state = converted("dino-to-timm-vit", saved(checkpoint, tmp_path), tmp_path, set={"grid": list(grid)})
    wanted = timm.layers.resample_abs_pos_embed(networks["teacher"].pos_embed.detach(), new_size=list(grid), num_prefix_tokens=1)
    torch.testing.assert_close(state["pos_embed"], wanted, rtol=1e-5, atol=1e-6)
    size = (8 * grid[0], 8 * grid[1])
    target = timm.models.VisionTransformer(img_size=size, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0).eval()
    target.load_state_dict(state, strict=True)
    networks["teacher"].set_input_size(img_size=size)  # timm's own way to another resolution
    with torch.no_grad():
        close(networks["teacher"](noise(2, 3, *size)), target(noise(2, 3, *size)))


# Quantised weights


def in_blocks(weight, size):
    """DeepSeek-V3's layout: each block of the weight over its greatest number, times fp8's; and what comes back, element by element."""
    rows, columns = (math.ceil(n / size) for n in weight.shape)
    scales, low, back = torch.empty(rows, columns), torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    for i in range(rows):
        for j in range(columns):
            block = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scales[i, j] = weight[block].abs().max() / 448
            low[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            back[block] = low[block].float() * scales[i, j]
    return low, scales, back


@pytest.mark.parametrize("said", ["config", "set"])
def test_fp8_blocks_into_a_plain_llama(tmp_path, transformers, said):
    """32, 40 and 16 rows and columns in blocks of 12: every matrix ends in blocks that are not full."""
    model, target = llama(transformers), llama(transformers, seed=5)
    state, wanted = {}, {}
    for name, value in model.state_dict().items():
        if name.endswith("_proj.weight"):
            state[name], state[f"{name}_scale_inv"], wanted[name] = in_blocks(value, 12)
            assert not torch.equal(wanted[name], value)
        else:
            state[name] = value.bfloat16()
            wanted[name] = state[name].float()
    if said == "config":
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8", "weight_block_size": [12, 12]}}))
    out = converted("fp8-blocks-to-float", saved(state, tmp_path), tmp_path, set={"rows": 12, "columns": 12} if said == "set" else {})
    equal(out, wanted)
    target.load_state_dict(out, strict=True)
    before, after = logits(model, words(36)), logits(target, words(36))
    assert (before - after).abs().mean() < 0.1 * before.abs().mean(), "what fp8 lost, and no more"
    (tmp_path / "config.json").unlink(missing_ok=True)
    assert refused("fp8-blocks-to-float", tmp_path / "in.pth", tmp_path, set={"rows": 16, "columns": 16}) == {"CK206"}


def test_mxfp4_experts_into_gpt_oss(tmp_path, transformers):
    """The oracle is transformers' own conversion; every byte and exponents on both sides of one are among the inputs."""
    convert = library("transformers.integrations.mxfp4").convert_moe_packed_tensors
    config = transformers.GptOssConfig(
        vocab_size=31, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model, target = (perturbed(transformers.GptOssForCausalLM(config), seed).bfloat16() for seed in (0, 5))
    state, generator = dict(model.state_dict()), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, inputs, outputs = value.shape
                shape = (experts, outputs, inputs // 32)
                blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
                blocks.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
                scales = torch.randint(120, 130, shape, generator=generator, dtype=torch.uint8)
                state[f"{name}_blocks"], state[f"{name}_scales"] = blocks, scales
                del state[name]
                value.copy_(convert(blocks, scales))
    out = converted("mxfp4-experts-to-float", saved(state, tmp_path), tmp_path)
    equal(out, {name: model.state_dict()[name] for name in out})
    target.load_state_dict(out, strict=True)
    close(logits(model, words(31)).float(), logits(target, words(31)).float())


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 24)
        self.body = nn.ModuleList([nn.Linear(24, 40), nn.Linear(40, 24, bias=False)])
        self.head = nn.Linear(24, 7)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.body[1](functional.gelu(self.body[0](x))))


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantised_layers_into_float(tmp_path):
    model, target = perturbed(Quantised()), perturbed(Quantised(), 5)
    low = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    state = converted("torch-dynamic-quant-to-float", saved(low.state_dict(), tmp_path), tmp_path)
    bias = state.pop("body.1.bias", None)
    assert bias is None
    target.load_state_dict(state, strict=True)
    for name, module in low.named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            assert torch.equal(state[f"{name}.weight"], module.weight().dequantize()), name
            assert not torch.equal(state[f"{name}.weight"], model.get_submodule(name).weight)
    ids = words(31)
    with torch.no_grad():
        before, after = low(ids), target(ids)
    assert (before - after).abs().mean() < 0.05 * before.abs().mean(), "activations are quantised on one side only"


# Adapters


class Hooked:
    """The adapter beside its layer, by hooks: what PEFT's forward pass computes."""

    def __init__(self, model, adapters):
        self.handles = [model.get_submodule(name).register_forward_hook(self.adding(*parts)) for name, parts in adapters.items()]

    @staticmethod
    def adding(a, b, scale):
        return lambda _, given, out: out + scale * (given[0] @ a.T @ b.T)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def lora(folder, model, layers, *, stabilised, transposed, extra=None):
    """An adapter as PEFT saves it. ``layers``: name -> (rank, alpha); those of the config's own come from r and lora_alpha."""
    from safetensors.torch import save_file

    state, adapters, generator = {}, {}, torch.Generator().manual_seed(7)
    for name, (rank, alpha) in layers.items():
        wide, out = model.get_submodule(name).weight.shape[:: 1 if transposed else -1]
        a, b = torch.randn(rank, wide, generator=generator) * 0.2, torch.randn(out, rank, generator=generator) * 0.2
        state[f"base_model.model.{name}.lora_A.weight"], state[f"base_model.model.{name}.lora_B.weight"] = a, b
        adapters[name] = (a, b, alpha / (math.sqrt(rank) if stabilised else rank))
    folder.mkdir()
    save_file({**state, **(extra or {})}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "fan_in_fan_out": transposed, "use_rslora": stabilised, "use_dora": bool(extra),
        "rank_pattern": {name: rank for name, (rank, _) in layers.items() if rank != 4},
        "alpha_pattern": {name: alpha for name, (_, alpha) in layers.items() if alpha != 8},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return adapters


def gpt2(transformers, seed=0):
    config = transformers.GPT2Config(vocab_size=36, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2)
    return perturbed(transformers.GPT2LMHeadModel(config), seed)


@pytest.mark.parametrize("stabilised", [False, True], ids=["alpha over r", "alpha over its root"])
@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
def test_a_lora_adapter_merged(tmp_path, transformers, kind, stabilised):
    make = gpt2 if kind == "GPT-2" else llama
    model, target = make(transformers), make(transformers, seed=5)
    layers = {
        "GPT-2": {"transformer.h.0.attn.c_attn": (4, 8), "transformer.h.1.attn.c_attn": (2, 8), "transformer.h.1.mlp.c_proj": (4, 24)},
        "Llama": {"model.layers.0.self_attn.q_proj": (4, 8), "model.layers.1.self_attn.v_proj": (2, 24), "model.layers.1.mlp.up_proj": (4, 3)},
    }[kind]  # fmt: skip
    adapters = lora(tmp_path / "adapter", model, layers, stabilised=stabilised, transposed=kind == "GPT-2")
    model.save_pretrained(tmp_path / "base")  # GPT-2's output layer is left out of the file
    state = converted(
        "peft-lora-merge",
        tmp_path / "base/model.safetensors",
        tmp_path,
        also={"adapter": tmp_path / "adapter"},
        set={"tie": kind == "GPT-2"},
    )
    target.load_state_dict(state, strict=True)
    ids = words(36)
    with Hooked(model, adapters):
        wanted = logits(model, ids)
    close(wanted, logits(target, ids))
    assert (wanted - logits(model, ids)).abs().max() > 0.01 * wanted.abs().max(), "an adapter that changes nothing proves nothing"
    changed = {name for name, value in target.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {f"{name}.weight" for name in layers}


def test_alpha_patterns_match_as_peft_matches_them(tmp_path, transformers):
    """PEFT reads a key as a regular expression for the end of the name, after a dot."""
    model, target = llama(transformers), llama(transformers, seed=5)
    layers = {
        "model.layers.0.self_attn.q_proj": (4, 24),
        "model.layers.1.self_attn.q_proj": (4, 2),
        "model.layers.1.self_attn.k_proj": (4, 8),
    }
    adapters = lora(tmp_path / "adapter", model, layers, stabilised=False, transposed=False)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["alpha_pattern"] = {"1.self_attn.q_proj": 2, r"layers\.\d+\.self_attn\.q_proj": 24, "_proj": 100}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    state = converted("peft-lora-merge", saved(model.state_dict(), tmp_path), tmp_path, also={"adapter": tmp_path / "adapter"})
    target.load_state_dict(state, strict=True)
    with Hooked(model, adapters):
        wanted = logits(model, words(36))
    close(wanted, logits(target, words(36)))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.lora_magnitude_vector", "model.embed_tokens.lora_embedding_A", "lm_head.weight"]
)
def test_what_cannot_be_merged_is_refused(tmp_path, transformers, name):
    model = llama(transformers)
    extra = {f"base_model.model.{name}": torch.ones(32)}
    lora(tmp_path / "adapter", model, {"model.layers.0.self_attn.q_proj": (4, 8)}, stabilised=False, transposed=False, extra=extra)
    source = saved(model.state_dict(), tmp_path)
    assert refused("peft-lora-merge", source, tmp_path, also={"adapter": tmp_path / "adapter"}) == {"CK207"}


def test_an_adapter_of_another_model_is_refused(tmp_path, transformers):
    """The adapter's layers must all be there, or it would be merged in part."""
    lora(tmp_path / "adapter", llama(transformers, num_hidden_layers=3), {f"model.layers.{i}.self_attn.q_proj": (4, 8) for i in range(3)},
         stabilised=False, transposed=False)  # fmt: skip
    source = saved(llama(transformers).state_dict(), tmp_path)
    assert refused("peft-lora-merge", source, tmp_path, also={"adapter": tmp_path / "adapter"}) == {"CK205", "CK207"}


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "OPT", "Whisper"])
def test_the_tied_output_layer_of_a_published_file(tmp_path, transformers, kind):
    made = {
        "GPT2": gpt2,
        "Llama": lambda library, seed=0: llama(library, seed, tie_word_embeddings=True),
        "OPT": lambda library, seed=0: perturbed(library.OPTForCausalLM(library.OPTConfig(
            vocab_size=36, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2,
            max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )), seed),
        "Whisper": whisper,
    }[kind]  # fmt: skip
    model, target = made(transformers), made(transformers, seed=5)
    model.save_pretrained(tmp_path / "published")
    state = converted("hf-tie-lm-head", tmp_path / "published/model.safetensors", tmp_path)
    equal(state, {name: model.state_dict()[name] for name in state})
    target.load_state_dict(state, strict=True)
    if kind != "Whisper":
        close(logits(model, words(36)), logits(target, words(36)))
    assert len({value.data_ptr() for value in state.values()}) == len(state) - 1, "the two share their storage"


def test_a_published_bart_which_ties_more_than_that_is_refused(tmp_path, transformers):
    config = transformers.BartConfig(vocab_size=36, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                     decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16)  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "published")
    assert refused("hf-tie-lm-head", tmp_path / "published/model.safetensors", tmp_path) == {"CK208"}


# Containers


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_tensors_into_plain_ones(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with torch.no_grad():
        for layer in model:
            layer.weight[layer.weight.abs() < 0.2] = 0
    state = model.state_dict()
    given = {**state, "0.weight": state["0.weight"].to_sparse(), "1.weight": state["1.weight"].to_sparse_csr()}
    out = converted("plain-tensors", saved({"model": given, "epoch": 3}, tmp_path), tmp_path)
    out = out.get("model", out)
    equal(out, state)
    nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).load_state_dict(out, strict=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("nested", [False, True])
def test_a_distributed_checkpoint_into_plain_tensors(tmp_path, transformers, nested):
    """Written by torch.distributed.checkpoint itself, in this one process."""
    import torch.distributed.checkpoint as dcp

    model, target = llama(transformers), llama(transformers, seed=5)
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    dcp.save({"model": state, "step": 7} if nested else state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    out = converted("plain-tensors", tmp_path / "dcp", tmp_path)
    equal(out.get("model", out), state)
    out = converted("plain-tensors", tmp_path / "dcp", tmp_path, set={"float32": True})
    target.load_state_dict(out.get("model", out), strict=True)
    close(logits(model.bfloat16().float(), words(36)), logits(target, words(36)))


def normed(norm, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv1d(4, 8, 3), nn.GELU(), nn.Conv1d(8, 6, 3), nn.Flatten(), nn.Linear(24, 5))
    for at in (0, 2, 4) if norm else ():
        norm(net[at])
    return perturbed(net, seed)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_folded_into_plain_weights(tmp_path):
    model, target = normed(nn.utils.weight_norm, 0), normed(None, 5)
    target.load_state_dict(converted("weight-norm-fold", saved(model.state_dict(), tmp_path), tmp_path), strict=True)
    x = noise(2, 4, 8)
    with torch.no_grad():
        close(model(x), target(x))
        for at in (0, 2, 4):
            nn.utils.remove_weight_norm(model[at])  # torch's own folding
            torch.testing.assert_close(target[at].weight, model[at].weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_into_parametrizations(tmp_path):
    model, target = normed(nn.utils.weight_norm, 0), normed(nn.utils.parametrizations.weight_norm, 5)
    target.load_state_dict(converted("weight-norm-to-parametrizations", saved(model.state_dict(), tmp_path), tmp_path), strict=True)
    x = noise(2, 4, 8)
    with torch.no_grad():
        close(model(x), target(x))


# CLIP


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """OpenAI's block: torch's own attention, whose in_proj_weight is query, key and value on top of each other."""

    def __init__(self, width, heads, activation):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "gelu": activation(), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](self.mlp["gelu"](self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, activation) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 48, 8, 8, bias=False)
        self.class_embedding, self.positional_embedding = nn.Parameter(torch.zeros(48)), nn.Parameter(torch.zeros(17, 48))
        self.ln_pre, self.ln_post = nn.LayerNorm(48), nn.LayerNorm(48)
        self.transformer = Transformer(48, 3, 4, activation)
        self.proj = nn.Parameter(torch.zeros(48, 24))

    def forward(self, image):
        x = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Clip(nn.Module):
    """OpenAI's CLIP and open_clip's, with square projections too, so that a transposition is not a matter of shapes."""

    def __init__(self, activation):
        super().__init__()
        self.visual = Visual(activation)
        self.transformer = Transformer(24, 2, 4, activation)
        self.token_embedding, self.ln_final = nn.Embedding(31, 24), nn.LayerNorm(24)
        self.positional_embedding = nn.Parameter(torch.zeros(10, 24))
        self.text_projection = nn.Parameter(torch.zeros(24, 24))
        self.logit_scale = nn.Parameter(torch.tensor(2.6))

    def text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.transformer(x, torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def hf_clip(transformers, activation):
    both = {"intermediate_size": 96, "num_attention_heads": 4, "hidden_act": activation}
    ends = {"bos_token_id": 29, "eos_token_id": 30, "pad_token_id": 0}
    text = {
        **both,
        **ends,
        "intermediate_size": 96,
        "vocab_size": 31,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "max_position_embeddings": 10,
    }
    vision = {**both, "intermediate_size": 192, "hidden_size": 48, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    return perturbed(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)), 5)


def same_clip(model, target):
    ids, image = words(29), noise(2, 3, 32, 32)
    ids[0, 5], ids[1, 7] = 30, 30  # the end of the text, where both read it off
    with torch.no_grad():
        found = target(input_ids=ids, pixel_values=image)
        for left, right in [(model.text(ids), found.text_embeds), (model.visual(image), found.image_embeds)]:
            close(functional.normalize(left, dim=-1), right)
        close(functional.normalize(model.text(ids), dim=-1) @ functional.normalize(model.visual(image), dim=-1).T * model.logit_scale.exp(),
              found.logits_per_text)  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
def test_openais_clip_into_transformers(tmp_path, transformers, half):
    model = perturbed(Clip(QuickGELU))
    if half:  # as the archives are: matrices in half precision, norms and embeddings not
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(value.half().float() if "ln_" not in name else value)
    state = {name: value.half() if half and "ln_" not in name else value for name, value in model.state_dict().items()}
    state |= {"input_resolution": torch.tensor(32), "context_length": torch.tensor(10), "vocab_size": torch.tensor(31)}
    target = hf_clip(transformers, "quick_gelu")
    target.load_state_dict(converted("openai-clip-to-hf-clip", saved(state, tmp_path), tmp_path), strict=True)
    same_clip(model, target)


@pytest.mark.parametrize("trainer", [False, True])
def test_open_clip_into_transformers(tmp_path, transformers, trainer):
    model, target = perturbed(Clip(nn.GELU)), hf_clip(transformers, "gelu")
    state = model.state_dict()
    if trainer:
        state = {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": value for name, value in state.items()}}
    target.load_state_dict(converted("openclip-to-hf-clip", saved(state, tmp_path), tmp_path), strict=True)
    same_clip(model, target)


@pytest.mark.parametrize("rule", ["openai-clip-to-hf-clip", "openclip-to-hf-clip"])
def test_clip_out_of_transformers_and_into_it_again(tmp_path, transformers, rule):
    """The other layout made by arithmetic from transformers' names; what comes back is the same bit by bit."""
    model, state = hf_clip(transformers, "quick_gelu"), {}
    for name, value in model.state_dict().items():
        tower, _, rest = name.partition(".")
        at = {"text_model": "", "vision_model": "visual."}.get(tower, "")
        parts = rest.split(".")
        if parts[0] == "encoder":
            block, (layer, last) = f"{at}transformer.resblocks.{parts[2]}.", parts[-2:]
            if layer in ("q_proj", "k_proj", "v_proj"):
                whole = state.setdefault(f"{block}attn.in_proj_{last}", torch.empty(3 * value.shape[0], *value.shape[1:]))
                for row in range(value.shape[0]):
                    whole["qkv".index(layer[0]) * value.shape[0] + row] = value[row]
            else:
                new = {"out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
                state[f"{block}{new[layer]}.{last}"] = value
        elif tower in ("text_projection", "visual_projection"):
            turned = torch.empty(value.shape[1], value.shape[0])
            for row in range(value.shape[0]):
                turned[:, row] = value[row]
            state[{"text_projection": "text_projection", "visual_projection": "visual.proj"}[tower]] = turned
        else:
            new = {"embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding.weight": "token_embedding.weight",
                   "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight", "": "logit_scale"}  # fmt: skip
            norm = rest.replace("pre_layrnorm", "ln_pre").replace("post_layernorm", "ln_post").replace("final_layer_norm", "ln_final")
            state[at + new.get(rest, norm)] = value
    assert state.keys() == Clip(QuickGELU).state_dict().keys()
    equal(converted(rule, saved(state, tmp_path), tmp_path), model.state_dict())


# Whisper and EnCodec


def whisper(transformers, seed=0):
    config = transformers.WhisperConfig(
        vocab_size=36, num_mel_bins=8, d_model=24, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=20, max_target_positions=12, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return perturbed(transformers.WhisperForConditionalGeneration(config), seed)


class Heads(nn.Module):
    """openai-whisper's MultiHeadAttention; its key has no bias."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, x, other, causal):
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.query(x), self.key(other), self.value(other)))
        return self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class WhisperBlock(nn.Module):
    def __init__(self, width, heads, cross):
        super().__init__()
        self.attn, self.attn_ln, self.mlp_ln = Heads(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if cross:
            self.cross_attn, self.cross_attn_ln = Heads(width, heads), nn.LayerNorm(width)

    def forward(self, x, other=None):
        y = self.attn_ln(x)
        x = x + self.attn(y, y, other is not None)
        if other is not None:
            x = x + self.cross_attn(self.cross_attn_ln(x), other, False)
        return x + self.mlp(self.mlp_ln(x))


class AudioEncoder(nn.Module):
    def __init__(self, width=24, heads=4):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(8, width, 3, padding=1), nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", torch.zeros(20, width))
        self.blocks = nn.ModuleList(WhisperBlock(width, heads, False) for _ in range(2))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, sound):
        x = functional.gelu(self.conv2(functional.gelu(self.conv1(sound)))).transpose(1, 2) + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class TextDecoder(nn.Module):
    def __init__(self, width=24, heads=4):
        super().__init__()
        self.token_embedding, self.positional_embedding = nn.Embedding(36, width), nn.Parameter(torch.zeros(12, width))
        self.blocks = nn.ModuleList(WhisperBlock(width, heads, True) for _ in range(3))
        self.ln = nn.LayerNorm(width)

    def forward(self, ids, heard):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, heard)
        return self.ln(x) @ self.token_embedding.weight.T


def test_openais_whisper_into_transformers(tmp_path, transformers):
    model, target = perturbed(nn.ModuleDict({"encoder": AudioEncoder(), "decoder": TextDecoder()})), whisper(transformers, 5)
    state = converted(
        "openai-whisper-to-hf-whisper",
        saved({"dims": {"n_mels": 8, "n_vocab": 36}, "model_state_dict": model.state_dict()}, tmp_path),
        tmp_path,
    )
    state = state.get("model_state_dict", state)
    target.load_state_dict(state, strict=True)
    assert state["proj_out.weight"].data_ptr() == state["model.decoder.embed_tokens.weight"].data_ptr()
    sound, ids = noise(2, 8, 40), words(36)
    with torch.no_grad():
        close(model["decoder"](ids, model["encoder"](sound)), target(input_features=sound, decoder_input_ids=ids).logits)


def encodec_of(model):
    """encodec's names: a convolution stands in a NormConv1d in a SConv1d, a transposed one in a NormConvTranspose1d in a SConvTranspose1d."""
    transposed = {name for name, module in model.named_modules() if isinstance(module, nn.ConvTranspose1d)}
    out = {}
    for name, value in model.state_dict().items():
        head, _, rest = name.partition(".layers.")
        if head == "quantizer":
            out[f"quantizer.vq.layers.{rest.replace('.codebook.', '._codebook.')}"] = value
            continue
        rest = rest.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v")
        at, _, last = rest.rpartition(".")
        if at.endswith(("conv", ".norm")):
            own, _, layer = at.rpartition(".")
            word = "convtr" if f"{head}.layers.{own}.conv" in transposed else "conv"
            at = f"{own}.{word}.{word if layer == 'conv' else 'norm'}"
        out[f"{head}.model.{at}.{last}"] = value
    return out


@pytest.mark.parametrize("kind", ["24 kHz", "48 kHz"])
def test_encodec_into_transformers(tmp_path, transformers, kind):
    shape = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "upsampling_ratios": [4, 2], "target_bandwidths": [30.0, 60.0]}
    if kind == "48 kHz":
        shape |= {"norm_type": "time_group_norm", "use_causal_conv": False, "audio_channels": 2}
    model, target = (perturbed(transformers.EncodecModel(transformers.EncodecConfig(**shape)), seed) for seed in (0, 5))
    theirs = encodec_of(model)
    assert "decoder.model.3.convtr.convtr.bias" in theirs
    assert "encoder.model.1.block.3.conv.conv.bias" in theirs
    assert ("decoder.model.3.convtr.norm.weight" if kind == "48 kHz" else "decoder.model.3.convtr.convtr.weight_g") in theirs
    assert "quantizer.vq.layers.1._codebook.embed_avg" in theirs
    state = converted("encodec-to-hf-encodec", saved(theirs, tmp_path), tmp_path)
    equal(state, dict(sorted(model.state_dict().items(), key=lambda item: list(state).index(item[0]))))
    target.load_state_dict(state, strict=True)
    sound = noise(2, shape.get("audio_channels", 1), 64)
    with torch.no_grad():
        close(model.decoder(model.encoder(sound)), target.decoder(target.encoder(sound)))
        codes = model.encode(sound, bandwidth=60.0).audio_codes
        assert torch.equal(codes, target.encode(sound, bandwidth=60.0).audio_codes)
        assert len(codes.unique()) > 3
