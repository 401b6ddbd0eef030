"""More rules between the vision libraries, proved on the installed ones: strict loading, equal outputs, and the way back.

Weights are seeded and perturbed, running statistics too: with fresh ones half of all mistakes would not show.
"""

import functools

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


def libraries():
    return [import_with_torchvision(name) for name in ("torchvision", "timm", "transformers")]


def plain(model, image):
    return model(image)


def logits(model, image):
    return model(pixel_values=image).logits


def tokens(model, image):
    return model(pixel_values=image).last_hidden_state


def features(model, image):
    return model.forward_features(image)


def prove(folder, rule, source, target, call=plain, source_call=plain, reached="L0 L1 L3 L4", size=64, **options):
    perturbed(source)
    perturbed(target, seed=9)
    torch.save(source.state_dict(), folder / "in.pth")
    report = ckptconv.run(rule, folder / "in.pth", folder / "out.pth", verify=4, **options)
    assert report.ladder.reached == reached
    written = torch.load(folder / "out.pth", weights_only=True)
    target.load_state_dict(written, strict=True)
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        left, right, other = source_call(source, image), call(target, image), source_call(source, image.flip(0))
    assert left.abs().max() > 1e-3, "a degenerate output proves nothing"
    assert (left - other).abs().max() > 1e-3 * left.abs().max(), "an output that does not depend on the image proves nothing"
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(left.abs().max()))
    return report


def refused(folder, rule, model):
    torch.save(model.state_dict(), folder / "in.pth")
    with pytest.raises(CkptconvError) as caught:
        ckptconv.run(rule, folder / "in.pth", folder / "out.pth")
    assert not (folder / "out.pth").exists()
    return {problem.code for problem in caught.value.problems}


def test_torchvision_convnext_into_timm(tmp_path):
    torchvision, timm, _ = libraries()
    block = torchvision.models.convnext.CNBlockConfig
    source = torchvision.models.convnext.ConvNeXt([block(16, 24, 2), block(24, 32, 1), block(32, 40, 3), block(40, None, 1)], num_classes=7)
    target = timm.create_model("convnext_tiny", depths=(2, 1, 3, 1), dims=(16, 24, 32, 40), num_classes=7)
    prove(tmp_path, "torchvision-convnext-to-timm-convnext", source, target)


@pytest.mark.parametrize("convolutional", [False, True])
def test_timm_convnext_into_transformers(tmp_path, convolutional):
    _, timm, transformers = libraries()
    depths, widths = [2, 1, 3, 1], [16, 24, 32, 40]
    source = timm.create_model("convnext_tiny", depths=depths, dims=widths, num_classes=7, conv_mlp=convolutional)
    target = transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(depths=depths, hidden_sizes=widths, num_labels=7, layer_norm_eps=1e-6)
    )
    prove(tmp_path, "timm-convnext-to-hf-convnext", source, target, logits)


def test_timm_convnext_v2_is_refused(tmp_path):
    _, timm, _ = libraries()
    model = timm.create_model("convnextv2_tiny", depths=(1, 1, 1, 1), dims=(16, 16, 16, 16), num_classes=7)
    assert refused(tmp_path, "timm-convnext-to-hf-convnext", model) == {"CK208"}


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_timm_resnet_into_transformers(tmp_path, kind):
    _, timm, transformers = libraries()
    depths, widths, wider = [2, 1, 3, 1], [16, 24, 32, 40], {"basic": 1, "bottleneck": 4}[kind]
    source = timm.create_model({"basic": "resnet18", "bottleneck": "resnet50"}[kind], layers=depths, channels=widths, num_classes=7)
    target = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(depths=depths, hidden_sizes=[wider * width for width in widths], layer_type=kind, num_labels=7)
    )
    prove(tmp_path, "timm-resnet-to-hf-resnet", source, target, logits)


@pytest.mark.parametrize(
    ("name", "code"),
    [("resnet26d", "CK208"), ("resnext50_32x4d", "CK207"), ("wide_resnet50_2", "CK207"), ("resnet50_gn", "CK208"), ("seresnet50", "CK208")],
)
def test_timm_resnets_that_transformers_does_not_have_are_refused(tmp_path, name, code):
    _, timm, _ = libraries()
    model = timm.create_model(name, layers=(1, 1, 1, 1), num_classes=7)
    assert refused(tmp_path, "timm-resnet-to-hf-resnet", model) == {code}


def test_torchvision_mobilenet_v2_into_timm(tmp_path):
    torchvision, timm, _ = libraries()
    source = torchvision.models.mobilenet_v2(width_mult=0.5, num_classes=7)
    prove(tmp_path, "torchvision-mobilenet-v2-to-timm-mobilenet-v2", source, timm.create_model("mobilenetv2_050", num_classes=7))


def test_torchvision_mobilenet_v2_of_another_depth_into_timm(tmp_path):
    torchvision, timm, _ = libraries()
    settings = [[1, 16, 1, 1], [6, 24, 3, 2], [6, 32, 1, 2]]
    source = torchvision.models.MobileNetV2(num_classes=7, width_mult=0.5, inverted_residual_setting=settings)
    efficientnet = import_with_torchvision("timm.models._efficientnet_builder")
    target = timm.models.EfficientNet(
        efficientnet.decode_arch_def([["ds_r1_k3_s1_c16"], ["ir_r3_k3_s2_e6_c24"], ["ir_r1_k3_s2_e6_c32"]]), num_classes=7,
        act_layer=nn.ReLU6, round_chs_fn=functools.partial(efficientnet.round_channels, multiplier=0.5),
    )  # fmt: skip
    rule = "torchvision-mobilenet-v2-to-timm-mobilenet-v2"
    assert refused(tmp_path, rule, source) == {"CK207"}
    prove(tmp_path, rule, source, target, set={"first": [1, 2, 5], "blocks": 5})


@pytest.mark.parametrize(
    ("name", "other"), [("mobilenet_v3_large", "mobilenetv3_large_100"), ("mobilenet_v3_small", "mobilenetv3_small_100")]
)
def test_torchvision_mobilenet_v3_into_timm(tmp_path, name, other):
    torchvision, timm, _ = libraries()
    source = getattr(torchvision.models, name)(num_classes=7)
    prove(tmp_path, "torchvision-mobilenet-v3-to-timm-mobilenet-v3", source, timm.create_model(other, num_classes=7, bn_eps=1e-3))


def test_torchvision_efficientnet_into_timm(tmp_path):
    torchvision, timm, _ = libraries()
    prove(
        tmp_path, "torchvision-efficientnet-to-timm-efficientnet", torchvision.models.efficientnet_b0(num_classes=7),
        timm.create_model("efficientnet_b0", num_classes=7),
    )  # fmt: skip


def test_torchvision_efficientnet_of_another_depth_into_timm(tmp_path):
    torchvision, timm, _ = libraries()
    shapes = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3), (6, 5, 1, 80, 112, 3),
              (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1)]  # fmt: skip
    settings = [torchvision.models.efficientnet.MBConvConfig(*shape, width_mult=0.5, depth_mult=1.2) for shape in shapes]
    source = torchvision.models.EfficientNet(settings, dropout=0.0, num_classes=7, last_channel=640)
    target = timm.models.efficientnet._gen_efficientnet("efficientnet_b1", channel_multiplier=0.5, depth_multiplier=1.2, num_classes=7)
    prove(tmp_path, "torchvision-efficientnet-to-timm-efficientnet", source, target)


def test_torchvision_efficientnet_v2_is_refused(tmp_path):
    torchvision, _, _ = libraries()
    block = torchvision.models.efficientnet.FusedMBConvConfig(1, 3, 1, 24, 24, 2)
    model = torchvision.models.EfficientNet([block], dropout=0.0, num_classes=7)
    assert refused(tmp_path, "torchvision-efficientnet-to-timm-efficientnet", model) == {"CK208"}


@pytest.mark.parametrize("squeeze", [None, 0.25])
def test_torchvision_regnet_into_timm(tmp_path, squeeze):
    torchvision, timm, _ = libraries()
    regnet = torchvision.models.regnet
    parameters = regnet.BlockParams.from_init_params(depth=13, w_0=24, w_a=36.44, w_m=2.49, group_width=8, se_ratio=squeeze)
    source = regnet.RegNet(parameters, num_classes=7, norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-5, momentum=0.1))
    target = timm.models.regnet.RegNet(
        timm.models.regnet.RegNetCfg(w0=24, wa=36.44, wm=2.49, group_size=8, depth=13, se_ratio=squeeze or 0.0), num_classes=7
    )
    prove(tmp_path, "torchvision-regnet-to-timm-regnet", source, target)


def test_torchvision_regnet_y_400mf_into_timm(tmp_path):
    torchvision, timm, _ = libraries()
    source, target = torchvision.models.regnet_y_400mf(num_classes=7), timm.create_model("regnety_004", num_classes=7)
    prove(tmp_path, "torchvision-regnet-to-timm-regnet", source, target)


def test_timm_distilled_deit_into_transformers(tmp_path):
    _, timm, transformers = libraries()
    source = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=7
    )
    config = transformers.DeiTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8, num_labels=7,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    target = transformers.DeiTForImageClassificationWithTeacher(config)
    prove(tmp_path, "timm-deit-to-hf-deit", source, target, logits, size=32)


@pytest.mark.parametrize(("name", "gated"), [("vit_small_patch14_dinov2", False), ("vit_giant_patch14_dinov2", True)])
def test_transformers_dinov2_into_timm(tmp_path, name, gated):
    _, timm, transformers = libraries()
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14, use_swiglu_ffn=gated
    )
    source = transformers.Dinov2Model(config)
    wide = {"mlp_ratio": 256 / 48} if gated else {}
    target = timm.create_model(name, img_size=56, embed_dim=48, depth=3, num_heads=4, **wide)
    prove(tmp_path, "hf-dinov2-to-timm-dinov2", source, target, features, tokens, size=56)
