"""convert, combine and its names, decode, resize, adapt_channels, resize_rows: what they compute, and what they refuse."""

import pytest
import torch

import ckptconv
from ckptconv.errors import CkptconvError
from ckptconv.ruleset.model import parse


def rules(steps, **header):
    import json

    data = {"version": 1, "name": "t", "summary": "t", "steps": steps, **header}
    return parse(json.dumps(data).encode(), "t.yaml")


def converted(steps, tensors, **options):
    return ckptconv.convert(tensors, rules(steps), **options)


def refused(steps, tensors, **options):
    with pytest.raises(CkptconvError) as error:
        converted(steps, tensors, **options)
    return error.value.problems


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_convert_gathers_stacks_and_joins():
    tensors = {f"l.experts.{e}.{w}.weight": normal(3, 2, seed=10 * e + at) for e in (10, *range(10)) for at, w in enumerate(("w1", "w3"))}
    step = {"convert": {"from": ["{m:**}.experts.{e:int}.w1.weight", "{m:**}.experts.{e:int}.w3.weight"], "gather": "e",
                        "to": "{m}.gate_up", "do": [{"stack": 0}, {"concat": 1}]}}  # fmt: skip
    out = converted([step], tensors)
    assert list(out) == ["l.gate_up"]
    for e in range(11):
        assert torch.equal(out["l.gate_up"][e], torch.cat([tensors[f"l.experts.{e}.w1.weight"], tensors[f"l.experts.{e}.w3.weight"]]))


def test_convert_fans_out():
    x = normal(6, 4)
    step = {"convert": {"from": "a.{p}", "to": "{x:q|k|v}.{p}", "do": [{"transpose": [0, 1]}, {"split": {"dim": 1, "parts": 3}}]}}
    out = converted([step], {"a.weight": x})
    assert all(torch.equal(out[f"{n}.weight"], x.t()[:, 2 * at : 2 * at + 2]) for at, n in enumerate("qkv"))


def test_convert_unstacks_squeezes_and_casts():
    x = normal(2, 1, 4)
    step = {
        "convert": {"from": "a", "to": ["b", "c"], "do": [{"squeeze": 1}, {"unstack": 0}, {"cast": "float64"}, {"affine": {"mul": 2.0}}]}
    }
    out = converted([step], {"a": x})
    assert torch.equal(out["c"], 2 * x[1, 0].double())


def test_where_leaves_the_rest_alone():
    step = {"convert": {"from": "l.{i:int}", "where": "i < 1", "to": "m.{i + 1}", "do": [{"reshape": [-1]}]}}
    assert list(converted([step], {"l.0": normal(2, 2), "l.1": normal(2)})) == ["m.1", "l.1"]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"from": "a.{i:int}", "to": "b"}, "`to` lacks {i}"),
        ({"from": "a", "gather": "e", "to": "b"}, "`gather: e` is no placeholder of `from`"),
        ({"from": "a", "to": "b", "do": [{"stak": 0}]}, "there is no transform 'stak'"),
        ({"from": "a", "to": "b", "do": [{"stack": "x"}]}, "stack takes an axis: {stack: 0}"),
        ({"from": "a", "to": "b", "do": [{"cast": "float33"}]}, "there is no dtype 'float33'"),
    ],
)
def test_a_convert_that_cannot_work_is_refused(body, what):
    with pytest.raises(CkptconvError) as error:
        rules([{"convert": body}])
    assert [problem.what for problem in error.value.problems] == [what]


def test_convert_says_when_tensors_are_left_over():
    problems = refused([{"convert": {"from": "a.{e:int}", "gather": "e", "to": "b"}}], {"a.0": normal(2), "a.1": normal(2)})
    assert problems[0].what == "a.0: `do` leaves 2 tensors for 1 names"
    assert problems[0].try_ == "stack or concat what is gathered"


def test_combine_merges_lora_and_leaves_other_weights_alone():
    w, a, b = normal(6, 4), normal(2, 4, seed=1), normal(6, 2, seed=2)
    step = {"combine": {"from": {"w": "{m:**}.weight", "a": "{m:**}.lora_A", "b": "{m:**}.lora_B"}, "to": "{m}.weight",
                        "formula": "w + s / a_rank * (b @ a)", "alone": "w"}}  # fmt: skip
    out = converted([step], {"x.weight": w, "x.lora_A": a, "x.lora_B": b, "y.weight": w}, set={"s": 3, "a_rank": 2})
    torch.testing.assert_close(out["x.weight"], w + 1.5 * b @ a)
    assert out["y.weight"] is w
    assert list(out) == ["x.weight", "y.weight"]


def test_combine_refuses_what_does_not_fit():
    step = {"combine": {"from": {"w": "{m:**}.w", "v": "{m:**}.v"}, "to": "{m}.x", "formula": "w * v"}}
    (problem,) = refused([step], {"a.w": normal(3, 2), "a.v": normal(3)})
    assert (problem.code, problem.what) == ("CK206", "a.w: the two sides of `*` do not fit: [3, 2] and [3] in w * v")
    assert problem.try_ == "rows(x, w) stands a vector along the first axis of w"
    (problem,) = refused([step], {"a.w": normal(3, 2), "a.v": normal(3, 2), "b.w": normal(1)})
    assert problem.what == "b.w has no partner '{m:**}.v'"


@pytest.mark.parametrize(
    ("formula", "what"),
    [
        ("w ** 2", "unexpected '*'"),
        ("exp(w)", "there is no function 'exp'"),
        ("w +", "the formula ends too early"),
        ("(" * 40 + "w" + ")" * 40, "a formula nests at most 32 deep"),
        ("norm(w, axes=(..., 1))", "axes are integers, and ... for all that follow"),
        ("w.__class__", "'.' cannot stand in a formula"),
        ("w" * 2000, "a formula has at most 1,024 characters; this one has 2,000"),
    ],
)
def test_a_formula_that_is_none_says_why(formula, what):
    with pytest.raises(CkptconvError) as error:
        rules([{"combine": {"from": {"w": "a"}, "to": "b", "formula": formula}}])
    assert error.value.problems[0].what == what


def test_merge_lora_reads_the_rank_from_the_tensor():
    w, a, b = normal(6, 4), normal(2, 4, seed=1), normal(6, 2, seed=2)
    step = {"merge_lora": {"a": "adapter::{m:**}.lora_A.weight", "b": "adapter::{m:**}.lora_B.weight", "alpha": 8, "transposed": "flip"}}
    given = {"x.weight": w, "adapter::x.lora_A.weight": a, "adapter::x.lora_B.weight": b}
    torch.testing.assert_close(converted([step], given, set={"flip": False})["x.weight"], w + 4 * b @ a)
    given["x.weight"] = w.t().contiguous()
    torch.testing.assert_close(converted([step], given, set={"flip": True})["x.weight"], w.t() + 4 * (b @ a).t())


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_what_torch_computes(dim):
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(3, 5, 2), dim=dim)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.7)
    g, v = layer.parametrizations.weight.original0.detach(), layer.parametrizations.weight.original1.detach()
    names = {"g": "{m:**}.weight_g", "v": "{m:**}.weight_v", "weight": "{m:**}.weight", "dim": dim}
    if dim is None:
        g = g.reshape(1, 1, 1)
    out = converted([{"weight_norm": names}], {"c.weight_g": g, "c.weight_v": v})
    torch.testing.assert_close(out["c.weight"], layer.weight.detach())
    back = converted([{"weight_norm": {**names, "fold": False}}], out)
    torch.testing.assert_close(back["c.weight_g"], g)
    assert torch.equal(back["c.weight_v"], out["c.weight"])


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_norm_gives_the_same_outputs(kind, bias):
    layer, norm = kind(3, 5, 3, bias=bias), torch.nn.BatchNorm2d(5)
    with torch.no_grad():
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            value.copy_(torch.rand(5) + 0.5)
    both = torch.nn.Sequential(layer, norm).eval()
    step = {"fold_batchnorm": {"layer": "{i:int}", "norm": "{j:int}"}}
    step = {"fold_batchnorm": {"layer": "0", "norm": "1", "transposed": kind is torch.nn.ConvTranspose2d}}
    folded = kind(3, 5, 3)
    state = converted([step, {"strip_prefix": "0."}], both.state_dict())
    folded.load_state_dict(state, strict=True)
    x = normal(2, 3, 8, 8)
    torch.testing.assert_close(folded(x), both(x), rtol=1e-4, atol=1e-5)


def test_a_mask_is_applied():
    w, mask = normal(4, 4), (normal(4, 4, seed=3) > 0).float()
    assert torch.equal(converted([{"apply_mask": {}}], {"l.weight_orig": w, "l.weight_mask": mask})["l.weight"], w * mask)


def test_fp8_blocks_are_what_transformers_computes():
    """The reference is the dequantiser of the installed library."""
    q, scale = normal(256, 384).to(torch.float8_e4m3fn), torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    out = converted([{"decode": {"layout": "blocks", "weight": "{m:**}.weight", "scale": "{m:**}.weight_scale_inv"}}],
                    {"a.weight": q, "a.weight_scale_inv": scale, "n.weight": normal(4)})  # fmt: skip
    blocks = q.float().reshape(2, 128, 3, 128) * scale[:, None, :, None]
    assert torch.equal(out["a.weight"], blocks.reshape(256, 384))
    assert list(out) == ["a.weight", "n.weight"]


def test_mxfp4_is_what_transformers_computes():
    from ckptconv.target.torchvision_ops import import_with_torchvision

    import_with_torchvision("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 5, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 8, 5), generator=generator, dtype=torch.uint8)
    step = {"decode": {"layout": "mxfp4", "weight": "{m:**}_blocks", "scale": "{m:**}_scales", "to": "{m}", "dtype": "bfloat16"}}
    step["decode"] |= {"weight": "e.{p}_blocks", "scale": "e.{p}_scales", "to": "e.{p}"}
    out = converted([step], {"e.down_blocks": blocks, "e.down_scales": scales})
    theirs = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16)
    assert torch.equal(out["e.down"].transpose(1, 2), theirs) or torch.equal(out["e.down"], theirs)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_int8_is_what_torch_dequantises():
    x = normal(4, 6)
    q = torch.quantize_per_channel(x, torch.tensor([0.1, 0.2, 0.05, 0.3]), torch.tensor([0, 1, 2, -3]), 0, torch.qint8)
    tensors = {"a.w": q.int_repr(), "a.s": q.q_per_channel_scales().float(), "a.z": q.q_per_channel_zero_points()}
    step = {"decode": {"layout": "int8", "weight": "{m}.w", "scale": "{m}.s", "zero": "{m}.z", "axis": 0, "to": "{m}.weight"}}
    assert torch.equal(converted([step], tensors)["a.weight"], q.dequantize())


@pytest.mark.parametrize(("prefix", "count"), [(1, 17), (5, 21), (0, 16), (2, 198)])
def test_position_embeddings_are_resampled_as_timm_does(prefix, count):
    from ckptconv.target.torchvision_ops import import_with_torchvision

    import_with_torchvision("timm")
    from timm.layers import resample_abs_pos_embed

    x = normal(1, count, 8)
    out = converted([{"resize": {"keys": "pos", "size": [6, 5]}}], {"pos": x})
    theirs = resample_abs_pos_embed(x, (6, 5), num_prefix_tokens=prefix)
    assert torch.equal(out["pos"], theirs)


def test_lines_and_relative_tables_are_resampled():
    import torch.nn.functional as F

    x = normal(5, 8)
    out = converted([{"resize": {"keys": "p", "size": [9], "mode": "linear", "antialias": False}}], {"p": x})
    torch.testing.assert_close(out["p"], F.interpolate(x.t()[None], size=9, mode="linear", align_corners=False)[0].t())
    table = normal(9 * 9 + 3, 4)
    out = converted([{"resize": {"keys": "t", "size": [13, 13], "suffix": 3, "antialias": False}}], {"t": table})
    assert out["t"].shape == (13 * 13 + 3, 4)
    assert torch.equal(out["t"][-3:], table[-3:])
    grid = table[:-3].t().reshape(1, 4, 9, 9)
    torch.testing.assert_close(out["t"][:-3], F.interpolate(grid, size=(13, 13), mode="bicubic").reshape(4, -1).t())


def test_positions_that_are_no_square_are_refused():
    (problem,) = refused([{"resize": {"keys": "pos", "size": [6, 6], "prefix": 1}}], {"pos": normal(1, 16, 4)})
    assert problem.what == "pos: 16 positions are no square grid after 1 others"
    assert problem.try_ == "grid: [rows, columns]"


@pytest.mark.parametrize(("how", "channels"), [("sum", 1), ("mean", 1), ("repeat", 4), ("repeat", 7), ("repeat", 2)])
def test_the_first_convolution_takes_other_channels(how, channels):
    w = normal(4, 3, 2, 2)
    out = converted([{"adapt_channels": {"keys": "w", "channels": channels, "how": how}}], {"w": w})["w"]
    if how == "repeat":
        from ckptconv.target.torchvision_ops import import_with_torchvision

        import_with_torchvision("timm")
        from timm.models import adapt_input_conv

        torch.testing.assert_close(out, adapt_input_conv(channels, w))
    else:
        torch.testing.assert_close(out, w.sum(1, keepdim=True) if how == "sum" else w.mean(1, keepdim=True))


def test_rows_are_kept_cut_filled_and_mapped():
    w = normal(4, 2)
    assert torch.equal(converted([{"resize_rows": {"keys": "w", "rows": 3}}], {"w": w})["w"], w[:3])
    assert torch.equal(
        converted([{"resize_rows": {"keys": "w", "rows": 5, "value": "ones"}}], {"w": w})["w"], torch.cat([w, torch.ones(1, 2)])
    )
    out = converted([{"resize_rows": {"keys": "w", "class_map": [3, -1, 0]}}], {"w": w})["w"]
    assert torch.equal(out, torch.stack([w[3], torch.zeros(2), w[0]]))
    (problem,) = refused([{"resize_rows": {"keys": "w", "class_map": [4]}}], {"w": w})
    assert problem.what == "w: class_map names row 4, and there are 4"
