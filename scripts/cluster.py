"""A conversion on Ray, on a cluster of this machine whose workers and nodes die: the bytes of one by a single process.

python scripts/cluster.py [--megabytes 64] [--parts 24]      `make cluster` installs what it needs, and runs it
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import pickle
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

import regraft
from regraft.checkpoints import on_ray
from regraft.storage.safetensors import write_tensors

V5 = "transformers-v5"


def make(folder: Path, megabytes: int) -> Path:
    """A mixture of experts in the layout of transformers 4."""
    hidden, inner, experts = 256, 512, 8
    layers = max(1, megabytes * 1_000_000 // (experts * 3 * hidden * inner * 2))
    config = {"model_type": "mixtral", "hidden_size": hidden, "intermediate_size": inner}
    config |= {"num_local_experts": experts, "num_hidden_layers": layers, "vocab_size": 32}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float16"}
    numbers = np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names: dict[str, str] = {}
    for layer in range(layers):
        at = f"model.layers.{layer}.block_sparse_moe"
        shapes = {f"{at}.gate.weight": (experts, hidden)}
        for expert in range(experts):
            shapes |= {f"{at}.experts.{expert}.{w}.weight": (inner, hidden) for w in ("w1", "w3")}
            shapes[f"{at}.experts.{expert}.w2.weight"] = (hidden, inner)
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        tensors = {
            name: numbers.integers(-999, 999, shape).astype(np.float16)
            for name, shape in shapes.items()
        }
        write_tensors(folder / file, tensors, {"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def slowly(work: on_ray.Work, part: str) -> object:
    """A part that waits before it begins, so that there is time to die, and leaves its process's number."""
    notes = Path(os.environ["REGRAFT_NOTES"])
    (notes / f"{part.replace('/', '-')}.{os.getpid()}").touch()
    time.sleep(0.5)
    return on_ray_do(work, part)


on_ray_do = on_ray._do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--parts", type=int, default=24)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        src = make(place / "src", asked.megabytes)
        began = time.monotonic()
        regraft.convert(src, place / "plain", to=V5)
        print(f"one process: {time.monotonic() - began:.1f} s", flush=True)
        notes = place / "notes"
        notes.mkdir()
        os.environ["REGRAFT_NOTES"] = str(notes)
        began = time.monotonic()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        cluster.wait_for_nodes()
        print(f"a cluster of 2 nodes: {time.monotonic() - began:.1f} s to start", flush=True)
        done: list[float] = []
        troubles = [lambda: kill_a_worker(notes), lambda: remove(cluster, nodes.pop())]

        def progress(_: str, count: int, total: int) -> None:
            done.append(time.monotonic())
            if len(done) in (3, 8):
                threading.Thread(target=troubles.pop(0)).start()

        on_ray._do = slowly
        began = time.monotonic()
        regraft.convert(
            src,
            place / "out",
            to=V5,
            runner="ray",
            address=cluster.address,
            part=f"/{asked.parts}",
            progress=progress,
        )
        begun = len(list(notes.iterdir()))
        print(
            f"{asked.parts} parts on Ray: {time.monotonic() - began:.1f} s, of which {0.5} s for each is waiting; "
            f"{begun} tasks were begun, {begun - asked.parts} of them again"
        )
        same = compare(place / "plain", place / "out")
        print(f"identical: {same}")
        assert same and not troubles and begun > asked.parts
        shipped(src, place, cluster.address)
        ray.shutdown()
        cluster.shutdown()


def kill_a_worker(notes: Path) -> None:
    """Kill a process that is at work on a part."""
    for note in sorted(notes.iterdir(), key=lambda path: -path.stat().st_mtime):
        try:
            os.kill(int(note.suffix[1:]), signal.SIGKILL)
        except ProcessLookupError:
            continue
        print(f"killed the process of part {note.stem}", flush=True)
        return


def remove(cluster: Cluster, node: object) -> None:
    cluster.remove_node(node, allow_graceful=False)
    print("removed a node", flush=True)


def compare(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    _, wrong, missing = filecmp.cmpfiles(one, other, names, shallow=False)
    return names == sorted(path.name for path in other.iterdir()) and not wrong + missing


def shipped(src: Path, place: Path, address: str) -> None:
    """What a part costs beside its work: parts without anything to do, and what is sent of them."""
    on_ray._do = on_ray_do
    cluster = on_ray.Cluster(address)
    count = 200
    began = time.monotonic()
    cluster.run(nothing, count, 1, lambda _: None)
    spent = time.monotonic() - began
    size = len(pickle.dumps(("x" * 28, f"999/{count}")))
    print(
        f"{count} parts without work: {spent / count * 1000:.1f} ms each, {size} bytes each are sent"
    )


def nothing(part: str) -> object:
    return part


if __name__ == "__main__":
    main()
