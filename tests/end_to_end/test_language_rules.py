"""The rules for language models, adapters and reparametrizations, proved on the installed libraries.

As in test_model_rules.py: seeded, perturbed weights, strict loading into the real model, and equal forward outputs. Where a library is not
installed (Megatron, kohya-ss, PEFT) the other layout is made here, element by element, from what its own forward pass does with it.
"""

import json

import pytest
import torch
from torch import nn

import ckptconv
from ckptconv.errors import CkptconvError
from ckptconv.target.torchvision_ops import import_with_torchvision


@pytest.fixture(scope="module")
def transformers():
    return import_with_torchvision("transformers")


def perturbed(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            if value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def close(left, right):
    assert left.abs().max() > 1e-3, "a degenerate output proves nothing"
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(left.abs().max()))


def words(high, length=9):
    return torch.randint(0, high, (2, length), generator=torch.Generator().manual_seed(1))


def converted(rule, source, folder, **options):
    """Runs the rule with every byte proved (L4), and gives back what a strict loader would see."""
    report = ckptconv.run(rule, source, folder / "out.pth", verify=4, **options)
    assert "L4" in report.ladder.reached, report.ladder.reached
    return torch.load(folder / "out.pth", weights_only=True)


def refused(rule, source, folder, code, **options):
    with pytest.raises(CkptconvError) as caught:
        ckptconv.run(rule, source, folder / "refused.pth", **options)
    assert code in [problem.code for problem in caught.value.problems]
    assert not (folder / "refused.pth").exists()


class SeparateAttention(nn.Module):
    """Attention with three projections in plain torch; ``rotary`` and ``alibi`` say which of the two models it stands in for."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.dense = (nn.Linear(width, width) for _ in range(4))

    def parts(self, x):
        return (one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj))

    def mixed(self, q, k, v, bias):
        return self.dense(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


def causal(length):
    return torch.full((length, length), float("-inf")).triu(1)


class NeoXAttention(SeparateAttention):
    def forward(self, hidden_states, position_embeddings=None, **_):
        cos, sin = (one.unsqueeze(1) for one in position_embeddings)
        turned = []
        q, k, v = self.parts(hidden_states)
        for one in (q, k):
            rotary, rest = one[..., : cos.shape[-1]], one[..., cos.shape[-1] :]
            first, second = rotary.chunk(2, -1)
            turned.append(torch.cat([rotary * cos + torch.cat([-second, first], -1) * sin, rest], -1))
        return self.mixed(*turned, v, causal(q.shape[2])), None


class BloomAttention(SeparateAttention):
    def forward(self, hidden_states, residual, alibi=None, **_):
        q, k, v = self.parts(hidden_states)
        bias = alibi.view(q.shape[0], self.heads, 1, -1) + causal(q.shape[2])
        return self.mixed(q, k, v, bias) + residual, None


def neox(transformers, seed=0):
    return perturbed(
        transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                vocab_size=31, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32
            )
        ),
        seed,
    )


def bloom(transformers, seed=0):
    return perturbed(transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=31, hidden_size=48, n_layer=2, n_head=4)), seed)


def test_gpt_neox_with_separate_projections(tmp_path, transformers):
    model, target = neox(transformers), neox(transformers, seed=5)
    for layer in target.gpt_neox.layers:
        layer.attention = NeoXAttention(48, 4)
    state = model.state_dict()
    for i in range(2):  # what versions before 4.30 saved too
        state[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
        state[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
        state[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(state, tmp_path / "in.pth")
    target.load_state_dict(converted("gpt-neox-split-qkv", tmp_path / "in.pth", tmp_path, set={"H": 4}), strict=True)
    ids = words(31)
    with torch.no_grad():
        close(model(input_ids=ids).logits, target.eval()(input_ids=ids).logits)


def test_bloom_with_separate_projections(tmp_path, transformers):
    model, target = bloom(transformers), bloom(transformers, seed=5)
    for block in target.transformer.h:
        block.self_attention = BloomAttention(48, 4)
    model.config.save_pretrained(tmp_path)  # the number of heads is read from here
    torch.save(model.state_dict(), tmp_path / "in.pth")
    target.load_state_dict(converted("bloom-split-qkv", tmp_path / "in.pth", tmp_path), strict=True)
    ids = words(31)
    with torch.no_grad():
        close(model(input_ids=ids).logits, target.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("rule", ["gpt-neox-split-qkv", "bloom-split-qkv"])
def test_each_row_of_query_key_value_goes_to_its_own_head(rule, transformers):
    state = (neox if rule.startswith("gpt") else bloom)(transformers).state_dict()
    found = ckptconv.convert(state, rule, set={"H": 4})
    fused = [name for name in state if ".query_key_value." in name]
    assert len(fused) == 4
    for name in fused:
        for which, letter in enumerate("qkv"):
            part = found[name.replace("query_key_value", f"{letter}_proj")]
            for head in range(4):
                for d in range(12):
                    assert torch.equal(part[head * 12 + d], state[name][head * 36 + which * 12 + d])
        assert not torch.equal(found[name.replace("query_key_value", "q_proj")], state[name].chunk(3)[0])


def test_falcon_is_not_taken_for_bloom(tmp_path, transformers):
    config = transformers.FalconConfig(vocab_size=31, hidden_size=48, num_hidden_layers=1, num_attention_heads=4)
    torch.save(transformers.FalconForCausalLM(config).state_dict(), tmp_path / "in.pth")
    refused("bloom-split-qkv", tmp_path / "in.pth", tmp_path, "CK208", set={"H": 4})


def experts_model(transformers, kind, seed=0):
    shared = {
        "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 11, "num_experts_per_tok": 3, "max_position_embeddings": 32, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    more = {
        "Qwen2Moe": {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
        "Qwen3Moe": {"moe_intermediate_size": 8, "head_dim": 8},
        "Olmoe": {},
    }[kind]
    return perturbed(getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shared, **more)), seed)


@pytest.mark.parametrize("kind", ["Qwen2Moe", "Qwen3Moe", "Olmoe"])
def test_experts_as_transformers_publishes_them_load_as_it_holds_them(tmp_path, transformers, kind):
    """``save_pretrained`` writes one tensor per expert; eleven of them, so that expert 10 stands before expert 2 in the file."""
    model, target = experts_model(transformers, kind), experts_model(transformers, kind, seed=5)
    model.save_pretrained(tmp_path / "published")
    state = converted("qwen2-moe-to-fused-experts", tmp_path / "published" / "model.safetensors", tmp_path)
    assert not [name for name in state if ".experts.10." in name]
    target.load_state_dict(state, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
    ids = words(31)
    with torch.no_grad():
        close(model(input_ids=ids).logits, target(input_ids=ids).logits)
    refused("qwen2-moe-to-fused-experts", tmp_path / "out.pth", tmp_path, "CK208")


VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "image_size": 16, "patch_size": 4}


@pytest.mark.parametrize(
    ("architecture", "config", "more"),
    [
        ("ViTForImageClassification", "ViTConfig", {"num_labels": 3}),
        ("ViTModel", "ViTConfig", {}),
        ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {"num_labels": 3}),
        ("ViTMAEForPreTraining", "ViTMAEConfig",
         {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 32}),
    ],
)  # fmt: skip
def test_vit_as_published_loads_strictly_into_transformers_5(tmp_path, transformers, architecture, config, more):
    """The oracle is transformers itself: what it holds has the new names, what it writes has the published ones."""
    settings = getattr(transformers, config)(**VISION, **more)
    model = perturbed(getattr(transformers, architecture)(settings))
    target = perturbed(getattr(transformers, architecture)(settings), seed=5)
    model.save_pretrained(tmp_path / "published")
    state = converted("hf-vit-4-to-5", tmp_path / "published" / "model.safetensors", tmp_path)
    target.load_state_dict(state, strict=True)
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    noise = {"noise": torch.rand(2, 16, generator=torch.Generator().manual_seed(2))} if "MAE" in architecture else {}
    with torch.no_grad():
        close(model(pixel_values=image, **noise)[0], target(pixel_values=image, **noise)[0])
    refused("hf-vit-4-to-5", tmp_path / "out.pth", tmp_path, "CK208")
    if "MAE" in architecture:  # transformers 5 writes decoder_encoder.layer where the published files have decoder_layers
        from safetensors.torch import load_file

        written = load_file(tmp_path / "published" / "model.safetensors")
        older = {name.replace("decoder_encoder.layer.", "decoder_layers."): value for name, value in written.items()}
        assert any(name.startswith("decoder.decoder_layers.0.attention.attention.query") for name in older)
        torch.save(older, tmp_path / "older.pth")
        again = converted("hf-vit-4-to-5", tmp_path / "older.pth", tmp_path, force=True)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state)


TEXT = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
        "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "bare", "pooler"),
    [
        ("BertForMaskedLM", "BertModel", False),
        ("BertForPreTraining", "BertModel", True),
        ("BertForQuestionAnswering", "BertModel", False),
        ("RobertaForMaskedLM", "RobertaModel", False),
        ("RobertaForSequenceClassification", "RobertaModel", False),
    ],
)
def test_bert_with_a_head_loads_strictly_into_the_encoder(tmp_path, transformers, architecture, bare, pooler):
    settings = getattr(transformers, architecture.partition("For")[0] + "Config")(**TEXT)
    model = perturbed(getattr(transformers, architecture)(settings))
    state = {}
    for name, value in model.state_dict().items():  # as the oldest files have it
        state[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = value
    state[f"{model.base_model_prefix}.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(state, tmp_path / "in.pth")
    ids = 3 + words(28)
    with torch.no_grad():
        wanted = model.base_model(input_ids=ids)
    for with_pooler in {pooler, False}:
        target = getattr(transformers, bare)(settings, add_pooling_layer=with_pooler).eval()
        state = converted("hf-bert-to-encoder", tmp_path / "in.pth", tmp_path, set={"pooler": with_pooler}, force=True)
        target.load_state_dict(state, strict=True)
        with torch.no_grad():
            found = target(input_ids=ids)
        close(wanted.last_hidden_state, found.last_hidden_state)
        if with_pooler:
            close(wanted.pooler_output, found.pooler_output)


def megatron_of(model, heads, groups, width, padded):
    """The Megatron-core state_dict of a transformers Llama, row by row: per group its queries, then its key, then its value."""
    each = heads // groups
    theirs, out = model.state_dict(), {}

    def padding(value):
        return torch.cat([value, torch.full((padded - value.shape[0], value.shape[1]), 9.0)])

    out["embedding.word_embeddings.weight"] = padding(theirs["model.embed_tokens.weight"])
    for i in range(model.config.num_hidden_layers):
        there, here = f"model.layers.{i}.", f"decoder.layers.{i}."
        for p in ("weight", "bias"):
            if f"{there}self_attn.q_proj.{p}" in theirs:
                q, k, v = (theirs[f"{there}self_attn.{x}_proj.{p}"] for x in "qkv")
                rows = []
                for group in range(groups):
                    rows += [q[(group * each + j) * width + d] for j in range(each) for d in range(width)]
                    rows += [k[group * width + d] for d in range(width)]
                    rows += [v[group * width + d] for d in range(width)]
                out[f"{here}self_attention.linear_qkv.{p}"] = torch.stack(rows)
                out[f"{here}self_attention.linear_proj.{p}"] = theirs[f"{there}self_attn.o_proj.{p}"]
        out[f"{here}self_attention.linear_qkv.layer_norm_weight"] = theirs[f"{there}input_layernorm.weight"]
        out[f"{here}self_attention.linear_qkv._extra_state"] = torch.zeros(5, dtype=torch.uint8)
        out[f"{here}mlp.linear_fc1.layer_norm_weight"] = theirs[f"{there}post_attention_layernorm.weight"]
        out[f"{here}mlp.linear_fc1.weight"] = torch.stack([row for x in ("gate", "up") for row in theirs[f"{there}mlp.{x}_proj.weight"]])
        out[f"{here}mlp.linear_fc2.weight"] = theirs[f"{there}mlp.down_proj.weight"]
        out[f"{here}mlp.linear_fc2._extra_state"] = torch.zeros(0, dtype=torch.uint8)
    out["decoder.final_layernorm.weight"] = theirs["model.norm.weight"]
    out["output_layer.weight"] = padding(theirs["lm_head.weight"])
    return out


def llama(transformers, groups, bias, seed=0):
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=groups, head_dim=12,
        intermediate_size=40, max_position_embeddings=32, attention_bias=bias, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return perturbed(transformers.LlamaForCausalLM(config), seed)


@pytest.mark.parametrize(("groups", "bias"), [(4, False), (2, False), (1, False), (2, True)])
def test_megatron_into_llama(tmp_path, transformers, groups, bias):
    """With all heads, grouped and a single key; a head is wider than hidden_size / heads, so that no product hides a mistake."""
    model, target = llama(transformers, groups, bias), llama(transformers, groups, bias, seed=5)
    (tmp_path / "hf").mkdir()
    model.config.save_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_key_value_heads"] == groups
    torch.save({"model": megatron_of(model, 4, groups, 12, padded=128), "iteration": 7, "checkpoint_version": 3.0}, tmp_path / "in.pt")
    state = converted("megatron-qkv-to-llama", tmp_path / "in.pt", tmp_path, config=tmp_path / "hf" / "config.json")
    state = state.get("model", state)
    target.load_state_dict(state, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
    ids = words(31)
    with torch.no_grad():
        close(model(input_ids=ids).logits, target(input_ids=ids).logits)


def test_megatron_layout_is_the_one_that_its_attention_reads(transformers):
    """Megatron views the mixed projection as (groups, (queries per group + 2) * width) and splits that: the same queries, keys, values."""
    groups, each, width = 2, 2, 12
    model = llama(transformers, groups, False)
    theirs = megatron_of(model, 4, groups, width, padded=31)
    found = ckptconv.convert(theirs, "megatron-qkv-to-llama", set={"H": 4, "G": groups})
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    mixed = nn.functional.linear(x, theirs["decoder.layers.1.self_attention.linear_qkv.weight"]).view(3, groups, -1)
    for letter, part in zip("qkv", mixed.split([each * width, width, width], -1), strict=True):
        close(part.reshape(3, -1), nn.functional.linear(x, found[f"model.layers.1.self_attn.{letter}_proj.weight"]))


def normed(norm, seed):
    """A network whose weights carry a norm: a convolution, a linear layer, one norm for the whole tensor, and a recurrent weight."""
    torch.manual_seed(seed)
    net = nn.ModuleDict({"conv": nn.Conv1d(4, 8, 3), "deep": nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 3)]), "rnn": nn.LSTM(3, 4)})
    norm(net["conv"])
    norm(net["deep"][0])
    norm(net["deep"][1], dim=None)
    norm(net["rnn"], name="weight_ih_l0")
    return perturbed(net, seed)


def call(net, x):
    y = net["deep"][1](net["deep"][0](net["conv"](x)))
    return net["rnn"](y.transpose(0, 1))[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_back_from_parametrizations(tmp_path):
    model, target = normed(nn.utils.parametrizations.weight_norm, 0), normed(nn.utils.weight_norm, 5)
    torch.save(model.state_dict(), tmp_path / "in.pth")
    target.load_state_dict(converted("weight-norm-from-parametrizations", tmp_path / "in.pth", tmp_path), strict=True)
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(call(model, x), call(target, x))


def test_weight_norm_leaves_other_parametrizations_alone(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.spectral_norm(model[0])
    torch.save(model.state_dict(), tmp_path / "in.pth")
    refused("weight-norm-from-parametrizations", tmp_path / "in.pth", tmp_path, "CK208")
    nn.utils.parametrizations.weight_norm(model[1])
    found = ckptconv.convert(model.state_dict(), "weight-norm-from-parametrizations")
    kept = {name for name in model.state_dict() if name.startswith("0.")}
    assert set(found) == kept | {"1.weight_g", "1.weight_v", "1.bias"}


def tree(paths):
    """A module for every dotted path."""
    root = nn.Module()
    for path, leaf in paths.items():
        here = root
        *parents, last = path.split(".")
        for part in parents:
            if part not in here._modules:
                here.add_module(part, nn.Module())
            here = here._modules[part]
        here.add_module(last, leaf)
    return root


class Adapter(nn.Module):
    """What PEFT puts beside a linear layer or a 1x1 convolution; alpha as a buffer, for strict loading to ask for it."""

    def __init__(self, wide, out, rank, conv):
        super().__init__()
        kind = (lambda a, b: nn.Conv2d(a, b, 1, bias=False)) if conv else (lambda a, b: nn.Linear(a, b, bias=False))
        self.lora_A, self.lora_B = kind(wide, rank), kind(rank, out)
        self.register_buffer("alpha", torch.tensor(0.0))


def unet_paths():
    """The modules of Stable Diffusion 1.5's UNet that kohya-ss trains: Transformer2DModel in six blocks and in the middle."""
    places = [f"down_blocks.{b}.attentions.{a}" for b in range(3) for a in range(2)]
    places += ["mid_block.attentions.0"] + [f"up_blocks.{b}.attentions.{a}" for b in (1, 2, 3) for a in range(3)]
    inside = [f"attn{n}.{x}" for n in (1, 2) for x in ("to_q", "to_k", "to_v", "to_out.0")] + ["ff.net.0.proj", "ff.net.2"]
    for place in places:
        yield f"{place}.proj_in", True
        yield f"{place}.proj_out", True
        yield from ((f"{place}.transformer_blocks.0.{x}", False) for x in inside)


def test_kohya_lora_of_the_whole_unet_and_text_encoder(tmp_path, transformers):
    """kohya's name is the module's path with underscores for dots, whatever the path; the rule has to find the dots again."""
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**TEXT, "num_hidden_layers": 12}))
    linears = [name for name, module in text.named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 12 * 6
    modules = {f"unet.{path}": ("lora_unet", path, conv) for path, conv in unet_paths()}
    for name in linears:
        path = name if name.startswith("text_model.") else f"text_model.{name}"  # transformers 5 left this part out
        modules[f"text_encoder.{path}"] = ("lora_te", path, False)
    assert len(modules) == 16 * 12 + 72, "192 and 72, as kohya-ss says when it starts to train"
    generator = torch.Generator().manual_seed(0)
    state, target = {}, tree({name: Adapter(8, 6, 2, conv) for name, (_, _, conv) in modules.items()})
    for prefix, path, conv in modules.values():
        name, one = f"{prefix}_{path.replace('.', '_')}", (1, 1) if conv else ()
        state[f"{name}.lora_down.weight"] = torch.randn(2, 8, *one, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(6, 2, *one, generator=generator)
        state[f"{name}.alpha"] = torch.rand((), generator=generator)
    torch.save(state, tmp_path / "in.pth")
    target.load_state_dict(converted("kohya-to-peft-lora", tmp_path / "in.pth", tmp_path), strict=True)
    for name, (prefix, path, conv) in modules.items():
        adapter, flat = target.get_submodule(name), f"{prefix}_{path.replace('.', '_')}"
        x = torch.randn(8, 1, 1, generator=generator) if conv else torch.randn(8, generator=generator)
        with torch.no_grad():
            found = (adapter.alpha / 2 * adapter.lora_B(adapter.lora_A(x))).flatten()
        up, down = state[f"{flat}.lora_up.weight"].flatten(1), state[f"{flat}.lora_down.weight"].flatten(1)
        torch.testing.assert_close(found, state[f"{flat}.alpha"] / 2 * (up @ down) @ x.flatten())
    refused("kohya-to-peft-lora", tmp_path / "out.pth", tmp_path, "CK208")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight", "CK208"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "CK208"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "CK208"),
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "CK208"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn3_to_q.lora_down.weight", "CK210"),
    ],
)
def test_kohya_names_of_other_kinds_are_refused(tmp_path, name, code):
    torch.save({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 4), name: torch.ones(2, 4)}, tmp_path / "in.pth")
    refused("kohya-to-peft-lora", tmp_path / "in.pth", tmp_path, code)
