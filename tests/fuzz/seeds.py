"""What the fuzzer starts from: small honest inputs of every kind, and the pieces that they are made of (a dictionary)."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def seeds() -> Mapping[str, list[bytes]]:
    """Target -> inputs."""
    import torch

    states = [
        {"x": torch.arange(8.0)},
        OrderedDict(a=torch.ones(2, 2).T, b=torch.zeros(0, 3), c=torch.tensor(1)),
        {"model": {"w": torch.nn.Parameter(torch.ones(2))}, "epoch": 3, "l": [1, (2.5, None)], "big": 2**40},
        {"half": torch.ones(3, dtype=torch.bfloat16), "b": torch.tensor([True])},
    ]
    zips, legacy, pickles = [], [], []
    for state in states:
        for new, kept in ((True, zips), (False, legacy)):
            stream = io.BytesIO()
            torch.save(state, stream, _use_new_zipfile_serialization=new)
            kept.append(stream.getvalue())
        import zipfile

        with zipfile.ZipFile(io.BytesIO(zips[-1])) as archive:
            pickles.append(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))
    headers = [
        {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}},
        {"__metadata__": {"format": "pt", "b": "a"}, "a": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}},
        {"e": {"dtype": "U8", "shape": [0, 3], "data_offsets": [0, 0]}, "f": {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}},
    ]
    raw = [json.dumps(header).encode() for header in headers]
    rules = [path.read_bytes() for path in sorted((ROOT / "rules").glob("*.yaml")) if path.stat().st_size < 4000]
    patterns = ["a.{p}", "{m:**}.w{i:int}.{x:q|k=kk}", "regex:(a|b)+[0-9]{1,3}", "layers.{i + 1}.x", "1 + n // 2 if t[0] == 3 else len(t)",
                "{'a': 1}['a']", "first(c.b, s)", "by_name(c, s, 1)", "**", "not n in t"]  # fmt: skip
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "s.safetensors"}}
    return {
        "zip": zips, "pickle": pickles, "zipped-pickle": pickles, "legacy": legacy,
        "safetensors": [b"\1" + part for part in raw] + [b"\0" + struct.pack("<Q", len(part)) + part + bytes(16) for part in raw],
        "rules": rules, "patterns": [text.encode() for text in patterns],
        "distributed": _distributed(),
        "index": [json.dumps(index).encode(), b'{"weight_map": {"a": "../x", "b": "link.safetensors", "c": "sub"}}'],
    }  # fmt: skip


def _distributed() -> list[bytes]:
    """One tensor of one chunk, one of two, and a value that is none, as torch pickles what it says of them."""
    import torch
    from targets import ARCHIVE
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    length, size = len(ARCHIVE), torch.Size
    found = []
    for shape, starts in (((2, 4), [(0, 0)]), ((4, 4), [(0, 0), (2, 0)]), ((2, 8), [(0, 4), (0, 0)])):
        chunks = [ChunkStorageMetadata(size(start), size((2, 4))) for start in starts]
        described = {"m.w": TensorStorageMetadata(TensorProperties(torch.float32), size(shape), chunks), "v": BytesStorageMetadata()}
        places = {MetadataIndex("m.w", start): _StorageInfo("__0_0.distcp", at * length, length) for at, start in enumerate(starts)}
        if len(starts) == 1:
            places[MetadataIndex("v")] = _StorageInfo("__0_0.distcp", length, length)
        metadata = Metadata(described, {"m.w": ("m", "w"), "v": ("l", 0)}, places, version="1.0.0")
        found += [pickle.dumps(metadata, protocol) for protocol in (2, 4)]
    return found


#: Words that mean something to the readers: the fuzzer puts them together sooner than it would find their letters.
WORDS: Mapping[str, list[bytes]] = {
    "zip": [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\xff\xff\xff\xff", b"archive/data.pkl", b"../"],
    "pickle": [
        b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"\x80\x02", b"R", b"tR", b"Q", b"sb.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_qtensor\n", b"X\1\0\0\0x",
        b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch\nfloat8_e4m3fn\n", b"cargparse\nNamespace\n", b"q\x00", b"h\x00", b"K\x01\x85", b")\x81", b"\x8a",
    ],
    "safetensors": [b'"dtype":"F32"', b'"shape":[', b'"data_offsets":[0,16]', b'"__metadata__":{', b"18446744073709551615", b"1e9", b"F4", b"BOOL"],
    "rules": [b"version: 1", b"- rename:", b"{m:**}", b"when:", b"&a", b"*a", b"<<:", b"!!", b"---", b"dtype: bfloat16", b"{i:int}", b"do: ["],
    "patterns": [b"{p}", b"{i:int}", b"{m:**}", b"regex:", b"**", b"{x:q|k}", b"shape(", b"by_name(", b" if ", b" else ", b"not in", b"//", b"[[1]]", b"{[1]: 2}"],
    "distributed": [
        b"ctorch.distributed.checkpoint.metadata\nChunkStorageMetadata\n", b"ctorch.distributed.checkpoint.metadata\nBytesStorageMetadata\n", b"ctorch\nSize\n",
        b"X\x0c\0\0\0__0_0.distcp", b"X\7\0\0\0offsets", b"X\5\0\0\0sizes", b"X\6\0\0\0chunks", b"X\3\0\0\0fqn", b"K\2K\4\x86", b"K\0K\0\x86", b"\x8a\1\xff", b"\x85R",
    ],
    "index": [b'"weight_map"', b'"metadata"', b"total_size", b"../", b"/dev/zero", b"s.safetensors", b"link.safetensors", b"1e999"],
}  # fmt: skip
