"""The JSON Schema of rule files, for completion and checking in editors."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from ckptconv.fields import schema_of
from ckptconv.ruleset import steps
from ckptconv.ruleset.expressions import Node
from ckptconv.ruleset.model import Header
from ckptconv.ruleset.patterns import Pattern, Template
from ckptconv.ruleset.steps.base import MODIFIERS


class _Schema(GenerateJsonSchema):
    """pydantic's, with what :mod:`ckptconv.fields` notes beside the core's schemas, and defaults as a rule file would say them."""

    def function_plain_schema(self, schema: core_schema.PlainValidatorFunctionSchema) -> JsonSchemaValue:
        return dict(schema["metadata"]["schema"])

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        found, said = super().typed_dict_schema(schema), schema["metadata"]
        found.update(title=said["name"], description=cleandoc(said["description"]))
        if "rest" in said:
            found["additionalProperties"] = said["rest"]
        return found

    def typed_dict_field_schema(self, schema: core_schema.TypedDictField) -> JsonSchemaValue:
        found, said = super().typed_dict_field_schema(schema), schema["metadata"]
        if said["description"]:
            found["description"] = said["description"]
        default = _said(said["default"])
        if default is None or isinstance(default, (str, bool, int, float, list)):
            found["default"] = default
        return found


def _said(value: Any) -> Any:
    if isinstance(value, tuple):
        return _said(value[0]) if len(value) == 1 else [_said(each) for each in value]
    if isinstance(value, (Pattern, Template)):
        return value.text
    return value.value if isinstance(value, Node) and value.kind == "literal" else value


def json_schema() -> dict[str, Any]:
    """The schema of language version 1, generated from the classes that rule files are checked by."""
    schema = _Schema().generate(schema_of(Header))
    choices = []
    for op, kind in steps.ALL.items():
        fields = _Schema().generate(schema_of(kind))
        modifiers = {name: fields["properties"][name] for name in MODIFIERS}
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
