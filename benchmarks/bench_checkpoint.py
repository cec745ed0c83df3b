"""Converting checkpoints beside cp and beside transformers.

    python benchmarks/bench_checkpoint.py --all              # everything that the README shows, 20 minutes
    python benchmarks/bench_checkpoint.py                    # fuse, split and rename on this disk
    python benchmarks/bench_checkpoint.py --work /dev/shm    # the same without a disk
    python benchmarks/bench_checkpoint.py --moves            # permutes and transposes in memory
    python benchmarks/bench_checkpoint.py --scale            # the plan of a 1 TB checkpoint, and flat memory

Every contender runs in a process of its own, with the source in the page cache, and until the bytes
are on disk. Each round runs all of them, in an order of its own, so that what else the machine does
hits them alike. regraft's time is that of the whole command, start of Python included. Tables are
in Markdown; times are medians, and a ratio is the median of the ratios of the rounds.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
MEMORY = Path("/dev/shm")
CP, DISK, TRANSFORMERS = "cp + sync", "writing alone", "transformers"
ONE, TWO = "regraft, 1 worker", "regraft, 2 workers"
CASES = {
    "fuse": ("Mixtral, experts fused (v4 to v5)", "v4", "transformers-v5", False),
    "split": ("Mixtral, experts split (v5 to v4)", "v5", "transformers-v4", True),
    "rename": ("Granite MoE, names only (v4 to v5)", "granite", "transformers-v5", False),
}
GOALS = (
    (TWO, CP, 1.25),
    (ONE, CP, 0.8),
    (TWO, TRANSFORMERS, 8.0),
    ("RoPE permute", "memcpy", 0.95),
    ("transpose", "torch's transpose", 1.5),
)
"""Who should be how many times as fast as whom."""
_WRITE = """
import mmap, os, sys, time
from pathlib import Path
src, dst = Path(sys.argv[1]), Path(sys.argv[2])
dst.mkdir()
block = mmap.mmap(-1, 1 << 22)
block.write(os.urandom(1 << 22))
for file in sorted(src.iterdir()):
    left = file.stat().st_size
    flags = os.O_WRONLY | os.O_CREAT
    try:
        out = os.open(dst / file.name, flags | os.O_DIRECT)
    except OSError:
        out = os.open(dst / file.name, flags)
    while left > 0:
        left -= os.write(out, block)
    os.fsync(out)
"""
_TRANSFORMERS = """
import glob, os, sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16")
original = sys.argv[3] == "1"
model.save_pretrained(sys.argv[2], max_shard_size="500MB", save_original_format=original)
for name in glob.glob(sys.argv[2] + "/*"):
    file = os.open(name, os.O_RDONLY)
    os.fsync(file)
    os.close(file)
"""
_PLAN = """
import sys, time
from pathlib import Path
from regraft.checkpoints.memory import peak
from regraft.checkpoints.prepare import prepare
from regraft.checkpoints.units import Cutter
begun = time.perf_counter()
ready = prepare(Path(sys.argv[1]), "transformers-v5")
Cutter(ready.moves, ready.dtypes, ready.source.tensors)
seconds = time.perf_counter() - begun
size = int(ready.source.tensors.sizes.sum())
print(seconds, peak() / 1e6, len(ready.source.tensors), size / 1e12)
"""


def make(kind, folder, *options):
    """In a process of its own: a child's peak memory is at least its parent's."""
    command = [sys.executable, str(HERE / "made.py"), kind, str(folder), *map(str, options)]
    subprocess.run(command, check=True)


def regraft(src, dst, to, jobs):
    return [
        sys.executable, "-m", "regraft", "convert", str(src), str(dst), "--to", to,
        "--jobs", str(jobs), "--quiet",
    ]  # fmt: skip


def contenders_for(src, dst, to, original):
    found = {
        CP: ["sh", "-c", f"cp -r --reflink=never '{src}' '{dst}' && sync '{dst}'/*"],
        DISK: [sys.executable, "-c", _WRITE, str(src), str(dst)],
        ONE: regraft(src, dst, to, 1),
        TWO: regraft(src, dst, to, 2),
    }
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed and stays out")
    else:
        found[TRANSFORMERS] = [
            sys.executable,
            "-c",
            _TRANSFORMERS,
            str(src),
            str(dst),
            str(int(original)),
        ]
    return found


def run(command, dst):
    """Seconds, and the most memory in MB."""
    shutil.rmtree(dst, ignore_errors=True)
    os.sync()
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def warm(folder):
    for file in folder.iterdir():
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def compare(times, over, under):
    """How many times as fast: the median of the rounds, the least and the greatest."""
    each = [slow / fast for fast, slow in zip(times[over], times[under], strict=True)]
    return statistics.median(each), min(each), max(each)


def show_goals(times):
    for over, under, goal in GOALS:
        if over in times and under in times:
            ratio, least, most = compare(times, over, under)
            verdict = "reached" if ratio >= goal else "missed"
            print(
                f"- {over}: {ratio:.2f} times as fast as {under} ({least:.2f} to {most:.2f}; "
                f"goal {goal:g}, {verdict})"
            )
    print(flush=True)


def race(title, src, contenders, runs, dst, record):
    times = {name: [] for name in contenders}
    memory = dict.fromkeys(contenders, 0.0)
    size = sum(file.stat().st_size for file in src.iterdir())
    for _ in range(runs):
        for name in random.sample(list(contenders), len(contenders)):
            warm(src)
            seconds, most = run(contenders[name], dst)
            times[name].append(seconds)
            memory[name] = max(memory[name], most)
    shutil.rmtree(dst, ignore_errors=True)
    count = len(list(src.glob("*.safetensors")))
    print(f"\n{title}: {size / 1e9:.2f} GB in {count} files, {runs} rounds\n")
    print("| | median | min | max | GB/s | times cp | peak memory |\n|---|---|---|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        peak = f"{memory[name]:.0f} MB" if name not in (CP, DISK) else ""
        print(
            f"| {name} | {median:.2f} s | {min(values):.2f} s | {max(values):.2f} s "
            f"| {size / 1e9 / median:.2f} | {compare(times, name, CP)[0]:.2f} | {peak} |"
        )
    print()
    show_goals(times)
    record[title] = {"seconds": times, "memory": memory, "bytes": size}


def race_all(work, options, record):
    only = options.only.split(",")
    make("mixtral", work / "v4", "--gb", options.gb)
    subprocess.run(regraft(work / "v4", work / "v5", "transformers-v5", 2), check=True)
    if "rename" in only:
        make("granite", work / "granite", "--gb", options.gb)
    for name in only:
        title, source, to, original = CASES[name]
        src, dst = work / source, work / "out"
        race(title, src, contenders_for(src, dst, to, original), options.rounds, dst, record)


def scale(work, options, record):
    make("huge", work / "huge")
    rows = []
    for _ in range(options.rounds):
        command = [sys.executable, "-c", _PLAN, str(work / "huge")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append([float(word) for word in done.stdout.split()])
    seconds, memory, count, size = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"\nThe plan of a checkpoint of {size:.2f} TB ({count:.0f} tensors in 200 shards): "
        f"{seconds:.2f} s, {memory:.0f} MB (goals: below 2 s and 300 MB)",
        flush=True,
    )
    record["plan"] = rows
    shutil.rmtree(work / "huge")
    for gigabytes in (1, 20):
        make("mixtral", work / "v4", "--gb", gigabytes, "--holes")
        command = regraft(work / "v4", work / "out", "transformers-v5", 2)
        seconds, most = run(command, work / "out")
        print(f"{gigabytes} GB: {seconds:.1f} s, peak {most:.0f} MB (goal: at most 64)", flush=True)
        record[f"{gigabytes} GB"] = [seconds, most]
        shutil.rmtree(work / "v4")
        shutil.rmtree(work / "out")


def moves(rounds, record):
    """One thread in memory: a RoPE permute beside memcpy, a bf16 transpose beside torch."""
    import ml_dtypes
    import numpy as np

    from regraft.arrays.anonymous import rearrange

    random_numbers = np.random.default_rng(0)
    numbers = random_numbers.integers(0, 1 << 16, (4096, 4096), np.uint16)
    matrix = numbers.view(ml_dtypes.bfloat16)
    contenders = {
        "memcpy": numbers.copy,
        "RoPE permute": lambda: rearrange("(h d two) i == (h two d) i", matrix, h=32, two=2),
        "transpose": lambda: rearrange("o i == i o", matrix),
        "numpy's transpose": lambda: np.ascontiguousarray(matrix.T),
    }
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed and stays out")
    else:
        import torch

        torch.set_num_threads(1)
        tensor = torch.from_numpy(numbers.view(np.int16)).view(torch.bfloat16)
        contenders["torch's transpose"] = lambda: tensor.t().contiguous()
    times = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in random.sample(list(contenders), len(contenders)):
            begun = time.perf_counter()
            result = contenders[name]()
            if number:
                times[name].append(time.perf_counter() - begun)
            del result
    print(f"\nA 4096 x 4096 bfloat16 matrix, to new memory, one thread, {rounds} rounds\n")
    print("| | median | min | max | GB/s |\n|---|---|---|---|---|")
    for name, values in times.items():
        median, *ends = (1e3 * f(values) for f in (statistics.median, min, max))
        print(
            f"| {name} | {median:.1f} ms | {ends[0]:.1f} ms | {ends[1]:.1f} ms "
            f"| {matrix.nbytes / 1e6 / median:.2f} |"
        )
    print()
    show_goals(times)
    record["moves"] = times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gb", type=float, default=2.2)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--work", type=Path, help="a folder to make files in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--all", action="store_true", help="everything, on disk and in memory")
    parser.add_argument("--scale", action="store_true", help="a huge plan, and memory by size")
    parser.add_argument("--moves", action="store_true", help="permutes and transposes in memory")
    options = parser.parse_args()
    record = {}
    if options.moves or options.all:
        moves(max(21, options.rounds), record)
    places = [options.work]
    if options.all and MEMORY.is_dir():
        places.append(MEMORY)
    if options.all or not (options.moves or options.scale):
        for place in places:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                print(f"\nIn {place or tempfile.gettempdir()}:")
                race_all(Path(folder), options, record.setdefault(str(place), {}))
    if options.scale or options.all:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            scale(Path(folder), options, record)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
