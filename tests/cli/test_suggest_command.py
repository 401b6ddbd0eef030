"""`ckptconv suggest` as a person uses it: the rule written, tried, settled, applied, or refused."""

import json
from dataclasses import dataclass

import pytest
import torch
from click.testing import CliRunner

import ckptconv
from ckptconv.api import manifest_of_state_dict
from ckptconv.cli import cli as command
from ckptconv.errors import UsageError

NETS = """
import torch
from torch import nn


class Old(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).tanh())


class New(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.b(self.a(x).relu()).tanh())


class Swapped(New):
    def __init__(self):
        super().__init__()
        self.a, self.b = self.a, self.b

    def forward(self, x):
        return self.out(self.a(self.b(x).relu()).tanh())


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 7)
        self.out = nn.Linear(7, 3)
"""


@dataclass(frozen=True)
class Said:
    exit_code: int
    output: str
    stdout: str
    stderr: str


def suggest(*words):
    result = CliRunner().invoke(command, ["suggest", *map(str, words)], catch_exceptions=False, standalone_mode=False)
    return Said(
        result.return_value if isinstance(result.return_value, int) else result.exit_code, result.output, result.stdout, result.stderr
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(NETS, scope)
    torch.manual_seed(0)
    old = scope["Old"]()
    torch.save(old.state_dict(), "in.pth")
    names = {"first": "a", "second": "b", "head": "out"}
    torch.save({f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in old.state_dict().items()}, "same.pth")
    for name in ("New", "Swapped", "Deep"):
        manifest = manifest_of_state_dict(scope[name]().state_dict())
        (tmp_path / f"{name}.json").write_text(json.dumps(manifest.to_json()))
    torch.save(torch.randn(5, 4), "x.pt")
    return tmp_path


def test_the_rule_is_written_tried_and_runs(folder):
    result = suggest("in.pth", "--target", "py:nets:New", "-o", "mine.yaml")
    assert "written   mine.yaml" in result.output
    assert "L2 ok" in result.output
    assert "ckptconv run mine.yaml in.pth out.pth --target py:nets:New" in result.output
    assert not (folder / "out.pth").exists()
    assert result.exit_code == (1 if "ambiguous" in result.output else 0)
    assert ckptconv.run("mine.yaml", "in.pth", "out.pth", target="py:nets:New").ladder.reached == "L0 L1 L2 L3"


def test_a_rule_that_is_there_is_not_overwritten(folder):
    (folder / "mine.yaml").write_text("mine")
    result = suggest("in.pth", "--target", "New.json", "-o", "mine.yaml")
    assert (result.exit_code, "CK501" in result.output) == (5, True)
    assert (folder / "mine.yaml").read_text() == "mine"
    assert suggest("in.pth", "--target", "New.json", "-o", "mine.yaml", "--force").exit_code in (0, 1)


@pytest.mark.parametrize("words", [[], ["-o", "-"]], ids=["without -o", "-o -"])
def test_without_a_file_the_rule_alone_goes_to_stdout(folder, words):
    result = suggest("in.pth", "--target", "New.json", *words)
    from ckptconv.ruleset.model import parse

    assert parse(result.stdout.encode(), "suggested.yaml", stem="suggested").header.name == "suggested"
    assert "verdict" in result.stderr


def test_values_of_a_file_with_the_same_weights_settle_it(folder):
    report = ckptconv.suggest("in.pth", "same.pth", "mine.yaml")
    assert report.settled == ("values: all 6 tensors are those of same.pth, bit by bit",)
    assert report.exit_code == 0
    assert report.ladder.reached == "L0 L1 L3"


def test_values_of_another_training_settle_nothing(folder):
    torch.save({name: torch.randn_like(value) for name, value in torch.load("same.pth").items()}, "other.pth")
    report = ckptconv.suggest("in.pth", "other.pth", "mine.yaml")
    assert report.settled == ()
    assert not report.problems


def test_the_models_outputs_settle_it(folder, monkeypatch):
    """The first suggestion is wrong, though it loads; the alternative gives equal outputs, and is what is written and applied."""
    ambiguous(monkeypatch)
    report = ckptconv.suggest("in.pth", "py:nets:Swapped", "mine.yaml", parity=["source=py:nets:Old", "inputs=x.pt"])
    assert report.settled == ("parity: the models give equal outputs with mapping 2 of those tried",), report.problems
    assert "L5" in report.ladder.reached
    assert ckptconv.convert(torch.load("in.pth"), "mine.yaml")["b.weight"].equal(torch.load("in.pth")["first.weight"])


def test_a_pair_says_which_belongs_to_which(folder):
    ckptconv.suggest("in.pth", "New.json", "mine.yaml", pairs=["first=b", "second=a"])
    assert ckptconv.convert(torch.load("in.pth"), "mine.yaml")["b.weight"].equal(torch.load("in.pth")["first.weight"])


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("first", "--pair first: want SOURCE=TARGET, parts of names\n  try: --pair reduce=conv1"),
        ("frist=a", "--pair frist=a: no name of the source has frist in it\n  try: did you mean first?"),
        (
            "first=zzz",
            "--pair first=zzz: no name of the target has zzz in it\n  found: a.weight, a.bias, b.weight, b.bias\n  try: ckptconv inspect SRC --tree",
        ),
    ],
    ids=["no pair", "source", "target"],
)
def test_a_pair_that_means_nothing_is_refused(folder, pair, says):
    with pytest.raises(UsageError) as raised:
        ckptconv.suggest("in.pth", "same.pth", pairs=[pair])
    assert str(raised.value) == f"[CK107]\n  {says}"


def test_the_rules_name_must_be_one(folder):
    with pytest.raises(UsageError) as raised:
        ckptconv.suggest("in.pth", "same.pth", "My Rule.yaml")
    assert str(raised.value) == (
        "My Rule.yaml  [CK107]\n  a rule is called as its file, in small letters, digits and hyphens\n  try: -o my-rule.yaml"
    )


def test_apply_converts_what_is_settled(folder):
    result = suggest("in.pth", "--target", "same.pth", "-o", "mine.yaml", "--apply", "out.pth")
    assert result.exit_code == 0, result.output
    assert "written   out.pth  6 tensors" in result.output
    assert {name: value.tolist() for name, value in torch.load("out.pth").items()} == {
        name: value.tolist() for name, value in torch.load("same.pth").items()
    }


def ambiguous(monkeypatch):
    """A suggestion that leaves something open, whatever the algorithm makes of it."""
    from msgspec.structs import replace

    from ckptconv.stage import suggesting

    def open_(*arguments, **named):
        found = found_by(*arguments, **{**named, "values": None})
        return replace(found, confidence={**found.confidence, "a.weight": "ambiguous"}, alternatives={"a.weight": ("second.weight",)})

    found_by = suggesting.suggest
    monkeypatch.setattr(suggesting, "suggest", open_)


def test_apply_refuses_while_something_is_ambiguous(folder, monkeypatch):
    ambiguous(monkeypatch)
    result = suggest("in.pth", "--target", "New.json", "-o", "mine.yaml", "--apply", "out.pth")
    assert result.exit_code == 4
    assert (
        "mine.yaml  [CK415]\n  1 tensor is ambiguous, and nothing was written to DST: a.weight may also come from second.weight\n"
        "  try: --parity source=…, --pair SOURCE=TARGET, or --accept-ambiguous after reading the rule\n"
    ) in result.output
    assert not (folder / "out.pth").exists()
    accepted = suggest("in.pth", "--target", "New.json", "-o", "mine.yaml", "--apply", "out.pth", "--accept-ambiguous", "--force")
    assert (accepted.exit_code, (folder / "out.pth").exists()) == (1, True)


def test_what_cannot_be_converted_exits_4_and_writes_nothing(folder, snapshot):
    before = {name for name in snapshot(folder) if "__pycache__" not in name}
    result = suggest("in.pth", "--target", "Deep.json", "-o", "mine.yaml", "--apply", "out.pth")
    assert result.exit_code == 4
    assert "verdict   not convertible, because " in result.output
    assert "sure" not in result.output, "nobody asks how sure a mapping is that leads nowhere"
    assert {name for name in snapshot(folder) if "__pycache__" not in name} == before


def test_what_loads_as_it_is_needs_no_rule(folder):
    report = ckptconv.suggest("same.pth", "New.json", "mine.yaml")
    assert (report.verdict, report.text, report.exit_code) == ("loads as it is", "", 0)
    assert not (folder / "mine.yaml").exists()


def test_a_rule_for_one_of_several_state_dicts_selects_it(folder):
    state = torch.load("in.pth")
    torch.save({"model": state, "ema": state}, "train.pth")
    report = ckptconv.suggest("train.pth", "New.json", "mine.yaml", select=["ema"])
    assert 'select: ["ema"]' in report.text
    assert ckptconv.run("mine.yaml", "train.pth", "out.pth").source["container"] == "ema"


def test_json_says_the_same(folder):
    result = suggest("in.pth", "--target", "same.pth", "-o", "mine.yaml", "--json")
    data = json.loads(result.stdout)
    assert data["ckptconv_suggestion"] == 1
    assert (data["verdict"], data["rule"], data["problems"]) == ("convertible", "mine.yaml", [])
    assert {row["target"] for row in data["mapping"]} >= {"out.weight"}
    assert data["verification"]["reached"] == "L0 L1 L3"
