"""Let tools load files that they take whole, in part, wrongly or not at all, and compare with `regraft check --for`.

    python scripts/consumers/verdicts.py [TOOL ...] [--strict]

The files are those of `shared/verdicts.py`. mlx-lm, llama.cpp and PEFT (for Unsloth) load them themselves; of vLLM,
SGLang and NeMo Automodel the functions that read files do, unchanged, into stand-ins for layers. What is added then is
compared with what the file says by PEFT's rules, computed here, and gives the verdict anew: an error is `fails`, no
effect is `none`, other values are `wrong-scale`, missing ones `partial`. No judge of regraft's takes part.
"""

import contextlib
import io
import json
import math
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from shared.pinned import NotThereError, archive, cut, parse
from shared.tiny import DENSE, EXPERTS, INNER, LAYERS, MLP, SIZE
from shared.verdicts import CASES, STEM, write

# torchtune needs an older torchao than PEFT accepts, and PEFT looks for one wherever it injects an adapter.
sys.modules["torchao"] = None  # type: ignore[assignment]

PAIR = re.compile(r"(.+)\.lora_(?:embedding_)?A(?:\.weight)?")
RENAMED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class SourceError(Exception):
    """What only the tool's source tells, because its layers are not there."""


# What a file says.


def meaning(folder):
    """What PEFT's rules make of two files: by module, or by layer and parameter for packed experts."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    made = {}
    for name, tensor in tensors.items():
        hit = PAIR.fullmatch(name)
        if hit is None:
            if "lora_B" not in name and "lora_embedding_B" not in name:
                made[name.removeprefix(STEM)] = tensor.astype(np.float64)
            elif name.replace("_B", "_A") not in tensors:
                made[name.removeprefix(STEM).partition(".lora_")[0]] = np.zeros(())
            continue
        b = tensors.get(name.replace("_A", "_B"))
        path, a = hit[1].removeprefix(STEM), tensor.astype(np.float64)
        if b is None:
            made[path] = np.ones(())
            continue
        packed = re.fullmatch(r".*layers\.(\d+)\..*experts(\.base_layer)?", path)
        if packed is not None:
            both = f"{hit[1].removesuffix('.base_layer')}.base_layer.lora_A.weight" in tensors
            told = config.get("target_parameters", [""])[0].rpartition(".")[2]
            leaf = ("gate_up_proj" if packed[2] else "down_proj") if both else told
            delta = scale(config, path, config["r"]) * unpacked(a, b, config)
            # Before 0.19 PEFT had in and out of (out, in) parameters in each other's place.
            swapped = config["peft_version"] < "0.19"
            made[int(packed[1]), leaf] = delta.transpose(0, 2, 1) if swapped else delta
        else:
            made[path] = scale(config, path, a.shape[-2]) * (b.astype(np.float64) @ a)
    return made


def unpacked(a, b, config):
    """B A of each expert."""
    rank = len(a) // EXPERTS
    if config.get("lora_B_layout") == "grouped_by_expert":
        b = b.reshape(len(b), EXPERTS, rank).transpose(1, 0, 2)
    else:
        b = b.reshape(len(b), rank, EXPERTS).transpose(2, 0, 1)
    return b @ a.reshape(EXPERTS, rank, -1)


def scale(config, path, rank):
    """Alpha, by its pattern, over the rank or its root."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def verdict(got, wanted):
    """One word for what was loaded, beside what the file says; `got(key)` is None for what was passed over."""
    found = set()
    for key, delta in wanted.items():
        mine = got(key)
        if mine is None or not np.abs(mine).max() > 0:
            found.add("ignored")
        elif (
            delta.ndim
            and mine.shape != delta.shape
            and np.all(np.greater_equal(mine.shape, delta.shape))
        ):
            found.add("wrong")  # the rest of its slot is empty
        elif delta.ndim and mine.shape != delta.shape:
            return "fails"  # it is copied into a buffer of another size
        elif delta.ndim and np.abs(mine - delta).max() < 1e-5 * np.abs(delta).max():
            found.add("loaded")
        else:
            found.add("wrong")
    if not found or found == {"ignored"}:
        return "none"
    return "wrong-scale" if "wrong" in found else "partial" if "ignored" in found else "full"


# vLLM


def in_vllm(case, src, _base):
    """Its functions read the file; what its slots then have."""
    import vllm_functions as here

    vllm = here.functions()
    if case.model_type not in here.MODELS:
        tree = parse(vllm.root, f"vllm/model_executor/models/{case.model_type}.py")
        names = {getattr(b, "id", "") for n in tree.body for b in getattr(n, "bases", ())}
        assert "SupportsLoRA" in names, "the class takes no LoRA"
    manager = here.manager_of(vllm, case.model_type)
    shapes = {f"model.layers.{n}.{k}": v for n in range(LAYERS) for k, v in (DENSE | MLP).items()}
    slots = shapes if case.model_type == "llama" else None
    got = {k: v.astype(np.float64) for k, v in here.loaded(vllm, manager, src, slots).items()}
    mapper = manager.model.hf_to_vllm_mapper
    stem = "language_model.model.layers" if "_vl_" in case.model_type else "model.layers"

    def find(key):
        if isinstance(key, tuple):
            return got.get(f"{stem}.{key[0]}.mlp.experts.{key[1]}")
        name = f"{key}.weight"
        return got.get(
            (mapper.get_rename_mapper().map_name(name) if mapper else name).removesuffix(".weight")
        )

    return find


# SGLang


def in_sglang(case, src, base):
    """Its functions check the config and read the file; what its buffers then have."""
    import typing

    import sglang_functions as here

    sglang = here.functions()
    given = {**vars(sglang), **{n: getattr(typing, n) for n in ("Iterable", "Optional")}}
    path = "sglang/srt/lora/lora_manager.py"
    manager = object.__new__(cut(archive("sglang"), path, ("LoRAManager",), given)["LoRAManager"])
    words = json.loads((base / "config.json").read_text())["vocab_size"]
    config = sglang.LoRAConfig(path=str(src), base_vocab_size=words)
    manager.attn_dp_enabled, manager.lora_refs, manager.configs = False, {}, {"one": config}
    manager.num_pinned_loras, manager.max_loras_per_batch, manager.memory_pool = 0, 8, None
    manager.base_model = None
    told = type("Reference", (), {"lora_name": "one", "lora_path": str(src), "pinned": False})
    manager.validate_new_adapter(config, told)
    with contextlib.suppress(AttributeError):  # the rest of it asks the model for its layers
        manager.init_lora_shapes(16, None)
    got = here.loaded(sglang, src, case.model_type, strict=False, targets=manager.target_modules)

    def find(key):
        hit = isinstance(key, str) and re.fullmatch(
            r".*layers\.(\d+)\.\w+\.(?:experts\.(\d+)\.)?(\w+)", key
        )
        if not hit:
            return None
        made = got.get((int(hit[1]), hit[2] is not None, RENAMED.get(hit[3], hit[3])))
        return made if made is None or hit[2] is None else made[int(hit[2])]

    return find


# NeMo Automodel


def in_nemo(case, src, base):
    """Its functions turn the file into its model's tensors; whether its layers take these is told here."""
    import nemo_functions as here

    nemo = here.functions()
    if case.model_type == "gpt_oss":
        raise SourceError("its model has layers of its own for these experts")
    config = nemo.load_automodel_peft_config_dict(str(src))
    tensors, whole = here.loaded(nemo, src)
    tensors = {name.removeprefix(STEM): x.astype(np.float64) for name, x in tensors.items()}
    leaves = set(DENSE) | (set(MLP) if case.model_type == "llama" else set())
    rank, got = config["dim"], {}
    for layer in range(LAYERS):
        for leaf in leaves:
            path = f"model.layers.{layer}.{leaf}"
            a, b = (tensors.get(f"{path}.lora_{letter}.weight") for letter in "AB")
            if b is None:
                continue  # it stays zero
            if a is None:
                a = np.random.default_rng(1).normal(size=(rank, SIZE))
            assert a.shape[0] == b.shape[1] == rank, "a layer of another rank"
            got[path] = whole * b @ a
        place = f"model.layers.{layer}.mlp.experts."
        for part, name in (("gate_and_up", "gate_up_proj"), ("down", "down_proj")):
            a, b = (tensors.get(f"{place}lora_{part}_{letter}") for letter in "AB")
            if a is None or b is None:
                continue
            wide = SIZE if part == "gate_and_up" else INNER
            high = 2 * INNER if part == "gate_and_up" else SIZE
            assert a.shape == (EXPERTS, wide, rank) and b.shape == (EXPERTS, rank, high)
            delta = whole * np.transpose(a @ b, (0, 2, 1))
            got[layer, name] = delta
            for expert in range(EXPERTS):
                if part == "down":
                    got[f"{place}{expert}.down_proj"] = delta[expert]
                else:
                    got[f"{place}{expert}.gate_proj"] = delta[expert][:INNER]
                    got[f"{place}{expert}.up_proj"] = delta[expert][INNER:]
            got[f"{place}lora_{part}_A"], got[f"{place}lora_{part}_B"] = a, b
    return got.get


# PEFT, and what Unsloth changes in it


def in_unsloth(case, src, base):
    """PEFT loads it into a model of transformers, Unsloth's function lays packed columns anew, and it is merged."""
    import unsloth_functions as here
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = json.loads((src / "adapter_config.json").read_text())
    tuned = PeftModel.from_pretrained(model, src)
    here.functions().convert_legacy_lora_b(tuned, "default", said)
    after = tuned.merge_and_unload().state_dict()
    got = {name: (after[name] - tensor).numpy() for name, tensor in before.items()}

    def find(key):
        if isinstance(key, tuple):
            return got[f"model.layers.{key[0]}.mlp.experts.{key[1]}"]
        if key in got:  # a whole tensor
            return after[key].numpy()
        hit = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", key)
        if hit is None:
            return got.get(f"{key}.weight")
        if f"{hit[1]}.gate_up_proj" not in got:
            return None
        if hit[3] == "down_proj":
            return got[f"{hit[1]}.down_proj"][int(hit[2])]
        both = got[f"{hit[1]}.gate_up_proj"][int(hit[2])]
        return both[:INNER] if hit[3] == "gate_proj" else both[INNER:]

    return find


# mlx-lm


def in_mlx(case, src, base):
    """It loads the file into a model of its own, and fuses it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import load_adapters

    module = __import__(f"mlx_lm.models.{case.model_type}", fromlist=["Model"])
    given = json.loads((base / "config.json").read_text())
    model = module.Model(module.ModelArgs.from_dict(given))
    mx.eval(model.parameters())
    load_adapters(model, str(src))
    got = {}
    for name, each in model.named_modules():
        if hasattr(each, "lora_a"):
            a, b = (np.array(each[f"lora_{letter}"], np.float64) for letter in "ab")
            got[name] = each.scale * (b @ a if a.ndim == 3 else b.T @ a.T)
    got |= {name: np.array(x, np.float64) for name, x in tree_flatten(model.parameters())}
    return got.get


def meaning_of_mlx(folder):
    """What mlx-lm's two files say."""
    tensors = load_file(folder / "adapters.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["fine_tune_type"] == "full":
        return {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    made = {}
    for module in {name.rpartition(".")[0] for name in tensors}:
        a, b = (tensors.get(f"{module}.lora_{letter}") for letter in "ab")
        if a is None or b is None:
            made[module] = np.ones(()) if b is None else np.zeros(())
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        made[module] = config["lora_parameters"]["scale"] * (b @ a if a.ndim == 3 else b.T @ a.T)
    return made


# llama.cpp


def in_llama_cpp(case, src, base):
    """Its library computes the same as with the deltas in the model's weights, or not."""
    import llama_cpp_library as here

    given, merged = here.weights(case.model_type), here.weights(case.model_type)
    model = here.write_model(base / "base.gguf", case.model_type, given)
    got = here.logits(model, src)
    hf = {name: path for path, name in here.NAMES.items()}
    means = meaning_of_gguf(src)
    for name, delta in means.items():
        hit = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if hit is None or hit[2] not in hf:
            continue
        if hit[2] in ("attn_q", "attn_k"):
            delta = delta.reshape(-1, 4, 2, SIZE).swapaxes(1, 2).reshape(delta.shape)
        merged[f"model.layers.{hit[1]}.{hf[hit[2]]}"] += delta
    wanted = here.logits(here.write_model(base / "merged.gguf", case.model_type, merged))
    same = np.abs(got - wanted).max() < 2e-2 * np.abs(wanted).max()
    return lambda key: None if "_norm" in key else means[key] * (1 if same else 2)


def meaning_of_gguf(path):
    """What a GGUF file says."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader, tensors = GGUFReader(str(path)), {}
    for each in reader.tensors:
        shape = tuple(int(size) for size in reversed(each.shape))
        plain = dequantize(np.array(each.data), each.tensor_type)
        tensors[each.name] = plain.reshape(shape).astype(np.float64)
    alpha, made = reader.fields["adapter.lora.alpha"].contents(), {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_a"):
            b = tensors[name[:-1] + "b"]
            made[name.removesuffix(".lora_a")] = alpha / len(tensor) * b @ tensor
        elif not name.endswith(".lora_b"):
            made[name] = tensor
    return made


TOOLS = {
    "vllm": (in_vllm, meaning),
    "sglang": (in_sglang, meaning),
    "nemo": (in_nemo, meaning),
    "unsloth": (in_unsloth, meaning),
    "mlx": (in_mlx, meaning_of_mlx),
    "llama.cpp": (in_llama_cpp, meaning_of_gguf),
}


def observed(case, folder):
    """The tool's own verdict, and why where it fails."""
    load, means = TOOLS[case.tool]
    src, base = write(case, folder)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            got = load(case, src, base)
    except (NotThereError, SourceError, ImportError):
        raise
    except Exception as problem:
        # Whatever a tool raises is its verdict.
        return "fails", f"{type(problem).__name__}: {str(problem)[:90]}"
    return verdict(got, means(src)), ""


def main():
    """One line for each tool, and one for each file where the two do not agree."""
    asked = [name for name in sys.argv[1:] if not name.startswith("-")]
    wrong = []
    for tool in TOOLS:
        if asked and tool not in asked:
            continue
        same, told = 0, []
        for case in CASES:
            if case.tool != tool:
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found, why = observed(case, Path(folder))
                except SourceError as problem:
                    told.append(f"  {case.name}: from its source: {problem}")
                    continue
                except (NotThereError, ImportError) as problem:
                    told.append(f"  {case.name}: skipped: {problem}")
                    wrong += [tool] if "--strict" in sys.argv else []
                    continue
            same += found == case.verdict
            if found != case.verdict:
                told.append(f"  {case.name}: {found}, where {case.verdict} is said {why}")
                wrong.append(tool)
            elif "-v" in sys.argv:
                told.append(f"  {case.name}: {found} {why}")
        print(f"{tool:14} {same} verdicts agree")
        print(*told, sep="\n", end="\n" if told else "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
