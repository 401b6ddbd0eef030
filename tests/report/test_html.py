"""The page as a person meets it: in a real browser, with names that try to break it, on paper, and without a script."""

import base64
import hashlib
import re

import pytest
from msgspec.structs import replace

from ckptconv.compare import compare
from ckptconv.errors import FitError, InputError, Problem, printable
from ckptconv.planner import make_plan
from ckptconv.report.changes import changes
from ckptconv.report.html import excerpt, render, script_json
from ckptconv.report.model import RunReport, difference
from ckptconv.report.page import page_of_difference, page_of_failure, page_of_run
from ckptconv.ruleset.model import parse
from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.verify import Ladder, Rung

RULES = b"""version: 1
name: r
summary: s
steps:
  - split: {from: "blocks.{i:int}.attn.qkv.weight", to: "layers.{i}.{x:q|k|v}.weight"}
  - concat:
      from: "blocks.{i:int}.{x:a|b}.weight"
      to: "layers.{i}.ab.weight"
  - rename: {"blocks.{i:int}.norm.{p}": "layers.{i}.ln.{p}"}
  - rearrange: {keys: conv, pattern: "o i -> i o"}
  - cast: {keys: half, dtype: float16}
  - drop: {keys: old, reason: nobody needs it}
  - fill: {to: new, shape: [2], value: zeros}
"""
HOSTILE = (
    "<script>alert(1)</script>", "</script><script>window.pwned=1</script>", "<!--<script>", "]]>", "&lt;b&gt;", "<img src=x onerror=window.pwned=1>",
    "rtl\u202egnp.weight", "\u2067isolate\u2069.x", "nul\x00.weight", "line\u2028sep\u2029", "tab\there\nnew", "\u202e" * 40, "zero\u200bwidth", "עברית.משקל",
    "\U0001f600 emoji", "\U0001f600 emoticon", "{{ 7*7 }}", "${7*7}", "long." + "x" * 10_000, "no_dots_" + "y" * 10_000, " ", "7" * 5_000, "8" * 5_000, "__proto__", "constructor",
)  # fmt: skip


def spec(*shape, dtype=DType.float32):
    return TensorSpec(shape, dtype)


def source(layers=12):
    tensors = {"conv": spec(3, 4), "half": spec(5), "old": spec(7)}
    for i in range(layers):
        tensors |= {f"blocks.{i}.attn.qkv.weight": spec(6, 4), f"blocks.{i}.a.weight": spec(2, 4), f"blocks.{i}.b.weight": spec(2, 4)}
        tensors |= {f"blocks.{i}.norm.weight": spec(4), f"blocks.{i}.norm.bias": spec(4), f"blocks.{i}.same": spec(1)}
    return Manifest(tensors)


def report(target=None, **changed):
    rules = parse(RULES, "r.yaml")
    plan = make_plan(rules, source())
    comparison = compare(plan.manifest, target(plan.manifest)) if target else None
    return replace(RunReport(
        "plan", {"rules": "r@1"}, {"path": "in.pth", "format": "torch", "container": ".", "tensors": 75, "parameters": 9, "nbytes": 36},
        {"path": "out.pth", "format": "torch", "tensors": 99, "nbytes": 36, "files": ["out.pth"]}, tuple(changes(plan)), notes=("mind this",),
        skipped={"optimizer": "dict"}, target="timm:x" if target else "", comparison=comparison, plan=plan, rule_texts=rules.texts, seconds=1.25,
        cost={"copied_nbytes": 30, "computed_nbytes": 6, "peak_nbytes": 12},
    ), **changed)  # fmt: skip


def other_target(manifest):
    """What the plan makes, but for one tensor more, one less and one of another shape."""
    tensors = {name: each for name, each in manifest.tensors.items() if name != "half"}
    return Manifest({**tensors, "conv": spec(9, 9), "head.weight": spec(3, 3)})


def failed():
    known = report(other_target)
    return page_of_failure("run", FitError(known.comparison.problems(), about=known))


# ---- without a browser ----


def test_nothing_in_the_data_can_end_its_element():
    for text in HOSTILE:
        assert re.search(r"[<>&\u2028\u2029\x00]", script_json({text: [text]})) is None
    page = render(page_of_difference(difference("<a>", Manifest(dict.fromkeys(HOSTILE, spec(1))), "b", Manifest({}))))
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert "onerror=window" in page, "it is there, as text"


def test_the_policy_lets_nothing_in_but_what_stands_in_the_page():
    page = render(page_of_run(report()))
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    assert policy.startswith("default-src &#39;none&#39;; ")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert re.findall(r"(?:src|href|action)=\"(.*?)\"|url\(|@import", page) == ["data:,"]
    assert " style=" not in page
    assert re.search(r" on[a-z]+=[\"']", page) is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (5, '  - split: {from: "blocks.{i:int}.attn.qkv.weight", to: "layers.{i}.{x:q|k|v}.weight"}'),
        (6, '  - concat:\n      from: "blocks.{i:int}.{x:a|b}.weight"\n      to: "layers.{i}.ab.weight"'),
        (0, ""), (99, ""),
    ],
    ids=["one line", "several", "no step", "past the end"],
)  # fmt: skip
def test_the_lines_of_a_step(line, expected):
    assert excerpt(RULES.decode(), line) == expected


@pytest.mark.parametrize(
    ("page", "headline"),
    [
        (lambda: page_of_run(report()), "This is the plan"),
        (lambda: page_of_run(report(lambda manifest: manifest)), "It fits timm:x"),
        (lambda: page_of_run(report(command="run")), "Converted, not verified"),
        (lambda: page_of_run(report(command="run", ladder=Ladder((Rung(0, "passed", "read back"),)))), "Converted and verified"),
        (lambda: page_of_run(report(command="verify", ladder=Ladder((Rung(0, "failed", "bytes differ"),)))), "Not verified"),
        (failed, "It does not fit timm:x"),
        (lambda: page_of_failure("run", FitError(Problem("CK407", "x"), {"reached": "none", "rungs": [], "parity": None}, report())), "Not verified"),
        (lambda: page_of_failure("run", InputError(Problem("CK310", "x"))), "The source is refused"),
        (lambda: page_of_difference(difference("a", source(), "b", source())), "The same names, shapes, dtypes and ties"),
        (lambda: page_of_difference(difference("a", source(2), "b", source())), "They differ"),
    ],
)  # fmt: skip
def test_the_verdict_is_read_first(page, headline):
    made = page()
    assert made.verdict.headline == headline
    assert f"<bdi>{headline}</bdi></h1>" in render(made)


# ---- from the command line ----


@pytest.fixture
def folder(tmp_path):
    import torch

    torch.save({"module.a": torch.ones(2), "module.b": torch.zeros(3)}, tmp_path / "in.pth")
    torch.save({"a": torch.ones(2), "b": torch.zeros(3), "c": torch.zeros(1)}, tmp_path / "other.pth")
    return tmp_path


def headline(path):
    return re.findall(r"<h1.*<bdi>(.*?)</bdi></h1>", path.read_text(encoding="utf-8"))[0]


def test_every_command_draws_its_page_and_replaces_what_was_there(folder, cli):
    page = folder / "p.html"
    for words, code, expected in [
        (["run", "dataparallel", "in.pth", "out.pth"], 0, "Converted and verified"),
        (["run", "dataparallel", "in.pth", "no.pth", "--target", "other.pth"], 4, "It does not fit other.pth"),
        (["run", "dataparallel", "missing.pth", "no.pth"], 3, "The source is refused"),
        (["plan", "dataparallel", "in.pth", "--quiet"], 0, "This is the plan"),
        (["diff", "in.pth", "other.pth", "--json"], 1, "They differ"),
        (["verify", "out.pth", "--target", "other.pth", "--format", "github"], 4, "Not verified"),
    ]:
        result = cli(*words, "--html", "p.html", cwd=folder)
        assert (result.code, headline(page)) == (code, expected), result.err
    assert sorted(path.name for path in folder.iterdir()) == ["in.pth", "other.pth", "out.pth", "p.html"]


def test_a_page_that_cannot_be_written_is_an_error_and_the_conversion_stays(folder, cli):
    result = cli("run", "dataparallel", "in.pth", "out.pth", "--html", "no/folder/p.html", cwd=folder)
    report = cli("run", "dataparallel", "in.pth", "out2.pth", "--report", "no/folder/p.html", cwd=folder)
    assert (result.code, result.err) == (report.code, report.err)
    assert result.code == 5
    assert (folder / "out.pth").exists()


# ---- in a browser ----


def row(tab, text):
    return tab.locator("#list .row").filter(has_text=text).first


def names(tab, side="right"):
    return tab.locator(f"#list .cell.{side} .name").all_text_contents()


def test_it_opens_with_verdict_ladder_and_templates(show):
    rungs = (Rung(0, "passed", "read back"), Rung(1, "passed", "all counted"), Rung(2, "skipped", "no target; name one"))
    tab = show(page_of_run(report(command="run", ladder=Ladder(rungs))))
    assert tab.locator("h1").inner_text() == "✓ Converted and verified"
    assert tab.locator(".ladder li").all_inner_texts()[:4] == [
        "L0\n✓ ok\nintegrity read back", "L1\n✓ ok\naccounting all counted", "L2\n– skipped\nstrict load no target; name one",
        "L3\n·\nvalues conserved not tried",
    ]  # fmt: skip
    assert "30 B copied, 6 B computed" in tab.locator(".facts").inner_text()
    assert tab.locator("details").all_inner_texts() == ["notes 1\nmind this", "left behind 1\noptimizer (dict)"]
    words = [text.split("\n")[0] for text in tab.locator("#kinds .kind").all_inner_texts()]
    assert words == ["×dropped", "<split", ">joined", "↻rearranged", "≈cast", "○filled", "→renamed", "=unchanged"]
    split = row(tab, "attn.qkv.weight")
    assert split.text_content() == "▸attn.qkv.weight×12[6, 4] float32<splitq.weight×12[2, 4] float32"
    assert row(tab, "blocks.{0-11}").get_attribute("aria-expanded") == "true"


def test_a_template_unfolds_and_every_tensor_shows_all(show):
    tab = show(page_of_run(report()), viewport={"width": 1300, "height": 3000})
    row(tab, "attn.qkv.weight").locator(".caret").click()
    assert "blocks.7.attn.qkv.weight" in names(tab, "left")
    assert {"layers.7.q.weight", "layers.7.k.weight", "layers.7.v.weight"} <= set(names(tab))
    row(tab, "attn.qkv.weight").locator(".caret").click()
    assert "blocks.7.attn.qkv.weight" not in names(tab, "left")
    row(tab, "blocks.{0-11}").locator(".caret").click()
    assert tab.locator("#list .row").filter(has_text="qkv").count() == 0
    folded = int(tab.locator("#list").get_attribute("aria-rowcount"))
    tab.click("#every")
    assert int(tab.locator("#list").get_attribute("aria-rowcount")) > folded + 12 * 6


def test_search_and_kinds_filter_together(show):
    tab = show(page_of_run(report()))
    tab.keyboard.press("/")
    tab.keyboard.type("layers.7 weight")
    assert tab.locator("#shown").inner_text() == "5 of 88 tensors"
    assert {"layers.7.q.weight", "layers.7.ab.weight", "layers.7.ln.weight"} <= set(names(tab))
    assert "layers.8.q.weight" not in names(tab)
    tab.locator("#kinds .chip", has_text="joined").click()
    assert tab.locator("#shown").inner_text() == "1 of 88 tensors"
    tab.fill("#search", "nowhere")
    assert tab.locator("#nothing").is_visible()
    tab.fill("#search", "FLOAT16")
    tab.locator("#kinds .chip", has_text="joined").click()
    assert names(tab) == ["half"]


def test_the_lineage_of_a_tensor_names_sources_expression_rule_line_and_neighbours(show):
    tab = show(page_of_run(report()))
    tab.fill("#search", "layers.7")
    row(tab, "layers.7.k.weight").locator(".cell.right .name").click()
    panel = tab.locator("#panel")
    text = panel.inner_text()
    for said in ("layers.7.k.weight", "[2, 4] float32, 32 B", "A part of one tensor.", "slice(#1, axis=0, 2:4)", "blocks.7.attn.qkv.weight", "r.yaml:5 split (step 1)",
                 '- split: {from: "blocks.{i:int}.attn.qkv.weight"', "One of 12"):  # fmt: skip
        assert said in text
    assert panel.locator("section", has_text="Also made of these").locator(".tensor").all_inner_texts() == [
        "layers.7.q.weight",
        "layers.7.v.weight",
    ]
    panel.get_by_text("layers.7.v.weight").click()
    assert panel.locator(".subject").inner_text() == "layers.7.v.weight"
    panel.get_by_text("blocks.7.attn.qkv.weight").click()
    assert panel.locator("h2").inner_text() == "Where it goes"
    assert panel.locator(".tensor").all_inner_texts() == ["layers.7.q.weight", "layers.7.k.weight", "layers.7.v.weight"]
    tab.keyboard.press("Escape")
    assert panel.is_hidden()
    row(tab, "layers.7.ab.weight").locator(".cell.right .name").click()
    assert "concat(#1, #2, axis=0)" in panel.inner_text()
    tab.fill("#search", "old")
    row(tab, "old").locator(".cell.left .name").click()
    assert "nobody needs it" in panel.inner_text()
    assert "r.yaml:12 drop (step 6)" in panel.inner_text()


def test_it_is_used_by_the_keyboard_alone(show):
    tab = show(page_of_run(report()))
    tab.locator("#search").focus()
    tab.keyboard.type("qkv")
    tab.keyboard.press("Enter")
    active = tab.locator('#list .row[aria-selected="true"]')
    tab.keyboard.press("End")
    tab.keyboard.press("Home")
    for _ in range(3):
        if "qkv" in active.inner_text():
            break
        tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    assert active.get_attribute("aria-expanded") == "true"
    assert tab.locator("#list").get_attribute("aria-activedescendant") == active.get_attribute("id")
    tab.keyboard.press("Enter")
    assert tab.locator("#panel .subject").inner_text() == "layers.0.q.weight"
    tab.keyboard.press("Escape")
    tab.keyboard.press("ArrowLeft")
    assert active.get_attribute("aria-expanded") == "false"


def test_a_failed_comparison_shows_both_sides(show):
    tab = show(failed())
    assert tab.locator("h1").inner_text() == "✗ It does not fit timm:x"
    assert "head.weight" in tab.locator(".problems").inner_text()
    for word, name, note in (
        ("missing", "head.weight", ""),
        ("unexpected", "half", "cast"),
        ("wrong shape", "conv", "[4, 3] here, [9, 9] in the target"),
    ):
        chip = tab.locator("#kinds .chip", has_text=word)
        chip.click()
        assert names(tab) == [name]
        row(tab, name).locator(".cell.right .name").click()
        assert note in tab.locator("#panel").inner_text()
        tab.keyboard.press("Escape")
        chip.click()


def test_a_failure_without_sides_shows_its_problems(show):
    hostile = Problem("CK310", "<b>no</b>", where="in\u202e.pth", found="f", try_="t")
    tab = show(page_of_failure("run", InputError(hostile)))
    assert "The source cannot be opened. in\\u202e.pth\n\n<b>no</b>\nfound: f\ntry: t" in tab.locator(".problems").inner_text()
    assert tab.locator("#map").count() == 0


def test_names_stay_text_and_break_nothing(show):
    left = Manifest({name: spec(2) for name in HOSTILE})
    right = Manifest({f"{name}.r": spec(2) for name in HOSTILE} | {HOSTILE[0]: spec(3)})
    tab = show(page_of_difference(difference("<i>a</i>", left, "b\u202ec", right)), viewport={"width": 1300, "height": 3000})
    tab.click("#every")
    assert {printable(name, 100_000)[:400] for name in HOSTILE} <= {name.removesuffix("…") for name in names(tab, "left")}
    assert tab.evaluate("window.pwned") is None
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no name pushes the page wider"
    assert {round(each["height"]) for each in (item.bounding_box() for item in tab.locator("#list .row").all())} == {26}
    tab.fill("#search", "xxxxxxxx")
    tab.locator("#list .cell.left .name", has_text="xxxxxxxx").click()
    assert len(tab.locator("#panel .subject bdi").inner_text()) == 401
    tab.get_by_text("show all 10,005 characters").click()
    assert tab.locator("#panel .subject bdi").inner_text() == "long." + "x" * 10_000
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("preferred", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_button(show, preferred):
    tab = show(page_of_run(report()), color_scheme=preferred)
    paper = "getComputedStyle(document.body).backgroundColor"
    first = tab.evaluate(paper)
    tab.click("#theme")
    second = tab.evaluate(paper)
    tab.click("#theme")
    assert (first, second) == (("rgb(253, 252, 250)", "rgb(22, 24, 27)")[:: 1 if preferred == "light" else -1])
    assert tab.evaluate(paper) == first


def test_paper_gets_templates_and_no_controls(show):
    tab = show(page_of_run(report()), color_scheme="dark")
    tab.click("#every")
    tab.emulate_media(media="print", color_scheme="light")
    assert tab.locator("#map").is_hidden()
    assert tab.locator("#theme").is_hidden()
    table = tab.locator("table.static")
    assert table.is_visible()
    assert "layers.{0-11}.q.weight ×12 [2, 4] float32" in table.inner_text()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 252, 250)"
    assert tab.pdf(format="A4").startswith(b"%PDF")


def test_without_a_script_the_templates_are_there(show):
    tab = show(page_of_run(report()), java_script_enabled=False)
    assert tab.locator("table.static").is_visible()
    assert tab.locator("#map").is_hidden()


def test_a_narrow_window_is_enough(show):
    tab = show(page_of_run(report()), viewport={"width": 360, "height": 640})
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    row(tab, "same").locator(".cell.right .name").click()
    box = tab.locator("#panel").bounding_box()
    assert (box["x"], box["width"], box["y"] + box["height"]) == (0, 360, 640)


def test_fifty_thousand_tensors_are_a_few_rows_of_the_document(show):
    names_ = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj.weight" for i in range(100) for e in range(250) for p in ("up", "down")]
    tab = show(
        page_of_difference(difference("a", Manifest(dict.fromkeys(names_, spec(8, 8))), "b", Manifest(dict.fromkeys(names_, spec(8, 8)))))
    )
    assert tab.locator("#shown").inner_text() == "50,000 tensors"
    tab.click("#every")
    rows = int(tab.locator("#list").get_attribute("aria-rowcount"))
    assert rows >= 50_000
    tab.locator("#list").focus()
    tab.keyboard.press("End")
    assert names(tab)[-1] == names_[-1]
    assert tab.locator("#list .row").count() < 100
    tab.fill("#search", "layers.77 experts.123.up")
    below = tab.evaluate("list.firstChild.getBoundingClientRect().top - head.getBoundingClientRect().bottom")
    assert abs(below) < 2, "what was found stands where it is seen"
    assert tab.locator("#shown").inner_text() == "1 of 50,000 tensors"
    assert "model.layers.77.mlp.experts.123.up_proj.weight" in names(tab)
