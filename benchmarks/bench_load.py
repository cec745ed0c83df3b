"""Loading a checkpoint of transformers 4 into a model of transformers 5: transformers itself, mapped, copied.

python benchmarks/bench_load.py [--rounds 5] [--only mixtral] [--cold] [--json FILE]

Each run is a process of its own; the contenders take turns, in another order each round, on a warm page cache. Printed
are medians, and ratios of medians. Every run's tensors and logits must have the same digest, and a run in which regraft
stepped back fails. --cold drops the checkpoint's files from the page cache before each run, checks that they are gone
(mincore), and tells how much came from the disk (/proc/self/io); it promises nothing. Where there is a GPU, loading
onto it is measured, too; elsewhere its figures read "not measured".
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__)
FIGURES = ("wall", "cpu", "with_forward", "peak", "anonymous")


@dataclass(frozen=True)
class Goal:
    """How much better than transformers one way of loading should be, figure by figure."""

    way: str
    at_least: dict[str, float]


@dataclass(frozen=True)
class Case:
    """A checkpoint, and who loads it."""

    name: str
    kind: str
    """As ``made.py`` calls it."""
    ways: tuple[str, ...]
    forward: bool
    goals: tuple[Goal, ...] = ()
    rounds: dict[str, int] = field(default_factory=dict)


CASES = (
    Case(
        "mixtral",
        "small-mixtral",
        ("transformers", "map", "copy"),
        True,
        (
            Goal("map", {"wall": 4.0, "cpu": 6.0, "with_forward": 2.0, "peak": 10.0}),
            Goal("copy", {"wall": 1.3, "peak": 1 / 0.6}),
        ),
    ),
    Case(
        "qwen",
        "qwen",
        ("transformers", "map", "copy"),
        False,
        (Goal("map", {"wall": 5.0, "cpu": 5.0}),),
    ),
)


def memory() -> dict[str, float]:
    """What the process takes, in MB."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "RssAnon"):
            found[name] = int(value.split()[0]) / 1000
    return found


def from_disk() -> float:
    """What the process has read that was in no cache, in MB."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("read_bytes"))


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def load_one(way: str, folder: str, forward: bool, device: str = "cpu") -> None:
    """One load in this process; the figures are printed as JSON."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch
    import transformers.models.mixtral.modeling_mixtral
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    from transformers import AutoModelForCausalLM

    import regraft
    import regraft.bridges.peft.hook

    options: dict[str, Any] = {"dtype": "auto"}
    if device != "cpu":
        torch.zeros(1, device=device)
        options["device_map"] = device
    disk = from_disk()
    before, cpu, start = memory(), cpu_seconds(), time.perf_counter()
    if way == "transformers":
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        model = regraft.from_pretrained(AutoModelForCausalLM, folder, load=way, **options)
    if device != "cpu":
        torch.cuda.synchronize()
    wall, cpu, after = time.perf_counter() - start, cpu_seconds() - cpu, memory()
    figures: dict[str, Any] = {
        "wall": wall,
        "cpu": cpu,
        "peak": after["VmHWM"] - before["VmHWM"],
        "anonymous": after["RssAnon"] - before["RssAnon"],
    }
    if device != "cpu":
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        figures["device_peak"] = torch.cuda.max_memory_allocated() / size
    if forward:
        ids = torch.arange(64, device=device)[None]
        start = time.perf_counter()
        with torch.no_grad():
            model(ids)
        figures["with_forward"] = wall + time.perf_counter() - start
    figures["from_disk"] = from_disk() - disk
    figures["digest"] = digest(model)
    if way != "transformers":
        figures["done"] = model.regraft_load.to_dict()
    print(json.dumps(figures))


def digest(model: Any) -> str:
    """Of every tensor, and of what the model says to some tokens."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.cpu().contiguous().view(torch.uint8).numpy()
        found.update(name.encode() + str(tensor.dtype).encode())
        found.update(raw.tobytes())
    with torch.no_grad():
        logits = model(torch.arange(8, device=model.device)[None]).logits
    found.update(logits.float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def run_one(way: str, folder: Path, forward: bool, device: str = "cpu") -> dict[str, Any]:
    """One load in a process of its own."""
    command = [sys.executable, str(HERE), "--one", way, str(folder), str(int(forward)), device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if way != "transformers" and figures["done"]["way"] != way:
        raise SystemExit(f"{way}: regraft stepped back: {figures['done']}")
    return figures


def compare(
    case: Case,
    folder: Path,
    rounds: int,
    before: Callable[[], None] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Runs in turn; medians, ratios to transformers', and whether the goals are reached."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in case.ways}
    shuffled = random.Random(case.name)
    ways = list(case.ways)
    run_one(ways[0], folder, case.forward, device)
    for _ in range(rounds):
        shuffled.shuffle(ways)
        for way in ways:
            if before is not None:
                before()
            runs[way].append(run_one(way, folder, case.forward, device))
    digests = {figures["digest"] for some in runs.values() for figures in some}
    if len(digests) > 1:
        raise SystemExit(f"{case.name}: the models differ: {digests}")
    more = ["device_peak"] if before is None else ["from_disk"]
    names = [n for n in (*FIGURES, *more) if n in runs[ways[0]][0]]
    medians = {
        way: {name: statistics.median(f[name] for f in some) for name in names}
        for way, some in runs.items()
    }
    print(f"\n{case.name}, {rounds} rounds, medians (seconds, MB); times better than transformers")
    print(f"  {'':14}" + "".join(f"{name:>22}" for name in names))
    for way, values in medians.items():
        cells = [
            f"{values[n]:10.2f} ({medians['transformers'][n] / max(values[n], 1e-9):8.2f}x)"
            for n in names
        ]
        print(f"  {way:14}" + "".join(f"{cell:>22}" for cell in cells))
    reached = {}
    for goal in case.goals if device == "cpu" else ():
        for name, least in goal.at_least.items():
            ratio = medians["transformers"][name] / max(medians[goal.way][name], 1e-9)
            reached[f"{goal.way} {name}"] = ratio >= least
            verdict = "reached" if ratio >= least else "missed"
            print(f"  goal: {goal.way}, {name}: at least {least:.2f}x, is {ratio:.2f}x: {verdict}")
    return {"medians": medians, "runs": runs, "reached": reached}


def rank_main(rank: int, store: str, folder: str, results: str) -> None:
    """One of two ranks: FSDP2 from the meta device."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    import regraft
    import regraft.bridges.peft.hook

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = memory()
    done = regraft.load_checkpoint(model, folder, load="copy")
    grown = memory()["VmHWM"] - before["VmHWM"]
    part = sum(t.to_local().numel() * t.element_size() for t in model.state_dict().values())
    figures = {"read": (done.mapped + done.copied) / part, "growth": grown * 1e6 / part}
    Path(results, str(rank)).write_text(json.dumps(figures))
    torch.distributed.destroy_process_group()


def ranks(folder: Path) -> list[dict[str, float]]:
    """What two ranks read and take, as parts of what they hold."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as results:
        arguments = (str(Path(results) / "store"), str(folder), results)
        torch.multiprocessing.spawn(rank_main, arguments, nprocs=2)
        found = [json.loads(Path(results, str(rank)).read_text()) for rank in range(2)]
    print("\ntwo ranks of FSDP2, as parts of what each of them holds")
    for rank, figures in enumerate(found):
        verdict = figures["read"] <= 1.01 and figures["growth"] <= 1.05
        print(
            f"  rank {rank}: read {figures['read']:.3f} (goal 1.01), peak growth {figures['growth']:.3f} (goal 1.05): "
            f"{'reached' if verdict else 'missed'}"
        )
    return found


class StillCachedError(Exception):
    """Files could not be dropped from the page cache."""


def drop(folder: Path) -> None:
    """Drop a checkpoint's files from the page cache.

    Raises ``StillCachedError`` where they stay there, as on a file system in memory.
    """
    paths = [path for path in folder.iterdir() if path.stat().st_size]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    left, size = sum(map(cached, paths)), sum(path.stat().st_size for path in paths)
    if left * 100 > size:
        raise StillCachedError(f"{left / size:.0%} of {folder} stays in the page cache")


def cached(path: Path) -> int:
    """How many bytes of a file are in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        pages = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(memory)
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(ctypes.addressof(first))
        failed = libc.mincore(address, ctypes.c_size_t(len(memory)), pages)
        del first
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def make(kind: str, folder: Path) -> None:
    """Make a checkpoint, unless it is there."""
    if not folder.exists():
        subprocess.run(
            [sys.executable, str(HERE.with_name("made.py")), kind, str(folder)], check=True
        )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=[*(case.name for case in CASES), "ranks"])
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--data", type=Path, help="keep the checkpoints there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    import torch

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data or Path(scratch)
        data.mkdir(exist_ok=True)
        for case in CASES:
            if options.only not in (None, case.name):
                continue
            make(case.kind, data / case.kind)
            results[case.name] = compare(case, data / case.kind, options.rounds)
            if options.cold and case.name == "mixtral":
                print("\nwith a cold cache:", end="")
                try:
                    results["cold"] = compare(
                        Case("mixtral, cold", case.kind, case.ways, True),
                        data / case.kind,
                        options.rounds,
                        lambda folder=data / case.kind: drop(folder),
                    )
                except StillCachedError as error:
                    print(f" not measured: {error}")
            if torch.cuda.is_available():
                print("\nonto a GPU:", end="")
                results[f"{case.name}, GPU"] = compare(
                    Case(case.name, case.kind, ("transformers", "map"), False),
                    data / case.kind,
                    options.rounds,
                    device="cuda:0",
                )
        if options.only in (None, "ranks"):
            make("small-mixtral", data / "small-mixtral")
            results["ranks"] = ranks(data / "small-mixtral")
    if not torch.cuda.is_available():
        print("\nGPU: not measured")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        load_one(sys.argv[2], sys.argv[3], sys.argv[4] == "1", sys.argv[5])
    else:
        sys.exit(main(sys.argv[1:]))
