"""What is suggested for two manifests: the text, the verdict, and how sure it is."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import Builder, experts, fused_vit, gpt, manifest, resnet, split_vit, stacked_experts, staged_resnet

from ckptconv.compare import compare
from ckptconv.plan import reads
from ckptconv.planner import make_plan
from ckptconv.ruleset.model import parse
from ckptconv.ruletests import run_tests
from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.suggest import suggest
from ckptconv.suggest.suggestion import allowed
from ckptconv.suggest.writing import Rule


def suggested(source, target, **more):
    """The suggestion, its rule planned again on the source: it must fit, do what the mapping says, and pass its own tests."""
    found = suggest(source, target, name="mine", **more)
    if found.text:
        rules = parse(found.text.encode(), "mine.yaml", stem="mine")
        plan = make_plan(rules, source)
        assert not compare(plan.manifest, target, allowed(Rule(found.text, rules, plan))).problems()
        aliases = source.aliases
        for output in plan.outputs:
            assert set(reads(output.expr)) == {aliases.get(name, name) for name in found.mapping[output.name][0]}
        outcomes = run_tests(rules)
        assert outcomes
        assert [str(failure) for outcome in outcomes for failure in outcome.failures] == []
    return found


def body(found):
    """The rule without its header and its tests."""
    return found.text.partition("steps:\n")[2].partition("tests:\n")[0]


def level(found, name):
    return found.confidence[name]


# --- whole rule files ------------------------------------------------------------------------------------------------------------------

SPLIT = """\
# yaml-language-server: $schema=../schema/rule-v1.schema.json
version: 1
name: mine
revision: 1
summary: "suggested from names and shapes: 44 tensors to 56 tensors"
steps:
  # likely: vit.layers.{0-2}.attention.q_proj.weight, vit.layers.{0-2}.attention.q_proj.bias: the order of rows in the joined tensor is \
taken to be piece after piece
  - split: {from: "blocks.{i:int}.attn.qkv.{p}", to: "vit.layers.{i}.attention.{x:q|k|v}_proj.{p}", dim: 0}
  - rename:
      "blocks.{i:int}.mlp.{m:**}": "vit.layers.{i}.mlp.{m}"
      "{x:cls_token|pos_embed=position_embeddings}": "vit.embeddings.{x}"
      "patch_embed.proj.{p}": "vit.embeddings.patch.projection.{p}"
      "blocks.{i:int}.attn.proj.{p}": "vit.layers.{i}.attention.o_proj.{p}"
      "blocks.{i:int}.{x:norm1=before|norm2=after}.{p}": "vit.layers.{i}.layernorm_{x}.{p}"
      "norm.{p}": "vit.layernorm.{p}"
      "head.{p}": "classifier.{p}"
tests:
  - name: names and shapes that were seen
    given:
      cls_token: [1, 1, 8]
      patch_embed.proj.weight: [8, 3, 4, 4]
      blocks.0.norm1.weight: [8]
      blocks.0.attn.qkv.weight: [24, 8]
      blocks.0.attn.proj.weight: [8, 8]
      blocks.0.mlp.fc1.weight: [32, 8]
      norm.weight: [8]
      head.weight: [11, 8]
    expect:
      vit.embeddings.cls_token: [1, 1, 8]
      vit.embeddings.patch.projection.weight: [8, 3, 4, 4]
      vit.layers.0.layernorm_before.weight: [8]
      vit.layers.0.attention.q_proj.weight: [8, 8]
      vit.layers.0.attention.k_proj.weight: [8, 8]
      vit.layers.0.attention.v_proj.weight: [8, 8]
      vit.layers.0.attention.o_proj.weight: [8, 8]
      vit.layers.0.mlp.fc1.weight: [32, 8]
      vit.layernorm.weight: [8]
      classifier.weight: [11, 8]
"""

STACKED = """\
# yaml-language-server: $schema=../schema/rule-v1.schema.json
version: 1
name: mine
revision: 1
summary: "suggested from names and shapes: 34 tensors to 20 tensors"
steps:
  # likely: model.layers.{0-1}.mlp.experts.gate_up_proj: the order of rows in the joined tensor is taken to be piece after piece
  - convert:
      from: ["model.layers.{i:int}.moe.experts.{e:int}.w1.weight", "model.layers.{i:int}.moe.experts.{e:int}.w3.weight"]
      gather: e
      to: "model.layers.{i}.mlp.experts.gate_up_proj"
      do: [{stack: 0}, {concat: 1}]
  - stack: {from: "model.layers.{i:int}.moe.experts.{e:int}.w2.weight", over: e, to: "model.layers.{i}.mlp.experts.down_proj"}
  - rename: {"model.layers.{i:int}.moe.gate.weight": "model.layers.{i}.mlp.router.weight"}
tests:
  - name: names and shapes that were seen
    given:
      model.layers.0.moe.gate.weight: [3, 8]
      model.layers.0.moe.experts.0.w1.weight: [12, 8]
      model.layers.0.moe.experts.0.w2.weight: [8, 12]
      model.layers.0.moe.experts.0.w3.weight: [12, 8]
      model.layers.0.moe.experts.1.w1.weight: [12, 8]
      model.layers.0.moe.experts.1.w2.weight: [8, 12]
      model.layers.0.moe.experts.1.w3.weight: [12, 8]
      model.layers.0.moe.experts.2.w1.weight: [12, 8]
      model.layers.0.moe.experts.2.w2.weight: [8, 12]
      model.layers.0.moe.experts.2.w3.weight: [12, 8]
    expect:
      model.layers.0.mlp.router.weight: [3, 8]
      model.layers.0.mlp.experts.gate_up_proj: [3, 24, 8]
      model.layers.0.mlp.experts.down_proj: [3, 8, 12]
"""

TURNED = """\
# yaml-language-server: $schema=../schema/rule-v1.schema.json
version: 1
name: mine
revision: 1
summary: "suggested from names and shapes: 28 tensors to 28 tensors"
steps:
  - check: {keys: transformer.h.0.attn.c_attn.weight, shape: ["*", "3 * shape()[0]"], note: otherwise it is undone already}
  # likely: transformer.h.{0-1}.attn.c_proj.weight: a square matrix: its shape does not tell whether it is turned
  - rearrange:
      keys: ["transformer.h.{i:int}.attn.c_{x:attn|proj}.weight", "transformer.h.{i:int}.mlp.c_{x:fc|proj}.weight"]
      pattern: "i o -> o i"
tests:
  - name: names and shapes that were seen
    given: {transformer.h.0.attn.c_attn.weight: [8, 24], transformer.h.0.mlp.c_fc.weight: [8, 32]}
    expect: {transformer.h.0.attn.c_attn.weight: [24, 8], transformer.h.0.mlp.c_fc.weight: [32, 8]}
"""

COUNTED = """\
# yaml-language-server: $schema=../schema/rule-v1.schema.json
version: 1
name: mine
revision: 1
summary: "suggested from names and shapes: 50 tensors to 50 tensors"
steps:
  - rename:
      conv1.weight: encoder.embedder.convolution.weight
      "bn1.{p}": "encoder.embedder.normalization.{p}"
      "layer{i:int}.{j:int}.conv{k:int}.weight": "encoder.stages.{i - 1}.layers.{j}.layer.{k - 1}.convolution.weight"
      "layer{i:int}.{j:int}.bn{k:int}.{p}": "encoder.stages.{i - 1}.layers.{j}.layer.{k - 1}.normalization.{p}"
      layer2.0.downsample.0.weight: encoder.stages.1.layers.0.shortcut.convolution.weight
      "layer2.0.downsample.1.{p}": "encoder.stages.1.layers.0.shortcut.normalization.{p}"
      "fc.{p}": "classifier.1.{p}"
tests:
  - name: names and shapes that were seen
    given:
      conv1.weight: [8, 3, 7, 7]
      bn1.weight: [8]
      layer1.0.conv1.weight: [8, 8, 3, 3]
      layer1.0.bn1.weight: [8]
      layer2.0.downsample.0.weight: [16, 8, 1, 1]
      layer2.0.downsample.1.weight: [16]
      fc.weight: [5, 16]
    expect:
      encoder.embedder.convolution.weight: [8, 3, 7, 7]
      encoder.embedder.normalization.weight: [8]
      encoder.stages.0.layers.0.layer.0.convolution.weight: [8, 8, 3, 3]
      encoder.stages.0.layers.0.layer.0.normalization.weight: [8]
      encoder.stages.1.layers.0.shortcut.convolution.weight: [16, 8, 1, 1]
      encoder.stages.1.layers.0.shortcut.normalization.weight: [16]
      classifier.1.weight: [5, 16]
"""

LOSSY = """\
# yaml-language-server: $schema=../schema/rule-v1.schema.json
version: 1
name: mine
revision: 1
summary: "suggested from names and shapes: 44 tensors to 44 tensors"
steps:
  - strip_prefix: module.
  - drop: {keys: "head.**", reason: the target has another number of classes}
target: {allow: {missing: ["head.{x:weight|bias}"]}}
tests:
  - name: names and shapes that were seen
    given: {module.cls_token: [1, 1, 8], module.head.weight: [11, 8]}
    expect: {cls_token: [1, 1, 8]}
"""


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        pytest.param(fused_vit(), split_vit(), SPLIT, id="a joined projection is split"),
        pytest.param(experts(), stacked_experts(), STACKED, id="experts are stacked"),
        pytest.param(gpt(turned=True), gpt(turned=False), TURNED, id="matrices are turned"),
        pytest.param(resnet(), staged_resnet(), COUNTED, id="indices are calculated"),
        pytest.param(fused_vit(prefix="module."), fused_vit(classes=7), LOSSY, id="a wrapper, and a head of another size"),
    ],
)
def test_whole_rules(source, target, text):
    assert suggested(source, target).text == text


# --- one ability each ------------------------------------------------------------------------------------------------------------------

NETWORK = manifest(embed__weight=[40, 8], mid__weight=[8, 6], mid__bias=[8], lm_head__weight=[40, 8])


@pytest.mark.parametrize(
    ("source", "target", "verdict", "steps"),
    [
        pytest.param(fused_vit(prefix="_orig_mod.module."), fused_vit(), "convertible", "  - strip_prefix: _orig_mod.module.\n", id="wrappers"),
        pytest.param(fused_vit(), fused_vit(prefix="backbone."), "convertible", "  - add_prefix: backbone.\n", id="a prefix is added"),
        pytest.param(
            manifest(l1__weight=[8, 4], l1__bias=[8], l2__weight=[8, 8], l2__bias=[8], l3__weight=[2, 8], l3__bias=[2]),
            manifest(net__0__weight=[8, 4], net__0__bias=[8], net__2__weight=[8, 8], net__2__bias=[8], net__4__weight=[2, 8], net__4__bias=[2]),
            "convertible", '  - rename: {"l{i:int}.{p}": "net.{2*i - 2}.{p}"}\n', id="every second index",
        ),
        pytest.param(
            manifest(up__weight=[8, 4, 1, 1], up__bias=[8], gamma=[8]), manifest(fc__weight=[8, 4], fc__bias=[8], ls=[8, 1, 1]), "convertible",
            '  - rename:\n      "up.{p}": "fc.{p}"\n      gamma: ls\n  - rearrange: {keys: fc.weight, pattern: "o i 1 1 -> o i"}\n'
            '  - rearrange: {keys: ls, pattern: "a -> a 1 1"}\n', id="convolution to linear",
        ),
        pytest.param(
            manifest(conv__weight_g=[8, 1, 1], conv__weight_v=[8, 4, 3], conv__bias=[8]),
            manifest(c__bias=[8], c__parametrizations__weight__original0=[8, 1, 1], c__parametrizations__weight__original1=[8, 4, 3]),
            "convertible", '  - rename:\n      conv.bias: c.bias\n      "conv.weight_{x:g=original0|v=original1}": "c.parametrizations.weight.{x}"\n',
            id="weight norm",
        ),
        pytest.param(
            Builder().conv("a", 8, 3, 3).batch_norm("b", 8).manifest, Builder().conv("c", 8, 3, 3).batch_norm("d", 8, counted=False).manifest,
            "convertible",
            '  - drop: {keys: b.num_batches_tracked, reason: the model makes it itself}\n  - rename:\n      a.weight: c.weight\n'
            '      "b.{p}": "d.{p}"\n', id="a buffer goes",
        ),
        pytest.param(
            Builder().conv("a", 8, 3, 3).batch_norm("b", 8, counted=False).manifest, Builder().conv("c", 8, 3, 3).batch_norm("d", 8).manifest,
            "convertible",
            '  - rename:\n      a.weight: c.weight\n      "b.{p}": "d.{p}"\ntarget: {allow: {missing: [d.num_batches_tracked]}}\n',
            id="a buffer is made",
        ),
        pytest.param(
            manifest(tok_embed__weight=[31, 8], fc__weight=[8, 6]), manifest(wte__weight=[31, 8], fc__weight=[8, 6], lm_head__weight=[31, 8]),
            "convertible",
            "  - rename: {tok_embed.weight: wte.weight}\n"
            "  # ambiguous: the source has no such tensor: the one that it is tied to elsewhere may be meant\n"
            "  - tie: {from: wte.weight, to: lm_head.weight}\n", id="a tied head",
        ),
        pytest.param(
            NETWORK, manifest(embed__weight=[32, 8], mid__weight=[8, 6], mid__bias=[8], lm_head__weight=[32, 8]), "convertible with loss",
            "  # likely: embed.weight, lm_head.weight: rows are cut off\n"
            "  # 40 rows in the source: the last ones are taken to be padding\n"
            '  - resize_rows: {keys: "{x:embed|lm_head}.weight", rows: 32}\n', id="rows of a vocabulary",
        ),
        pytest.param(
            fused_vit(), fused_vit(positions=26), "convertible with loss",
            "  # likely: cls_token: the positions are changed, and a token may have one of them\n"
            "  # likely: pos_embed: its sizes are changed\n  # another resolution\n"
            "  - resize: {keys: pos_embed, size: [5, 5], prefix: 1}\n", id="positions",
        ),
        pytest.param(
            fused_vit(), fused_vit(positions=16), "convertible with loss",
            "  # ambiguous: cls_token: the source's position for it is added, because the target's positions have none\n"
            "  # likely: pos_embed: its sizes are changed\n"
            "  - split: {from: pos_embed, to: [pos_embed_of_tokens, pos_embed], dim: 1, sizes: [1, 16]}\n"
            "  # the target adds no position to its token\n"
            "  - combine: {from: {token: cls_token, position: pos_embed_of_tokens}, to: cls_token, formula: \"token + position\"}\n",
            id="the position of a token",
        ),
        pytest.param(
            fused_vit(), fused_vit(channels=1), "convertible with loss",
            "  # likely: patch_embed.proj.weight: its sizes are changed\n"
            "  - adapt_channels: {keys: patch_embed.proj.weight, channels: 1, how: sum}\n", id="input channels",
        ),
        pytest.param(
            fused_vit(classes=0), fused_vit(), "convertible with loss",
            '  # names and shapes are right as they are\n  - keep: "**"\ntarget: {allow: {missing: ["head.{x:weight|bias}"]}}\n', id="a new head",
        ),
        pytest.param(
            manifest(a__weight=([4, 3], "bfloat16"), a__bias=([4], "bfloat16")), manifest(b__weight=[4, 3], b__bias=[4]), "convertible",
            '  - rename: {"a.{p}": "b.{p}"}\n  - cast: {keys: "**", dtype: float32, of: [bfloat16]}\n', id="another dtype",
        ),
        pytest.param(
            stacked_experts(), experts(), "convertible",
            "  # likely: model.layers.{0-1}.moe.experts.0.w1.weight: the order of rows in the joined tensor is taken to be piece after piece\n"
            '  - split: {from: "model.layers.{i:int}.mlp.experts.gate_up_proj", to: "model.layers.{i}.moe.experts.{x:w1|w3}.weight", dim: 1}\n'
            '  - unstack: {from: "model.layers.{i:int}.mlp.experts.down_proj", over: e, to: "model.layers.{i}.moe.experts.{e}.w2.weight"}\n'
            '  - unstack: {from: "model.layers.{i:int}.moe.experts.w{j:int}.weight", over: e, to: "model.layers.{i}.moe.experts.{e}.w{j}.weight"}\n'
            '  - rename: {"model.layers.{i:int}.mlp.router.weight": "model.layers.{i}.moe.gate.weight"}\n', id="experts are taken apart",
        ),
    ],
)  # fmt: skip
def test_one_ability(source, target, verdict, steps):
    found = suggested(source, target)
    assert found.verdict == verdict
    assert found.missing == tuple(name for name in target if name not in found.mapping)
    assert body(found) == steps


def test_parts_of_ranks():
    source = Manifest({f"{rank}::{name}": TensorSpec(shape, DType.float32) for rank in (0, 1)
                       for name, shape in (("up.weight", (6, 4)), ("down.weight", (4, 6)), ("norm.weight", (4,)))})  # fmt: skip
    found = suggested(source, manifest(fc1__weight=[12, 4], fc2__weight=[4, 12], ln__weight=[4]))
    assert {name: how for name, (_, how) in found.mapping.items()} == {
        "fc1.weight": "joined", "fc2.weight": "joined", "ln.weight": "the same on all ranks",
    }  # fmt: skip


def test_names_and_shapes_that_fit_need_no_rule():
    found = suggested(fused_vit(), fused_vit())
    assert (found.verdict, found.text, found.reason) == ("loads as it is", "", "")
    assert set(found.confidence.values()) == {"certain"}


# --- refusals --------------------------------------------------------------------------------------------------------------------------


def renamed(source, old, new):
    return Manifest({name.replace(old, new): spec for name, spec in source.tensors.items()}, source.ties)


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        pytest.param(fused_vit(depth=6), split_vit(depth=3),
                     "the source has 6 blocks in its longest list, and the target 3: no renaming can change that", id="deeper"),
        pytest.param(fused_vit(depth=6), fused_vit(depth=3),
                     "the source has 6 blocks in its longest list, and the target 3: no renaming can change that", id="deeper, the same names"),
        pytest.param(fused_vit(depth=3), split_vit(depth=6),
                     "the source has 3 blocks in its longest list, and the target 6: no renaming can change that", id="less deep"),
        pytest.param(fused_vit(width=8), split_vit(width=12), "the source is 8 wide, and the target 12: no renaming can change that", id="wider"),
        pytest.param(resnet((1, 2)), staged_resnet((1, 1)),
                     "the source has layer2.{0-1}, and 1 of these 2 would be lost", id="a block more"),
        pytest.param(manifest(fc__weight=[5, 10], fc__bias=[5]), manifest(fc__weight=[6, 10], fc__bias=[6]),
                     "fc.weight is [5, 10] in the source and [6, 10] in the target; 1 more of the same names differ", id="one layer"),
        pytest.param(Manifest({f"state.{name}.{what}": spec for name, spec in fused_vit().tensors.items() for what in ("exp_avg", "exp_avg_sq")}),
                     fused_vit(), "the source is the state of an optimizer: it has the shapes of a model, and none of its weights", id="Adam"),
        pytest.param(manifest(a__lora_A__weight=[2, 8], a__lora_B__weight=[8, 2]), manifest(a__weight=[8, 8]),
                     "the source is an adapter alone (LoRA): without the model that it was made for, it says nothing of the target's weights",
                     id="LoRA"),
        pytest.param(Manifest({}), fused_vit(), "no tensor of the target can be made of the source's", id="nothing"),
        pytest.param(fused_vit(), Manifest({}), "no tensor of the target can be made of the source's", id="nothing wanted"),
    ],
)  # fmt: skip
def test_refusals(source, target, reason):
    found = suggest(source, target, name="mine")
    assert (found.verdict, found.reason, found.text) == ("not convertible", reason, "")


def test_biases_that_the_target_needs_are_a_reason():
    source = Manifest({name: spec for name, spec in split_vit().tensors.items() if not name.endswith("v_proj.bias")})
    found = suggest(source, split_vit(), name="mine")
    assert found.verdict == "not convertible"
    assert "v_proj" in found.reason


# --- how sure it is --------------------------------------------------------------------------------------------------------------------


def two_alike(*names):
    made = Builder().tensor("embed.weight", 31, 8).tensor("pos.weight", 20, 8)
    for name in names:
        made.linear(name, 8, 8, bias=False)
    return made.manifest


def test_order_and_names_that_agree_are_certain():
    found = suggested(two_alike("b.query", "b.key"), two_alike("c.q_proj", "c.k_proj"))
    assert found.mapping["c.q_proj.weight"][0] == ("b.query.weight",)
    assert level(found, "c.q_proj.weight") == "certain"


def test_order_alone_is_likely():
    assert level(suggested(two_alike("b.foo", "b.bar"), two_alike("c.left", "c.right")), "c.left.weight") == "likely"


def test_letters_of_queries_and_keys_are_believed_against_the_order_but_not_certain():
    found = suggested(two_alike("b.query", "b.key"), two_alike("c.k_proj", "c.q_proj"))
    assert found.mapping["c.q_proj.weight"][0] == ("b.query.weight",)
    assert level(found, "c.q_proj.weight") == "likely"


def test_order_and_names_that_disagree_are_ambiguous():
    found = suggested(two_alike("b.alpha_in", "b.beta_in"), two_alike("c.beta_proj", "c.alpha_proj"))
    assert level(found, "c.alpha_proj.weight") == "ambiguous"
    assert len(found.alternatives["c.alpha_proj.weight"]) == 1


def test_names_in_alphabetical_order_say_nothing_of_the_order():
    source = Manifest(dict(sorted(two_alike("b.foo", "b.zoo").tensors.items())))
    found = suggested(source, two_alike("c.left", "c.right"))
    assert level(found, "c.left.weight") == "ambiguous"


def test_a_hint_settles_what_shapes_cannot():
    source, target = two_alike("b.foo", "b.bar"), two_alike("c.left", "c.right")
    found = suggested(source, target, hints=[("foo", "right")])
    assert found.mapping["c.right.weight"][0] == ("b.foo.weight",)
    assert level(found, "c.right.weight") == "certain"


@pytest.mark.parametrize("as_function", [False, True])
def test_values_settle_what_shapes_cannot(as_function):
    source, target = two_alike("b.foo", "b.bar"), two_alike("c.left", "c.right")
    ours = {"b.foo.weight": "1", "b.bar.weight": "2"}
    theirs = {"c.left.weight": "2", "c.right.weight": "1"}
    values = {"source": ours.get, "target": theirs.get} if as_function else {"source": ours, "target": theirs}
    found = suggested(source, target, values=values)
    assert found.mapping["c.right.weight"][0] == ("b.foo.weight",)
    assert level(found, "c.right.weight") == "certain"


def test_values_that_contradict_are_said():
    found = suggested(
        manifest(a__weight=[4, 3]), manifest(b__weight=[4, 3]), values={"source": {"a.weight": "1"}, "target": {"b.weight": "2"}}
    )
    assert level(found, "b.weight") == "ambiguous"
    assert "its values are other than the target's" in found.text


def test_what_is_in_the_same_blocks_is_the_same():
    """The shortcut's projection stands first on one side and last on the other, with the shape of the first convolution."""

    def model(names, first):
        made, size = Builder(), 4
        for stage, out in enumerate((8, 16)):
            for at in range(3):
                block = f"s{stage}.b.{at}"
                shortcut = lambda block=block, size=size, out=out: made.conv(f"{block}.{names[0]}.0", out, size, 1)  # noqa: E731
                if first and at == 0:
                    shortcut()
                made.conv(f"{block}.{names[1]}.0", out, size, 1).conv(f"{block}.{names[2]}.0", out, out, 3).conv(
                    f"{block}.{names[3]}.0", out, out, 1
                )
                if not first and at == 0:
                    shortcut()
                size = out
        return made.manifest

    found = suggested(model(("proj", "f_a", "f_b", "f_c"), True), model(("down", "one", "two", "three"), False))
    assert found.mapping["s0.b.0.down.0.weight"][0] == ("s0.b.0.proj.0.weight",)
    assert found.mapping["s1.b.0.one.0.weight"][0] == ("s1.b.0.f_a.0.weight",)


# --- properties ------------------------------------------------------------------------------------------------------------------------

MODELS = {"fused": fused_vit(), "split": split_vit(), "gpt": gpt(turned=False), "resnet": resnet(), "experts": experts()}
SYLLABLES = ["ka", "lo", "mi", "ne", "pu", "ra", "si", "to", "ve", "zu"]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.randoms(use_true_random=False))
def test_any_renamed_model_is_found_again(name, chosen):
    """Modules get words that mean nothing; their order stays."""
    target = MODELS[name]
    modules = sorted({part for each in target for part in each.split(".")[:-1] if not any(letter.isdigit() for letter in part)})
    said = dict(
        zip(
            modules, ("".join(chosen.sample(SYLLABLES, 3)) + SYLLABLES[at % 10] * (1 + at // 10) for at in range(len(modules))), strict=True
        )
    )
    names = {each: ".".join([*(said.get(part, part) for part in each.split(".")[:-1]), each.rpartition(".")[2]]) for each in target}
    source = Manifest({names[each]: spec for each, spec in target.tensors.items()})
    found = suggested(source, target)
    assert found.verdict == "convertible"
    assert {each: sources for each, (sources, _) in found.mapping.items()} == {each: (names[each],) for each in target}


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(fused_vit(), split_vit()), (experts(), stacked_experts()), (resnet(), staged_resnet())]),
    st.randoms(use_true_random=False),
)
def test_any_order_of_the_keys_gives_a_rule_that_fits_or_a_reason(pair, chosen):
    source, target = pair
    names = list(target)
    chosen.shuffle(names)
    found = suggested(source, Manifest({name: target[name] for name in names}))
    assert found.text or found.reason


def test_the_result_does_not_depend_on_the_hash_seed():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from made import *; from ckptconv.suggest import suggest; " \
           "found = suggest(resnet((1, 2, 1)), staged_resnet((1, 2, 1)), name='mine'); print(found.text, dict(found.confidence))"  # fmt: skip
    folder = str(__import__("pathlib").Path(__file__).parent)
    made = [subprocess.run([sys.executable, "-c", code, folder], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, text=True, check=True).stdout
            for seed in ("0", "1", "2")]  # fmt: skip
    assert len(set(made)) == 1
    assert "rename" in made[0]


def test_a_large_manifest_is_thought_about_as_a_small_one():
    """What is carried over from a few members of every list is what the rule does to all."""
    source, target = (
        experts(depth=12, count=40),
        renamed(renamed(experts(depth=12, count=40), "moe.experts", "mlp.all"), "moe.gate", "mlp.gate"),
    )
    found = suggested(source, target)
    assert len(found.mapping) == len(target)
    assert not found.missing
    assert not found.unexpected
    assert body(found) == (
        "  - rename:\n"
        '      "model.layers.{i:int}.moe.gate.weight": "model.layers.{i}.mlp.gate.weight"\n'
        '      "model.layers.{i:int}.moe.experts.{j:int}.w{k:int}.weight": "model.layers.{i}.mlp.all.{j}.w{k}.weight"\n'
    )


def test_a_large_manifest_with_stacked_experts():
    found = suggested(experts(depth=12, count=40), stacked_experts(depth=12, count=40))
    assert "model.layers.{0-11}.mlp.experts.gate_up_proj" in found.text
    assert len(found.mapping["model.layers.7.mlp.experts.gate_up_proj"][0]) == 80


def test_as_many_layers_as_experts():
    found = suggested(experts(depth=3, count=3), stacked_experts(depth=3, count=3))
    assert found.verdict == "convertible"
    assert len(found.mapping["model.layers.2.mlp.experts.down_proj"][0]) == 3


def test_hostile_names_are_no_syntax():
    source = Manifest({"a{b}.weight": TensorSpec((3, 2), DType.float32), "x|y=z.bias": TensorSpec((4,), DType.float32)})
    target = Manifest({"c}d{.weight": TensorSpec((3, 2), DType.float32), "\u202e#.bias": TensorSpec((4,), DType.float32)})
    found = suggested(source, target)
    assert found.verdict == "convertible"
