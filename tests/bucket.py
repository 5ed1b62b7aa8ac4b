"""A bucket of an emulated Google Cloud Storage, which can be told to fail.

Run as a process of its own: `python -m tests.bucket`. (Within the process that reads from it, it
would wait for the interpreter's lock, which pyarrow holds while it waits for an answer.)
"""

import contextlib
import http.server
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

NAME = "bucket"


@dataclass(eq=False)
class Faults:
    """What goes wrong with the next requests; what is done is counted.

    Attributes:
        refuse: Requests to answer with 503.
        cut: Downloads to cut off in the middle.
        slow: Downloads to send piece by piece, with pauses between.
        done: How often each of these has happened.
    """

    refuse: int = 0
    cut: int = 0
    slow: int = 0
    done: dict[str, int] = field(default_factory=lambda: {"refuse": 0, "cut": 0, "slow": 0})
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, faults: dict[str, str]) -> None:
        """Lets more requests fail."""
        with self._lock:
            for kind, number in faults.items():
                setattr(self, kind, getattr(self, kind) + int(number))

    def due(self, kind: str) -> bool:
        """Returns whether a request is to fail in this way, and counts it."""
        with self._lock:
            left = getattr(self, kind)
            if left:
                setattr(self, kind, left - 1)
                self.done[kind] += 1
            return left > 0


class _Handler(RequestHandler):
    # The emulator answers one request at a time; clients keep several open.
    _lock = threading.Lock()

    def __init__(self, storage: Storage, faults: Faults, *args) -> None:
        self._faults = faults
        super().__init__(storage, *args)

    def _handle(self, answer: Callable[[], None]) -> None:
        if self._faults.due("refuse"):
            self.send_error(503)
            return
        stream = self.wfile
        self.wfile = _Held()
        with self._lock:
            answer()
        sent, self.wfile = self.wfile.sent, stream
        head, _, body = sent.partition(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            stream.write(head + b"\r\n\r\n")
            if len(body) > 1 and self._faults.due("cut"):
                stream.write(body[: len(body) // 2])
                return
            pieces = 5 if len(body) > 1 and self._faults.due("slow") else 1
            size = -(-len(body) // pieces) or 1
            for start in range(0, len(body), size):
                stream.write(body[start : start + size])
                if pieces > 1:
                    time.sleep(0.1)

    def do_GET(self) -> None:
        if self.path.startswith("/faults"):
            self._faults.add(dict(parse_qsl(urlsplit(self.path).query)))
            answer = json.dumps(self._faults.done).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        else:
            self._handle(super().do_GET)

    def do_POST(self) -> None:
        self._handle(super().do_POST)

    def do_PUT(self) -> None:
        self._handle(super().do_PUT)

    def do_DELETE(self) -> None:
        self._handle(super().do_DELETE)


class _Held:
    """A stream that keeps what is written to it."""

    def __init__(self) -> None:
        self.sent = b""

    def write(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def flush(self) -> None:
        pass


@dataclass(frozen=True)
class Bucket:
    """An empty bucket, served by a process of its own.

    Attributes:
        uri: ``gs://`` and its name.
        address: Of the server, for the environment variable STORAGE_EMULATOR_HOST.
    """

    uri: str
    address: str

    def fail(self, **faults: int) -> None:
        """Lets the next requests fail: see `Faults`."""
        self._control(faults)

    def done(self) -> dict[str, int]:
        """Returns how often each fault has happened."""
        return self._control({})

    def _control(self, faults: dict[str, int]) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.address}/faults?{urlencode(faults)}") as answer:
            return json.load(answer)


@contextlib.contextmanager
def emulated_bucket() -> Iterator[Bucket]:
    """Serves an empty bucket for the time of a with block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bucket"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield Bucket(f"gs://{NAME}", server.stdout.readline().strip())
        finally:
            server.kill()


def _incomplete(answer, storage, upload, fallback_end=0) -> None:
    """Says how much of an upload is there; of nothing, the emulator says that it is one byte."""
    received = storage.get_resumable_byte_count(upload)
    answer.status = objects.GoogleHTTPStatus.RESUME_INCOMPLETE
    if received or fallback_end:
        answer["Range"] = f"bytes=0-{received - 1 if received else fallback_end}"


def _serve() -> None:
    objects._resumable_incomplete = _incomplete
    storage, faults = Storage(use_memory_fs=True), Faults()
    buckets.create_bucket(NAME, storage)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, storage, faults))
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
