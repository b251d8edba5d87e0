"""The few endpoints of the Hugging Face Hub that pushing and loading one repository need, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler

from serving import listening

COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """Keeps what is committed in `files`, name -> bytes, and gives it back."""

    def __init__(self, *arguments, files: dict[str, bytes]) -> None:
        self.files = files
        super().__init__(*arguments)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/owner/name"
        assert self.headers["Authorization"] == "Bearer hf_secret"
        if self.path == "/api/repos/create":
            assert json.loads(body) == {"organization": "owner", "name": "name"}
            self.files[".gitattributes"] = b""
            answer: dict = {"url": address}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif self.path == "/api/models/owner/name/preupload/main" and self.files:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif self.path == "/api/models/owner/name/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT}
        else:
            raise AssertionError(self.path)
        self.answer(200, json.dumps(answer).encode())

    def do_GET(self) -> None:
        file = self.files.get(self.path.removeprefix("/owner/name/resolve/main/"))
        if file is None:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        else:
            self.answer(200, file, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(file).hexdigest()}"'})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """Its address, HF_ENDPOINT."""
    with listening(partial(Hub, files=files)) as address:
        yield address
