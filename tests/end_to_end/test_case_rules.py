"""The rules that were found by real conversions, proved on the installed libraries: strict loading, equal outputs, and the way back.

Weights are seeded and perturbed, running statistics too: with fresh ones half of all mistakes would not show.
"""

import pytest
import torch
from torch import nn

import ckptconv
from ckptconv.errors import CkptconvError
from ckptconv.target.torchvision_ops import import_with_torchvision


def perturbed(model, seed=0):
    """Every value moved; variances near 1, and weights scaled by their fan-in, so that a deep network's output stays finite and alive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif not value.is_floating_point():
                value.fill_(7)
            elif value.ndim > 1 and not name.endswith(("token", "pos_embed", "position_embeddings")):
                value.copy_(torch.randn(value.shape, generator=generator) * (1.5 / value[0].numel()) ** 0.5)
            else:
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model.eval()


def library(name):
    import_with_torchvision("torchvision")
    return import_with_torchvision(name)


def picture(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def plain(model, given):
    return model(given)


def logits(model, given):
    return model(given).logits


def convert(folder, rule, state, reached="L0 L1 L3 L4", **options):
    torch.save(state, folder / "in.pth")
    report = ckptconv.run(rule, folder / "in.pth", folder / "out.pth", verify=4, force=True, **options)
    assert report.ladder.reached == reached
    return torch.load(folder / "out.pth", weights_only=True)


def prove(folder, rule, source, target, given, call=plain, source_call=plain, state=None, **options):
    """``state``: what stands in the file, where that is not the source's own state_dict."""
    perturbed(source)
    perturbed(target, seed=9)
    target.load_state_dict(convert(folder, rule, source.state_dict() if state is None else state(source), **options), strict=True)
    with torch.no_grad():
        left, right, other = source_call(source, given), call(target, given), source_call(source, given.flip(0))
    assert left.abs().max() > 1e-3, "a degenerate output proves nothing"
    assert (left - other).abs().max() > 1e-3 * left.abs().max(), "an output that does not depend on its input proves nothing"
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(left.abs().max()))


def published(folder):
    """What transformers writes into a file: the names of its predecessors."""

    def state(model):
        from safetensors.torch import load_file

        model.save_pretrained(folder / "published")
        return load_file(folder / "published/model.safetensors")

    return state


def refused(folder, rule, state, **options):
    torch.save(state, folder / "in.pth")
    with pytest.raises(CkptconvError) as caught:
        ckptconv.run(rule, folder / "in.pth", folder / "out.pth", **options)
    assert not (folder / "out.pth").exists()
    return {problem.code for problem in caught.value.problems}


@pytest.mark.parametrize("from_file", [False, True], ids=["in memory", "published"])
def test_transformers_swin_into_timm(tmp_path, from_file):
    transformers, timm = library("transformers"), library("timm")
    config = {"image_size": 64, "patch_size": 4, "embed_dim": 24, "depths": [2, 1, 2], "num_heads": [2, 4, 4], "window_size": 4}
    source = transformers.SwinForImageClassification(transformers.SwinConfig(**config, num_labels=11))
    target = timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, embed_dim=24, depths=(2, 1, 2), num_heads=(2, 4, 4), window_size=4, num_classes=11
    )
    state = published(tmp_path) if from_file else None
    prove(tmp_path, "hf-swin-to-timm-swin", source, target, picture(64), source_call=logits, state=state)


def test_transformers_swin_with_absolute_positions_is_refused(tmp_path):
    transformers = library("transformers")
    config = transformers.SwinConfig(image_size=32, embed_dim=24, depths=[1], num_heads=[2], window_size=4, use_absolute_embeddings=True)
    assert refused(tmp_path, "hf-swin-to-timm-swin", transformers.SwinForImageClassification(config).state_dict()) == {"CK208"}


@pytest.mark.parametrize("from_file", [False, True], ids=["in memory", "published"])
def test_transformers_mae_into_timm(tmp_path, from_file):
    transformers, timm = library("transformers"), library("timm")
    source = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, image_size=32, patch_size=8, layer_norm_eps=1e-6,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=40, mask_ratio=0.0,
    ))  # fmt: skip
    target = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, mlp_ratio=80 / 48, num_classes=0, global_pool=""
    )

    def encoded(model, image):
        in_order = torch.arange(16.0).expand(len(image), -1)  # or MAE shuffles the patches
        return model.vit(image, noise=in_order).last_hidden_state

    state = published(tmp_path) if from_file else None
    prove(tmp_path, "hf-vitmae-to-timm-vit", source, target, picture(), source_call=encoded, state=state)


@pytest.mark.parametrize(
    ("block", "wrapper", "trained", "follower"),
    [
        ("BasicBlock", "module.", "encoder_q", "encoder_k"),
        ("Bottleneck", "", "encoder_q", "encoder_k"),
        ("BasicBlock", "module.", "base_encoder", "momentum_encoder"),
    ],
)
def test_moco_into_torchvision(tmp_path, block, wrapper, trained, follower):
    resnet = library("torchvision").models.resnet
    source, other, target = (resnet.ResNet(getattr(resnet, block), [1, 2, 1, 1], num_classes=16) for _ in range(3))
    perturbed(other, seed=3)
    target.fc = nn.Identity()

    def state(model):
        both = {f"{wrapper}{trained}.{key}": value for key, value in model.state_dict().items()}
        both |= {f"{wrapper}{follower}.{key}": value for key, value in other.state_dict().items()}
        return {"epoch": 200, "state_dict": both | {f"{wrapper}queue": torch.randn(16, 24), f"{wrapper}queue_ptr": torch.tensor([17])}}

    def trunk(model, image):
        kept, model.fc = model.fc, nn.Identity()
        out = model(image)
        model.fc = kept
        return out

    prove(tmp_path, "moco-to-torchvision-resnet", source, target, picture(), source_call=trunk, state=state)


@pytest.mark.parametrize("absolute", [False, True])
def test_timm_beit_into_transformers(tmp_path, absolute):
    transformers, timm = library("transformers"), library("timm")
    source = timm.models.beit.Beit(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, mlp_ratio=2, use_abs_pos_emb=absolute, use_rel_pos_bias=True,
        init_values=0.1, num_classes=11,
    )  # fmt: skip
    target = transformers.BeitForImageClassification(transformers.BeitConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8, num_labels=11,
        use_relative_position_bias=True, use_absolute_position_embeddings=absolute, layer_norm_eps=1e-6,
    ))  # fmt: skip
    prove(tmp_path, "timm-beit-to-hf-beit", source, target, picture(), call=logits, state=lambda model: {"model": model.state_dict()})


def test_timm_beits_of_other_kinds_are_refused(tmp_path):
    timm = library("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    shared = timm.models.beit.Beit(**sizes, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    by_token = timm.models.beit.Beit(**sizes, use_rel_pos_bias=True, global_pool="token")
    for model in (shared, by_token):
        assert refused(tmp_path, "timm-beit-to-hf-beit", model.state_dict()) == {"CK208"}


def test_timm_siglip_into_transformers(tmp_path):
    transformers, timm = library("transformers"), library("timm")
    source = timm.create_model("vit_base_patch16_siglip_224", img_size=48, embed_dim=48, depth=3, num_heads=4, mlp_ratio=2, num_classes=0)
    target = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=48, patch_size=16, hidden_act="gelu"
    ))  # fmt: skip
    prove(tmp_path, "timm-siglip-to-hf-siglip", source, target, picture(48), call=lambda model, image: model(image).pooler_output)


def bert():
    transformers = library("transformers")
    config = transformers.BertConfig(
        vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, max_position_embeddings=32
    )
    return transformers.BertForPreTraining(config), transformers.BertForMaskedLM(config)


def of_2018(model):
    renamed = {}
    for name, value in model.state_dict().items():
        if not name.endswith(("position_ids", "decoder.bias")):
            renamed[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = value
    return renamed


def words():
    return torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("state", [None, of_2018], ids=["today", "2018"])
def test_bert_for_pretraining_into_masked_lm(tmp_path, state):
    source, target = bert()
    prove(
        tmp_path, "bert-pretraining-to-hf-masked-lm", source, target, words(), call=logits, state=state,
        source_call=lambda model, ids: model(ids).prediction_logits,
    )  # fmt: skip
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    for first, second in [("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
                          ("cls.predictions.bias", "cls.predictions.decoder.bias")]:  # fmt: skip
        assert written[first].data_ptr() == written[second].data_ptr(), f"{second} is tied"


@pytest.mark.parametrize("decoder_first", [False, True])
def test_bert_with_a_decoder_of_its_own_is_refused(tmp_path, decoder_first):
    source, _ = bert()
    name = "cls.predictions.decoder.weight"
    state = of_2018(perturbed(source))
    other = {name: state[name] + 1}
    state = {**other, **{key: value for key, value in state.items() if key != name}} if decoder_first else {**state, **other}
    assert refused(tmp_path, "bert-pretraining-to-hf-masked-lm", state) == {"CK207"}


def causal(kind, **more):
    transformers = library("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **more
    )
    return perturbed(getattr(transformers, f"{kind}ForCausalLM")(config))


def test_torchtune_llama_comes_back_as_it_was(tmp_path):
    before = causal("Llama", tie_word_embeddings=False).state_dict()
    heads = {"H": 4, "G": 2}
    between = convert(tmp_path, "hf-llama-to-torchtune-llama", before, set=heads)
    after = convert(tmp_path, "torchtune-llama-to-hf-llama", between, set=heads)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert not torch.equal(between["layers.0.attn.k_proj.weight"], after["model.layers.0.self_attn.k_proj.weight"])


def test_torchtune_llama_without_an_output_layer_gets_a_tied_head(tmp_path):
    state = convert(tmp_path, "hf-llama-to-torchtune-llama", causal("Llama", tie_word_embeddings=False).state_dict(), set={"H": 4, "G": 2})
    del state["output.weight"]
    after = convert(tmp_path, "torchtune-llama-to-hf-llama", state, set={"H": 4, "G": 2})
    assert after["lm_head.weight"].data_ptr() == after["model.embed_tokens.weight"].data_ptr()


def test_llama_into_litgpt_joins_queries_keys_and_values(tmp_path):
    before = causal("Llama", tie_word_embeddings=False).state_dict()
    after = convert(tmp_path, "hf-llama-to-litgpt", before)
    parts = [before[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(after["transformer.h.1.attn.qkv.weight"], torch.cat(parts))
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.parametrize("shared", [True, False], ids=["one storage", "two of one value"])
def test_qwen2_with_a_tied_head_into_torchtune(tmp_path, shared):
    before = causal("Qwen2", tie_word_embeddings=True).state_dict()
    state = before if shared else {name: value.clone() for name, value in before.items()}
    after = convert(tmp_path, "hf-qwen2-to-torchtune-qwen2", state)
    assert len(after) == len(before) - 1
    assert torch.equal(after["tok_embeddings.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize("head_first", [False, True])
def test_qwen2_does_not_lose_a_head_of_its_own(tmp_path, head_first):
    state = causal("Qwen2", tie_word_embeddings=False).state_dict()
    if head_first:
        state = dict(reversed(state.items()))
    assert refused(tmp_path, "hf-qwen2-to-torchtune-qwen2", state) == {"CK207"}
    after = convert(tmp_path, "hf-qwen2-to-torchtune-qwen2", state, set={"tied": False})
    assert torch.equal(after["output.weight"], state["lm_head.weight"])


class Detector(nn.Module):
    """A model whose layers stand under model., as ultralytics' do."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("averaged", [True, False])
def test_pickled_detector_into_float32(tmp_path, averaged):
    model, ema = perturbed(Detector(), 1).half(), perturbed(Detector(), 2).half()
    after = convert(tmp_path, "ultralytics-ema", {"epoch": 9, "model": model, "ema": ema if averaged else None, "updates": 40})
    before = (ema if averaged else model).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value.float() if value.is_floating_point() else value) for name, value in before.items())
    assert after["model.1.num_batches_tracked"].dtype == torch.int64


def test_one_network_of_a_lightning_module(tmp_path):
    networks = {
        name: perturbed(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), seed).state_dict()
        for seed, name in enumerate(("net", "teacher"))
    }
    state = {f"{name}.{key}": value for name, network in networks.items() for key, value in network.items()}
    checkpoint = {"epoch": 2, "state_dict": state | {"class_weight": torch.rand(5)}, "pytorch-lightning_version": "2.6.6"}
    assert not torch.equal(networks["net"]["0.weight"], networks["teacher"]["0.weight"])
    for name, network in networks.items():
        after = convert(tmp_path, "lightning-network", checkpoint, set={"network": name})
        assert after.keys() == network.keys()
        assert all(torch.equal(after[key], value) for key, value in network.items())
    (tmp_path / "out.pth").unlink()
    assert refused(tmp_path, "lightning-network", checkpoint) == {"CK104"}
    assert refused(tmp_path, "lightning", checkpoint) == {"CK204"}
