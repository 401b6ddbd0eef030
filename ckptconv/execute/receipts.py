"""What a task leaves behind when it is done: what it wrote, by digests, so that anyone can tell later whether it is still there.

A receipt is a file of less than ten kilobytes and may travel; what it says of single tensors lies in a file beside it where that is more.
Receipts are read as strangers' files: nothing in them is trusted but what their order and their task's outputs confirm.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ckptconv.errors import Refusal, printable
from ckptconv.execute.engine import Receipt
from ckptconv.execute.staging import fsync

MAX_RECEIPT = 10_000  #: bytes of one that travels
MAX_DETAILS = 256 << 20  #: bytes of what lies beside it (docs/limits.md)
_INLINE = 8_000
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)
_Value = TypeVar("_Value")
_Count = Annotated[int, Field(ge=0)]


class Details(BaseModel):
    """What a task found out about single tensors."""

    model_config = _STRICT
    digests: Mapping[str, str]  #: of its outputs
    crc32: Mapping[str, Mapping[str, _Count]]  #: by file and output
    source_digests: Mapping[str, str]
    checked: Sequence[tuple[int, int]]
    noticed: Mapping[str, Mapping[str, int]]


class TaskReceipt(BaseModel):
    """One task that is done."""

    model_config = _STRICT
    ckptconv_receipt: Literal[1] = 1
    task: _Count
    order: str  #: the fingerprint of what it was done by
    ckptconv: str
    torch: str | None  #: None where nothing was computed
    owner: str
    seconds: float
    read_nbytes: _Count
    copied_nbytes: _Count
    computed_nbytes: _Count
    tensors: _Count
    digest: str  #: of the details, as they are written
    details: Details | None = None  #: None: they lie beside it

    @property
    def written_nbytes(self) -> int:
        return self.copied_nbytes + self.computed_nbytes


def details_of(receipt: Receipt) -> Details:
    """What an engine's receipt says of single tensors, in an order that does not depend on which thread was first."""
    return Details(
        digests=_sorted(receipt.digests), crc32={file: _sorted(sums) for file, sums in sorted(receipt.crc32.items())},
        source_digests=_sorted(receipt.source_digests), checked=sorted(receipt.checked), noticed=_sorted(receipt.noticed),
    )  # fmt: skip


def _sorted(values: Mapping[str, _Value]) -> dict[str, _Value]:
    return dict(sorted(values.items()))


def write(folder: Path, receipt: TaskReceipt, details: Details, *, sync: bool) -> TaskReceipt:
    """Puts a receipt into ``folder`` by renaming; gives it back as it stands there. ``digest`` is filled in here."""
    raw = details.model_dump_json().encode()
    found = receipt.model_copy(update={"digest": xxhash.xxh3_128_hexdigest(raw), "details": details if len(raw) <= _INLINE else None})
    if found.details is None:
        _put(folder / _name(receipt.task, "details"), raw, sync)
    _put(folder / _name(receipt.task), found.model_dump_json().encode(), sync)
    if sync:
        fsync(folder)
    return found


def read(folder: Path, task: int, order: str, outputs: Collection[str]) -> tuple[TaskReceipt, Details] | None:
    """The receipt of a task, and what it says; None where there is none.

    Raises :class:`~ckptconv.errors.Refusal` CK416 where it is damaged, of another order, or not about just these ``outputs``.
    """
    try:
        receipt = TaskReceipt.model_validate_json(_bytes(folder / _name(task), MAX_RECEIPT))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise _bad("its receipt is damaged", _first(error)) from None
    if receipt.order != order:
        raise _bad("its receipt is of another plan, source or version", f"order {printable(receipt.order, 40)}")
    if receipt.task != task:
        raise _bad("its receipt is another task's", f"task {receipt.task}")
    details = receipt.details
    try:
        raw = details.model_dump_json().encode() if details is not None else _bytes(folder / _name(task, "details"), MAX_DETAILS)
        if xxhash.xxh3_128_hexdigest(raw) != receipt.digest:
            raise _bad("its receipt is damaged", "its digest is another")
        details = details or Details.model_validate_json(raw)
    except FileNotFoundError:
        raise _bad("its receipt lacks the file beside it") from None
    except ValidationError as error:
        raise _bad("its receipt is damaged", _first(error)) from None
    if details.digests.keys() != set(outputs):
        raise _bad("its receipt is about other tensors")
    return receipt, details


def done(folder: Path) -> set[int]:
    """The numbers of the tasks that have a receipt, whatever it says."""
    with suppress(FileNotFoundError):
        return {int(name.removesuffix(".json")) for name in os.listdir(folder) if name.endswith(".json") and name[:-5].isdecimal()}
    return set()


def written_at(folder: Path, task: int) -> float:
    """When a receipt was written, by the filesystem's clock; 0 where it is gone."""
    with suppress(OSError):
        return os.stat(folder / _name(task)).st_mtime
    return 0.0


def withdraw(folder: Path, task: int) -> None:
    """Takes a receipt away: its task is to be done again."""
    for name in (_name(task), _name(task, "details")):
        with suppress(FileNotFoundError):
            os.unlink(folder / name)


def put_together(found: Iterable[Details], receipts: Iterable[TaskReceipt]) -> Receipt:
    """The receipts of all tasks as one, as if a single run had filled everything.

    Raises :class:`~ckptconv.errors.Refusal` CK311 where two tasks read different bytes as one tensor of the source.
    """
    crc32: dict[str, dict[str, int]] = {}
    digests: dict[str, str] = {}
    source: dict[str, str] = {}
    checked: set[tuple[int, int]] = set()
    noticed: dict[str, Mapping[str, int]] = {}
    for details in found:
        for file, sums in details.crc32.items():
            crc32.setdefault(file, {}).update(sums)
        digests.update(details.digests)
        for name, digest in details.source_digests.items():
            if source.setdefault(name, digest) != digest:
                raise Refusal(f"two tasks read different bytes as {printable(name)}", code="CK311", try_="make the work anew")
        checked.update(details.checked)
        noticed.update(details.noticed)
    counts = [(receipt.copied_nbytes, receipt.computed_nbytes) for receipt in receipts]
    return Receipt(
        crc32, digests, source, frozenset(checked), sum(one for one, _ in counts), sum(other for _, other in counts), (), noticed
    )


def _name(task: int, kind: str = "json") -> str:
    return f"{task:06d}.{kind}"


def _put(path: Path, data: bytes, sync: bool) -> None:
    beside = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as stream:
            stream.write(data)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def _bytes(path: Path, limit: int) -> bytes:
    with path.open("rb") as stream:
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise _bad("its receipt is too large", f"more than {limit:,} bytes")
    return raw


def _bad(what: str, found: str = "") -> Refusal:
    return Refusal(what, code="CK416", found=found)


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    return printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
