"""A small server of objects for tests: plain HTTP with ranges, and as much of S3's protocol as its clients use.

Keys are paths without the first slash (``bucket/folder/file``). Every request is counted; a test can let any of
them fail, stall, lie or break off.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

from local_server import listening


@dataclass(frozen=True)
class Request:
    """One request: its number from 0, its method, the key, the query, and the range that it asks for."""

    number: int
    method: str
    key: str
    query: dict[str, list[str]]
    range: tuple[int, int | None] | None
    """First byte, and last byte, as the header has it."""


Fault = Callable[[Request], str | None]
"""What goes wrong with a request: ``503``, ``drop``, ``short``, ``whole`` (the range is ignored), ``404``, ..."""


@dataclass
class Objects:
    """What the server holds, and what it was asked."""

    data: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, tuple[str, dict[int, bytes]]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    seen: list[frozenset[str]] = field(default_factory=list)
    """The keys that could be seen, after each request that wrote."""
    fault: Fault | None = None
    delay: float = 0.0
    page: int = 1000
    """Parts of an upload that are listed at a time."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    @property
    def url(self) -> str:
        """Where it is, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def put_folder(self, folder: Path, key: str) -> None:
        """Put a folder's files below a key."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.data[f"{key}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()

    def folder(self, key: str) -> dict[str, bytes]:
        """What lies below a key."""
        start = key + "/"
        return {k.removeprefix(start): v for k, v in self.data.items() if k.startswith(start)}

    def count(self, method: str = "GET") -> int:
        """How many requests of one kind came."""
        return sum(request.method == method for request in self.requests)


def etag(data: bytes) -> str:
    """An object's tag."""
    return '"' + hashlib.md5(data).hexdigest() + '"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the header and the body are two packets
    objects: Objects

    def log_message(self, format: str, *args: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.timeout = 10

    def _begin(self) -> tuple[Request, str | None]:
        parts = urlsplit(self.path)
        asked = self.headers.get("Range", "")
        span = None
        if asked.startswith("bytes="):
            first, _, last = asked[6:].partition("-")
            span = (int(first), int(last) if last else None) if first else (-int(last), None)
        with self.objects.lock:
            request = Request(
                len(self.objects.requests),
                self.command,
                unquote(parts.path).strip("/"),
                parse_qs(parts.query, keep_blank_values=True),
                span,
            )
            self.objects.requests.append(request)
            fault = self.objects.fault(request) if self.objects.fault is not None else None
        if self.objects.delay:
            threading.Event().wait(self.objects.delay)
        return request, fault

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _failed(self, fault: str | None) -> bool:
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return True
        if fault is not None and fault.isdigit():
            self._answer(int(fault), b"<Error><Code>SlowDown</Code></Error>")
            return True
        return False

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        request, fault = self._begin()
        if self._failed(fault):
            return
        if "list-type" in request.query:
            self._list(request)
            return
        if "uploadId" in request.query:
            self._list_parts(request)
            return
        data = self.objects.data.get(request.key)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        tag = '"other"' if fault == "etag" else etag(data)
        wanted = self.headers.get("If-Match")
        if wanted is not None and wanted != tag and fault != "etag":
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        headers = {"ETag": tag, "Last_Modified": "Mon, 02 Jan 2023 00:00:00 GMT"}
        if request.range is None or fault == "whole":
            self._answer(200, data, **headers)
            return
        first, last = request.range
        first = max(len(data) + first, 0) if first < 0 else first
        end = len(data) if last is None else min(last + 1, len(data))
        if first >= len(data):
            self._answer(416, Content_Range=f"bytes */{len(data)}")
            return
        part = data[first:end]
        headers["Content_Range"] = f"bytes {first}-{end - 1}/{len(data)}"
        if fault == "short":
            headers["Content_Length"] = str(len(part))
            self._answer(206, part[: len(part) // 2], **headers)
            self.close_connection = True
            return
        if fault == "less":
            part = part[: len(part) // 2]
            headers["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        self._answer(206, part, **headers)

    def _list(self, request: Request) -> None:
        prefix = request.query.get("prefix", [""])[0]
        bucket = request.key
        rows = []
        for key, data in sorted(self.objects.data.items()):
            name = key.removeprefix(bucket + "/")
            if key.startswith(bucket + "/") and name.startswith(prefix):
                rows.append(
                    f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>{escape(etag(data))}</ETag>"
                    "<LastModified>2023-01-02T00:00:00.000Z</LastModified></Contents>"
                )
        text = "".join(rows)
        body = f"<ListBucketResult><Name>{bucket}</Name>{text}<IsTruncated>false</IsTruncated></ListBucketResult>"
        self._answer(200, body.encode(), Content_Type="application/xml")

    def _list_parts(self, request: Request) -> None:
        upload = self._upload(request)
        if upload is None:
            return
        after = int(request.query.get("part-number-marker", ["0"])[0])
        numbers = [number for number in sorted(upload[1]) if number > after]
        shown = numbers[: self.objects.page]
        rows = "".join(
            f"<Part><PartNumber>{n}</PartNumber><ETag>{escape(etag(upload[1][n]))}</ETag>"
            f"<Size>{len(upload[1][n])}</Size></Part>"
            for n in shown
        )
        rows += f"<IsTruncated>{str(len(shown) < len(numbers)).lower()}</IsTruncated>"
        rows += f"<NextPartNumberMarker>{shown[-1] if shown else 0}</NextPartNumberMarker>"
        body = f"<ListPartsResult>{rows}</ListPartsResult>"
        self._answer(200, body.encode(), Content_Type="application/xml")

    def _upload(self, request: Request) -> tuple[str, dict[int, bytes]] | None:
        upload = self.objects.uploads.get(request.query["uploadId"][0])
        if upload is None:
            self._answer(404, b"<Error><Code>NoSuchUpload</Code></Error>")
        return upload

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        body, rest = b"", data
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size.partition(b";")[0], 16)
            if not length:
                break
            body, rest = body + rest[:length], rest[length + 2 :]
        return body

    def do_PUT(self) -> None:
        request, fault = self._begin()
        body = self._body()
        if self._failed(fault):
            return
        with self.objects.lock:
            if "partNumber" in request.query:
                upload = self._upload(request)
                if upload is None:
                    return
                upload[1][int(request.query["partNumber"][0])] = body
            elif self.headers.get("If-None-Match") == "*" and request.key in self.objects.data:
                self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            else:
                self.objects.data[request.key] = body
                self.objects.seen.append(frozenset(self.objects.data))
        self._answer(200, ETag=etag(body))

    def do_POST(self) -> None:
        request, fault = self._begin()
        body = self._body()
        if self._failed(fault):
            return
        with self.objects.lock:
            if "delete" in request.query:
                keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
                for key in keys:
                    self.objects.data.pop(f"{request.key}/{unescape(key)}", None)
                self.objects.seen.append(frozenset(self.objects.data))
                gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
                text = f"<DeleteResult>{gone}</DeleteResult>"
            elif "uploads" in request.query:
                name = f"upload-{request.number}"
                self.objects.uploads[name] = (request.key, {})
                text = f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            else:
                upload = self._upload(request)
                if upload is None:
                    return
                del self.objects.uploads[request.query["uploadId"][0]]
                key, parts = upload
                data = b"".join(parts[number] for number in sorted(parts))
                self.objects.data[key] = data
                self.objects.seen.append(frozenset(self.objects.data))
                text = (
                    "<CompleteMultipartUploadResult><Location>l</Location><Bucket>b</Bucket>"
                    f"<Key>{escape(key)}</Key><ETag>{escape(etag(data))}</ETag></CompleteMultipartUploadResult>"
                )
        self._answer(200, text.encode(), Content_Type="application/xml")

    def do_DELETE(self) -> None:
        request, fault = self._begin()
        if self._failed(fault):
            return
        with self.objects.lock:
            if "uploadId" in request.query:
                self.objects.uploads.pop(request.query["uploadId"][0], None)
            else:
                self.objects.data.pop(request.key, None)
                self.objects.seen.append(frozenset(self.objects.data))
        self._answer(204)


@contextmanager
def serving() -> Iterator[Objects]:
    """A server at work, until the block ends."""
    objects = Objects()
    with listening(type("Handler", (_Handler,), {"objects": objects})) as objects.port:
        yield objects
