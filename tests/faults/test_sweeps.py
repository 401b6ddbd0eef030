"""Truncation at every byte, and every byte changed: by the thousand, inside this process. Nothing but our refusal may come of it."""

import contextlib
import io

import pytest
import torch
from building import entry, legacy_file, safetensors_file, torch_file
from test_l_distributed import CHUNK, metadata

from ckptconv import formats
from ckptconv.errors import Refusal, UsageError
from ckptconv.ruleset import builtin, model


def written_by_torch(new):
    stream = io.BytesIO()
    torch.save({"x": torch.arange(8.0), "y": {"z": torch.ones(2)}}, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


FILES = {
    "zip": torch_file(), "zip-of-torch": written_by_torch(True), "legacy": legacy_file(), "legacy-of-torch": written_by_torch(False),
    "safetensors": safetensors_file({"a": entry(), "b": entry(offsets=(8, 16))}, bytes(16)),
}  # fmt: skip


def outcome(path):
    try:
        return formats.read(path)
    except Refusal as refusal:
        code = refusal.code
    assert code.startswith("CK3")
    return None


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_c031_c016_c053_c072_cut_at_every_byte(tmp_path, data):
    path = tmp_path / "in"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert outcome(path) is None, f"cut to {size} of {len(data)} bytes, and read"


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_c017_c027_every_byte_changed(tmp_path, data):
    """What is still read lies inside the file; what is not is refused."""
    path = tmp_path / "in"
    for at in range(0, len(data), 1 if len(data) < 1000 else 3):
        for change in (0x01, 0x80, 0xFF):
            path.write_bytes(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :])
            contents = outcome(path)
            for container in contents.containers.values() if contents is not None else ():
                for placed in container.stored.values():
                    assert 0 <= placed.storage.offset <= placed.storage.offset + placed.storage.nbytes <= len(data)


def test_c137_c141_distributed_metadata_cut_and_changed_at_every_byte(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(CHUNK)
    data = metadata()
    for at in range(len(data)):
        (tmp_path / ".metadata").write_bytes(data[:at])
        assert outcome(tmp_path) is None
        (tmp_path / ".metadata").write_bytes(data[:at] + bytes([data[at] ^ 0x81]) + data[at + 1 :])
        outcome(tmp_path)


def test_c100_a_rule_file_cut_at_every_byte():
    raw = (builtin.folder() / "dataparallel.yaml").read_bytes()
    for size in range(len(raw)):
        with contextlib.suppress(UsageError):
            model.parse(raw[:size], "r.yaml")
