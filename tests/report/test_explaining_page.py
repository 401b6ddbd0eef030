"""The pages of explain and suggest: the verdict, why, what to type, and both sides."""

import json
import re

import pytest

from ckptconv import api
from ckptconv.report.explaining_page import page_of_explanation, page_of_suggestion
from ckptconv.report.html import render
from ckptconv.spec import DType, Manifest, TensorSpec

PASTED = """RuntimeError: Error(s) in loading state_dict for Net:
\tMissing key(s) in state_dict: "fc.weight". 
\tUnexpected key(s) in state_dict: "module.fc.weight". 
"""  # noqa: W291  (as torch prints it)


def spec(*shape):
    return TensorSpec(shape, DType.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({f"module.blocks.{i}.fc.weight": torch.ones(4, 3) for i in range(3)}, "in.pth")
    for name, depth in (("same", 3), ("deep", 9)):
        wanted = Manifest({f"blocks.{i}.fc.weight": spec(4, 3) for i in range(depth)})
        (tmp_path / f"{name}.json").write_text(json.dumps(wanted.to_json()))
    return tmp_path


def block(page, title):
    return next((each.rows for each in page.blocks if each.title == title), ())


def test_an_explanation_draws_what_the_rule_makes(folder):
    page = page_of_explanation(api.explain("in.pth", "same.json"))
    assert (page.verdict.state, page.verdict.headline) == ("good", "Convertible")
    assert block(page, "what to type") == (("ckptconv run dataparallel in.pth out.pth --target same.json",),)
    assert ("drawn", "what dataparallel makes of it") in page.facts
    assert {(link.kind, str(link.origin.op)) for link in page.lineage.links} == {("renamed", "strip_prefix")}
    assert "strip_prefix" in page.rule_texts["rules/dataparallel.yaml"]


def test_what_cannot_be_converted_shows_what_is_missing(folder):
    page = page_of_explanation(api.explain("in.pth", "deep.json"))
    assert (page.verdict.state, page.verdict.headline) == ("bad", "Not convertible")
    assert [kind for kind, *_ in block(page, "why")] != []
    assert sorted({link.kind for link in page.lineage.links}) == ["missing", "renamed"]


def test_of_a_pasted_error_only_names_are_known(folder):
    page = page_of_explanation(api.explain(error=PASTED))
    assert page.lineage is None
    assert ("missing", "fc.weight", "") in block(page, "differences")
    assert "fc.weight" in render(page)


def test_a_suggestion_marks_what_is_ambiguous(folder):
    import torch

    torch.save({"left.w": torch.ones(4, 4), "right.w": torch.ones(4, 4), "head.w": torch.ones(2, 4)}, "twins.pth")
    (folder / "twins.json").write_text(json.dumps(Manifest({"p.w": spec(4, 4), "q.w": spec(4, 4), "head.w": spec(2, 4)}).to_json()))
    report = api.suggest("twins.pth", "twins.json", "mine.yaml")
    page = page_of_suggestion(report)
    assert {link.output for link in page.lineage.links if link.kind == "ambiguous"} == {
        name for row in report.ambiguous for name in ("p.w", "q.w") if name in row.target
    }
    assert block(page, "the rule file") == ((report.text,),)
    assert [rung["status"] for rung in page.rungs][: len(report.ladder.rungs)] == [rung.status for rung in report.ladder.rungs]


def test_both_commands_write_their_page(folder, cli):
    for words, code, headline in [
        (["explain", "in.pth", "--target", "same.json"], 1, "Convertible"),
        (["explain", "missing.pth"], 3, "Cannot be read"),
        (["suggest", "in.pth", "--target", "same.json", "-o", "mine.yaml"], 0, "Convertible"),
    ]:
        result = cli(*words, "--html", "p.html", cwd=folder)
        (found,) = re.findall(r"<h1.*<bdi>(.*?)</bdi></h1>", (folder / "p.html").read_text(encoding="utf-8"))
        assert (result.code, found) == (code, headline), result.err


def test_it_opens_in_a_browser(folder, show):
    tab = show(page_of_suggestion(api.suggest("in.pth", "same.json")))
    assert tab.locator("h1").inner_text() == "✓ Convertible"
    assert "ckptconv run" in tab.locator(".block.code").first.inner_text()
    tab.get_by_text("the rule file").click()
    assert "steps:\n" in tab.locator(".block.code").last.inner_text()
