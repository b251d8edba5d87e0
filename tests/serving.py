"""A web server on this machine that says what was asked of it, and can stop in the middle of a file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Files(SimpleHTTPRequestHandler):
    """The files of a folder; of the one called `stuck` half, until `go`."""

    def __init__(self, *arguments, served: Served, **options) -> None:
        self.served = served
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        self.served.asked.append(self.path.rpartition("/")[2])
        super().do_GET()

    def send_error(self, code: int, *rest: str | None) -> None:
        super().send_error(self.served.missing if code == 404 else code, *rest)

    def copyfile(self, source, outputfile) -> None:
        content = source.read()
        half = len(content) // 2
        outputfile.write(content[:half])
        if self.path.endswith(f"/{self.served.stuck}"):
            outputfile.flush()
            self.served.halfway.set()
            self.served.go.wait()
        outputfile.write(content[half:])

    def log_message(self, *_) -> None:
        pass


class Served:
    """What a server was asked for, by the last part of the path; and its stop."""

    def __init__(self, stuck: str, missing: int) -> None:
        self.stuck, self.missing, self.asked = stuck, missing, list[str]()
        self.halfway, self.go = threading.Event(), threading.Event()
        self.address = ""


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler] | partial) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:  # type: ignore[arg-type]
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def serving(folder: Path, stuck: str = "", missing: int = 404) -> Iterator[Served]:
    served = Served(stuck, missing)
    with listening(partial(Files, served=served, directory=str(folder))) as address:
        served.address = f"{address}/set"
        yield served
        served.go.set()
