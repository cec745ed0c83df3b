"""A small server of objects for tests: plain HTTP with ranges, and as much as their clients use of S3, GCS and Azure.

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
"""What goes wrong with a request: ``503``, ``drop``, ``short``, ``whole`` (the range is ignored), ``404``, ...

A status may be followed by what Retry-After says: ``503 after 7``.
"""


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
    date: str = ""
    """What answers say that the time is; the clock's, where it is empty."""
    tags: dict[str, str] = field(default_factory=dict)
    """Of a key the ETag that its upload gave it."""
    blocks: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Of a key the blocks that Azure has and no list took up."""
    committed: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)
    """Of a key the blocks of its last list."""
    tokens: set[str] = field(default_factory=set)
    """What requests had in their Authorization."""
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

    def date_time_string(self, timestamp: float | None = None) -> str:
        return self.objects.date or super().date_time_string(timestamp)

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
            self.objects.tokens.add(self.headers.get("Authorization", ""))
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
        status, _, after = (fault or "").partition(" after ")
        if status.isdigit():
            headers = {"Retry_After": after} if after else {}
            self._answer(int(status), b"<Error><Code>SlowDown</Code></Error>", **headers)
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
        if request.query.get("comp") == ["list"]:
            self._list_blobs(request)
            return
        if request.query.get("comp") == ["blocklist"]:
            self._list_blocks(request)
            return
        if "uploadId" in request.query:
            self._list_parts(request)
            return
        data = self.objects.data.get(request.key)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        tag = '"other"' if fault == "etag" else self.objects.tags.get(request.key, etag(data))
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
        if fault == "more":
            part += b"more"
        self._answer(206, part, **headers)

    def _list(self, request: Request) -> None:
        prefix = request.query.get("prefix", [""])[0]
        bucket = request.key
        rows = []
        for key, data in sorted(self.objects.data.items()):
            name = key.removeprefix(bucket + "/")
            if key.startswith(bucket + "/") and name.startswith(prefix):
                rows.append(
                    f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size>"
                    f"<ETag>{escape(self.objects.tags.get(key, etag(data)))}</ETag>"
                    "<LastModified>2023-01-02T00:00:00.000Z</LastModified></Contents>"
                )
        text = "".join(rows)
        body = f"<ListBucketResult><Name>{bucket}</Name>{text}<IsTruncated>false</IsTruncated></ListBucketResult>"
        self._answer(200, body.encode(), Content_Type="application/xml")

    def _list_blobs(self, request: Request) -> None:
        prefix = request.query.get("prefix", [""])[0]
        rows = "".join(
            f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>Mon, 02 Jan 2023 00:00:00 GMT"
            f"</Last-Modified><Etag>{escape(etag(data)[1:-1])}</Etag><Content-Length>{len(data)}</Content-Length>"
            "<Content-Type>x/y</Content-Type></Properties></Blob>"
            for key, data in sorted(self.objects.data.items())
            if (name := key.removeprefix(request.key + "/")) != key and name.startswith(prefix)
        )
        body = f"<EnumerationResults><Blobs>{rows}</Blobs><NextMarker/></EnumerationResults>"
        self._answer(200, body.encode(), Content_Type="application/xml")

    def _list_blocks(self, request: Request) -> None:
        if request.key not in self.objects.blocks and request.key not in self.objects.data:
            self._answer(404, b"", x_ms_error_code="BlobNotFound")
            return
        lists = {
            "CommittedBlocks": self.objects.committed.get(request.key, []),
            "UncommittedBlocks": self.objects.blocks.get(request.key, {}).items(),
        }
        rows = "".join(
            f"<{name}>"
            + "".join(f"<Block><Name>{n}</Name><Size>{len(b)}</Size></Block>" for n, b in blocks)
            + f"</{name}>"
            for name, blocks in lists.items()
        )
        body = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{rows}</BlockList>'
        self._answer(200, body.encode(), Content_Type="application/xml")

    def _put_blob(self, request: Request, body: bytes) -> bool:
        """What Azure does with a PUT, under the lock; whether it was one."""
        key, comp = request.key, request.query.get("comp", [""])[0]
        if comp == "block":
            self.objects.blocks.setdefault(key, {})[request.query["blockid"][0]] = body
            self._answer(201)
        elif comp == "blocklist":
            names = re.findall(r"<(?:Latest|Uncommitted)>(.*?)</", body.decode())
            known = dict(self.objects.committed.get(key, [])) | self.objects.blocks.pop(key, {})
            if any(name not in known for name in names):
                self._answer(400, b"", x_ms_error_code="InvalidBlockList")
                return True
            self.objects.committed[key] = [(name, known[name]) for name in names]
            self.objects.data[key] = b"".join(known[name] for name in names)
            self.objects.seen.append(frozenset(self.objects.data))
            self._answer(201, ETag=etag(body), Last_Modified="Mon, 02 Jan 2023 00:00:00 GMT")
        return bool(comp)

    def _delete_batch(self, request: Request, body: bytes) -> None:
        """Azure's removal of many blobs by one request, whose parts are requests themselves."""
        answers = ""
        for number, path in enumerate(re.findall(r"DELETE (\S+) HTTP", body.decode())):
            key = unquote(urlsplit(path).path).strip("/")
            self.objects.blocks.pop(key, None)
            status = "404 Not Found" if self.objects.data.pop(key, None) is None else "202 Accepted"
            answers += (
                f"--b\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
                f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        self.objects.seen.append(frozenset(self.objects.data))
        self._answer(
            202, f"{answers}--b--\r\n".encode(), Content_Type="multipart/mixed; boundary=b"
        )

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
            only_new = (
                self.headers.get("If-None-Match") == "*"
                or self.headers.get("x-goog-if-generation-match") == "0"
            )
            if self._put_blob(request, body):
                return
            if "partNumber" in request.query:
                upload = self._upload(request)
                if upload is None:
                    return
                upload[1][int(request.query["partNumber"][0])] = body
            elif only_new and request.key in self.objects.data:
                self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            else:
                self.objects.data[request.key] = body
                self.objects.tags.pop(request.key, None)
                self.objects.blocks.pop(request.key, None)
                self.objects.seen.append(frozenset(self.objects.data))
        status = 201 if "x-ms-version" in self.headers else 200
        self._answer(status, ETag=etag(body), Last_Modified="Mon, 02 Jan 2023 00:00:00 GMT")

    def do_POST(self) -> None:
        request, fault = self._begin()
        body = self._body()
        if self._failed(fault):
            return
        with self.objects.lock:
            if request.query.get("comp") == ["batch"]:
                self._delete_batch(request, body)
                return
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
                digests = b"".join(hashlib.md5(parts[number]).digest() for number in sorted(parts))
                tag = f'"{hashlib.md5(digests).hexdigest()}-{len(parts)}"'
                self.objects.tags[key] = tag
                self.objects.seen.append(frozenset(self.objects.data))
                text = (
                    "<CompleteMultipartUploadResult><Location>l</Location><Bucket>b</Bucket>"
                    f"<Key>{escape(key)}</Key><ETag>{escape(tag)}</ETag></CompleteMultipartUploadResult>"
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
