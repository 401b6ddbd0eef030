"""Tables and packages whose entries live in modules that are imported when an entry is asked for: a run pays for what it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T")


class Lazy(Mapping[str, T]):
    """Key -> ``module:attribute``, read as key -> that object.

    >>> table = Lazy({"join": "posixpath:join"})
    >>> list(table), table["join"]("a", "b")
    (['join'], 'a/b')
    """

    def __init__(self, homes: Mapping[str, str]) -> None:
        self._homes, self._found = homes, dict[str, Any]()

    def __getitem__(self, key: str) -> T:
        if key not in self._found:
            module, _, attribute = self._homes[key].partition(":")
            self._found[key] = getattr(import_module(module), attribute)
        return self._found[key]  # type: ignore[no-any-return]  # what stands there is for the table's author to know

    def __contains__(self, key: object) -> bool:
        return key in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def exports(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: name -> module of the package that has it."""
    table = Lazy[Any]({name: f"{package}.{module}:{name}" for name, module in homes.items()})

    def getattribute(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return table[name]

    return getattribute
