"""Converting checkpoints beside cp and beside transformers.

    python benchmarks/bench_checkpoint.py                 # everything, about ten minutes
    python benchmarks/bench_checkpoint.py --runs 3 --gb 1 --only fuse,rename
    python benchmarks/bench_checkpoint.py --scale         # the plan of a 1 TB checkpoint, and flat memory
    python benchmarks/bench_checkpoint.py --moves         # permutes and transposes in memory

Every contender runs in a process of its own, in shuffled order, with the source in the page cache,
and until the bytes are on disk. Medians are shown. regraft's time is that of the whole command, start of
Python included.
"""

import argparse
import importlib.metadata
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

import ml_dtypes
import numpy as np

SHARD = 500_000_000
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "model_type": "mixtral",
    "num_attention_heads": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GRANITE = {
    **MIXTRAL,
    "architectures": ["GraniteMoeForCausalLM"],
    "intermediate_size": 3584,
    "model_type": "granitemoe",
    "num_local_experts": 16,
}


def shapes_of(config, layers):
    hidden, inner, experts = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    values = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", values), ("v", values), ("o", hidden)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (hidden,)
        moe = at + "block_sparse_moe."
        if config["model_type"] == "granitemoe":
            yield moe + "router.layer.weight", (experts, hidden)
            yield moe + "input_linear.weight", (experts, 2 * inner, hidden)
            yield moe + "output_linear.weight", (experts, hidden, inner)
            continue
        yield moe + "gate.weight", (experts, hidden)
        for expert in range(experts):
            yield f"{moe}experts.{expert}.w1.weight", (inner, hidden)
            yield f"{moe}experts.{expert}.w2.weight", (hidden, inner)
            yield f"{moe}experts.{expert}.w3.weight", (inner, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def make(folder, config, gigabytes, holes=False):
    """A checkpoint of random numbers in shards, one tensor in memory at a time; or of holes."""
    folder.mkdir(parents=True)
    per_layer = sum(2 * int(np.prod(s)) for n, s in shapes_of(config, 1) if ".layers." in n)
    layers = max(1, round(gigabytes * 1e9 / per_layer))
    (folder / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": layers}, indent=2)
    )
    shards, size = [[]], 0
    for name, shape in shapes_of(config, layers):
        if size > SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += 2 * int(np.prod(shape))
    random_numbers = np.random.default_rng(0)
    total, where = 0, {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard:
            end = at + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            at, where[name] = end, file
        total += at
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if holes:
                out.truncate(8 + len(text) + at)
                continue
            for _, shape in shard:
                values = random_numbers.standard_normal(shape, dtype=np.float32)
                values *= 0.02
                out.write(values.astype(ml_dtypes.bfloat16).tobytes())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()


def apart(function, *arguments):
    """In a process of its own: a child's peak memory is at least its parent's."""
    code = "import sys, json, pathlib, bench_checkpoint as b\n"
    code += f"b.{function}(pathlib.Path(sys.argv[1]), *json.loads(sys.argv[2]))"
    folder, *rest = arguments
    here = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(rest)], check=True, env=here
    )


def copy(src, dst):
    return ["sh", "-c", f"cp -r --reflink=never '{src}' '{dst}' && sync '{dst}'/*"]


def regraft(src, dst, to, jobs):
    return [
        sys.executable, "-m", "regraft", "convert", str(src), str(dst), "--to", to,
        "--jobs", str(jobs), "--quiet",
    ]  # fmt: skip


def transformers(src, dst, original):
    code = (
        "import sys, transformers, glob, os\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='bfloat16')\n"
        f"m.save_pretrained(sys.argv[2], max_shard_size='500MB', save_original_format={original})\n"
        "for f in glob.glob(sys.argv[2] + '/*'):\n"
        "    d = os.open(f, os.O_RDONLY); os.fsync(d); os.close(d)\n"
    )
    return [sys.executable, "-c", code, str(src), str(dst)]


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


def race(title, src, contenders, runs, dst):
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
    base = statistics.median(times["cp + sync"])
    print(f"\n{title}: {size / 1e9:.2f} GB in {len(list(src.glob('*.safetensors')))} files")
    print(f"{'':24}{'median s':>9}{'GB/s':>7}{'x cp':>7}{'min s':>7}{'max s':>7}{'peak MB':>9}")
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:24}{median:9.2f}{size / 1e9 / median:7.2f}{base / median:7.2f}"
            f"{min(values):7.2f}{max(values):7.2f}{memory[name]:9.0f}",
            flush=True,
        )


def race_all(work, runs, gigabytes, only):
    v4, v5, granite, dst = (work / name for name in ("v4", "v5", "granite", "out"))
    apart("make", v4, MIXTRAL, gigabytes)
    subprocess.run(regraft(v4, v5, "transformers-v5", 2), check=True)
    if "rename" in only:
        apart("make", granite, GRANITE, gigabytes)
    cases = {
        "fuse": (v4, "transformers-v5", False),
        "split": (v5, "transformers-v4", True),
        "rename": (granite, "transformers-v5", False),
    }
    for name in only:
        src, to, original = cases[name]
        contenders = {
            "cp + sync": copy(src, dst),
            "regraft, 1 worker": regraft(src, dst, to, 1),
            "regraft, 2 workers": regraft(src, dst, to, 2),
        }
        try:
            importlib.metadata.version("transformers")
            contenders["transformers"] = transformers(src, dst, original)
        except importlib.metadata.PackageNotFoundError:
            print("transformers is not installed and stays out")
        race(name, src, contenders, runs, dst)


def make_huge(folder):
    """Headers of a 1 TB checkpoint over holes: 100k tensors in 200 shards."""
    folder.mkdir(parents=True)
    config = {**GRANITE, "model_type": "qwen3_moe", "hidden_size": 4096, "num_experts": 272}
    config |= {"moe_intermediate_size": 1216, "num_hidden_layers": 122}
    del config["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(config))
    names = [("model.embed_tokens.weight", (32000, 4096)), ("model.norm.weight", (4096,))]
    for layer in range(122):
        at = f"model.layers.{layer}."
        names.append((at + "mlp.gate.weight", (272, 4096)))
        names += [(f"{at}self_attn.{p}_proj.weight", (4096, 4096)) for p in "qkvo"]
        for expert in range(272):
            inside = f"{at}mlp.experts.{expert}."
            names += [(f"{inside}{p}_proj.weight", (1216, 4096)) for p in ("gate", "up")]
            names.append((inside + "down_proj.weight", (4096, 1216)))
    where, total = {}, 0
    per_file = -(-len(names) // 200)
    for number in range(200):
        file = f"model-{number + 1:05d}-of-00200.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in names[number * per_file : (number + 1) * per_file]:
            end = at + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            at, where[name] = end, file
        total += at
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"plan of {len(names)} tensors, {total / 1e12:.2f} TB, 200 shards:", flush=True)


def scale(work):
    apart("make_huge", work / "huge")
    code = (
        "import sys, time, resource\n"
        "from pathlib import Path\n"
        "from regraft.checkpoints.prepare import prepare\n"
        "from regraft.checkpoints.units import Cutter\n"
        "begun = time.perf_counter()\n"
        "ready = prepare(Path(sys.argv[1]), 'transformers-v5')\n"
        "Cutter(ready.moves, ready.dtypes, ready.source.tensors)\n"
        "seconds = time.perf_counter() - begun\n"
        "memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6\n"
        "print(f'{seconds:.2f} s, {memory:.0f} MB')\n"
    )
    for _ in range(5):
        subprocess.run([sys.executable, "-c", code, str(work / "huge")], check=True)
    for gigabytes in (1, 20):
        apart("make", work / "v4", MIXTRAL, gigabytes, True)
        seconds, most = run(regraft(work / "v4", work / "out", "transformers-v5", 2), work / "out")
        print(f"{gigabytes} GB: {seconds:.1f} s, peak {most:.0f} MB", flush=True)
        shutil.rmtree(work / "v4")
        shutil.rmtree(work / "out")


def moves():
    """One thread in memory: a RoPE permute beside memcpy, a bf16 transpose beside torch."""
    from regraft.arrays.anonymous import rearrange

    random_numbers = np.random.default_rng(0)
    matrix = random_numbers.integers(0, 1 << 16, (4096, 4096), np.uint16).view(ml_dtypes.bfloat16)
    other = np.empty_like(matrix)
    contenders = {
        "memcpy": lambda: np.copyto(other.view(np.uint16), matrix.view(np.uint16)),
        "RoPE permute": lambda: rearrange("(h d two) i == (h two d) i", matrix, h=32, two=2),
        "transpose": lambda: rearrange("o i == i o", matrix),
        "numpy transpose": lambda: np.ascontiguousarray(matrix.T),
        "memcpy to new memory": lambda: matrix.view(np.uint16).copy(),
    }
    try:
        import torch

        torch.set_num_threads(1)
        tensor = torch.from_numpy(matrix.view(np.int16)).view(torch.bfloat16)
        contenders["torch transpose"] = lambda: tensor.t().contiguous()
    except ImportError:
        print("torch is not installed and stays out")
    times = {name: [] for name in contenders}
    for _ in range(11):
        for name in random.sample(list(contenders), len(contenders)):
            begun = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - begun)
    print("a 4096 x 4096 bfloat16 matrix, one thread:")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"  {name:22}{median * 1e3:8.2f} ms {matrix.nbytes / 1e9 / median:7.2f} GB/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--gb", type=float, default=2.2)
    parser.add_argument("--only", default="fuse,split,rename")
    parser.add_argument("--work", type=Path, help="a folder to make files in")
    parser.add_argument("--scale", action="store_true", help="a huge plan, and memory by size")
    parser.add_argument("--moves", action="store_true", help="permutes and transposes in memory")
    options = parser.parse_args()
    if options.moves:
        moves()
        return
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        if options.scale:
            scale(Path(folder))
            return
        race_all(Path(folder), options.runs, options.gb, options.only.split(","))


if __name__ == "__main__":
    main()
