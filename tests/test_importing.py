"""Rules imported from the installed transformers' own conversion mapping."""

import importlib.util

import pytest

from ckptconv.errors import Refusal
from ckptconv.importing.regexes import whole_of
from ckptconv.ruleset import model as rulefile
from ckptconv.ruleset.patterns import Pattern, Template

needs_mapping = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("transformers.conversion_mapping") is None,
    reason="needs transformers 5",
)
PROVED = ["CLIPTextModel", "ViTModel", "SegformerModel", "BeitModel", "legacy", "qwen2_moe", "swin", "dinov3_vit", "Dinov2Model",
          "MimiModel", "gte", "RfDetrForInstanceSegmentation"]  # fmt: skip


def renamed(sources: list[str], target: str, name: str, scope: str = "") -> str | None:
    found = whole_of(sources, target, scope)
    captures = Pattern.parse(f"regex:{found.pattern}").match(name)
    return None if captures is None else Template.parse(found.to).render(captures.__getitem__)


@pytest.mark.parametrize(("sources", "target", "name", "expected"), [
    (["attention.query"], "q_proj", "layer.0.attention.query.weight", "layer.0.q_proj.weight"),
    (["norm1"], "norm2", "a.norm1.weight", "a.norm2.weight"),
    (["norm1"], "norm2", "a.norm10.weight", None),  # a name's boundary
    (["norm_"], "n_", "a.norm_x", "a.n_x"),
    ([r"^model(?!\.(text|visual))"], "model.text", "model.layers.0", "model.text.layers.0"),
    ([r"^model(?!\.(text|visual))"], "model.text", "model.visual.0", None),
    ([r"^model(?!\.(text|visual))"], "model.text", "model.vision.0", "model.text.vision.0"),
    ([r"(?<!up\.)(?<!_)norm\."], "up.norm.", "norm.weight", "up.norm.weight"),
    ([r"(?<!up\.)(?<!_)norm\."], "up.norm.", "up.norm.weight", None),
    ([r"(?<!up\.)(?<!_)norm\."], "up.norm.", "a.q_norm.weight", None),
    ([r"(?<!up\.)(?<!_)norm\."], "up.norm.", "a.norm.weight", "a.up.norm.weight"),
    ([r"(?<!psp\.[0-9]\.)bn\."], "norm.", "psp.3.bn.weight", None),
    ([r"(?<!psp\.[0-9]\.)bn\."], "norm.", "psp.x.bn.weight", "psp.x.norm.weight"),
    ([r"(blocks\.\d+)\.fc1\."], r"\1.mlp.fc1.", "blocks.3.fc1.bias", "blocks.3.mlp.fc1.bias"),
    ([r"(^|model\.)layers\."], r"\1text.layers.", "layers.0", "text.layers.0"),
    (["^a.b", "^a.b.c"], "x", "a.b.c.d", "x.d"),  # the longest first
])  # fmt: skip
def test_a_search_becomes_a_full_match(sources, target, name, expected):
    assert renamed(sources, target, name) == expected


def test_what_re2_cannot_say_is_refused_with_the_reason():
    with pytest.raises(Refusal, match="look-around") as refusal:
        whole_of([r"b(?![^a])"], "c")
    assert refusal.value.code == "CK110"


@needs_mapping
def test_the_mapping_is_the_installed_one():
    from ckptconv.importing.transformers_mapping import model_types

    assert {"mixtral", "LlavaModel", "legacy"} <= set(model_types())


@needs_mapping
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", PROVED)
def test_a_rule_does_what_transformers_does(key):
    from ckptconv.importing.proving import prove

    assert prove(key) == ""


@needs_mapping
@pytest.mark.filterwarnings("ignore")
def test_a_rule_file_is_readable():
    from ckptconv.importing.transformers_mapping import rule_for

    rules = rulefile.parse(rule_for("qwen2_moe").encode(), "x.yaml", stem="hf-qwen2-moe-published-to-5")
    assert [step.step.op for step in rules.steps] == ["stack", "stack", "concat", "stack"]


@needs_mapping
def test_a_stranger_is_refused_with_the_nearest_name():
    from ckptconv.importing.transformers_mapping import rule_for

    with pytest.raises(Refusal, match="has no 'mixtrol'") as refusal:
        rule_for("mixtrol")
    assert (refusal.value.code, refusal.value.try_) == ("CK110", "did you mean mixtral?")


@needs_mapping
def test_a_rule_is_imported_on_the_command_line(tmp_path, cli):
    result = cli("rules", "import", "transformers:mixtral", "-o", tmp_path / "mix.yaml", "--prove")
    assert result.code == 0, result.err
    assert result.out == f"{tmp_path / 'mix.yaml'}: written, proved\n"
    assert cli("check", tmp_path / "mix.yaml").code == 0
    assert cli("test", tmp_path / "mix.yaml").out.endswith("1 tests, all pass\n")


@pytest.mark.parametrize(("word", "what"), [
    ("transformers:mixtrall", "did you mean mixtral?"),
    ("vllm:mixtral", "rules are imported from transformers, not from vllm:mixtral"),
])  # fmt: skip
def test_what_cannot_be_imported_is_named(word, what, cli):
    result = cli("rules", "import", word)
    assert result.code == 2
    assert what in result.err
