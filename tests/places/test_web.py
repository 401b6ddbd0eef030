"""``http://``: a plain web server on this machine, with ranges and without."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from placing import NONE, tensors, write_shards
from safetensors.torch import load_file

import ckptconv


@pytest.fixture
def web(scratch, tmp_path):
    """The address of a server of ``files``, its requests, and whether it knows ranges."""

    class Files(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        files: dict = {}  # noqa: RUF012
        asked: list = []  # noqa: RUF012
        ranges = True

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            raw = self.files.get(self.path.partition("?")[0].lstrip("/"))
            wanted = self.headers.get("Range") if self.ranges else None
            self.asked.append((self.command, self.path, wanted))
            begin, end = 0, len(raw or b"")
            if wanted:
                begin, end = (int(word) for word in wanted.removeprefix("bytes=").split("-"))
                end += 1
            self.send_response(404 if raw is None else 206 if wanted else 200)
            self.send_header("Content-Length", str(len((raw or b"")[begin:end])))
            if wanted:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(raw)}")
            self.send_header("ETag", '"1"')
            self.end_headers()
            if body and raw is not None:
                self.wfile.write(raw[begin:end])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Files.address = f"http://127.0.0.1:{server.server_port}"
    (tmp_path / "none.yaml").write_text(NONE)
    yield Files
    server.shutdown()
    server.server_close()


def test_a_file_by_its_address(web, tmp_path, source):
    web.files["m/in.safetensors"] = source.read_bytes()
    web.files["m/config.json"] = b"{}"
    url = f"{web.address}/m/in.safetensors?token=hunter2"
    report = ckptconv.run(tmp_path / "none.yaml", url, tmp_path / "out.safetensors")
    assert report.ladder.reached == "L0 L1 L3"
    assert report.source["path"] == f"{web.address}/m/in.safetensors?token=***"
    assert all(torch.equal(load_file(tmp_path / "out.safetensors")[key], value) for key, value in tensors().items())
    gets = [wanted for method, path, wanted in web.asked if method == "GET" and path.startswith("/m/in.safetensors")]
    assert all(gets)


def test_an_index_leads_to_its_shards(web, tmp_path):
    write_shards(tmp_path)
    web.files |= {f"in/{path.name}": path.read_bytes() for path in (tmp_path / "in").iterdir()}
    report = ckptconv.inspect(f"{web.address}/in/model.safetensors.index.json")
    assert len(report.candidates[0].manifest) == 4
    index = json.loads(web.files["in/model.safetensors.index.json"])
    index["weight_map"]["module.first"] = "../../etc/passwd"
    web.files["in/model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(ckptconv.CkptconvError, match="CK308"):
        ckptconv.inspect(f"{web.address}/in/model.safetensors.index.json")
    assert not [path for _, path, _ in web.asked if "passwd" in path]


def test_a_server_without_ranges(web, tmp_path, source, monkeypatch):
    monkeypatch.setattr("ckptconv.places.stores.WAIT", 0)
    web.files["in.safetensors"] = source.read_bytes()
    web.ranges = False
    with pytest.raises(ckptconv.CkptconvError, match=r"CK31[03]"):
        ckptconv.inspect(f"{web.address}/in.safetensors")


def test_nothing_there(web):
    with pytest.raises(ckptconv.CkptconvError, match=r"CK310\]\n  the source cannot be opened: nothing is there"):
        ckptconv.inspect(f"{web.address}/none.pth")
