"""The rules for wrappers, averages and training checkpoints, proved on what the libraries themselves write where one process can do it.

Weights are seeded and perturbed. DistributedDataParallel and FSDP run with gloo and a single rank. mmengine, PEFT and the repositories of
MAE, MoCo v3, DINO and SwAV are not installed: their layouts are made here around the real model.
"""

import argparse
import functools

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


def perturbed(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif not value.is_floating_point():
                value.fill_(7)
            elif value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator) * (1.5 / value[0].numel()) ** 0.5)
            else:
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model.eval()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(high=31):
    return torch.randint(3, high, (2, 9), generator=torch.Generator().manual_seed(1))


def close(left, right):
    assert left.abs().max() > 1e-3, "a degenerate output proves nothing"
    assert (left[0] - left[1]).abs().max() > 1e-3 * left.abs().max(), "an output that does not depend on its input proves nothing"
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(left.abs().max()))


def converted(rule, state, folder, **options):
    torch.save(state, folder / "in.pth")
    report = ckptconv.run(rule, folder / "in.pth", folder / "out.pth", verify=4, force=True, **options)
    assert "L4" in report.ladder.reached, report.ladder.reached
    return torch.load(folder / "out.pth", weights_only=True)


def refused(rule, state, folder, **options):
    torch.save(state, folder / "in.pth")
    with pytest.raises(CkptconvError) as caught:
        ckptconv.run(rule, folder / "in.pth", folder / "refused.pth", **options)
    assert not (folder / "refused.pth").exists()
    return {problem.code for problem in caught.value.problems}


def vit(seed=0, **more):
    timm = library("timm")
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7, **more}
    return perturbed(timm.models.VisionTransformer(**sizes), seed)


def resnet(seed=0, block="BasicBlock"):
    models = library("torchvision").models.resnet
    torch.manual_seed(seed)
    return perturbed(models.ResNet(getattr(models, block), [1, 2, 1, 1], num_classes=7), seed)


def trunk(seed=0, block="BasicBlock"):
    model = resnet(seed, block)
    model.fc = nn.Identity()
    return model


def image():
    return noise(2, 3, 32, 32)


def proved(model, target, state, given=None):
    """``state`` loads strictly into ``target``, holds ``model``'s own bytes, and computes the same."""
    target.load_state_dict(state, strict=True)
    for name, value in model.state_dict().items():
        if name in state:
            assert torch.equal(state[name], value), name
    given = image() if given is None else given
    with torch.no_grad():
        close(model.eval()(given), target.eval()(given))


# Wrappers


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rule", ["dataparallel", "ddp", "wrapper-stack"])
def test_data_parallel(tmp_path, rule):
    proved(resnet(), resnet(5), converted(rule, nn.DataParallel(resnet()).state_dict(), tmp_path))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("inside", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("rule", ["ddp", "wrapper-stack"])
def test_distributed_data_parallel(tmp_path, rule, inside):
    state = nn.parallel.DistributedDataParallel(resnet()).state_dict()
    assert all(name.startswith("module.") for name in state)
    state = converted(rule, {"epoch": 3, inside: state} if inside else state, tmp_path)
    proved(resnet(), resnet(5), state.get(inside, state))


@pytest.mark.parametrize("rule", ["torch-compile", "wrapper-stack"])
@pytest.mark.parametrize("regional", [False, True])
def test_torch_compile(tmp_path, rule, regional):
    """Not run, so nothing is compiled; the names come with the wrapper."""
    compiled = vit()
    if regional:
        for i, block in enumerate(compiled.blocks):
            compiled.blocks[i] = torch.compile(block)
    else:
        compiled = torch.compile(compiled)
    state = compiled.state_dict()
    assert any(name.startswith("blocks.0._orig_mod." if regional else "_orig_mod.") for name in state)
    proved(vit(), vit(5), converted(rule, state, tmp_path))


def checkpoint_wrapped():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = vit()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return model


@pytest.mark.parametrize("rule", ["activation-checkpoint", "wrapper-stack"])
def test_activation_checkpointing(tmp_path, rule):
    """torch's own state_dict hook takes the segment out; who saves named_parameters, or an optimizer's names, has it."""
    state = {name: value.detach() for name, value in checkpoint_wrapped().named_parameters()}
    assert "blocks.1._checkpoint_wrapped_module.attn.qkv.weight" in state
    proved(vit(), vit(5), converted(rule, state, tmp_path))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("rule", ["fsdp-wrapped", "wrapper-stack"])
def test_fully_sharded_data_parallel(tmp_path, rule):
    from torch.distributed.fsdp import FullyShardedDataParallel

    def sharded(module, original):
        return FullyShardedDataParallel(module, use_orig_params=original, device_id=torch.device("cpu"))

    for original in (True, False):
        model = checkpoint_wrapped()
        for i, block in enumerate(model.blocks):
            model.blocks[i] = sharded(block, original)
        state = {name: value.detach().clone() for name, value in sharded(model, original).named_parameters()}
        if original:
            assert "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.norm1.bias" in state
            proved(vit(), vit(5), converted(rule, state, tmp_path))
        else:
            assert any("flat_param" in name for name in state)
            if rule == "fsdp-wrapped":
                assert refused(rule, state, tmp_path) == {"CK305"}


def test_wrappers_in_each_other_and_half_precision(tmp_path):
    model = vit().bfloat16().float()
    state = nn.DataParallel(torch.compile(vit().bfloat16())).state_dict()
    assert "module._orig_mod.cls_token" in state
    proved(model, vit(5), converted("wrapper-stack", state, tmp_path, set={"float32": True}))


# Averages


def test_torchs_averaged_model(tmp_path):
    averaged, model = torch.optim.swa_utils.AveragedModel(resnet(0), use_buffers=True), resnet(2)
    for _ in range(3):
        averaged.update_parameters(model)
    state = averaged.state_dict()
    assert int(state["n_averaged"]) == 3
    proved(averaged.module, resnet(5), converted("ema-averaged-model", state, tmp_path))


@pytest.mark.parametrize("wrapped", [False, True], ids=["unwrapped", "as the module holds it"])
def test_timms_training_checkpoint(tmp_path, wrapped):
    """Written by timm's own CheckpointSaver, with its own average."""
    utils = library("timm.utils")
    model = vit()
    ema = utils.ModelEmaV3(model, decay=0.5)
    perturbed(model, 2)
    ema.update(model)
    assert not torch.equal(ema.module.head.weight, model.head.weight)
    more = {"unwrap_fn": lambda one: one} if wrapped else {}
    saver = utils.CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), 0.1), args=argparse.Namespace(model="vit"), model_ema=ema,
        checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), **more,
    )  # fmt: skip
    saver.save_checkpoint(0)
    checkpoint = torch.load(tmp_path / "last.pth.tar", weights_only=False)
    assert next(iter(checkpoint["state_dict_ema"])).startswith("module.") == wrapped
    state = converted("ema-timm", checkpoint, tmp_path)
    proved(ema.module, vit(5), state.get("state_dict_ema", state))


@pytest.mark.parametrize("distributed", [False, True])
def test_mmengines_averages_are_swapped(tmp_path, distributed):
    """EMAHook._swap_ema_state_dict: before it is saved, the average stands in state_dict and the trained model in ema_state_dict."""
    trained, average = resnet(0), resnet(2)
    both = {"steps": torch.tensor(9)} | {f"module.{name}": value for name, value in trained.state_dict().items()}
    head = "module." if distributed else ""
    checkpoint = {"meta": {"epoch": 3}, "state_dict": average.state_dict(prefix=head), "ema_state_dict": both, "message_hub": {}}
    state = converted("ema-mmengine", checkpoint, tmp_path)
    proved(average, resnet(5), state.get("state_dict", state))
    state = converted("raw-mmengine", checkpoint, tmp_path)
    proved(trained, resnet(5), state.get("ema_state_dict", state))
    del checkpoint["ema_state_dict"]
    assert refused("raw-mmengine", checkpoint, tmp_path) == {"CK309"}


# Names that come and go


def test_counters_that_another_norm_does_not_have(tmp_path):
    """torchvision's FrozenBatchNorm2d, as its detection models use it, has no counter."""
    ops, models = library("torchvision").ops, library("torchvision").models.resnet
    model = resnet()
    target = models.ResNet(models.BasicBlock, [1, 2, 1, 1], num_classes=7, norm_layer=ops.FrozenBatchNorm2d)
    proved(model, target, converted("drop-num-batches-tracked", model.state_dict(), tmp_path))


def bert(seed=0):
    transformers = library("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=31, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
                                     max_position_embeddings=32)  # fmt: skip
    return perturbed(transformers.BertModel(config), seed)


def same_bert(model, target, state):
    target.load_state_dict(state, strict=True)
    with torch.no_grad():
        close(model(input_ids=words()).last_hidden_state, target(input_ids=words()).last_hidden_state)


def test_gamma_and_beta_of_an_old_bert(tmp_path):
    model, state = bert(), {}
    for name, value in model.state_dict().items():
        state[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = value
    assert sum(name.endswith("gamma") for name in state) == 5
    same_bert(model, bert(5), converted("gamma-beta", state, tmp_path))


@pytest.mark.parametrize("kind", ["Bert", "CLIPText"])
def test_position_ids_of_an_old_file(tmp_path, kind):
    transformers = library("transformers")
    if kind == "Bert":
        model, target = bert(), bert(5)
    else:
        config = transformers.CLIPTextConfig(vocab_size=31, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
                                             bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
        model, target = (perturbed(transformers.CLIPTextModel(config), seed) for seed in (0, 5))
    state = {**model.state_dict(), "embeddings.position_ids": torch.arange(32)[None]}
    with pytest.raises(RuntimeError, match="position_ids"):
        target.load_state_dict(state, strict=True)
    same_bert(model, target, converted("hf-position-ids", state, tmp_path))


class LoraLinear(nn.Module):
    """The names that PEFT gives to a layer with an adapter."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, layer.out_features, bias=False)})


def test_the_base_of_a_model_with_adapters(tmp_path):
    wrapped = bert()
    for layer in wrapped.encoder.layer:
        layer.attention.self.query = LoraLinear(layer.attention.self.query)
        layer.attention.self.value = LoraLinear(layer.attention.self.value)
    state = wrapped.state_dict(prefix="base_model.model.")
    assert "base_model.model.encoder.layer.1.attention.self.value.base_layer.bias" in state
    assert "base_model.model.encoder.layer.1.attention.self.value.lora_B.default.weight" in state
    same_bert(bert(), bert(5), converted("peft-base-model", state, tmp_path))


@pytest.mark.parametrize("kind", ["CLIPText", "CLIPVision", "SiglipText", "SiglipVision"])
def test_a_tower_of_transformers_4(tmp_path, kind):
    transformers = library("transformers")
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    if kind.endswith("Text"):
        given, name = {"input_ids": words()}, "text_model."
        shape |= {"vocab_size": 31, "max_position_embeddings": 10, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    else:
        given, name = {"pixel_values": image()}, "vision_model."
        shape |= {"image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(**shape)
    model, target = (perturbed(getattr(transformers, f"{kind}Model")(config), seed) for seed in (0, 5))
    state = model.state_dict(prefix=name)
    if kind.startswith("CLIP"):
        state[f"{name}embeddings.position_ids"] = torch.arange(10)[None]
    target.load_state_dict(converted("hf-clip-tower-4-to-5", state, tmp_path), strict=True)
    with torch.no_grad():
        close(model(**given).last_hidden_state, target(**given).last_hidden_state)


# Self-supervised training


class Mae(nn.Module):
    """facebookresearch/mae's MaskedAutoencoderViT: timm's blocks, and a decoder of its own."""

    def __init__(self):
        super().__init__()
        block, layers = library("timm.models.vision_transformer").Block, library("timm.layers")
        self.patch_embed = layers.PatchEmbed(32, 8, 3, 48)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 48)), nn.Parameter(torch.zeros(1, 17, 48), requires_grad=False)
        norm = {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-6)}
        self.blocks = nn.ModuleList(block(48, 4, 4, qkv_bias=True, **norm) for _ in range(2))
        self.norm = nn.LayerNorm(48, eps=1e-6)
        self.decoder_embed, self.mask_token = nn.Linear(48, 32), nn.Parameter(torch.zeros(1, 1, 32))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 17, 32), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(block(32, 4, 4, qkv_bias=True, **norm) for _ in range(1))
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(32), nn.Linear(32, 192)

    def forward_encoder(self, x):
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_mae_into_timm(tmp_path, prefix):
    model, target = perturbed(Mae()), vit(5, num_classes=0)
    checkpoint = {"model": model.state_dict(prefix=prefix), "epoch": 3, "args": argparse.Namespace(model="mae")}
    state = converted("mae-pretrain-to-timm-vit", checkpoint, tmp_path)
    target.load_state_dict(state.get("model", state), strict=True)
    with torch.no_grad():
        close(model.forward_encoder(image()), target.forward_features(image()))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_moco_v3_into_timm(tmp_path, prefix):
    def projection(wide, out):
        return nn.Sequential(nn.Linear(wide, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, out, bias=False))

    both = nn.ModuleDict({"base_encoder": vit(0), "momentum_encoder": vit(2), "predictor": projection(16, 16)})
    for name in ("base_encoder", "momentum_encoder"):
        both[name].head = projection(48, 16)
    checkpoint = {"epoch": 3, "arch": "vit_small", "state_dict": both.state_dict(prefix=prefix)}
    state = converted("mocov3-to-timm-vit", checkpoint, tmp_path)
    proved(vit(0, num_classes=0), vit(5, num_classes=0), state.get("state_dict", state))
    assert refused("moco-to-torchvision-resnet", checkpoint, tmp_path) == {"CK208"}


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("select", ["teacher", "student"])
def test_dino_with_a_resnet_into_torchvision(tmp_path, block, select):
    networks = {name: trunk(seed, block) for seed, name in enumerate(("student", "teacher"))}
    checkpoint = {"epoch": 3}
    for name, network in networks.items():
        head = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(16, 8)), "last_layer": nn.Linear(8, 40)})
        checkpoint[name] = nn.ModuleDict({"backbone": network, "head": head}).state_dict(prefix="module.")
    more = {} if select == "teacher" else {"select": [select]}
    state = converted("dino-to-torchvision-resnet", checkpoint, tmp_path, **more)
    proved(networks[select], trunk(5, block), state.get(select, state))


@pytest.mark.parametrize("flat", [True, False], ids=["published", "training checkpoint"])
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_swav_into_torchvision(tmp_path, block, flat):
    model = trunk(0, block)
    whole = trunk(0, block)
    whole.projection_head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    whole.prototypes = nn.Linear(4, 40, bias=False)
    state = whole.state_dict(prefix="module.")
    state = converted("swav-to-torchvision-resnet", state if flat else {"epoch": 3, "state_dict": state}, tmp_path)
    proved(model, trunk(5, block), state.get("state_dict", state))


@pytest.mark.parametrize("classes", [3, 7, 12])
@pytest.mark.parametrize("kind", ["timm ViT", "torchvision ResNet", "transformers ViT"])
def test_another_number_of_classes(tmp_path, kind, classes):
    transformers = library("transformers")

    def made(count, seed):
        if kind == "timm ViT":
            return vit(seed, num_classes=count)
        if kind == "torchvision ResNet":
            models = library("torchvision").models.resnet
            return perturbed(models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=count), seed)
        return perturbed(transformers.ViTForImageClassification(transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, image_size=32, patch_size=8, num_labels=count
        )), seed)  # fmt: skip

    model, target = made(7, 0), made(classes, 5)
    target.load_state_dict(converted("new-classes", model.state_dict(), tmp_path, set={"classes": classes}), strict=True)
    with torch.no_grad():
        before, after = (getattr(out, "logits", out) for out in (model(image()), target(image())))
    common = min(7, classes)
    close(before[:, :common], after[:, :common])
    assert torch.equal(after[:, common:], torch.zeros(2, classes - common)), "what is new says nothing yet"
    assert functional.softmax(after, -1).isfinite().all()
