"""A store that counts, and checkpoints in it."""

import importlib.util
import sys
from pathlib import Path

import pytest
from placing import tensors
from safetensors.torch import save_file

from ckptconv.places import presence, stores
from ckptconv.places.settings import using

BENCH = Path(__file__).parents[2] / "bench" / "store.py"


def _latency_store():
    if "latency_store" not in sys.modules:
        spec = importlib.util.spec_from_file_location("latency_store", BENCH)
        sys.modules["latency_store"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["latency_store"])
    return sys.modules["latency_store"].LatencyStore


@pytest.fixture
def store(monkeypatch):
    """``slow://``, with requests that are made again at once."""
    monkeypatch.setattr(stores, "WAIT", 0)
    return _latency_store()()


@pytest.fixture
def scratch(tmp_path):
    """Where everything lies on its way; empty again when a command has ended, however it ended."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    with using(scratch=folder):
        yield folder
    assert not list(folder.iterdir())
    assert not presence._keepers


@pytest.fixture
def source(tmp_path):
    """A safetensors file."""
    save_file(tensors(), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"
