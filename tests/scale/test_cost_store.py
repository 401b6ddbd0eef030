"""The cost model against a store that counts: the requests and bytes that it foretells are those that are made."""

import sys
from math import inf
from pathlib import Path

import pytest

pytest.importorskip("ckptconv.places")
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))
from on_paper import checkpoint, measured, on_paper


def test_requests_and_bytes_are_those_that_are_foretold(tmp_path):
    folder = tmp_path / "in"
    checkpoint(folder, tensors=12)
    paper, found = on_paper(folder, 0.0, inf), measured(folder, 0.0, inf)
    nbytes = 12 * 1024 * 1024 * 2
    assert paper.read_nbytes == paper.written_nbytes == nbytes
    assert nbytes <= found.read_nbytes < nbytes * 1.01, "the headers, and nothing twice"
    assert nbytes <= found.written_nbytes < nbytes * 1.01
    writes = sum(found.by_kind[kind] for kind in ("part", "put", "create_multipart_upload"))
    assert abs(paper.writes - writes) <= 2
    assert abs(paper.reads - (found.requests - writes)) <= 10, "of folders and files that are looked at"
