"""Problems as annotations: what GitHub's runner and SARIF readers get."""

import json

import jsonschema
import pytest

from ckptconv.errors import Problem
from ckptconv.report.annotations import Place, github, place_of, sarif


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("rules/a.yaml:14:9  concat (step 3)", Place("rules/a.yaml", 14, 9)),
        ("rules/a.yaml:14", Place("rules/a.yaml", 14)),
        ("rules/a.yaml  when", Place("rules/a.yaml")),
        ("in folder/my rules.yaml:2:1", Place("in folder/my rules.yaml", 2, 1)),
        ("", Place("given.yaml")),
        ("somewhere else", Place("given.yaml")),
    ],
)
def test_the_place_is_read_from_where(where, place):
    assert place_of(Problem("CK201", "x", where=where), "given.yaml") == place


def test_no_text_can_become_a_command():
    hostile = Problem("CK201", "a\n::error file=x::b %", found="\r\n::set-output", where="")
    (line,) = github([("a,b:c.yaml", [hostile])]).splitlines()
    assert line == "::error file=a%2Cb%3Ac.yaml,title=CK201::a%0A::error file=x::b %25%0Afound: %0D%0A::set-output"


def test_sarif_is_what_its_schema_says():
    log = sarif([("a.yaml", [Problem("CK201", "nothing matched", where="a.yaml:3:5  drop (step 1)", try_="look")])])
    (run,) = log["runs"]
    (result,) = run["results"]
    assert log["version"] == "2.1.0"
    assert result["message"] == {"text": "nothing matched\ntry: look"}
    assert result["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "a.yaml"},
        "region": {"startLine": 3, "startColumn": 5},
    }
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == "CK201"


#: What SARIF 2.1.0 (OASIS, 3.13 to 3.30) asks of the parts that are written, in our own words.
SARIF = {
    "type": "object", "required": ["version", "runs"],
    "properties": {"$schema": {"type": "string"}, "version": {"const": "2.1.0"}, "runs": {"type": "array", "items": {
        "type": "object", "required": ["tool", "results"],
        "properties": {
            "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
            "tool": {"type": "object", "required": ["driver"], "properties": {"driver": {
                "type": "object", "required": ["name"], "properties": {"name": {"type": "string", "minLength": 1}, "rules": {
                    "type": "array", "uniqueItems": True, "items": {
                        "type": "object", "required": ["id"], "properties": {
                            "id": {"type": "string"}, "shortDescription": {"type": "object", "required": ["text"]},
                        },
                    },
                }},
            }}},
            "results": {"type": "array", "items": {
                "type": "object", "required": ["message", "ruleId"],
                "properties": {
                    "level": {"enum": ["none", "note", "warning", "error"]}, "ruleIndex": {"type": "integer", "minimum": 0},
                    "message": {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}},
                    "locations": {"type": "array", "items": {"type": "object", "properties": {"physicalLocation": {
                        "type": "object", "required": ["artifactLocation"],
                        "properties": {
                            "artifactLocation": {"type": "object", "properties": {"uri": {
                                "type": "string", "pattern": r"^([a-z]+:)?[A-Za-z0-9._~!$&'()*+,;=@/%-]+$",
                            }}},
                            "region": {"type": "object", "required": ["startLine"], "properties": {
                                "startLine": {"type": "integer", "minimum": 1}, "startColumn": {"type": "integer", "minimum": 1},
                            }},
                        },
                    }}}},
                },
            }},
        },
    }}},
}  # fmt: skip


@pytest.mark.parametrize(
    "found",
    [
        [],
        [("a.yaml", [])],
        [("my rules/ü:1.yaml", [Problem("CK201", "x", where="my rules/ü:1.yaml:3:5  drop"), Problem("CK102", "y")])],
        [
            ("/tmp/in 1.pth", [Problem("CK401", "<b>\u202e\x00", found="f")]),
            ("b.yaml", [Problem("CK999", "unknown code", where="b.yaml:7")]),
        ],
    ],
    ids=["nothing looked at", "nothing found", "a relative path", "an absolute path"],
)
def test_sarif_holds_to_the_standard(found):
    log = json.loads(json.dumps(sarif(found)))
    jsonschema.validate(log, SARIF)
    (run,) = log["runs"]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]


def test_check_and_test_annotate(tmp_path, cli):
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nname: bad\nsummary: x\nsteps:\n  - drob: [a]\n")
    result = cli("check", bad, "--format", "github")
    assert result.code == 1
    assert result.out.startswith(f"::error file={bad!s},line=5,col=5,title=CK102::there is no step 'drob'%0Atry: did you mean drop?")
    result = cli("check", bad, "--format", "sarif")
    assert json.loads(result.out)["runs"][0]["results"][0]["ruleId"] == "CK102"
    untested = tmp_path / "untested.yaml"
    untested.write_text("version: 1\nname: untested\nsummary: x\nsteps:\n  - drop: [a]\n")
    result = cli("test", untested, "--format", "github")
    assert result.code == 1
    assert "title=CK108::" in result.out
    assert cli("check", "dataparallel", "--format", "github").out == ""


def test_verify_annotates(tmp_path, cli):
    import torch

    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    torch.save({"b": torch.ones(3)}, tmp_path / "b.pth")
    result = cli("verify", tmp_path / "a.pth", "--target", tmp_path / "b.pth", "--format", "github")
    assert result.code == 4
    assert result.out.startswith(f"::error file={tmp_path / 'a.pth'},title=CK4")
