"""Sound adapters of every dialect, changes to them, and how much a file adds to its base: for ``fuzz.py``.

The sum of the squares of all that an adapter adds is the same in every layout: rows are moved, cut and stacked, and
none is made or lost. It is computed in float64 from a file's own names, without regraft's readers of dialects, and
notices a scale that is wrong, a module that is lost or doubled, and a number that is not finite.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from dense import pick

import regraft
from regraft.errors import RegraftError
from regraft.storage.json_files import told_in_json
from regraft.storage.safetensors import open_tensors, read_header, write_tensors
from regraft.storage.torch_file import open_torch
from regraft.storage.torch_write import write_torch

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
V5 = "transformers-v5"
PREFIX = "base_model.model."
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sound:
    """An input that can be converted."""

    dialect: str
    path: Path
    to: str
    base: Path | None = None


# -- making them

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "vocab_size": 20,
    "tie_word_embeddings": False,
}
LLAMA_MODULES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (12, 16),
    "mlp.up_proj": (12, 16),
    "mlp.down_proj": (16, 12),
}
FLUX = {
    "double_blocks.0.img_attn.qkv": (24, 8),
    "double_blocks.1.txt_attn.proj": (8, 8),
    "double_blocks.0.img_mlp.0": (32, 8),
    "double_blocks.0.img_mod.lin": (48, 8),
    "single_blocks.0.linear1": (56, 8),
    "single_blocks.11.linear2": (8, 40),
    "final_layer.adaLN_modulation.1": (16, 8),
}


def sound_inputs(folder: Path) -> list[Sound]:
    """One or more of each dialect, made in a folder."""
    folder.mkdir(parents=True)
    llama, base = _llama(folder)
    mixtral, its_base = GOLDEN / "cases/mixtral__gud_attn", GOLDEN / "bases/mixtral"
    qwen, qwen_base = GOLDEN / "cases/qwen3_moe__gud", GOLDEN / "bases/qwen3_moe"
    made = []
    for name in ("vllm", "sglang", "nemo", "unsloth", "unsloth-grouped", "mlx", "gguf", "litgpt"):
        made += _converted(name, folder / f"mixtral-{name}", mixtral, its_base)
    for name in ("torchtune", "litgpt", "mlx", "gguf", "vllm"):
        made += _converted(name, folder / f"llama-{name}", llama, base)
    made.append(Sound("tinker", _tinker(qwen, folder / "tinker"), V5, qwen_base))
    made.append(Sound("megatron-bridge", _megatron(qwen, folder / "megatron"), V5, qwen_base))
    made += [
        Sound(name, path, to)
        for name, path in _images(folder)
        for to in ("diffusers", "kohya", "comfyui")
    ]
    return made


def _converted(name: str, out: Path, source: Path, base: Path) -> list[Sound]:
    try:
        regraft.convert(source, out, to=name, model=base)
    except RegraftError as error:
        if error.findings[0].code == "package-missing":
            return []
        raise
    return [Sound(name, out, V5, base)]


def _llama(folder: Path) -> tuple[Path, Path]:
    base, path = folder / "llama", folder / "llama-peft"
    base.mkdir()
    path.mkdir()
    (base / "config.json").write_text(json.dumps(LLAMA))
    tensors = {}
    noise = np.random.default_rng(3)
    for layer in range(2):
        for module, (out, into) in LLAMA_MODULES.items():
            stem = f"{PREFIX}model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = noise.standard_normal((2, into), np.float32)
            tensors[f"{stem}.lora_B.weight"] = noise.standard_normal((out, 2), np.float32)
    write_tensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    leaves = sorted(module.rpartition(".")[2] for module in LLAMA_MODULES)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": leaves}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, base


def _tinker(source: Path, out: Path) -> Path:
    """Experts of a projection stacked, as Tinker saves them."""
    out.mkdir()
    stacks: dict[str, dict[int, np.ndarray]] = {}
    tensors: Tensors = {}
    for name, tensor in open_tensors(source / "adapter_model.safetensors").items():
        head, found, tail = name.partition(".experts.")
        if not found:
            tensors[name] = tensor
            continue
        expert, leaf, rest = tail.split(".", 2)
        leaf = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[leaf]
        stacks.setdefault(f"{head}.experts.{leaf}.{rest}", {})[int(expert)] = tensor
    tensors |= {name: np.stack([each[e] for e in sorted(each)]) for name, each in stacks.items()}
    write_tensors(out / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "all-linear"}))
    return out


def _megatron(source: Path, out: Path) -> Path:
    out.mkdir()
    tensors = open_tensors(source / "adapter_model.safetensors")
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    write_tensors(out / "adapter_model.safetensors", bare, {})
    config = json.loads((source / "adapter_config.json").read_text())
    run = {"peft": {"dim": config["r"], "alpha": config["lora_alpha"]}}
    (out / "run_config.json").write_text(json.dumps(run))
    return out


def _images(folder: Path) -> Iterator[tuple[str, Path]]:
    """LoRAs of FLUX in every spelling that is read."""
    noise = np.random.default_rng(4)
    factors = {
        name: (
            noise.standard_normal((2, into), np.float32),
            noise.standard_normal((out, 2), np.float32),
        )
        for name, (out, into) in FLUX.items()
    }

    def file(
        name: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
    ) -> tuple[str, Path]:
        path = folder / f"{name}.safetensors"
        write_tensors(path, tensors, metadata)
        return name, path

    kohya: Tensors = {}
    onetrainer: Tensors = {}
    bfl: Tensors = {}
    for name, (down, up) in factors.items():
        flat, dotted = "lora_unet_" + name.replace(".", "_"), "diffusion_model." + name
        kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        kohya[f"{flat}.alpha"] = np.array(3, np.float32)
        onetrainer |= {f"{dotted}.lora_down.weight": down, f"{dotted}.lora_up.weight": up}
        onetrainer[f"{dotted}.alpha"] = np.array(3, np.float32)
        bfl |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    yield file("kohya", kohya, {"ss_network_module": "networks.lora_flux"})
    yield file("onetrainer", onetrainer, {"ot_revision": "1"})
    yield file("bfl", bfl, {})
    for name in ("diffusers", "comfyui", "ai-toolkit"):
        path = folder / f"{name}.safetensors"
        regraft.convert(folder / "kohya.safetensors", path, to=name)
        yield name, path
    regraft.convert(folder / "kohya.safetensors", folder / "peft-image", to="peft")
    yield "peft-image", folder / "peft-image"
    xlabs: Tensors = {}
    for name, rows in (("double_blocks.0", 24), ("single_blocks.3", 24)):
        for stream in ("1", "2") if name.startswith("double") else ("",):
            stem = f"{name}.processor.qkv_lora{stream}"
            xlabs[f"{stem}.down.weight"] = noise.standard_normal((2, 8), np.float32)
            xlabs[f"{stem}.up.weight"] = noise.standard_normal((rows, 2), np.float32)
    yield file("xlabs", xlabs, {})


# -- changing them

TWINS = (
    (PREFIX, ""),
    (".self_attn.", ".attn."),
    (".block_sparse_moe.", ".mlp."),
    ("lora_down", "lora_A"),
    ("lora_up", "lora_B"),
    ("lora_A.weight", "lora_A.default.weight"),
    ("lora_B.weight", "lora_B.default.weight"),
    ("transformer.", "diffusion_model."),
    ("diffusion_model.", "model.diffusion_model."),
    ("diffusion_model.", ""),
    ("lora_unet_", "lora_transformer_"),
    ("w1", "gate_proj"),
    ("gate_proj", "w1"),
    ("experts.0.", "experts.00."),
    ("layers.0.", "layers.00."),
    ("model.layers", "model.model.layers"),
    (".down.weight", "_linear_layer.down.weight"),
)
"""Two ways to write one thing: a file with both has it twice."""
TYPES = (
    np.int64,
    np.float16,
    np.float64,
    np.complex64,
    np.bool_,
    np.uint8,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
)
NUMBERS = (0, -1, 0.5, 1e308, 3e38, 1e-320, float("nan"), float("inf"), -float("inf"), 2**40)


def change_tensors(tensors: Tensors, rng: random.Random) -> None:
    """One tensor of a file lost, doubled, renamed, or other than it should be."""
    name = rng.choice(list(tensors))
    if rng.random() < 0.2:
        name = rng.choice([n for n in tensors if n.endswith("alpha")] or [name])
    tensor = tensors[name]

    def renamed(old: str, new: str) -> None:
        if old in name:
            tensors[name.replace(old, new, 1)] = tensors.pop(name)

    def shifted() -> None:
        numbers = re.findall(r"(?<![0-9])[0-9]+(?![0-9])", name)
        if numbers:
            renamed(rng.choice(numbers), rng.choice(("0", "1", "7", "999999", "9" * 30, "-1")))

    def twin() -> None:
        ways = [(a, b) for one in TWINS for a, b in (one, one[::-1]) if a and a in name]
        a, b = rng.choice(ways or [("", "x")])
        tensors[name.replace(a, b, 1)] = tensor * 2 if rng.random() < 0.5 else tensor

    def put(value: float) -> None:
        with np.errstate(all="ignore"):
            changed = np.array(tensor)
            if changed.size:
                changed.reshape(-1)[rng.randrange(changed.size)] = np.float64(value).astype(
                    changed.dtype
                )
            tensors[name] = changed

    def become(made: Any) -> None:
        tensors[name] = np.ascontiguousarray(made) if np.ndim(made) else np.array(made)

    def cast() -> None:
        with np.errstate(all="ignore"):
            become(np.asarray(tensor).astype(rng.choice(TYPES)))

    changes: list[Callable[[], object]] = [
        lambda: tensors.pop(name) if len(tensors) > 1 else None,
        lambda: become(tensor.T),
        lambda: become(tensor[..., None]),
        lambda: become(tensor[None]),
        lambda: become(tensor.reshape(-1)),
        lambda: become(tensor[:0] if tensor.ndim else tensor.reshape(1)[:0]),
        lambda: become(tensor[:-1] if tensor.ndim else tensor),
        lambda: become(tensor[..., :-1] if tensor.ndim else tensor),
        lambda: become(np.concatenate([tensor, tensor]) if tensor.ndim else np.stack([tensor] * 2)),
        lambda: become(np.zeros((1,) * 64, tensor.dtype)) if rng.random() < 0.2 else None,
        lambda: become(tensor.reshape(-1)[0]) if tensor.size else None,
        cast,
        lambda: put(rng.choice(NUMBERS)),
        lambda: put(rng.choice(NUMBERS)),
        shifted,
        twin,
        twin,
        lambda: renamed(name, name + rng.choice((".x", "", ".weight", "0", " "))),
    ]
    rng.choice(changes)()


TEXTS = ("", "nan", "1e999", "-1", "0", "[" * 4000, "{}", '{"a": NaN}', "null", "[[1]]")


def change_dialect_file(
    path: Path,
    rng: random.Random,
    change_file: Callable[[Path, random.Random], None],
    change_json: Callable[[Any, random.Random], Any],
) -> None:
    """A file of an adapter changed: its tensors one by one, its text, or its bytes."""
    way = rng.random()
    if way < 0.15:
        data = path.read_bytes()
        path.write_bytes(data[: rng.randrange(len(data))])
    elif way < 0.3 or path.suffix not in (".safetensors", ".pt", ".lora"):
        change_text(path, rng) if path.suffix == ".yaml" else change_file(path, rng)
    elif path.suffix == ".safetensors":
        tensors = {name: np.array(x) for name, x in open_tensors(path).items()}
        metadata = dict(read_header(path).metadata)
        if metadata and way < 0.4:
            key = rng.choice(list(metadata))
            told = told_in_json(metadata[key])
            if isinstance(told, dict) and told and rng.random() < 0.7:
                metadata[key] = json.dumps(change_json(told, rng))
            else:
                metadata[key] = rng.choice(TEXTS)
        else:
            for _ in range(rng.choice((1, 1, 2))):
                change_tensors(tensors, rng)
        _rewrite(path, lambda: write_tensors(path, tensors, metadata))
    else:
        inside = "model" if path.suffix == ".lora" else None
        tensors = {name: np.array(x) for name, x in open_torch(path, inside).items()}
        change_tensors(tensors, rng)
        _rewrite(path, lambda: write_torch(path, tensors, inside))


def _rewrite(path: Path, write: Callable[[], None]) -> None:
    """Write a file anew; as it was where it cannot be written at all."""
    old = path.with_name(path.name + "~")
    path.rename(old)
    try:
        write()
    except RegraftError:
        old.rename(path)
    old.unlink(missing_ok=True)


VALUES = (
    *("", "null", "-1", "0", "1e400", ".nan", ".inf", "9" * 400, "[1]", "{a: 1}", "yes", "'x'"),
    *("[" * 3000, "*a", "!!python/name:os.system", "2000-01-01", "0x10", "0o7", "1_000"),
)


def change_text(path: Path, rng: random.Random) -> None:
    """A line of a YAML file with another value, or a hostile one."""
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    name = lines[at].partition(":")[0]
    value = rng.choice(VALUES)
    lines[at] = rng.choice((f"{name}: {value}", value, f"{lines[at]}\n{name}: {value}"))
    if rng.random() < 0.1:
        aliases = "".join(f"b{n}: &b{n} [{f'*b{n - 1}, ' * 9}]\n" for n in range(1, 9))
        lines = [f"b0: &b0 [1]\n{aliases}", *lines]
    path.write_text("\n".join(lines))


def copied(sound: Sound, folder: Path) -> tuple[Path, list[Path]]:
    """A copy of an input, and its files."""
    to = folder / sound.path.name
    if sound.path.is_file():
        shutil.copy(sound.path, to)
        return to, [to]
    shutil.copytree(sound.path, to)
    return to, sorted(p for p in to.iterdir() if p.is_file())


# -- what they add


def energy(path: Path, dialect: str) -> float | None:
    """The sum of the squares of what an adapter adds, by its own names; ``None`` where that is not known here."""
    with np.errstate(all="ignore"):
        if dialect in ("litgpt", "gguf"):
            return None
        if dialect == "mlx":
            return _mlx(path)
        if dialect == "torchtune":
            return _torchtune(path)
        if dialect in _IMAGE:
            return _image(path / "pytorch_lora_weights.safetensors" if path.is_dir() else path)
        return _peft(path)


_IMAGE = ("kohya", "diffusers", "comfyui", "ai-toolkit", "onetrainer", "bfl", "xlabs")


def _square(factor: float, up: np.ndarray, down: np.ndarray) -> float:
    assert "c" not in up.dtype.kind + down.dtype.kind, "a factor is complex, and was converted"
    up, down = up.astype(np.float64), down.astype(np.float64)
    return float(((factor * (up @ down)) ** 2).sum())


def _peft(path: Path) -> float | None:
    file = path / "adapter_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
    else:
        run = json.loads((path / "run_config.json").read_text(encoding="utf-8"))["peft"]
        config = {"r": run.get("dim"), "lora_alpha": run["alpha"]}
    grouped = config.get("lora_B_layout") == "grouped_by_expert"
    tensors = open_tensors(path / "adapter_model.safetensors")
    total = 0.0
    for name, a in tensors.items():
        match = re.fullmatch(r"(.*)\.lora_A(?:\.default)?\.weight", name)
        if match is None:
            if ".lora_" not in name:
                total += float((tensors[name].astype(np.float64) ** 2).sum())
            continue
        b = tensors[name.replace(".lora_A", ".lora_B")]
        module = match[1].removeprefix(PREFIX)
        if a.ndim == 3 and a.shape[2] == b.shape[2] == 1:
            a, b = a[..., 0], b[..., 0]
        if a.ndim == 3:
            if not a.size or not b.size:
                continue
            alpha = pick(config, "alpha_pattern", module, config["lora_alpha"])
            count = max(len(a), len(b))
            shared = (np.broadcast_to(x, (count, *x.shape[1:])) for x in (a, b))
            for one, other in zip(*shared, strict=True):
                total += _square(alpha / a.shape[1], other, one)
            continue
        aimed, experts = module, 1
        if ".mlp.experts" in module and re.search(r"experts(\.base_layer)?$", module):
            inner = module.endswith(".base_layer")
            aimed = module.removesuffix(".base_layer") + (
                ".gate_up_proj" if inner else ".down_proj"
            )
            rank = pick(config, "rank_pattern", aimed, config["r"])
            experts = len(a) // rank
        rank = len(a) // experts
        alpha = pick(config, "alpha_pattern", aimed, config.get("lora_alpha", 8))
        factor = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        a = a.reshape(experts, rank, -1)
        b = b.reshape(len(b), experts, rank) if grouped else b.reshape(len(b), rank, experts)
        for number in range(experts):
            total += _square(factor, b[:, number] if grouped else b[:, :, number], a[number])
    return total


def _mlx(path: Path) -> float:
    factor = json.loads((path / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    tensors = open_tensors(path / "adapters.safetensors")
    total = 0.0
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            b = tensors[name[:-1] + "b"]
            for one, other in zip(a, b, strict=True) if a.ndim == 3 else [(a, b)]:
                total += _square(factor, other, one) if a.ndim == 3 else _square(factor, one, other)
    return total


def _torchtune(path: Path) -> float:
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = open_torch(path / "adapter_model.pt")
    factor = config["lora_alpha"] / config["r"]
    return sum(
        _square(factor, tensors[name.replace("lora_a", "lora_b")], a)
        for name, a in tensors.items()
        if name.endswith(".lora_a.weight")
    )


_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_DOWN = re.compile(r"(.*?)(\.lora_A\.weight|\.lora_down\.weight|_lora[12]?\.down\.weight)")


def _image(path: Path) -> float | None:
    tensors = open_tensors(path)
    metadata = read_header(path).metadata
    said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    total, read = 0.0, set()
    for name, down in tensors.items():
        match = _DOWN.fullmatch(name)
        if match is None:
            continue
        up = name.replace("lora_A", "lora_B").replace("down.weight", "up.weight")
        component, _, module = match[1].partition(".")
        alpha: Any = len(down)
        if f"{match[1]}.alpha" in tensors:
            alpha = float(tensors[f"{match[1]}.alpha"].reshape(-1)[0])
        elif any(f"{component}.{name}" in said for name in _SCALING):
            usual = said.get(f"{component}.lora_alpha", 8)  # PEFT's own, as diffusers loads it
            alpha = pick({"p": said.get(f"{component}.alpha_pattern")}, "p", module, usual)
        read |= {name, up, f"{match[1]}.alpha"}
        flat = [x.reshape(len(x), -1) if x.size else x for x in (tensors[up], down)]
        total += _square(alpha / len(down), *flat)
    return total if read >= tensors.keys() else None


def assert_as_much(before: float | None, after: float | None) -> None:
    """Raise AssertionError where one file adds more to the base than the other."""
    if before is None or after is None or before == after:
        return
    assert not (np.isnan(before) ^ np.isnan(after)), f"one of {before} and {after} is no number"
    if not np.isnan(before):
        most = max(before, after)
        assert abs(before - after) <= 1e-5 * most, f"one adds {before}, the other {after}"
