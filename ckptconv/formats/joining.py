"""Several files as one source: their tensors placed in one list of files, under names that say where each comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Composite, Container, Contents, Placed, Storage


def shifted(container: Container, by: int, prefix: str = "") -> Container:
    """The container with its files ``by`` places further on, and ``prefix`` before every name."""
    storages: dict[Storage, Storage] = {}

    def moved(placed: Placed) -> Placed:
        if placed.storage not in storages:
            storages[placed.storage] = replace(placed.storage, file=placed.storage.file + by)
        return replace(placed, storage=storages[placed.storage])

    def whole(composite: Composite) -> Composite:
        return replace(composite, parts={name: moved(part) if isinstance(part, Placed) else part for name, part in composite.parts.items()})

    return replace(
        container,
        tensors={prefix + name: moved(placed) for name, placed in container.tensors.items()},
        composites={prefix + name: whole(composite) for name, composite in container.composites.items()},
        unsupported={prefix + name: kind for name, kind in container.unsupported.items()},
        skipped={prefix + name: kind for name, kind in container.skipped.items()},
    )


def side_by_side(parts: Mapping[str, Contents], format: str) -> Contents:  # noqa: A002  (the field's own word)
    """One contents whose names are ``KEY::name``: the ranks of a tensor-parallel set. Only containers that all parts have are there.

    Raises :class:`~ckptconv.errors.Refusal` CK308 where the parts share none.
    """
    first = next(iter(parts.values()))
    shared = [path for path in first.containers if all(path in part.containers for part in parts.values())]
    if not shared:
        raise Refusal("the files of the set have no state_dict in common", code="CK308",
                      found=printable(", ".join(f"{key}: {' '.join(part.containers)}" for key, part in list(parts.items())[:4])))  # fmt: skip
    containers = {path: _joined(path, parts) for path in shared}
    files = tuple(file for part in parts.values() for file in part.files)
    warnings = [f"{printable(key)}: {warning}" for key, part in parts.items() for warning in part.warnings]
    return Contents(format, files, containers, tree=None, warnings=tuple(dict.fromkeys(warnings))[:20])


def _joined(path: str, parts: Mapping[str, Contents]) -> Container:
    by, placed = 0, []
    for key, part in parts.items():
        placed.append(shifted(part.containers[path], by, f"{key}::"))
        by += len(part.files)
    return together(path, placed)


def together(path: str, containers: Sequence[Container]) -> Container:
    """One container with everything of all of them; module versions are those of the first."""
    return Container(
        path,
        {name: placed for container in containers for name, placed in container.tensors.items()},
        containers[0].module_versions,
        {name: kind for container in containers for name, kind in container.skipped.items()},
        {name: composite for container in containers for name, composite in container.composites.items()},
        {name: kind for container in containers for name, kind in container.unsupported.items()},
    )


def plain_files(folder: Path) -> list[str]:
    """Names of the folder's visible files, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
