"""The step that is another rule file, for all names or for those under a prefix."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator

from ckptconv.errors import Refusal, printable
from ckptconv.ruleset.steps.base import Context, Number, Step, Table


class Include(Step):
    """The steps of another rule file: a built-in rule, or a file in this rule's folder. With `scope`, only under that prefix."""

    op: ClassVar[str] = "include"
    rules: str = Field(min_length=1, description="a built-in rule's name, or the path of a file in this rule's folder")
    scope: str = Field("", description="a prefix with its dot, as in 'vision_tower.': taken off before, put back after")
    set: dict[str, Any] = Field(default_factory=dict, description="variables of the included rule; text is an expression of this one's")
    config: Number | None = Field(None, description="what the included rule sees as config, as in 'config.vision_config'")

    @field_validator("scope")
    @classmethod
    def _ends_with_a_dot(cls, value: str) -> str:
        if value and (not value.endswith(".") or value.startswith(".")):
            raise Refusal("a scope is a prefix with its dot at the end", code="CK102", found=printable(value), try_="scope: vision_tower.")
        return value

    @classmethod
    def short(cls, value: Any) -> Any:
        return {"rules": value} if isinstance(value, str) else value

    def lower(self, table: Table, context: Context) -> Table:  # noqa: ARG002  (the signature of all steps)
        raise AssertionError("the planner runs the included steps")
