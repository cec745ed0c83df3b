"""Conversions in parts: two elements of an array beside two threads; and a terabyte on paper.

python benchmarks/bench_parts.py [--rounds 5] [--folder FOLDER]
python benchmarks/bench_parts.py --terabyte [--shards 200] [--parts 64]

The terabyte is files of holes with true headers. It is planned, cut and divided as it would be, and one small part is
made, which says how long the large ones take.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import made

import regraft
from regraft.checkpoints.prepare import prepare
from regraft.checkpoints.sharding import make_head
from regraft.checkpoints.shares import cut, piece_size, pieces_of
from regraft.checkpoints.staging import job_of
from regraft.checkpoints.windows import Windows
from regraft.options import ConvertOptions
from regraft.storage.scheduler import Share

V5 = "transformers-v5"


def two(folder: Path, place: Path, rounds: int) -> None:
    """Two elements at once, with a thread each, beside one process with two threads."""
    convert = [sys.executable, "-m", "regraft", "convert", folder, place / "out", "--to", V5, "-q"]
    stage = ["--stage", place / "stage", "--jobs", "1"]
    # As an installed regraft starts: with its bytecode, which must not be made anew by every process.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str(place / "bytecode")

    def run(*commands: list[object]) -> tuple[float, float]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        texts = [list(map(str, command)) for command in commands]
        started = [subprocess.Popen(text, env=env) for text in texts]
        ends = [process.wait() for process in started]
        failed = [shlex.join(text) for text, end in zip(texts, ends, strict=True) if end]
        if failed:
            sys.exit(f"failed: {failed}")
        spent = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    rows = []
    run([*convert, "--dry-run"], [*convert, *stage, "--part", "0/2"])
    shutil.rmtree(place / "stage")
    for _ in range(rounds):
        threads = run([*convert, "--jobs", "2"])
        shutil.rmtree(place / "out")
        elements = run(*([*convert, *stage, "--part", f"{i}/2"] for i in range(2)))
        commit = run([*convert, *stage, "--commit"])
        shutil.rmtree(place / "out")
        shutil.rmtree(place / "stage")
        rows.append((*threads, *elements, *commit))
        print(
            "two threads {:.2f} s ({:.2f} s CPU), two elements {:.2f} s ({:.2f} s CPU), "
            "commit {:.2f} s ({:.2f} s CPU)".format(*rows[-1]),
            flush=True,
        )
    ratios = [row[2] / row[0] for row in rows]
    best = min(row[2] for row in rows) / min(row[0] for row in rows)
    print(
        f"elements / threads: median {statistics.median(ratios):.2f}, best of each {best:.2f} (goal: within 0.1 of 1)"
    )


def draw(folder: Path, shards: int, experts: int, layers: int) -> None:
    """A mixture of experts of about a terabyte: headers, and holes in place of numbers."""
    hidden, inner = 5120, 1024
    folder.mkdir(parents=True)
    config = {**made.QWEN, "hidden_size": hidden, "moe_intermediate_size": inner}
    config |= {"num_experts": experts, "num_hidden_layers": layers, "num_attention_heads": 40}
    config |= {"head_dim": 128, "num_key_value_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (151936, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.mlp.gate.weight"] = (experts, hidden)
        for name, rows in (("q", hidden), ("k", 1024), ("v", 1024), ("o", hidden)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
        for expert in range(experts):
            for name in ("gate", "up", "down"):
                shape = (hidden, inner) if name == "down" else (inner, hidden)
                shapes[f"{at}.mlp.experts.{expert}.{name}_proj.weight"] = shape
    names, where = list(shapes), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        rows, at = [], 0
        for name in names[len(names) * number // shards : len(names) * (number + 1) // shards]:
            size = 2 * shapes[name][0] * shapes[name][1]
            rows.append((name, "BF16", shapes[name], at, at + size))
            at += size
            where[name] = file
        head = make_head(iter(rows), {"format": "pt"}, file)
        with (folder / file).open("wb") as out:
            out.write(head)
            out.truncate(len(head) + at)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def terabyte(place: Path, shards: int, count: int) -> None:
    """Plan, cut and divide; and make one small part."""
    src = place / "src"
    draw(src, shards, 256, 130)
    began = time.monotonic()
    ready = prepare(src, V5)
    job = job_of(ready, piece_size(ready.layout.size))
    planned = time.monotonic() - began
    total = ready.layout.size
    print(
        f"{total / 1e12:.2f} TB, {len(ready.source.tensors)} tensors in {len(ready.source.files)} files -> "
        f"{len(ready.moves.names)} in {len(ready.layout.files)}: planned in {planned:.1f} s, job {job.name}"
    )
    began = time.monotonic()
    pieces = cut(ready.layout.files, job.piece)
    windows = Windows(ready.moves, ready.dtypes, ready.source.tensors)
    read = {}
    for piece in pieces:
        its = windows.sources(ready.layout.files[piece.file], piece.start, piece.stop)
        read[piece] = sum(size for _, _, size in its)
    print(
        f"{len(pieces)} pieces of {job.piece / 1e6:.0f} MB; their sources: {time.monotonic() - began:.1f} s"
    )
    for parts in (count, 1000):
        began = time.monotonic()
        mine = [pieces_of(pieces, Share(number, parts)) for number in range(parts)]
        spent = time.monotonic() - began
        written = [sum(piece.size for piece in its) for its in mine]
        reads = [sum(read[piece] for piece in its) for its in mine]
        asked = ConvertOptions(to=V5, stage="/models/out.stage", part=f"999/{parts}")
        sent = len(pickle.dumps((str(src), "/models/out", asked)))
        print(
            f"{parts} parts: {min(written) / 1e9:.2f} to {max(written) / 1e9:.2f} GB each, largest / mean "
            f"{max(written) * parts / total:.3f} written, {max(reads) * parts / sum(reads):.3f} read; read in all "
            f"{sum(reads) / total:.3f} of what is written; divided in {spent:.1f} s, {sent * parts} bytes to ship"
        )
    small = round(total / 200e6)
    began = time.monotonic()
    report = regraft.convert(
        src, place / "out", to=V5, stage=place / "stage", part=f"{small // 2}/{small}", jobs=2
    )
    spent = time.monotonic() - began
    part = report.checkpoint.part
    rate = part.bytes / max(spent - planned, 0.01)
    print(
        f"a part of {part.bytes / 1e6:.0f} MB by two threads: {spent:.1f} s, of which {planned:.1f} s is planning: "
        f"{rate / 1e6:.0f} MB/s; so one of {total / count / 1e9:.1f} GB takes {total / count / rate + planned:.0f} s, "
        f"and all {count} at once as long"
    )
    used = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file())
    print(
        f"{used / 1e6:.0f} MB on disk in all; peak memory {resource.getrusage(0).ru_maxrss // 1024} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--terabyte", action="store_true")
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--parts", type=int, default=64)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        place = Path(name)
        if asked.terabyte:
            terabyte(place, asked.shards, asked.parts)
            return
        folder = asked.folder or place / "src"
        if not (folder / "config.json").exists():
            made.make(folder, made.MIXTRAL, 1.0)
        two(folder, place, asked.rounds)


if __name__ == "__main__":
    main()
