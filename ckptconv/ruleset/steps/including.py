"""The step that is another rule file, for all names or for those under a prefix."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from msgspec import Meta, field

from ckptconv.errors import Refusal, printable
from ckptconv.fields import Checked
from ckptconv.ruleset.steps.base import Context, Number, Step, Table


def _ends_with_a_dot(scope: str) -> str:
    if scope and (not scope.endswith(".") or scope.startswith(".")):
        raise Refusal("a scope is a prefix with its dot at the end", code="CK102", found=printable(scope), try_="scope: vision_tower.")
    return scope


class Include(Step, frozen=True):
    """The steps of another rule file: a built-in rule, or a file in this rule's folder. With `scope`, only under that prefix."""

    op: ClassVar[str] = "include"
    rules: Annotated[str, Meta(min_length=1, description="a built-in rule's name, or the path of a file in this rule's folder")]
    scope: Annotated[
        str, Checked(_ends_with_a_dot), Meta(description="a prefix with its dot, as in 'vision_tower.': taken off before, put back after")
    ] = ""
    set: Annotated[dict[str, Any], Meta(description="variables of the included rule; text is an expression of this one's")] = field(
        default_factory=dict
    )
    config: Annotated[Number | None, Meta(description="what the included rule sees as config, as in 'config.vision_config'")] = None

    @classmethod
    def short(cls, value: Any) -> Any:
        return {"rules": value} if isinstance(value, str) else value

    def lower(self, table: Table, context: Context) -> Table:  # noqa: ARG002  (the signature of all steps)
        raise AssertionError("the planner runs the included steps")
