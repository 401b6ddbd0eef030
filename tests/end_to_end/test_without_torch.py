"""Looking and planning read headers only: torch, numpy and safetensors are never imported."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

PROBE = """
import sys
sys.argv = ["ckptconv", *{arguments!r}]
from ckptconv.__main__ import main
try:
    main()
except SystemExit as done:
    code = done.code
heavy = [name for name in ("torch", "numpy", "safetensors", "einops", "timm", "transformers", "fsspec", "huggingface_hub", "asyncio") if name in sys.modules]
print("HEAVY", heavy, "CODE", code)
"""


@pytest.fixture
def folder(tmp_path):
    torch.save({"module.a.weight": torch.ones(4, 2), "module.b.weight": torch.ones(3)}, tmp_path / "in.pth")
    model = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"a": torch.nn.Linear(4, 2)})})
    optimizer = torch.optim.Adam(model.parameters())
    model["module"]["a"](torch.ones(4)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "train.pth")
    save_file({"a.weight": torch.ones(4, 2), "b.weight": torch.ones(3)}, tmp_path / "in.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["inspect", "in.pth"],
        ["inspect", "in.safetensors"],
        ["plan", "dataparallel", "in.pth", "out.safetensors", "--target", "in.safetensors"],
        ["diff", "in.safetensors", "in.safetensors"],
        ["check", "dataparallel", "timm-vit-to-hf-vit", "gpt2-conv1d-to-linear"],
        ["test"],
        ["rules", "lock", "--check"],
        ["rules", "list"],
        ["schema"],
        ["explain", "in.pth"],
        ["explain", "CK101"],
        ["run", "dataparallel", "in.pth", "out.pth", "--target", "in.safetensors"],
        ["run", "dataparallel", "in.pth", "out.safetensors"],
        ["run", "dataparallel", "in.pth", "out", "--format", "dcp"],
        ["run", "dataparallel", "train.pth", "trained.pth", "--optimizer", "follow"],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported(folder, arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(arguments=arguments)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "HEAVY [] CODE 0", done.stdout + done.stderr
