"""The JSON Schema of rule files, for completion and checking in editors."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from ckptconv.ruleset import steps
from ckptconv.ruleset.expressions import Node
from ckptconv.ruleset.model import Header
from ckptconv.ruleset.patterns import Pattern, Template

_MODIFIERS = ("when", "optional", "note")


class _Schema(GenerateJsonSchema):
    """Defaults as a rule file would say them."""

    def encode_default(self, dft: Any) -> Any:
        return super().encode_default(_said(dft))


def _said(value: Any) -> Any:
    if isinstance(value, tuple):
        return _said(value[0]) if len(value) == 1 else [_said(each) for each in value]
    if isinstance(value, (Pattern, Template)):
        return value.text
    return value.value if isinstance(value, Node) and value.kind == "literal" else value


def json_schema() -> dict[str, Any]:
    """The schema of language version 1, generated from the models that validate rule files."""
    schema = Header.model_json_schema(by_alias=True, schema_generator=_Schema)
    definitions: dict[str, Any] = schema.pop("$defs", {})
    choices = []
    for op, kind in steps.ALL.items():
        fields = kind.model_json_schema(by_alias=True, schema_generator=_Schema)
        definitions.update(fields.pop("$defs", {}))
        modifiers = {name: fields["properties"][name] for name in _MODIFIERS}
        body: dict[str, Any] = fields
        shorts = _short_forms(op)
        if op == "rename":
            body = {"type": "object", "minProperties": 1, "description": fields["description"]}
        choices.append({
            "type": "object", "required": [op], "additionalProperties": False, "description": fields["description"],
            "properties": {op: {"anyOf": [*shorts, body]} if shorts else body, **modifiers},
        })  # fmt: skip
    properties = schema.pop("properties")
    properties["steps"] = {"type": "array", "minItems": 1, "items": {"anyOf": choices}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ckptconv rule file, version 1",
        "type": "object",
        "additionalProperties": False,
        "required": [*schema["required"], "steps"],
        "properties": properties,
        "$defs": definitions,
    }


def _short_forms(op: str) -> list[dict[str, Any]]:
    text: dict[str, Any] = {"type": "string"}
    texts: dict[str, Any] = {"type": "array", "items": text}
    forms: dict[str, list[dict[str, Any]]] = {
        "add_prefix": [text],
        "strip_prefix": [text, texts],
        "strip_infix": [text, texts],
        "drop": [text, texts],
        "keep": [text, texts],
        "include": [text],
    }
    return forms.get(op, [])
