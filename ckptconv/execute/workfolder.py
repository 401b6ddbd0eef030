"""The folder in which a conversion in tasks is made, beside its destination: ``.NAME.ckptconv-work``.

It holds the staged output at its full size, what it is made by (``order.json``), a claim for each task that somebody does, and a receipt
for each that is done. It outlives everybody who works in it. Nothing stands under the final name until all of it is renamed.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ckptconv.errors import CkptconvError, OutputError, Problem, printable
from ckptconv.execute.claims import Claims
from ckptconv.execute.digest import digest_tensors
from ckptconv.execute.renaming import rename_new
from ckptconv.execute.sources import Sources
from ckptconv.execute.staging import PUBLISHING, WAY_ON, Place, fsync, is_published, remove_work, turn, work_beside
from ckptconv.formats.base import FileLayout, Placed, Storage
from ckptconv.layout import Layout
from ckptconv.spec import DType, TensorSpec, contiguous_strides

ORDER = "order.json"
MAX_ORDER = 1 << 20  #: bytes
_DIFFERS: Mapping[str, str] = {
    "ckptconv": "the version of ckptconv", "torch": "the version of torch", "rules": "the rules", "plan": "the plan that the rules make",
    "source": "the source's files", "layout": "the output's files", "tasks": "the tasks",
}  # fmt: skip


class WorkFolder(Place):
    """The work folder of ``destination``; nothing is read or made before :meth:`start`.

    ``order`` is what the work is made by, part by part: everybody who works here must have the same.
    """

    def __init__(self, destination: Path, layout: Layout, order: Mapping[str, str], *, force: bool = False) -> None:
        self.work = work_beside(Path(os.path.abspath(destination)))
        files = self.work / "files"
        super().__init__(destination, files if layout.is_folder else files / layout.files[0].name, is_folder=layout.is_folder, force=force)
        self.layout, self.order = layout, dict(order)
        self.receipts, self.claims = self.work / "receipts", self.work / "claims"

    @property
    def is_there(self) -> bool:
        """True where somebody began."""
        return (self.work / ORDER).exists() and not is_published(self.work)

    def start(self, way_on: str, *, anew: bool = False) -> None:
        """Makes the folder and its files, or joins those who did; safe when many start at once. ``way_on`` is the command that goes on.

        Raises :class:`~ckptconv.errors.OutputError`: CK507 where the work there is made by another order (``anew`` takes it away, where
        nobody does a task of it), and as :class:`~ckptconv.execute.staging.Staging` does where the output cannot be made.
        """
        parent = self.destination.parent
        if not parent.is_dir():
            raise OutputError(
                Problem("CK503", f"the folder {printable(parent)} does not exist", where=self.shown, try_=f"mkdir -p {printable(parent)}")
            )
        with self.explained(), turn(parent):
            self.clear()
            if is_published(self.work):
                remove_work(self.work)
            self.refuse_what_is_there()
            if self.is_there and anew and self._found().get("parts") != self.order:
                self._remove_idle()
            if not self.is_there:
                self.refuse_too_much(self.layout.nbytes - _allocated(self.path))
            self._make(way_on)

    def _make(self, way_on: str) -> None:
        private = 0o700 if self.destination.exists() else 0o777  # what replaces something private is private from its first byte on
        self.work.mkdir(private, exist_ok=True)
        if not self.is_there:
            _put_new(self.work / WAY_ON, (way_on + "\n").encode())
            _put_new(self.work / ORDER, json.dumps({"ckptconv_order": 1, "parts": self.order}, indent=1).encode())
        self.check()  # before anything is made that another order has no place for
        files = self.path if self.is_folder else self.path.parent
        for folder in (files, self.receipts, self.claims):
            folder.mkdir(private, exist_ok=True)
        for file in self.layout.files:
            # A file that is there is only ever made longer, up to the size that all agree on: nobody's bytes are touched.
            descriptor = os.open(files / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, private & 0o666)
            try:
                if os.fstat(descriptor).st_size < file.nbytes:
                    os.ftruncate(descriptor, file.nbytes)
            finally:
                os.close(descriptor)

    def check(self) -> None:
        """Raises :class:`~ckptconv.errors.OutputError` CK507 where the work is made by another order than ours."""
        parts = self._found().get("parts")
        if parts == self.order:
            return
        theirs: Mapping[str, Any] = parts if isinstance(parts, dict) else {}
        other = [word for word in self.order if theirs.get(word) != self.order[word]] or ["order"]
        what = ", ".join(_DIFFERS.get(word, word) for word in other)
        versions = [
            f"{word} {printable(theirs.get(word), 40)}, here {self.order[word]}" for word in other if word in ("ckptconv", "torch", "rules")
        ]
        raise OutputError(
            Problem("CK507", f"the work that is under way was begun with something else: {what}", where=printable(self.work),
                    found="; ".join(versions), try_=f"go on as it was begun; or --force, or rm -r {shlex.quote(printable(self.work))}, to begin anew")
        )  # fmt: skip

    def _found(self) -> Mapping[str, Any]:
        try:
            with (self.work / ORDER).open("rb") as stream:
                data = json.loads(stream.read(MAX_ORDER))
        except (ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    def _remove_idle(self) -> None:
        claims = Claims(self.claims, {})
        for name in os.listdir(self.claims) if self.claims.is_dir() else []:
            found = claims.look(name) if not name.startswith(".") else None
            if found is not None and found.state == "claimed":
                raise OutputError(
                    Problem("CK506", "somebody does a task of the work that --force would take away", where=self.shown,
                            found=printable(f"{name}: {found.owner}"), try_="wait until its lease is over")
                )  # fmt: skip
        remove_work(self.work)

    def layouts_of(self, names: Sequence[str]) -> list[FileLayout]:
        """The layouts of these output files."""
        wanted = set(names)
        return [file for file in self.layout.files if file.name in wanted]

    def sync(self, names: Sequence[str]) -> None:
        """Waits until the disk has these output files."""
        for name in names:
            fsync(self.path_of(name))

    def digests(self, outputs: Collection[str], *, threads: int, progress: Callable[[int], None] | None = None) -> dict[str, str]:
        """Digests of outputs, read back from where they are staged; none of those whose file is gone or cut."""
        whole = [file for file in self.layout.files if _nbytes(self.path_of(file.name)) >= file.nbytes]
        placed = {name: _placed(file, name, at) for at, file in enumerate(whole) for name in outputs if name in file.slots}
        with Sources([self.path_of(file.name) for file in whole]) as opened:
            return digest_tensors(opened, placed, threads=threads, progress=progress)

    def publish(self, *, sync: bool = True) -> None:
        """Renames the output into place and takes the folder away. Who is killed in between leaves what the next one finishes."""
        with self.explained():
            # Where the rename is an exchange, the old output lies here afterwards: by its inode it is told from the new one.
            name = self.path.relative_to(self.work)
            (self.work / PUBLISHING).write_text(f"{os.lstat(self.path).st_ino}\n{name}\n", encoding="utf-8")
            if sync:
                fsync(self.work)
        super().publish(sync=sync)
        remove_work(self.work)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Errors of the system inside the block are those of writing this output."""
        try:
            yield
        except CkptconvError:
            raise
        except OSError as error:
            raise self.problem(error) from error


def _placed(file: FileLayout, name: str, number: int) -> Placed:
    slot = file.slots[name]
    spec = file.manifest.tensors.get(name)
    if spec is None:  # a tensor that is kept beside the state_dict: only its bytes matter
        spec = TensorSpec((slot.nbytes,), DType.uint8)
    return Placed(spec, Storage(number, slot.offset, slot.nbytes), 0, contiguous_strides(spec.shape))


def _put_new(path: Path, data: bytes) -> None:
    """Writes a file that is there once and for all; the first of several wins."""
    beside = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileExistsError):
            rename_new(beside, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(beside)


def _nbytes(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return -1


def _allocated(path: Path) -> int:
    """Bytes on the disk of what is staged already."""
    paths = [*path.rglob("*")] if path.is_dir() else [path]
    return sum(os.lstat(each).st_blocks * 512 for each in paths if each.exists())
