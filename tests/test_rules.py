"""Every rule file that is shipped: it is valid, says the same to editors, and passes its own tests."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from ckptconv.ruleset import builtin
from ckptconv.ruleset.schema import json_schema
from ckptconv.ruletests import run_tests

NAMES = builtin.names()
SCHEMA_FILE = Path(__file__).parent.parent / "schema" / "rule-v1.schema.json"


def test_there_are_rules_and_no_two_have_one_name():
    assert len(NAMES) >= 18
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_rule_passes_its_own_tests(name):
    failures = {outcome.name: outcome.failures for outcome in run_tests(builtin.find(name)) if not outcome.passed}
    assert failures == {}


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_accepts_a_shipped_rule(name):
    rules = builtin.find(name)
    data = yaml.safe_load((builtin.folder() / rules.file.removeprefix("rules/")).read_text(encoding="utf-8"))
    assert jsonschema.validate(data, json_schema()) is None


def test_the_committed_schema_is_current():
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == json.loads(json.dumps(json_schema())), "run `make schema`"


@pytest.mark.parametrize(
    "broken",
    [
        {"version": 2, "name": "a", "summary": "s", "steps": [{"drop": "a"}]},
        {"version": 1, "name": "a", "summary": "s", "steps": []},
        {"version": 1, "name": "a", "summary": "s", "steps": [{"drp": "a"}]},
        {"version": 1, "name": "a", "summary": "s", "steps": [{"cast": {"keys": "a", "dtype": "float33"}}]},
        {"version": 1, "name": "a", "summary": "s", "steps": [{"drop": "a"}], "extra": 1},
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(broken):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, json_schema())
