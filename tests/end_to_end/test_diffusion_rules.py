"""The autoencoder of latent diffusion, as its authors lay it out, into diffusers: strict loading, equal outputs, and diffusers' own conversion."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import ckptconv
from ckptconv.errors import CkptconvError
from ckptconv.target.torchvision_ops import import_with_torchvision

GROUPS = 4


def norm(channels):
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x):
        inner = self.conv2(functional.silu(self.norm2(self.conv1(functional.silu(self.norm1(x))))))
        return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Attention over pixels, its projections being 1x1 convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        inner = self.norm(x)
        q, k, v = (each(inner).flatten(2).transpose(1, 2) for each in (self.q, self.k, self.v))
        return x + self.proj_out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Resized(nn.Module):
    def __init__(self, channels, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(channels, channels, 3, padding=1 if up else 0, stride=1 if up else 2)

    def forward(self, x):
        return self.conv(functional.interpolate(x, scale_factor=2.0) if self.up else functional.pad(x, (0, 1, 0, 1)))


class Half(nn.Module):
    """The encoder, or the decoder, whose levels are counted from the picture too: it runs through them from the last."""

    def __init__(self, widths, blocks, ends, decoder):
        super().__init__()
        self.decoder = decoder
        first, last = ends
        self.conv_in = nn.Conv2d(first, widths[-1] if decoder else widths[0], 3, padding=1)
        levels = []
        for at, width in enumerate(widths):
            before = widths[min(at + 1, len(widths) - 1)] if decoder else widths[max(at - 1, 0)]
            level = nn.Module()
            level.block = nn.ModuleList([Block(before if not each else width, width) for each in range(blocks + decoder)])
            if decoder and at:
                level.upsample = Resized(width, up=True)
            if not decoder and at < len(widths) - 1:
                level.downsample = Resized(width, up=False)
            levels.append(level)
        setattr(self, "up" if decoder else "down", nn.ModuleList(levels))
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = (
            Block(widths[-1], widths[-1]),
            Attention(widths[-1]),
            Block(widths[-1], widths[-1]),
        )
        end = widths[0] if decoder else widths[-1]
        self.norm_out, self.conv_out = norm(end), nn.Conv2d(end, last, 3, padding=1)

    def middle(self, x):
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))

    def forward(self, x):
        x = self.conv_in(x)
        x = self.middle(x) if self.decoder else x
        for level in reversed(self.up) if self.decoder else self.down:
            for block in level.block:
                x = block(x)
            for resized in ("upsample", "downsample"):
                x = getattr(level, resized)(x) if hasattr(level, resized) else x
        x = x if self.decoder else self.middle(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    def __init__(self, widths, blocks=1, latent=3):
        super().__init__()
        self.encoder = Half(widths, blocks, (3, 2 * latent), decoder=False)
        self.decoder = Half(widths, blocks, (latent, 3), decoder=True)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1), nn.Conv2d(latent, latent, 1)


@pytest.fixture(scope="module")
def diffusers():
    for name in ("torchvision", "transformers.modeling_utils", "diffusers"):
        library = import_with_torchvision(name)
    return library


def models(diffusers, widths, blocks):
    torch.manual_seed(0)
    source = Autoencoder(widths, blocks).eval()
    target = diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=blocks, norm_num_groups=GROUPS, latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for value in source.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    return source, target


@pytest.mark.parametrize("prefix", ["", "first_stage_model."], ids=["a file of its own", "a whole checkpoint"])
@pytest.mark.parametrize(("widths", "blocks"), [((8, 16), 1), ((8, 8, 16), 2)], ids=["two levels", "three levels"])
def test_the_autoencoder_into_diffusers(tmp_path, diffusers, widths, blocks, prefix):
    source, target = models(diffusers, widths, blocks)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    if prefix:
        state |= {
            "betas": torch.rand(4),
            "model.diffusion_model.out.2.weight": torch.rand(4, 4),
            "first_stage_model.loss.logvar": torch.zeros(()),
        }
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    report = ckptconv.run("ldm-vae-to-diffusers-vae", tmp_path / "model.ckpt", tmp_path / "out.pth", verify=4)
    assert report.ladder.reached == "L0 L1 L3 L4"
    out = torch.load(tmp_path / "out.pth", weights_only=True)
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    oracle = convert_ldm_vae_checkpoint(dict(state), dict(target.config))
    assert {name: value.shape for name, value in out.items()} == {name: value.shape for name, value in oracle.items()}
    assert all(torch.equal(value, oracle[name]) for name, value in out.items())
    target.load_state_dict(out, strict=True)
    picture = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        latent = source.quant_conv(source.encoder(picture))
        torch.testing.assert_close(target.encode(picture).latent_dist.parameters, latent, rtol=1e-4, atol=1e-4)
        decoded = source.decoder(source.post_quant_conv(latent[:, :3]))
        torch.testing.assert_close(target.decode(latent[:, :3]).sample, decoded, rtol=1e-4, atol=1e-4)


def test_the_autoencoder_back_from_diffusers(tmp_path, diffusers):
    source, _ = models(diffusers, (8, 16), 1)
    torch.save(source.state_dict(), tmp_path / "in.pth")
    ckptconv.run("ldm-vae-to-diffusers-vae", tmp_path / "in.pth", tmp_path / "out.pth")
    ckptconv.run("ldm-vae-to-diffusers-vae", tmp_path / "out.pth", tmp_path / "back.pth", reverse=True, like=str(tmp_path / "in.pth"))
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == source.state_dict().keys()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in back.items())


@pytest.mark.parametrize(
    "name", ["quantize.embedding.weight", "encoder.down.0.attn.0.q.weight"], ids=["a codebook", "attention in a level"]
)
def test_what_the_target_does_not_have_is_refused(tmp_path, diffusers, name):
    source, _ = models(diffusers, (8, 16), 1)
    torch.save({**source.state_dict(), name: torch.rand(8, 8, 1, 1)}, tmp_path / "in.pth")
    with pytest.raises(CkptconvError) as caught:
        ckptconv.run("ldm-vae-to-diffusers-vae", tmp_path / "in.pth", tmp_path / "out.pth")
    assert [problem.code for problem in caught.value.problems] == ["CK208"]
