"""A few pairs of the public benchmark (`bench/suggest`): real implementations of tuned families, and pairs that must be refused."""

import sys
from pathlib import Path

import pytest

from ckptconv.suggest import suggest
from ckptconv.target.torchvision_ops import import_with_torchvision

BENCH = Path(__file__).parents[2] / "bench" / "suggest"


@pytest.fixture(scope="module")
def bench():
    for library in ("timm", "transformers"):
        import_with_torchvision(library)
    sys.path.insert(0, str(BENCH))
    try:
        import mutations
        import negatives
        import pairs
        import scoring
    finally:
        sys.path.remove(str(BENCH))
    return {"pairs": pairs, "negatives": negatives, "mutations": mutations, "scoring": scoring}


@pytest.mark.parametrize(
    "name",
    ["torchvision ViT → timm ViT", "HF 4 Swin → timm Swin", "torchvision ResNet-18 → HF", "HF GPT-2 → linear GPT", "HF Llama → litgpt",
     "Mixtral published → HF 5", "HF 5 → Mixtral published", "HF Qwen2 tied → torchtune"],
)  # fmt: skip
def test_pairs(bench, name):
    pair = next(pair for pair in bench["pairs"].pairs() if pair.name == name)
    assert not pair.held_out
    built = pair.build()
    score = bench["scoring"].Judge(built.source, built.target, built.truth).score(suggest(built.source, built.target, name="suggested"))
    assert (score.error, score.certain_wrong, score.perfect, score.recall, score.precision) == ("", 0, True, 1.0, 1.0)


@pytest.mark.parametrize("at", [0, 4, 6])
def test_mutations(bench, at):
    built = bench["mutations"].mutations()[at].build()
    score = bench["scoring"].Judge(built.source, built.target, built.truth).score(suggest(built.source, built.target, name="suggested"))
    assert (score.error, score.certain_wrong, score.perfect) == ("", 0, True)


REASONS = {
    "ResNet-50 → ResNet-18": "the source has bottleneck blocks and the target has basic blocks: another variant of the model",
    "ViT depth 12 → 24": "the source has 12 blocks in its longest list, and the target 24: no renaming can change that",
    "ViT width 96 → 48, same names": "the source is 96 wide, and the target 48: no renaming can change that",
    "Llama, 2 key heads → 4":
        "model.layers.0.self_attn.k_proj.weight is [24, 48] in the source and [48, 48] in the target; 21 more of the same names differ",
    "LoRA adapter → its base":
        "the source is an adapter alone (LoRA): without the model that it was made for, it says nothing of the target's weights",
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_negatives(bench, name):
    negative = next(each for each in bench["negatives"].negatives() if each.name == name)
    found = suggest(*negative.build(), name="suggested")
    assert (found.verdict, found.reason, found.text) == ("not convertible", REASONS[name], "")
