"""A checkpoint behind HTTP with latency: converted in a stream, beside a plain parallel download of the same bytes.

python benchmarks/bench_remote.py [--folder FOLDER] [--latency 0.02] [--gb 0.8] [--streams 8] [--rounds 5]

The server is a process of its own on this machine, so both sides share its processors with it. Both write files and
wait until they are on disk. Both have as many streams, and requests of the same size.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import made

import regraft
from regraft.checkpoints.stream import WINDOW
from regraft.storage.stores import open_store

HERE = Path(__file__).parent
V5 = "transformers-v5"


@contextmanager
def serving(folder: Path, latency: float):
    command = [sys.executable, HERE / "range_server.py", folder, "--latency", str(latency)]
    server = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.stdin.close()
        server.wait()


def download(url: str, names: list[str], out: Path, streams: int) -> int:
    """Every byte of some files by requests of a window's size, several at once, into files."""
    out.mkdir()
    store = open_store(url)
    opened = {name: os.open(out / name, os.O_RDWR | os.O_CREAT, 0o666) for name in names}

    def one(span):
        found, start, stop = span
        return os.pwrite(opened[found.key], store.read(found, start, stop), start)

    with ThreadPoolExecutor(streams) as pool:
        founds = list(pool.map(lambda name: store.first(name, 8)[0], names))
        spans = [
            (found, at, min(at + WINDOW, found.size))
            for found in founds
            for at in range(0, found.size, WINDOW)
        ]
        total = sum(pool.map(one, spans))
    for file in opened.values():
        os.fsync(file)
        os.close(file)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gb", type=float, default=0.8)
    parser.add_argument("--latency", type=float, default=0.02)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder = asked.folder or place / "in"
        if not folder.exists():
            made.make(folder, made.MIXTRAL, asked.gb)
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        regraft.convert(folder, place / "local", to=V5)
        ratios = []
        with serving(folder, asked.latency) as url:
            for _ in range(asked.rounds):
                shutil.rmtree(place / "plain", ignore_errors=True)
                shutil.rmtree(place / "out", ignore_errors=True)
                before = resource.getrusage(resource.RUSAGE_SELF)
                began = time.monotonic()
                count = download(url, names, place / "plain", asked.streams)
                plain = time.monotonic() - began
                between = resource.getrusage(resource.RUSAGE_SELF)
                began = time.monotonic()
                report = regraft.convert(url, place / "out", to=V5, jobs=asked.streams)
                ours = time.monotonic() - began
                after = resource.getrusage(resource.RUSAGE_SELF)
                ratios.append(plain / ours)
                cpu = [
                    b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime
                    for a, b in ((before, between), (between, after))
                ]
                traffic = report.checkpoint.traffic
                print(
                    f"{count / 1e6:.0f} MB: download {plain:.2f} s ({cpu[0]:.2f} s CPU), regraft {ours:.2f} s "
                    f"({cpu[1]:.2f} s CPU, {traffic['requests']} requests, {traffic['read'] / 1e6:.0f} MB read), "
                    f"ratio {ratios[-1]:.2f}, peak {after.ru_maxrss // 1024} MB after {between.ru_maxrss // 1024}",
                    flush=True,
                )
                same = all(
                    (place / "out" / path.name).read_bytes() == path.read_bytes()
                    for path in (place / "local").iterdir()
                )
                assert same, "another result than that of files of this machine"
        print(f"ratio: median {statistics.median(ratios):.2f} (goal: at least 0.65)")


if __name__ == "__main__":
    main()
