"""Steps as the text of a rule file: one line where it fits, a block where it does not, and YAML that reads back as what was meant."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ckptconv.backplan import Written
from ckptconv.spec import DType, Manifest, TensorSpec

PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*( [A-Za-z0-9_./]+)*")  #: text that YAML takes as text without quotes
_SURPRISES = frozenset({"yes", "no", "on", "off", "true", "false", "null", "y", "n"})
_LINE = 140


def step_lines(step: Written) -> list[str]:
    """The lines of one entry of `steps`."""
    short = f"  - {step.op}: {flow(step.body)}"
    if (len(short) <= _LINE and step.op != "rename") or not isinstance(step.body, Mapping):
        return [short]
    if step.op == "rename" and len(step.body) == 1 and len(short) <= _LINE:
        return [short]
    return [f"  - {step.op}:", *block(step.body, 6)]


def block(body: Mapping[str, Any], indent: int) -> list[str]:
    """The fields of a mapping, each on lines of its own."""
    lines: list[str] = []
    for key, value in body.items():
        text = f"{' ' * indent}{flow(key)}: {flow(value)}"
        if len(text) <= _LINE or not isinstance(value, (list, Mapping, str)) or not value:
            lines.append(text)
        elif isinstance(value, str):
            lines += [f"{' ' * indent}{flow(key)}:", f"{' ' * (indent + 2)}{flow(value)}"]
        elif isinstance(value, Mapping):
            lines += [f"{' ' * indent}{flow(key)}:", *block(value, indent + 2)]
        else:
            lines += [f"{' ' * indent}{flow(key)}:", *(f"{' ' * (indent + 2)}- {flow(item)}" for item in value)]
    return lines


def test_lines(test: Mapping[str, Any]) -> list[str]:
    """The lines of one test, with the word `tests` before them."""
    first, *rest = block(test, 4)
    return ["tests:", f"  - {first.strip()}", *rest]


def flow(value: Any) -> str:
    """A value on one line of strict YAML.

    >>> flow({"from": "a.{i:int}", "dim": 0, "mul": 1e-05, "keys": ["x", "no"]})
    '{from: "a.{i:int}", dim: 0, mul: 1.0e-05, keys: [x, "no"]}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, float):
        digits, _, exponent = repr(value).partition("e")
        return (digits if "." in digits else f"{digits}.0") + (f"e{exponent}" if exponent else "")
    if not isinstance(value, str):
        return json.dumps(value)
    return value if PLAIN.fullmatch(value) and value.lower() not in _SURPRISES else json.dumps(value, ensure_ascii=False)


def specs(manifest: Manifest) -> dict[str, Any]:
    """Names with their shapes, and dtypes where these are not float32, as a test has them."""
    return {name: _spec(spec) for name, spec in manifest.tensors.items()}


def _spec(spec: TensorSpec) -> Any:
    return list(spec.shape) if spec.dtype is DType.float32 else {"shape": list(spec.shape), "dtype": spec.dtype.value}
