"""A server of files with ranges and latency, for benchmarks: as little work as can be, so that the client is measured.

python benchmarks/range_server.py FOLDER --latency 0.02      prints its port, and serves until stdin ends
"""

from __future__ import annotations

import argparse
import os
import re
import socketserver
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote


class Handler(socketserver.StreamRequestHandler):
    """Requests of one connection, one after the other: GET and HEAD with one range."""

    disable_nagle_algorithm = True
    server: Server

    def handle(self) -> None:
        while line := self.rfile.readline():
            method, path, _ = line.decode().split(" ", 2)
            asked = ""
            while (header := self.rfile.readline().strip()) != b"":
                name, _, value = header.decode().partition(":")
                asked = value.strip() if name.lower() == "range" else asked
            time.sleep(self.server.latency)
            self._answer(method, self.server.folder / unquote(path).lstrip("/"), asked)

    def _answer(self, method: str, path: Path, asked: str) -> None:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        try:
            size = os.fstat(file).st_size
            first, last, status = 0, size - 1, "200 OK"
            match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
            if match is not None:
                first = int(match[1]) if match[1] else max(0, size - int(match[2]))
                last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
                status = "206 Partial Content"
            head = (
                f'HTTP/1.1 {status}\r\nContent-Length: {last - first + 1}\r\nETag: "{size}"\r\n'
                f"Last-Modified: Mon, 02 Jan 2023 00:00:00 GMT\r\nAccept-Ranges: bytes\r\n"
                f"Content-Range: bytes {first}-{last}/{size}\r\n\r\n"
            )
            self.wfile.write(head.encode())
            self.server.count()
            while method == "GET" and first <= last:
                first += os.sendfile(self.connection.fileno(), file, first, last - first + 1)
        finally:
            os.close(file)


class Server(socketserver.ThreadingTCPServer):
    """Serves a folder."""

    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

    def __init__(self, folder: Path, latency: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.latency, self.requests = folder, latency, 0
        self._lock = threading.Lock()

    def count(self) -> None:
        with self._lock:
            self.requests += 1

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves is no error."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.02)
    asked = parser.parse_args()
    with Server(asked.folder, asked.latency) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
