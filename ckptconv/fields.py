"""Fields that a person writes, or that we saved: structs whose annotations are checked by pydantic's core, all faults at once.

pydantic's own models cost 0.09 s to import and to build, half of what a small conversion takes. So what every run needs (rule files,
steps, transforms) is a msgspec struct here, and its annotations are handed to the core of pydantic, which loads in a few milliseconds and
words its complaints as the models do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from msgspec import NODEFAULT, Meta, Struct
from pydantic_core import CoreSchema, SchemaValidator, core_schema

_F = TypeVar("_F", bound="Fields")
_PLAIN: Mapping[type, Callable[..., CoreSchema]] = {
    str: core_schema.str_schema, bool: core_schema.bool_schema, int: core_schema.int_schema, float: core_schema.float_schema,
}  # fmt: skip
#: The constraints of :class:`msgspec.Meta` that can be used, and what they can stand beside.
_LIMITS = {"ge": ("int",), "min_length": ("str", "tuple", "dict"), "max_length": ("str", "tuple", "dict"), "pattern": ("str",)}


class Parsed(Struct, frozen=True, eq=False):
    """In an ``Annotated`` type: ``parse`` makes the value of what was written, or raises ``ValueError``; ``schema`` is what editors see."""

    parse: Callable[[Any], Any]
    schema: Mapping[str, Any]


class Checked(Struct, frozen=True, eq=False):
    """In an ``Annotated`` type: ``check`` gets the value, once its type is right, and gives it back or raises ``ValueError``."""

    check: Callable[[Any], Any]


class Rest(Struct, frozen=True, eq=False):
    """In an ``Annotated`` dict: it takes the fields that have no name of their own. ``schema`` is what editors see of each."""

    schema: Mapping[str, Any]


class Fields(Struct, frozen=True):
    """A mapping that was read from a file, as an object. Frozen, compared by value.

    Types are strict: no text for a number, no number for text. ``__post_init__`` checks what no single field can know, and raises
    ``ValueError``. Constraints and descriptions are written as :class:`msgspec.Meta`.

    >>> from msgspec import field
    >>> class Cut(Fields):
    ...     start: Annotated[int, Meta(ge=0)] = field(name="from")
    ...     sizes: tuple[int, ...] = ()
    >>> Cut.validated({"from": 2, "sizes": [1, 1]})
    Cut(start=2, sizes=(1, 1))
    """

    @classmethod
    def validated(cls: type[_F], data: Any) -> _F:
        """The object that ``data`` says. Raises ``pydantic_core.ValidationError`` (a ``ValueError``) with everything that is wrong."""
        made: _F = _validator(cls).validate_python(data)
        return made

    @classmethod
    def written_names(cls) -> tuple[str, ...]:
        """The fields as they are written in files."""
        return tuple(
            written for name, written in zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True) if name != _rest(cls)
        )


@cache
def _validator(kind: type[Fields]) -> SchemaValidator:
    return SchemaValidator(schema_of(kind))


@cache
def _hints(kind: type[Fields]) -> Mapping[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: hints[name] for name in kind.__struct_fields__}


@cache
def _rest(kind: type[Fields]) -> str | None:
    """The field that takes the others."""
    return next((name for name, hint in _hints(kind).items() if any(isinstance(note, Rest) for note in _notes(hint))), None)


def _notes(hint: Any) -> tuple[Any, ...]:
    return tuple(hint.__metadata__) if get_origin(hint) is Annotated else ()


def schema_of(kind: Any) -> CoreSchema:
    """pydantic's core schema of a type: of a :class:`Fields`, of plain values, and of tuples, dicts, unions and literals of them."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _annotated(inner[0], kind.__metadata__)
    if isinstance(kind, type) and issubclass(kind, Fields):
        return _of_fields(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return core_schema.no_info_plain_validator_function(kind)
    if kind in _PLAIN:
        return _PLAIN[kind](strict=True)
    if kind is Any:
        return core_schema.any_schema()
    if origin is Literal:
        return core_schema.literal_schema(list(inner))
    if origin is tuple and inner[-1] is ...:
        return core_schema.tuple_schema([schema_of(inner[0])], variadic_item_index=0)
    if origin is tuple:
        return core_schema.tuple_schema([schema_of(each) for each in inner])
    if origin is dict:
        return core_schema.dict_schema(schema_of(inner[0]), schema_of(inner[1]), strict=True)
    if origin in (Union, UnionType):
        choices = [schema_of(each) for each in inner if each is not type(None)]
        one = choices[0] if len(choices) == 1 else core_schema.union_schema([*choices])
        return core_schema.nullable_schema(one) if type(None) in inner else one
    raise TypeError(f"no field can have the type {kind}")


def _annotated(kind: Any, notes: tuple[Any, ...]) -> CoreSchema:
    parsed = next((note for note in notes if isinstance(note, Parsed)), None)
    if parsed is None:
        schema = schema_of(kind)
    else:
        schema = core_schema.no_info_plain_validator_function(parsed.parse, metadata={"schema": dict(parsed.schema)})
    for note in notes:
        if isinstance(note, Meta):
            schema = _limited(schema, kind, note)
        elif isinstance(note, Checked):
            schema = core_schema.no_info_after_validator_function(note.check, schema)
    return schema


def _limited(schema: CoreSchema, kind: Any, meta: Meta) -> CoreSchema:
    """The schema with the constraints of ``meta``, which are the core's own, by the same names."""
    limits = {limit: value for limit in _LIMITS if (value := getattr(meta, limit)) is not None}
    for limit in limits:
        if schema["type"] not in _LIMITS[limit]:
            raise TypeError(f"{limit} means nothing for {kind}")
    return cast("CoreSchema", {**schema, **limits})


def _of_fields(kind: type[Fields]) -> CoreSchema:
    """Unknown fields are faults, unless the class has a field for the rest. What is not written stays at the class's default."""
    fields, rest = {}, _rest(kind)
    count = len(kind.__struct_fields__) - len(kind.__struct_defaults__)
    defaults = (*(NODEFAULT for _ in range(count)), *kind.__struct_defaults__)
    for (name, hint), written, default in zip(_hints(kind).items(), kind.__struct_encode_fields__, defaults, strict=True):
        if name == rest:
            continue
        said = [note.description for note in _notes(hint) if isinstance(note, Meta) and note.description]
        metadata = {"description": said[-1] if said else None, "default": default}
        fields[name] = core_schema.typed_dict_field(
            schema_of(hint), required=default is NODEFAULT, validation_alias=written, metadata=metadata
        )
    metadata = {"name": kind.__name__, "description": kind.__doc__}
    if rest is None:
        checked = core_schema.typed_dict_schema(fields, extra_behavior="forbid", metadata=metadata)
        return core_schema.no_info_after_validator_function(lambda values: kind(**values), checked)
    others = schema_of(get_args(get_args(_hints(kind)[rest])[0])[1])
    metadata["rest"] = next(dict(note.schema) for note in _notes(_hints(kind)[rest]) if isinstance(note, Rest))
    checked = core_schema.typed_dict_schema(fields, extra_behavior="allow", extras_schema=others, metadata=metadata)

    def made(values: dict[str, Any]) -> Fields:
        return kind(**{name: values.pop(name) for name in fields if name in values}, **{rest: values})

    return core_schema.no_info_after_validator_function(made, checked)
