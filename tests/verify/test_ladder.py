"""The ladder finds what is wrong with a written file: each rung something that the others cannot see."""

import pytest
import torch
from msgspec.structs import replace

from ckptconv import api
from ckptconv.errors import FitError
from ckptconv.stage import producing
from ckptconv.verify.values import multiset_checksum


@pytest.fixture
def done(tmp_path):
    torch.manual_seed(0)
    torch.save({"qkv": torch.randn(6, 4), "up": torch.randn(3, 3), "norm": torch.randn(4)}, tmp_path / "in.pth")
    (tmp_path / "r.yaml").write_text(
        "version: 1\nname: r\nsummary: s\nsteps:\n  - split: {from: qkv, to: '{x:q|k|v}'}\n  - rearrange: {keys: up, pattern: 'i o -> o i'}\n"
    )
    report = api.run(tmp_path / "r.yaml", tmp_path / "in.pth", tmp_path / "out.pth")
    assert report.ladder.reached == "L0 L1 L3"
    return tmp_path


def verified(folder, state):
    torch.save(state, folder / "changed.pth")
    return api.verify(folder / "changed.pth", against=folder / "in.pth", rules=folder / "r.yaml").ladder


@pytest.mark.parametrize(
    ("change", "level", "word"),
    [
        (lambda s: s.pop("k"), 0, "other names"),
        (lambda s: s.update(q=s["q"].double()), 0, "written as"),
        (lambda s: s["norm"].add_(1), 0, "norm"),
        (lambda s: s.update(q=s["k"].clone()), 0, "q"),  # one part written twice, another lost
        (lambda s: s.update(up=s["up"].T.contiguous()), 3, "up"),  # a square matrix that was not transposed
        (lambda s: s["v"].view(-1)[3].add_(1e-6), 0, "v"),
        (lambda s: s["up"].view(-1)[3].add_(1e-6), 3, "up"),
    ],
)
def test_each_fault_is_found_on_its_rung(done, change, level, word):
    state = torch.load(done / "out.pth")
    change(state)
    ladder = verified(done, state)
    assert ladder.failed is not None
    assert ladder.failed.level == level
    assert any(word in problem.what for problem in ladder.failed.problems)


def a_flipped_bit(layouts, receipt, metadata, folder, real):
    real(layouts, receipt, metadata, folder)
    path = folder / layouts[0].name
    data = bytearray(path.read_bytes())
    data[layouts[0].slots["norm"].offset + 2] ^= 1
    path.write_bytes(data)


def a_wrong_checksum(layouts, receipt, metadata, folder, real):
    lies = {file: {name: crc ^ (name == "norm") for name, crc in slots.items()} for file, slots in receipt.crc32.items()}
    real(layouts, replace(receipt, crc32=lies), metadata, folder)


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        (a_flipped_bit, "norm: the bytes in the file are not those of the plan"),
        (a_wrong_checksum, "norm: the checksum that the file records does not match its bytes"),
    ],
)
def test_a_fault_between_writing_and_reading_back_is_found(done, monkeypatch, fault, word):
    real = producing.seal_all
    monkeypatch.setattr(producing, "seal_all", lambda *arguments: fault(*arguments, real))
    with pytest.raises(FitError) as error:
        api.run(done / "r.yaml", done / "in.pth", done / "new.pth")
    assert [problem.what for problem in error.value.problems] == [word]
    assert not (done / "new.pth").exists()


def test_a_good_file_is_proved_again(done):
    assert verified(done, torch.load(done / "out.pth")).reached == "L0 L1 L3"


def test_what_was_proved_stands_in_the_output(done):
    metadata = api.inspect(done / "out.pth").metadata
    assert metadata["ckptconv.verified"].strip() == "L0 L1 L3"
    assert metadata["ckptconv.rules"] == "r@1"
    assert metadata["ckptconv.rules_digest"].startswith("sha256:")
    assert metadata["ckptconv.source_digest"].startswith("xxh3_128:")
    assert metadata["ckptconv.version"]


def test_the_same_inputs_give_the_same_file(done):
    for at, threads in enumerate((1, 4)):
        for suffix in ("pth", "safetensors"):
            api.run(done / "r.yaml", done / "in.pth", done / f"again{at}.{suffix}", threads=threads)
    assert (done / "again0.pth").read_bytes() == (done / "again1.pth").read_bytes()
    assert (done / "again0.safetensors").read_bytes() == (done / "again1.safetensors").read_bytes()


def test_the_source_comes_back_from_the_output(done):
    report = api.run(done / "r.yaml", done / "in.pth", done / "there.safetensors", verify=4)
    assert report.ladder.reached == "L0 L1 L3 L4"
    assert report.ladder.rungs[-1].sentence == "3 source tensors come back byte-equal"
    (done / "d.yaml").write_text(
        "version: 1\nname: d\nsummary: s\nsteps:\n  - drop: norm\n  - split: {from: qkv, to: '{x:q|k|v}'}\n  - cast: {keys: up, dtype: bfloat16}\n"
    )
    report = api.run(done / "d.yaml", done / "in.pth", done / "part.pth", verify=4)
    assert (
        report.ladder.rungs[-1].sentence == "1 source tensors come back byte-equal; 2 cannot (up, norm: cast(·, bfloat16) cannot be undone)"
    )


def test_a_square_matrix_that_was_not_transposed_does_not_come_back(done):
    state = torch.load(done / "out.pth")
    state["up"] = state["up"].T.contiguous()
    torch.save(state, done / "changed.pth")
    ladder = api.verify(done / "changed.pth", against=done / "in.pth", rules=done / "r.yaml", level=4).ladder
    assert ladder.failed is not None


def test_without_verification_nothing_is_claimed(done):
    api.run(done / "r.yaml", done / "in.pth", done / "quick.pth", verify=None)
    assert api.inspect(done / "quick.pth").metadata["ckptconv.verified"].strip() == "none"


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex128, torch.float8_e4m3fn]
)
def test_the_checksum_sees_values_and_not_their_order(dtype):
    values = torch.randint(0, 2 if dtype is torch.bool else 9, (50,)).to(torch.float32).to(dtype)
    shuffled = values[torch.randperm(50)] if dtype is not torch.float8_e4m3fn else values.view(torch.uint8)[torch.randperm(50)].view(dtype)
    assert multiset_checksum(values) == multiset_checksum(shuffled)
    changed = values.clone().view(torch.uint8)
    changed[0] ^= 1
    assert multiset_checksum(values) != multiset_checksum(changed.view(dtype))


def test_lost_and_doubled_do_not_cancel_out():
    values = torch.arange(10.0)
    doubled = values.clone()
    doubled[3] = doubled[4]
    assert multiset_checksum(values) != multiset_checksum(doubled)
