"""Files that tools take whole, in part, wrongly or not at all: one at least for each answer of `regraft check --for`.

The tests compare the answers with what stands here, and `scripts/consumers/verdicts.py` compares what stands here with
what the tools' own code does.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regraft.storage.safetensors import write_tensors
from shared.tiny import DENSE, EXPERTS, GROUPS, HEADS, INNER, LAYERS, MLP, SIZE, WORDS

RANK, ALPHA = 4, 8
STEM = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OWN = "automodel_peft_config.json"
Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors], Tensors]

FIELDS = {
    "hidden_size": SIZE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": 8,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "vocab_size": WORDS,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
}
MORE = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INNER,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "gpt_oss": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": INNER,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 0,
    },
}
ROOTS = {"w1": (INNER, SIZE), "w3": (INNER, SIZE), "w2": (SIZE, INNER)}
NAMES = {name.removeprefix("mlp."): shape for name, shape in MLP.items()}
MODULES = {
    "llama": DENSE | MLP,
    "qwen2": DENSE,
    "mixtral": DENSE
    | {f"block_sparse_moe.experts.{e}.{n}": s for e in range(EXPERTS) for n, s in ROOTS.items()},
    "qwen3_moe": DENSE
    | {f"mlp.experts.{e}.{n}": s for e in range(EXPERTS) for n, s in NAMES.items()},
    "gpt_oss": {},
    "deepseek_v3": {},
}


class Case(NamedTuple):
    """A file, and what a tool is said to do with it."""

    tool: str
    name: str
    verdict: str
    reason: str
    """Part of what is said of it, of failures, modules or in a note; empty where nothing is to be said."""
    model_type: str
    make: Callable[[Path, str], None]
    """Writes the folder `lora` beside the folder `base`."""
    fields: dict[str, Any]
    """Of the base's config."""
    based: bool = True
    """Whether the base is given."""


def write_base(folder: Path, case: Case) -> Path:
    """The base's config."""
    folder.mkdir(parents=True)
    data = {"model_type": case.model_type} | FIELDS | MORE.get(case.model_type, {}) | case.fields
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def write(case: Case, folder: Path) -> tuple[Path, Path]:
    """The adapter's path and the base's folder."""
    base = write_base(folder / "base", case)
    (folder / "lora").mkdir()
    case.make(folder / "lora", case.model_type)
    one = folder / "lora/adapter.gguf"
    return (one if one.exists() else folder / "lora"), base


def factors(shapes, rank=RANK, layers=range(LAYERS), seed=0) -> Tensors:
    """PEFT's factors of some modules of every layer; a name without a dot is one outside of the layers."""
    random, made = np.random.default_rng(seed), {}
    for layer in layers:
        for name, (out, into) in shapes.items():
            place = f"{STEM}model.layers.{layer}.{name}" if "." in name else f"{STEM}{name}"
            for letter, shape in (("A", (rank, into)), ("B", (out, rank))):
                numbers = random.integers(-9, 9, shape) / 16
                made[f"{place}.lora_{letter}.weight"] = numbers.astype(np.float32)
    return made


def packed(
    rank=RANK,
    parameters=("gate_up_proj", "down_proj"),
    swap=False,
    module="mlp.experts",
    inner=INNER,
) -> Tensors:
    """Factors of stacked experts as PEFT packs them, since 0.19 or (`swap`) before."""
    random, made = np.random.default_rng(0), {}
    sizes = {"gate_up_proj": (2 * inner, SIZE), "down_proj": (SIZE, inner)}
    for layer in range(LAYERS):
        for leaf in parameters:
            inside = leaf == "gate_up_proj" and len(parameters) == 2
            place = f"{STEM}model.layers.{layer}.{module}" + ".base_layer" * inside
            out, into = sizes[leaf][::-1] if swap else sizes[leaf]
            for letter, shape in (("A", (EXPERTS * rank, into)), ("B", (out, rank * EXPERTS))):
                numbers = random.integers(-9, 9, shape) / 16
                made[f"{place}.lora_{letter}.weight"] = numbers.astype(np.float32)
    return made


def as_it_is(tensors: Tensors) -> Tensors:
    """No change."""
    return tensors


def rename(*pairs: tuple[str, str]) -> Change:
    """Other names."""

    def change(tensors):
        made = {}
        for name, tensor in tensors.items():
            for old, new in pairs:
                name = re.sub(old, new, name)
            made[name] = tensor
        return made

    return change


def without(pattern: str) -> Change:
    """Some tensors fewer."""
    return lambda tensors: {n: x for n, x in tensors.items() if not re.search(pattern, n)}


def more(**shapes: tuple[int, ...]) -> Change:
    """Some tensors more, by name with `__` for dots."""
    return lambda tensors: (
        tensors
        | {
            f"{STEM}{name.replace('__', '.')}": np.ones(shape, np.float32)
            for name, shape in shapes.items()
        }
    )


def wider(pattern: str, rank: int) -> Change:
    """Another rank for some modules: the factors stand twice, half as large."""

    def change(tensors):
        made = dict(tensors)
        for name, tensor in tensors.items():
            if re.search(pattern, name):
                axis = 0 if "lora_A" in name else 1
                made[name] = np.concatenate([tensor] * (rank // tensor.shape[axis]), axis)
        return made

    return change


def cut(pattern: str, rows: int) -> Change:
    """So many rows of some B, again and again where there are fewer: LoRAs for layers of another size."""
    return lambda tensors: {
        name: np.resize(tensor, (rows, tensor.shape[1])) if re.search(pattern, name) else tensor
        for name, tensor in tensors.items()
    }


def both(*changes: Change) -> Change:
    """One change after another."""

    def change(tensors):
        for each in changes:
            tensors = each(tensors)
        return tensors

    return change


def peft(change: Change = as_it_is, *, tensors=None, other=None, **config: Any):
    """PEFT's two files; `...` takes a field away, and `other` are files beside them."""

    def make(folder: Path, model_type: str) -> None:
        given = tensors() if tensors is not None else factors(MODULES[model_type])
        made = change(given)
        about = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": _leaves(made),
            "peft_version": "0.21.2",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
        }
        if any(re.search(r"experts(\.base_layer)?\.lora_", name) for name in made):
            about["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        about = {k: v for k, v in (about | config).items() if v is not ...}
        write_tensors(folder / WEIGHTS, made, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(about))
        for name, data in (other or {}).items():
            (folder / name).write_text(json.dumps(data))

    return make


def _leaves(tensors: Tensors) -> list[str]:
    found = (re.fullmatch(r".*?([^.]+)\.lora_\w+(\.weight)?", name) for name in tensors)
    return sorted({hit[1] for hit in found if hit} - {"experts", "base_layer"})


def mlx(change: Change = as_it_is, config=None, *, bare=False, **parameters: Any):
    """mlx-lm's two files of a dense adapter: (in, rank) and (rank, out); `bare`: without the config."""

    def make(folder: Path, model_type: str) -> None:
        made = {}
        for name, tensor in factors(MODULES[model_type]).items():
            name = name.removeprefix(STEM).removesuffix(".weight")
            made[re.sub(r"lora_([AB])", lambda hit: hit[0].lower(), name)] = tensor.T
        made = change(made)
        keys = sorted({n.split(".", 3)[3].rpartition(".")[0] for n in made if ".layers." in n})
        about = {
            "fine_tune_type": "lora",
            "num_layers": LAYERS,
            "lora_parameters": {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": keys}
            | parameters,
        }
        about["lora_parameters"] = {
            k: v for k, v in about["lora_parameters"].items() if v is not ...
        }
        about = {k: v for k, v in (about | (config or {})).items() if v is not ...}
        write_tensors(folder / "adapters.safetensors", made, {})
        if not bare:
            (folder / CONFIG).write_text(json.dumps(about))

    return make


def gguf(change: Change = as_it_is, *, architecture="llama", alpha=ALPHA, dtype=None, tokens=None):
    """llama.cpp's file of a dense adapter, by the package gguf."""
    places = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }

    def make(folder: Path, model_type: str) -> None:
        from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
        from gguf.quants import quantize

        made = {}
        for name, tensor in factors(MODULES[model_type]).items():
            hit = re.fullmatch(r".*layers\.(\d+)\.(.+)\.lora_([AB])\.weight", name)
            made[f"blk.{hit[1]}.{places[hit[2]]}.weight.lora_{hit[3].lower()}"] = tensor
        writer = GGUFWriter(str(folder / "adapter.gguf"), architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        if tokens:
            kinds = GGUFValueType.ARRAY, GGUFValueType.UINT32
            writer.add_key_value("adapter.alora.invocation_tokens", tokens, kinds[0], kinds[1])
        for name, tensor in change(made).items():
            if dtype is not None and tensor.shape[-1] % 32 == 0:
                kind = GGMLQuantizationType[dtype]
                writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, np.ascontiguousarray(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return make


def switches(tensors: Tensors) -> Tensors:
    """mlx-lm's stacked experts instead of single ones, (E, rank, in) and (E, out, rank)."""
    made = {n: x for n, x in tensors.items() if ".experts." not in n}
    for layer in range(LAYERS):
        for leaf in NAMES:
            for letter in "ab":
                place = f"model.layers.{layer}.mlp.{{}}.{leaf}.lora_{letter}"
                each = [tensors[place.format(f"experts.{e}")].T for e in range(EXPERTS)]
                made[place.format("switch_mlp")] = np.stack(each)
    return made


def native() -> Tensors:
    """Grouped factors of experts as NeMo has them in memory."""
    random, made = np.random.default_rng(0), {}
    sizes = {"gate_and_up": (SIZE, 2 * INNER), "down": (INNER, SIZE)}
    for layer in range(LAYERS):
        for part, (into, out) in sizes.items():
            place = f"{STEM}model.layers.{layer}.mlp.experts.lora_{part}_"
            for letter, shape in (("A", (EXPERTS, into, RANK)), ("B", (EXPERTS, RANK, out))):
                made[place + letter] = (random.integers(-9, 9, shape) / 16).astype(np.float32)
    return made


def gate_for_up(tensors: Tensors) -> Tensors:
    """Give up gate's A, as NeMo writes one adapter per expert."""
    return {
        name: tensors[name.replace("up_proj", "gate_proj")] if "lora_A" in name else tensor
        for name, tensor in tensors.items()
    }


STAMPED = {OWN: {"paramwrapper_layout": "peft-0.19.1", "target_modules": []}}
PLAIN = {OWN: {"target_modules": []}}
LOST = r"experts\.1\.(w3|up_proj)"
GROUPED = {"lora_B_layout": "grouped_by_expert"}


def stacked(leaves=("w1", "w2", "w3")) -> Tensors:
    """One 3-D tensor for all experts, as Tinker has them."""
    made = factors(DENSE)
    for layer in range(LAYERS):
        for leaf in leaves:
            out, into = ROOTS[leaf]
            place = f"{STEM}model.layers.{layer}.mlp.experts.{leaf}.lora_"
            made[f"{place}A.weight"] = np.ones((EXPERTS, RANK, into), np.float32)
            made[f"{place}B.weight"] = np.ones((EXPERTS, out, RANK), np.float32)
    return made


def case(tool, name, verdict, reason, model_type, make, based=True, **fields):
    """A case; `fields` are of the base's config."""
    return Case(tool, name, verdict, reason, model_type, make, fields, based)


def _served(tool, *, packed_reason):
    """What is asked of vLLM and SGLang alike."""
    return [
        case(tool, "plain", "full", "", "llama", peft()),
        case(tool, "other files", "fails", "its config is not PEFT's", "llama", mlx()),
        case(tool, "no rank", "fails", "has no r", "llama", peft(r=...)),
        case(tool, "dora", "fails", "does not have DoRA", "llama", peft(use_dora=True)),
        case(tool, "half", "fails", "no other half", "llama", peft(without(r"v_proj\.lora_B"))),
        case(tool, "packed", *packed_reason, "qwen3_moe", peft(tensors=packed)),
    ]


CASES = [
    # vLLM
    *_served("vllm", packed_reason=("fails", "--enable-mixed-moe-lora-format")),
    case("vllm", "one by one", "full", "", "qwen3_moe", peft()),
    case(
        "vllm",
        "another key",
        "fails",
        "no key that it knows",
        "llama",
        peft(more(model__norm__weight=(SIZE,))),
    ),
    case(
        "vllm",
        "refused",
        "fails",
        "takes no LoRA for",
        "dbrx",
        peft(tensors=lambda: factors(DENSE)),
    ),
    case("vllm", "bias", "fails", "bias is not none", "llama", peft(bias="all")),
    case("vllm", "no number", "fails", "lora_alpha is 'x'", "llama", peft(lora_alpha="x")),
    case("vllm", "lora_bias", "fails", "does not have lora_bias", "llama", peft(lora_bias=True)),
    case(
        "vllm",
        "saved",
        "fails",
        "no modules_to_save but",
        "llama",
        peft(modules_to_save=["lm_head"]),
    ),
    case(
        "vllm",
        "init",
        "fails",
        "does not have init_lora_weights",
        "llama",
        peft(init_lora_weights="pissa"),
    ),
    case(
        "vllm",
        "unembed",
        "fails",
        "the head is called lm_head",
        "llama",
        peft(tensors=lambda: factors(DENSE | {"unembed_tokens": (WORDS, SIZE)})),
    ),
    case(
        "vllm",
        "head",
        "fails",
        "lm_head cannot be adapted",
        "deepseek_v3",
        peft(tensors=lambda: factors({"lm_head": (WORDS, SIZE)})),
    ),
    case(
        "vllm",
        "beyond",
        "partial",
        "has this path, and nothing",
        "llama",
        peft(rename((r"layers\.1\.", "layers.9."))),
    ),
    case(
        "vllm",
        "of a vlm",
        "none",
        "has no language_model",
        "llama",
        peft(rename(("model.layers", "model.language_model.layers"))),
    ),
    case(
        "vllm",
        "of a smaller base",
        "wrong-scale",
        "the rest stays zero",
        "llama",
        peft(cut(r"o_proj\.lora_B", SIZE // 2)),
    ),
    case(
        "vllm",
        "of a larger base",
        "fails",
        f"{2 * SIZE} where the base has {SIZE}",
        "llama",
        peft(cut(r"o_proj\.lora_B", 2 * SIZE)),
    ),
    case("vllm", "rank", "wrong-scale", "taken from the config", "llama", peft(r=2)),
    case(
        "vllm",
        "shared",
        "fails",
        "needs --enable-moe-shared-loras",
        "qwen3_moe",
        peft(tensors=stacked),
    ),
    case(
        "vllm",
        "apart",
        "fails",
        "experts of this model packed",
        "gpt_oss",
        peft(tensors=lambda: factors(MODULES["qwen3_moe"])),
    ),
    case(
        "vllm",
        "odd names",
        "fails",
        "an expert's projections are",
        "qwen3_moe",
        peft(rename(("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))),
    ),
    case(
        "vllm",
        "block",
        "partial",
        "the module is called block_sparse_moe",
        "mixtral",
        peft(rename(("block_sparse_moe", "mlp"))),
    ),
    case("vllm", "one fewer", "fails", "demands every expert", "qwen3_moe", peft(without(LOST))),
    case(
        "vllm",
        "ranks",
        "fails",
        "the ranks of the experts differ",
        "qwen3_moe",
        peft(
            wider(r"experts\.1\.up_proj", 2 * RANK),
            rank_pattern={r"experts\.1\.up_proj": 2 * RANK},
            alpha_pattern={r"experts\.1\.up_proj": ALPHA},
        ),
    ),
    case("vllm", "stack", "full", "", "gpt_oss", peft(tensors=packed)),
    case(
        "vllm",
        "one parameter",
        "fails",
        "only one is there",
        "gpt_oss",
        peft(
            tensors=lambda: packed(parameters=("down_proj",)),
            target_parameters=["mlp.experts.down_proj"],
        ),
    ),
    case(
        "vllm",
        "swapped",
        "fails",
        "in and out exchanged",
        "qwen3_vl_moe",
        peft(
            rename(("model.layers", "model.language_model.layers")),
            tensors=lambda: packed(swap=True),
            peft_version="0.18.1",
        ),
        text_config={"model_type": "qwen3_vl_moe_text"} | FIELDS | MORE["qwen3_moe"],
    ),
    case(
        "vllm",
        "grouped",
        "wrong-scale",
        "Unsloth grouped",
        "gpt_oss",
        peft(tensors=packed, **GROUPED),
    ),
    case("vllm", "rslora", "full", "", "llama", peft(use_rslora=True)),
    # SGLang
    *_served("sglang", packed_reason=("fails", "packed experts match no target")),
    case(
        "sglang",
        "of another base",
        "fails",
        f"{SIZE // 2} where the base has {SIZE}",
        "llama",
        peft(cut(r"o_proj\.lora_B", SIZE // 2)),
    ),
    case("sglang", "one by one", "full", "", "qwen3_moe", peft()),
    case("sglang", "loha", "fails", "it has LoRA only", "llama", peft(peft_type="LOHA")),
    case(
        "sglang",
        "new tokens",
        "fails",
        "no adapter that adds tokens",
        "llama",
        peft(other={"added_tokens.json": {"<new>": WORDS}}),
    ),
    case(
        "sglang",
        "known tokens",
        "full",
        "",
        "llama",
        peft(other={"added_tokens.json": {"<known>": WORDS - 1}}),
    ),
    case(
        "sglang",
        "expression",
        "fails",
        "target_modules is an expression",
        "llama",
        peft(target_modules=".*proj"),
    ),
    case("sglang", "w1", "fails", "no buffers", "mixtral", peft()),
    case(
        "sglang",
        "norm",
        "fails",
        "it matches no target",
        "llama",
        peft(more(model__layers__0__input_layernorm__weight=(SIZE,))),
    ),
    case(
        "sglang",
        "last norm",
        "partial",
        "LoRA factors only",
        "llama",
        peft(more(model__norm__weight=(SIZE,))),
    ),
    case(
        "sglang",
        "odd factor",
        "fails",
        "no factor that it knows",
        "llama",
        peft(more(model__layers__0__self_attn__q_proj__lora_magnitude_vector=(SIZE,))),
    ),
    case(
        "sglang",
        "router",
        "fails",
        "no module that it can adapt",
        "qwen3_moe",
        peft(
            tensors=lambda: factors(MODULES["qwen3_moe"] | {"mlp.gate": (EXPERTS, SIZE)}),
            target_modules=[f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")],
        ),
    ),
    case(
        "sglang",
        "router named",
        "fails",
        "no buffers",
        "qwen3_moe",
        peft(tensors=lambda: factors(MODULES["qwen3_moe"] | {"mlp.gate": (EXPERTS, SIZE)})),
    ),
    case(
        "sglang",
        "unnamed",
        "fails",
        "target_modules does not name it",
        "llama",
        peft(target_modules=["q_proj", "k_proj", "v_proj"]),
    ),
    case("sglang", "q alone", "fails", "(KeyError)", "llama", peft(without("v_proj"))),
    case("sglang", "no q", "fails", "q_proj is missing", "llama", peft(without("q_proj"))),
    case("sglang", "no gate", "fails", "gate_proj is missing", "llama", peft(without("gate_proj"))),
    case("sglang", "no up", "full", "", "llama", peft(without("up_proj"))),
    case("sglang", "no k", "full", "", "llama", peft(without("k_proj"))),
    case(
        "sglang",
        "beyond",
        "fails",
        "no such layer (IndexError)",
        "llama",
        peft(rename((r"layers\.1\.", "layers.9."))),
    ),
    case(
        "sglang",
        "ranks",
        "fails",
        "its buffers have the config's",
        "llama",
        peft(wider("o_proj", 8), rank_pattern={"o_proj": 8}, alpha_pattern={"o_proj": ALPHA}),
    ),
    case("sglang", "rslora", "wrong-scale", "not read use_rslora", "llama", peft(use_rslora=True)),
    case(
        "sglang",
        "alphas",
        "wrong-scale",
        "not read alpha_pattern",
        "llama",
        peft(alpha_pattern={"o_proj": 32}),
    ),
    # Unsloth
    case(
        "unsloth",
        "of another base",
        "fails",
        f"{SIZE // 2} where the base has {SIZE}",
        "llama",
        peft(cut(r"o_proj\.lora_B", SIZE // 2)),
    ),
    case("unsloth", "plain", "full", "", "llama", peft()),
    case("unsloth", "packed", "full", "", "qwen3_moe", peft(tensors=packed)),
    case("unsloth", "grouped", "full", "", "qwen3_moe", peft(tensors=packed, **GROUPED)),
    case("unsloth", "one by one", "full", "", "qwen3_moe", peft(peft_version="0.18.1")),
    case("unsloth", "other files", "fails", "its config is not PEFT's", "llama", mlx()),
    case(
        "unsloth",
        "stamp",
        "full",
        "NeMo's stamp is not read",
        "qwen3_moe",
        peft(tensors=packed, other=STAMPED),
    ),
    case(
        "unsloth",
        "norm",
        "full",
        "",
        "llama",
        peft(more(model__norm__weight=(SIZE,))),
    ),
    case(
        "unsloth",
        "odd factor",
        "partial",
        "PEFT knows no such key",
        "llama",
        peft(more(model__layers__0__self_attn__q_proj__lora_C__weight=(RANK, RANK))),
    ),
    case(
        "unsloth",
        "empty",
        "fails",
        "no adapter_model.safetensors with tensors",
        "llama",
        peft(lambda _: {}),
    ),
    case("unsloth", "no config", "fails", "it has no adapter_config.json", "llama", gguf()),
    case("unsloth", "no B", "partial", "no lora_B", "llama", peft(without(r"v_proj\.lora_B"))),
    case("unsloth", "no A", "wrong-scale", "no lora_A", "llama", peft(without(r"v_proj\.lora_A"))),
    case(
        "unsloth", "bare", "none", "have no 'base_model.model.'", "llama", peft(rename((STEM, "")))
    ),
    case(
        "unsloth",
        "tinker",
        "partial",
        "no module of the model has this path",
        "qwen3_moe",
        peft(tensors=stacked),
    ),
    case(
        "unsloth",
        "swapped",
        "fails",
        "in and out exchanged",
        "qwen3_moe",
        peft(tensors=lambda: packed(swap=True), peft_version="0.18.1"),
    ),
    case(
        "unsloth",
        "apart",
        "fails",
        "no module for a single expert",
        "granitemoe",
        peft(
            rename(("mlp", "block_sparse_moe")),
            tensors=lambda: factors(
                {k: s for k, s in MODULES["qwen3_moe"].items() if "experts" in k}
            ),
        ),
        num_local_experts=EXPERTS,
    ),
    case(
        "unsloth",
        "unnamed",
        "partial",
        "neither target_modules nor",
        "llama",
        peft(target_modules=["q_proj"]),
    ),
    case(
        "unsloth",
        "beyond",
        "partial",
        "no module of the model has this path",
        "llama",
        peft(rename((r"layers\.1\.", "layers.9."))),
    ),
    case(
        "unsloth",
        "partly apart",
        "partial",
        "no module for a single expert",
        "granitemoe",
        peft(rename(("mlp", "block_sparse_moe")), tensors=lambda: factors(MODULES["qwen3_moe"])),
        num_local_experts=EXPERTS,
    ),
    case("unsloth", "rank", "fails", "its rank is", "llama", peft(r=3)),
    # NeMo Automodel
    case("nemo", "plain", "full", "", "llama", peft(other=PLAIN)),
    case("nemo", "packed", "full", "", "qwen3_moe", peft(tensors=packed, other=STAMPED)),
    case("nemo", "native", "full", "", "qwen3_moe", peft(tensors=native, other=PLAIN)),
    case(
        "nemo",
        "one by one",
        "full",
        "",
        "qwen3_moe",
        peft(gate_for_up, other=PLAIN),
    ),
    case("nemo", "other files", "fails", "its config is not PEFT's", "llama", mlx()),
    case("nemo", "no rank", "fails", "has no r", "llama", peft(r=..., other=PLAIN)),
    case("nemo", "alone", "fails", "from which it takes what is adapted", "llama", peft()),
    case(
        "nemo",
        "unknown stamp",
        "fails",
        "that it does not know",
        "qwen3_moe",
        peft(tensors=packed, other={OWN: {"paramwrapper_layout": "peft-7"}}),
    ),
    case(
        "nemo",
        "embedding",
        "partial",
        "is no layer that it adapts",
        "llama",
        peft(
            tensors=lambda: (
                factors(DENSE)
                | {
                    f"{STEM}model.embed_tokens.lora_embedding_A": np.ones(
                        (RANK, WORDS), np.float32
                    ),
                    f"{STEM}model.embed_tokens.lora_embedding_B": np.ones((SIZE, RANK), np.float32),
                }
            ),
            other=PLAIN,
        ),
    ),
    case(
        "nemo",
        "router",
        "partial",
        "is no layer that it adapts",
        "qwen3_moe",
        peft(tensors=lambda: factors(DENSE | {"mlp.gate": (EXPERTS, SIZE)}), other=PLAIN),
    ),
    case(
        "nemo",
        "other experts",
        "fails",
        "has other experts for this model",
        "gpt_oss",
        peft(tensors=packed, other=STAMPED),
    ),
    case(
        "nemo",
        "no B",
        "partial",
        "it has no lora_B",
        "llama",
        peft(without(r"v_proj\.lora_B"), other=PLAIN),
    ),
    case(
        "nemo",
        "no A",
        "wrong-scale",
        "it has no lora_A",
        "llama",
        peft(without(r"v_proj\.lora_A"), other=PLAIN),
    ),
    case(
        "nemo",
        "no down",
        "full",
        "",
        "qwen3_moe",
        peft(both(gate_for_up, without("down_proj")), other=PLAIN),
    ),
    case(
        "nemo",
        "bare",
        "full",
        "",
        "llama",
        peft(rename((STEM, "")), other=PLAIN),
    ),
    case(
        "nemo",
        "beyond",
        "partial",
        "no module of the model has this path",
        "llama",
        peft(rename((r"layers\.1\.", "layers.9.")), other=PLAIN),
    ),
    case(
        "nemo",
        "one fewer",
        "partial",
        "not every expert is there",
        "qwen3_moe",
        peft(both(gate_for_up, without(LOST)), other=PLAIN),
    ),
    case("nemo", "up's own", "wrong-scale", "gate's lora_A for up", "qwen3_moe", peft(other=PLAIN)),
    case(
        "nemo",
        "one parameter",
        "fails",
        "of one parameter alone",
        "qwen3_moe",
        peft(
            tensors=lambda: packed(parameters=("gate_up_proj",)),
            target_parameters=["mlp.experts.gate_up_proj"],
            other=STAMPED,
        ),
    ),
    case(
        "nemo",
        "grouped",
        "wrong-scale",
        "Unsloth packed it by expert",
        "qwen3_moe",
        peft(tensors=packed, other=STAMPED, **GROUPED),
    ),
    case(
        "nemo",
        "wrong stamp",
        "fails",
        "the shapes say otherwise",
        "qwen3_moe",
        peft(tensors=packed, other={OWN: {"paramwrapper_layout": "peft-0.18"}}),
    ),
    case(
        "nemo",
        "no stamp",
        "fails",
        "do not tell how experts are packed",
        "qwen3_moe",
        peft(tensors=lambda: packed(inner=SIZE // 2), other=PLAIN),
        moe_intermediate_size=SIZE // 2,
    ),
    case(
        "nemo",
        "no stamp, told by sizes",
        "full",
        "",
        "qwen3_moe",
        peft(tensors=packed, other=PLAIN),
    ),
    case(
        "nemo",
        "ranks",
        "fails",
        "its layers have the config's",
        "llama",
        peft(
            wider("o_proj", 8),
            rank_pattern={"o_proj": 8},
            alpha_pattern={"o_proj": ALPHA},
            other=PLAIN,
        ),
    ),
    case(
        "nemo",
        "rslora",
        "wrong-scale",
        "not read use_rslora",
        "llama",
        peft(use_rslora=True, other=PLAIN),
    ),
    case(
        "nemo",
        "alphas",
        "wrong-scale",
        "not read alpha_pattern",
        "llama",
        peft(alpha_pattern={"o_proj": 32}, other=PLAIN),
    ),
    case(
        "nemo",
        "norm",
        "partial",
        "it reads factors only",
        "llama",
        peft(more(model__norm__weight=(SIZE,)), other=PLAIN),
    ),
    # mlx-lm
    case("mlx", "plain", "full", "", "llama", mlx()),
    case("mlx", "peft", "fails", "there is no adapters.safetensors", "llama", peft()),
    case("mlx", "no config", "fails", "no adapter_config.json", "llama", mlx(bare=True)),
    case("mlx", "empty", "none", "adapters.safetensors is empty", "llama", mlx(lambda _: {})),
    case(
        "mlx",
        "whole weights",
        "full",
        "replaces whole weights",
        "llama",
        mlx(
            lambda _: {"model.norm.weight": np.ones(SIZE, np.float32)},
            {"fine_tune_type": "full"},
        ),
    ),
    case(
        "mlx",
        "experts with dora",
        "fails",
        "stacked experts have no DoRA",
        "qwen3_moe",
        mlx(switches, {"fine_tune_type": "dora"}),
    ),
    case("mlx", "experts", "full", "", "qwen3_moe", mlx(switches)),
    case(
        "mlx",
        "flat experts",
        "fails",
        "experts stand one below the other",
        "qwen3_moe",
        mlx(
            lambda t: {
                n: x.reshape(-1, x.shape[2]) if n.endswith("lora_a") and x.ndim == 3 else x
                for n, x in switches(t).items()
            }
        ),
    ),
    case(
        "mlx",
        "no parameters",
        "fails",
        "has no lora_parameters",
        "llama",
        mlx(config={"lora_parameters": ...}),
    ),
    case("mlx", "no scale", "fails", "does not say scale", "llama", mlx(scale=...)),
    case(
        "mlx", "old", "fails", "does not say num_layers", "llama", mlx(config={"num_layers": ...})
    ),
    case(
        "mlx",
        "other parameter",
        "fails",
        "no layer has a parameter called",
        "llama",
        mlx(lambda t: t | {"model.layers.0.self_attn.q_proj.m": np.ones(SIZE, np.float32)}),
    ),
    case(
        "mlx",
        "head",
        "fails",
        "in no block",
        "llama",
        mlx(
            lambda t: (
                t
                | {
                    "lm_head.lora_a": np.ones((SIZE, RANK), np.float32),
                    "lm_head.lora_b": np.ones((RANK, WORDS), np.float32),
                }
            )
        ),
    ),
    case("mlx", "keys", "fails", "keys does not name it", "llama", mlx(keys=["self_attn.q_proj"])),
    case(
        "mlx",
        "last block",
        "fails",
        "only the last 1 blocks",
        "llama",
        mlx(config={"num_layers": 1}),
    ),
    case("mlx", "no B", "partial", "no lora_b", "llama", mlx(without(r"v_proj\.lora_b"))),
    case("mlx", "no A", "wrong-scale", "no lora_a", "llama", mlx(without(r"v_proj\.lora_a"))),
    case("mlx", "rank", "fails", "its rank is", "llama", mlx(rank=2)),
    case(
        "mlx",
        "shape",
        "fails",
        "its shape is another one",
        "llama",
        mlx(
            lambda t: {
                n: x[: SIZE // 2] if n.endswith("q_proj.lora_a") else x for n, x in t.items()
            }
        ),
    ),
    case(
        "mlx",
        "unknown name",
        "fails",
        "the base has no such weight",
        "llama",
        mlx(rename(("o_proj", "out_proj"))),
    ),
    # llama.cpp
    case("llama.cpp", "plain", "full", "", "llama", gguf()),
    case("llama.cpp", "peft", "fails", "it is no GGUF file", "llama", peft()),
    case(
        "llama.cpp",
        "architecture",
        "fails",
        "its architecture is qwen2",
        "llama",
        gguf(architecture="qwen2"),
    ),
    case(
        "llama.cpp",
        "norm",
        "partial",
        "weights of norms",
        "llama",
        gguf(lambda t: t | {"blk.0.attn_norm.weight": np.ones(SIZE, np.float32)}),
    ),
    case("llama.cpp", "tokens", "full", "after the tokens", "llama", gguf(tokens=[1, 2])),
    case(
        "llama.cpp",
        "quantised",
        "full",
        "its factors are quantised",
        "llama",
        gguf(dtype="Q8_0"),
    ),
    case(
        "llama.cpp",
        "beyond",
        "fails",
        "the base has no such weight",
        "llama",
        gguf(rename((r"blk\.1\.", "blk.9."))),
    ),
    case(
        "llama.cpp",
        "shape",
        "fails",
        "its shape is another one",
        "llama",
        gguf(
            lambda t: {
                n: x[: len(x) // 2] if n.endswith("ffn_down.weight.lora_b") else x
                for n, x in t.items()
            }
        ),
    ),
    case("llama.cpp", "half", "fails", "lora_b", "llama", gguf(without(r"attn_v\.weight\.lora_b"))),
]
