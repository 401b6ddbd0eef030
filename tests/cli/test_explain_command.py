"""`ckptconv explain` on the screen: whole screens asserted, exit codes, JSON, pasted messages, names of a stranger's making."""

import json

import pytest
import torch
from torch import nn

SCREEN = """\
file      in.pth  torch, {size}: 2 tensors, 8 parameters
target    model.pth  2 tensors, 8 parameters
as it is  0.0% of the model's parameters would load; strict=True raises: 2 missing, 2 unexpected; strict=False would say nothing and leave 100.0% of the parameters random
why
  wrapper       every key in the checkpoint carries what a wrapper adds: module. (nn.DataParallel or DistributedDataParallel)
                → save model.module.state_dict() (DataParallel) or model._orig_mod.state_dict() (compile) next time
verdict   convertible, by the built-in rule dataparallel: every key of the model is filled
  ckptconv run dataparallel in.pth out.pth --target model.pth
"""


@pytest.fixture
def folder(tmp_path):
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "in.pth")
    torch.save(state, tmp_path / "model.pth")
    return tmp_path


def test_one_screen_says_what_is_wrong_and_what_to_type(folder, cli):
    result = cli("explain", "in.pth", "--target", "model.pth", cwd=folder)
    size = f"{(folder / 'in.pth').stat().st_size / 1000:.1f} kB"
    assert (result.code, result.out, result.err) == (1, SCREEN.format(size=size), "")
    command = result.out.splitlines()[-1].split()[1:]
    assert cli(*command, cwd=folder).code == 0
    after = cli("explain", "out.pth", "--target", "model.pth", cwd=folder)
    assert after.code == 0
    assert after.out.endswith(
        "verdict   loads as it is: every key of the model is there, with its shape\n  ckptconv verify out.pth --target model.pth\n"
    )


def test_a_pasted_message_is_read_from_a_file_or_a_pipe(folder, cli):
    model = nn.Sequential()
    model.fc = nn.Linear(3, 2)
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(torch.load(folder / "in.pth"))
    (folder / "message.txt").write_text(str(raised.value))
    piped = cli("explain", "--error", "-", cwd=folder, stdin=str(raised.value))
    assert (piped.code, "  ckptconv run dataparallel SRC out.pth\n" in piped.out) == (1, True)
    named = cli("explain", "in.pth", "--error", "message.txt", cwd=folder)
    assert (named.code, "  ckptconv run dataparallel in.pth out.pth\n" in named.out) == (1, True)


def test_a_code_is_explained(cli):
    result = cli("explain", "CK501")
    assert result.code == 0
    assert result.out.startswith("CK501  The output exists, and --force was not given.\n\nNothing is ever overwritten unless you say so.\n")
    assert cli("explain", "ck501", "--json").json["code"] == "CK501"
    assert cli("explain", "CK999").code == 2


def test_json_says_the_same_to_a_program(folder, cli):
    data = cli("explain", "in.pth", "--target", "model.pth", "--json", cwd=folder).json
    assert data["ckptconv_explanation"] == 1
    assert (data["verdict"], data["coverage"]) == ("convertible", 0.0)
    assert [cause["kind"] for cause in data["causes"]] == ["wrapper"]
    assert data["tried"][0] == {"rules": ["dataparallel"], "outcome": "fits", "coverage": 1.0, "reason": ""}
    assert {row["kind"] for row in data["differences"]} == {"missing", "unexpected"}
    assert data["commands"] == ["ckptconv run dataparallel in.pth out.pth --target model.pth"]


def test_a_file_that_is_none_is_explained_and_exits_3(folder, cli):
    (folder / "lfs.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    result = cli("explain", "lfs.pth", "--target", "model.pth", cwd=folder)
    assert result.code == 3
    assert result.out == (
        "file      lfs.pth  63 B\nlfs.pth  [CK301]\n  this is a git-lfs pointer (63 bytes), not the file itself\n  try: git lfs pull\n"
        "verdict   cannot be read\n"
    )


def test_a_thousand_wrong_keys_stay_one_screen(folder, cli):
    here = {f"blocks.{i}.{kind}.{leaf}": torch.zeros(i % 7 + 1) for i in range(250) for kind in ("a", "b") for leaf in ("weight", "bias")}
    torch.save(here, folder / "many.pth")
    torch.save(
        {f"layers.{i}.x{i % 13}.{leaf}": torch.zeros(i % 5 + 2, 3) for i in range(500) for leaf in ("weight", "bias")}, folder / "other.pth"
    )
    result = cli("explain", "many.pth", "--target", "other.pth", cwd=folder)
    assert len(result.out.splitlines()) <= 40
    assert max(map(len, result.out.splitlines())) < 1000


def test_names_of_a_stranger_steer_no_terminal(folder, cli):
    torch.save({"module.\x1b[31mred\u202e.weight": torch.ones(2), "x" * 900: torch.ones(3)}, folder / "evil.pth")
    try:
        result = cli("explain", "evil.pth", "--target", "model.pth", "-v", cwd=folder)
    except UnicodeDecodeError:  # pragma: no cover
        pytest.fail("the output is no text")
    assert "\x1b" not in result.out + result.err
    assert "\u202e" not in result.out + result.err


def test_verbose_lists_every_difference_and_rule(folder, cli):
    result = cli("explain", "in.pth", "--target", "model.pth", "-v", cwd=folder)
    assert "  only in the model       fc.weight  [2, 3] float32\n" in result.out
    assert "rules tried\n  dataparallel: fits, 100.0% of the model\n" in result.out
    assert json.loads(cli("explain", "in.pth", "--json", cwd=folder).out)["verdict"] == "no target"
