"""One process for all commands of a test session, and one conversion of each kind."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from faulty import KINDS, Commands, Conversion, write_source


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    made = Commands(tmp_path_factory.mktemp("commands"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def conversions(commands):
    # In memory where that can be: hundreds of runs wait for hundreds of fsyncs otherwise. A run on the disk is among the other tests.
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield {kind: Conversion(folder, commands, kind) for kind in KINDS}
    shutil.rmtree(folder)


@pytest.fixture(params=KINDS)
def conversion(request, conversions):
    made = conversions[request.param]
    made.reset()
    return made


@pytest.fixture
def place(tmp_path):
    """A folder with a checkpoint file and one of shards."""
    torch.save({"module.a": torch.arange(6.0), "module.b": torch.ones(2, 3)}, tmp_path / "in.pth")
    write_source(tmp_path)
    return tmp_path
