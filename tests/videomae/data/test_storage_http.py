"""Ranges over HTTP, from a server of this process."""

import random
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from videomae.data import storage
from videomae.data.storage import BLOCK, CacheConfig, read_range, size_of

CONTENT = random.Random(0).randbytes(3 * BLOCK + 1000)


@pytest.fixture(autouse=True)
def _afresh(monkeypatch):
    storage._objects.clear()
    monkeypatch.setattr(storage, "_PAUSES", (0.01, 0.02))
    yield
    storage.configure(None)


@pytest.fixture
def folder(tmp_path):
    storage.configure(CacheConfig(str(tmp_path / "cache"), 16 * BLOCK / 1e9))
    return tmp_path / "cache"


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves CONTENT: by range, or as a whole at /whole.tar; /busy.tar once it was asked for twice in vain."""

    ranges: list[str | None] = []
    busy = 2  # what a look-up asks for: HEAD, then GET

    def do_HEAD(self):
        if self.path == "/busy.tar" and RangeHandler.busy:
            RangeHandler.busy -= 1
            return self.send_error(503)
        if self.path == "/none.tar":
            return self.send_error(404)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        part = CONTENT[int(asked[1]) : int(asked[2]) + 1] if asked and self.path != "/whole.tar" else CONTENT
        self.send_response(206 if len(part) < len(CONTENT) else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.ranges.append(self.headers.get("Range"))
            self.wfile.write(part)
        return None

    do_GET = do_HEAD

    def log_message(self, *_):
        """Nothing: every request would be a line of the test's output."""


@pytest.fixture
def server():
    pytest.importorskip("aiohttp", reason="http:// needs the extra videomae-engine[http]")
    with ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_reads_ranges_over_http(server, folder):
    assert size_of(f"{server}/a.tar") == len(CONTENT)
    assert read_range(f"{server}/a.tar", 5, 10) == CONTENT[5:15]
    assert read_range(f"{server}/a.tar", BLOCK - 5, 10) == CONTENT[BLOCK - 5 : BLOCK + 5]
    assert RangeHandler.ranges == [f"bytes=0-{BLOCK - 1}", f"bytes={BLOCK}-{2 * BLOCK - 1}"]
    assert read_range(f"{server}/a.tar", len(CONTENT) - 5, 10) == CONTENT[-5:]
    assert size_of(f"{server}/none.tar") is None
    with pytest.raises(FileNotFoundError):
        read_range(f"{server}/none.tar", 0, 1)


def test_tells_what_is_wrong_with_an_http_server_from_a_missing_file(server):
    assert size_of(f"{server}/busy.tar") == len(CONTENT)
    assert RangeHandler.busy == 0
    with pytest.raises(OSError, match="the server knows no ranges"):
        read_range(f"{server}/whole.tar", 5, 10)
    with pytest.raises(OSError, match="ClientConnectorError"):
        size_of("http://127.0.0.1:9/a.tar")
