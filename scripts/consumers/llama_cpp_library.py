"""Let llama.cpp itself load what regraft writes for it, and compute with it.

    python scripts/consumers/llama_cpp_library.py [--strict]

The library comes from node-llama-cpp's package of binaries for Linux on x64, and is called by ctypes. A tiny model with
an adapter has to give the logits of the same model with B A added to its weights. Models are written here, by the
package gguf.
"""

import ctypes
import functools
import re
import subprocess
import tarfile

import numpy as np
from shared.pinned import PINS, NotThereError, kept
from shared.running import main
from shared.tiny import EXPERTS, GROUPS, HEADS, INNER, LAYERS, SIZE, WORDS, adapter, off

import regraft

MODELS = ("llama", "mistral", "mixtral", "qwen3_moe")
ARCHITECTURES = {"qwen3_moe": "qwen3moe"}
WORDS_OF_A_TEXT = [3, 14, 15, 92, 65, 35]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EXPERTS_OF = {
    **{"w1": "gate", "w3": "up", "w2": "down"},
    **{f"{name}_proj": name for name in ("gate", "up", "down")},
}
SIZES = {"gate": (INNER, SIZE), "up": (INNER, SIZE), "down": (SIZE, INNER)}


class Opaque(ctypes.Structure):
    """A structure of parameters that is handed on as it came; it is larger than any of them."""

    _fields_ = (("bytes", ctypes.c_char * 1024),)


class Batch(ctypes.Structure):
    """A batch of tokens, handed on as it came."""

    _fields_ = (("bytes", ctypes.c_char * 56),)


@functools.cache
def library():
    """llama.cpp's library. Raises `NotThereError`."""
    found = re.search(r"(?m)^# npm: (\S+)", PINS.read_text())
    if found is None:
        raise NotThereError(f"no package of npm is pinned in {PINS.name}")
    folder = kept() / re.sub(r"\W+", "-", found[1])
    inside = folder / "package/bins/linux-x64"
    if not inside.exists():
        folder.mkdir(exist_ok=True)
        try:
            command = ["npm", "pack", "--silent", found[1]]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as problem:
            raise NotThereError(f"{found[1]} could not be had: {problem}") from problem
        with tarfile.open(next(folder.glob("*.tgz"))) as opened:
            opened.extractall(folder, filter="data")
    try:
        for name in ("libggml-base*", "libggml.*", "libllama.*"):
            made = ctypes.CDLL(str(next(inside.glob(name))), mode=ctypes.RTLD_GLOBAL)
    except OSError as problem:
        raise NotThereError(f"it does not load here: {problem}") from problem
    pointer = ctypes.c_void_p
    for name, answer, given in (
        ("llama_model_default_params", Opaque, []),
        ("llama_context_default_params", Opaque, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Opaque]),
        ("llama_init_from_model", pointer, [pointer, Opaque]),
        ("llama_adapter_lora_init", pointer, [pointer, ctypes.c_char_p]),
        ("llama_set_adapters_lora", ctypes.c_int, [pointer, pointer, ctypes.c_size_t, pointer]),
        ("llama_batch_get_one", Batch, [pointer, ctypes.c_int32]),
        ("llama_decode", ctypes.c_int, [pointer, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("llama_log_set", None, [pointer, pointer]),
    ):
        function = getattr(made, name)
        function.restype, function.argtypes = answer, given
    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
    made.llama_log_set(ctypes.cast(log, pointer), None)
    made.quiet = log  # it is called as long as the library is there
    ggml = ctypes.CDLL(str(next(inside.glob("libggml.*"))))
    ggml.ggml_backend_load_all_from_path(ctypes.c_char_p(str(inside).encode()))
    return made


class CannotLoadError(Exception):
    """What the library did not load."""


def logits(model, lora=None):
    """What a model says comes next, with an adapter or without. Raises `CannotLoadError`."""
    llama = library()
    loaded = llama.llama_model_load_from_file(
        str(model).encode(), llama.llama_model_default_params()
    )
    if not loaded:
        raise CannotLoadError("the model")
    context = llama.llama_init_from_model(loaded, llama.llama_context_default_params())
    try:
        if lora is not None:
            made = llama.llama_adapter_lora_init(loaded, str(lora).encode())
            if not made:
                raise CannotLoadError("the adapter")
            adapters, scales = (ctypes.c_void_p * 1)(made), (ctypes.c_float * 1)(1.0)
            assert llama.llama_set_adapters_lora(context, adapters, 1, scales) == 0
        tokens = (ctypes.c_int32 * len(WORDS_OF_A_TEXT))(*WORDS_OF_A_TEXT)
        assert llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(tokens))) == 0
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (WORDS,)).copy()
    finally:
        llama.llama_free(context)
        llama.llama_model_free(loaded)


def weights(model_type):
    """Random weights of a tiny model: attention and one MLP by the names of transformers 4."""
    random = np.random.default_rng(0)
    sizes = {
        "self_attn.q_proj": (HEADS * 8, SIZE),
        "self_attn.k_proj": (GROUPS * 8, SIZE),
        "self_attn.v_proj": (GROUPS * 8, SIZE),
        "self_attn.o_proj": (SIZE, HEADS * 8),
    }
    if model_type == "mixtral":
        leaves = {"w1": "gate", "w3": "up", "w2": "down"}
        inside, router = "block_sparse_moe.experts", "block_sparse_moe.gate"
    else:
        leaves = {f"{name}_proj": name for name in SIZES}
        inside, router = "mlp.experts", "mlp.gate"
    if model_type in ("mixtral", "qwen3_moe"):
        sizes |= {
            f"{inside}.{e}.{leaf}": SIZES[name]
            for e in range(EXPERTS)
            for leaf, name in leaves.items()
        }
        sizes[router] = (EXPERTS, SIZE)
    else:
        sizes |= {f"mlp.{leaf}": SIZES[name] for leaf, name in leaves.items()}
    made = {
        f"model.layers.{layer}.{name}": random.normal(size=shape) / 8
        for layer in range(LAYERS)
        for name, shape in sizes.items()
    }
    return made | {name: random.normal(size=(WORDS, SIZE)) for name in ("embed", "head")}


def write_model(path, model_type, given):
    """A model in GGUF, without a vocabulary."""
    from gguf import GGUFWriter

    rotated = model_type != "qwen3_moe"
    writer = GGUFWriter(str(path), ARCHITECTURES.get(model_type, "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(0)
    if model_type in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(INNER)
    ones = np.ones(SIZE, np.float32)
    made = {"output_norm": ones, "token_embd": given["embed"], "output": given["head"]}
    for layer in range(LAYERS):
        made |= {f"blk.{layer}.{name}": ones for name in ("attn_norm", "ffn_norm")}
        if model_type == "qwen3_moe":
            made |= {f"blk.{layer}.attn_{x}_norm": np.ones(8, np.float32) for x in "qk"}
    stacks = {}
    for name, weight in given.items():
        hit = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if hit is None:
            continue
        layer, rest = hit.groups()
        expert = re.fullmatch(r".*experts\.(\d+)\.(\w+)", rest)
        if expert is not None:
            place = f"blk.{layer}.ffn_{EXPERTS_OF[expert[2]]}_exps"
            stacks.setdefault(place, [None] * EXPERTS)[int(expert[1])] = weight
        elif rest.endswith(("moe.gate", "mlp.gate")):
            made[f"blk.{layer}.ffn_gate_inp"] = weight
        else:
            if rotated and rest.endswith(("q_proj", "k_proj")):
                weight = weight.reshape(-1, 2, 4, SIZE).swapaxes(1, 2).reshape(weight.shape)
            made[f"blk.{layer}.{NAMES[rest]}"] = weight
    made |= {name: np.stack(parts) for name, parts in stacks.items()}
    for name, weight in made.items():
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(folder, model_type):
    """The largest difference of logits; and without the adapter they are others."""
    base, lora, wanted = adapter(folder, model_type)
    regraft.convert(lora, folder / "lora.gguf", to="gguf", model=base)
    given = weights(model_type)
    merged = {name: weight + wanted.get(name, 0) for name, weight in given.items()}
    assert wanted.keys() <= given.keys()
    model = write_model(folder / "base.gguf", model_type, given)
    right = logits(write_model(folder / "merged.gguf", model_type, merged))
    assert off(logits(model), right) > 1e-2
    return off(logits(model, folder / "lora.gguf"), right)


if __name__ == "__main__":
    main("llama.cpp", MODELS, run, library)
