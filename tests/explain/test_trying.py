"""Rules tried on a checkpoint: one after another, thinned where it is large, and never with torch."""

import pytest

from ckptconv.explain.sides import Part
from ckptconv.explain.trying import LARGE, Question, thinned, try_rules
from ckptconv.planner import make_plan
from ckptconv.ruleset.builtin import find, names
from ckptconv.ruleset.model import parse
from ckptconv.spec import DType, Manifest, TensorSpec


def manifest(**named):
    return Manifest({name: TensorSpec(tuple(shape), DType.float32) for name, shape in named.items()})


def llama(layers, prefix=""):
    specs = {f"{prefix}model.embed_tokens.weight": (32, 16), f"{prefix}model.norm.weight": (16,), f"{prefix}lm_head.weight": (32, 16)}
    for at in range(layers):
        base = f"{prefix}model.layers.{at}."
        specs |= {f"{base}self_attn.{p}_proj.weight": (16, 16) for p in "qkvo"}
        specs |= {f"{base}mlp.{p}_proj.weight": (48, 16) for p in ("gate", "up")}
        specs |= {
            f"{base}mlp.down_proj.weight": (16, 48),
            f"{base}input_layernorm.weight": (16,),
            f"{base}post_attention_layernorm.weight": (16,),
        }
    return manifest(**specs)


@pytest.fixture(scope="module")
def builtin():
    return [find(name) for name in names()]


@pytest.mark.parametrize("layers", [2, 200], ids=["small", "large enough to be thinned"])
def test_a_wrappers_rule_is_followed_by_a_models(builtin, layers):
    source = llama(layers, "module.")
    assert (len(source) > LARGE) == (layers == 200)
    wanted = make_plan(find("hf-llama-to-litgpt"), llama(layers)).manifest
    best = try_rules(builtin, Question([Part(".", source)], wanted))[0]
    assert best.names == ("dataparallel", "hf-llama-to-litgpt")
    assert best.complete
    assert len(best.plan.outputs) == len(wanted)


def test_what_fits_on_the_first_blocks_and_not_on_all_does_not_fit(builtin):
    wanted = make_plan(find("hf-llama-to-litgpt"), llama(300)).manifest
    best = try_rules(builtin, Question([Part(".", llama(200))], wanted))[0]
    assert best.names == ("hf-llama-to-litgpt",)
    assert not best.fits
    assert round(best.coverage, 2) == 0.67


def test_thinning_keeps_the_first_blocks_and_all_experts():
    names_ = [f"layers.{at}.experts.{e}.w" for at in range(5) for e in range(8)] + ["norm.w"]
    kept = thinned(manifest(**dict.fromkeys(names_, (1,))))
    assert list(kept) == [f"layers.{at}.experts.{e}.w" for at in range(3) for e in range(8)] + ["norm.w"]


def test_the_rules_own_allowances_hold_and_are_a_loss():
    text = b"version: 1\nname: mine\nsummary: s\nsteps: [{rename: {a.w: b.w}}]\ntarget: {allow: {missing: [head.w]}}\n"
    found = try_rules(
        [parse(text, "mine.yaml", stem="mine")], Question([Part(".", manifest(**{"a.w": (2,)}))], manifest(**{"b.w": (2,), "head.w": (2,)}))
    )
    assert (found[0].fits, found[0].complete) == (True, False)


def test_a_rule_that_cannot_be_planned_says_why(builtin):
    found = try_rules(builtin, Question([Part(".", manifest(x=(1,)))], manifest(y=(1,))))
    reasons = {each.names: each.reason for each in found if each.plan is None}
    assert reasons["dataparallel",].startswith("no name starts with 'module.'") or reasons["dataparallel",]
    assert reasons["ema-timm",] == "it is for state_dict_ema or model_ema, not for ."
