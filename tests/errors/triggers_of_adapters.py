"""What provokes the codes of adapters: what cannot follow, what has several readings, what is wrong."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from errors.lab import EXPERT, QUERY, START, V4, V5, kept, provokes, renamed, without

import regraft
from regraft.dialects import registry
from regraft.dialects.peft.source import find_adapters
from regraft.planning.model import load_model
from regraft.rules import book as book_module
from regraft.storage import expressions
from regraft.storage.safetensors import write_tensors

LIBRARY = Path(book_module.__file__).parent / "library"

# Refused


@provokes("no-image")
def _(lab):
    lab.convert_adapter(case="mixtral__dora")


@provokes("max-error")
def _(lab):
    lab.convert(lab.adapter(), via="svd:1", max_error=1e-3)


@provokes("memory")
def _(lab):
    name = "model.layers.0.self_attn.q_proj.weight"
    for folder in ("base", "tuned"):
        (lab.path / folder).mkdir()
        weight = np.ones((4, 4), "f4") * (folder == "tuned")
        write_tensors(lab.path / folder / "model.safetensors", {name: weight}, {})
        (lab.path / folder / "config.json").write_text('{"model_type": "llama"}')
    regraft.extract(lab.path / "base", lab.path / "tuned", lab.out, rank=1, memory="1MB")


@provokes("single-expert")
def _(lab):
    lab.convert_adapter(
        lambda tensors: {
            n: t for n, t in tensors.items() if ".experts." not in n or "experts.0." in n
        },
        base=lab.base(num_local_experts=1),
        to=f"{V5}/peft-0.18",
    )


@provokes("partial-weights")
def _(lab):
    def save(tensors):
        """Every expert's gate whole, and no expert's up."""
        end = ".w1.lora_B.weight"
        rest = without(".w1.lora_")(tensors)
        for name in (name for name in tensors if name.endswith(end)):
            rows = tensors[name].shape[0]
            columns = tensors[name.replace("lora_B", "lora_A")].shape[1]
            rest[name.removesuffix(end) + ".w1.weight"] = np.ones((rows, columns), np.float32)
        return rest

    lab.convert_adapter(save, modules_to_save=["w1"])


@provokes("needs-base-weights")
def _(lab):
    lab.convert_adapter(case="jamba__all_linear_bias", base=lab.base("jamba"))


@provokes("nothing-left")
def _(lab):
    lab.convert_adapter(
        kept("dt_proj.lora_"),
        "jamba",
        case="jamba__all_linear_bias",
        target_modules=["dt_proj"],
        bias="none",
    )


@provokes("dialect")
def _(lab):
    lab.convert_adapter(lambda t: {"layers.0.attn.q_proj.lora_a.weight": next(iter(t.values()))})


@provokes("not-representable")
def _(lab):
    lab.convert_adapter(alpha_pattern={"w1": 1e300})


@provokes("not-finite")
def _(lab):
    def spoil(tensors):
        tensors[EXPERT.format(0, "w1", "A")][0, 0] = np.nan

    lab.convert_adapter(spoil)


# More than one reading, or none


@provokes("packing")
def _(lab):
    lab.convert_adapter(base=None, case="granitemoe__params_attn", to=V4, peft_version=...)


@provokes("which-model")
def _(lab):
    lab.convert_adapter(base=None, case="mixtral__router", auto_mapping=None)


@provokes("model-needed")
def _(lab):
    change = renamed("model.layers.", "tower.blocks.")
    lab.convert_adapter(change, base=None, auto_mapping=None, target_modules=".*")


@provokes("unknown-model")
def _(lab):
    lab.convert_adapter(
        base=lab.base(model_type="novel", architectures=["NovelModel"]), auto_mapping=None
    )


@provokes("which-dialect")
def _(lab):
    class Sure:
        def sniff(self, src):
            return SimpleNamespace(certain=True, why="its own file is there")

    lab.patch.setattr(registry, "dialects", lambda: {"one": Sure(), "other": Sure()})
    registry.dialect_of(lab.adapter())


@provokes("which-layout")
def _(lab):
    text = {
        "model_type": "qwen3_vl_moe_text",
        "hidden_size": 16,
        "moe_intermediate_size": 16,
        "num_experts": 2,
        "num_hidden_layers": 1,
    }
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    config = {"model_type": "qwen3_vl_moe", "text_config": text}
    lab.convert(lab.checkpoint({name: np.zeros((2, 16, 16), np.float32)}, config))


# The adapter


@provokes("not-found")
def _(lab):
    lab.convert(lab.path / "nothing")


@provokes("not-an-adapter")
def _(lab):
    find_adapters(lab.file(b"", "notes.txt"))


@provokes("no-config")
def _(lab):
    src = lab.adapter()
    (src / "adapter_config.json").unlink()
    find_adapters(src)


@provokes("no-weights")
def _(lab):
    src = lab.adapter()
    (src / "adapter_model.safetensors").unlink()
    lab.convert(src)


@provokes("empty")
def _(lab):
    src = lab.adapter()
    (src / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    lab.convert(src)


_FIELDS = {
    "config": {"r": "4"},
    "peft-type": {"peft_type": "LORAA"},
    "targets-nothing": {"target_modules": ["nothing"]},
    "not-targeted": {"target_modules": ["w1", "w2", "w3"]},
    "rank": {"case": "gpt_oss__params_attn", "base": "gpt_oss", "r": 3, "rank_pattern": {}},
}


@provokes(*_FIELDS)
def _(lab, code):
    lab.convert_adapter(**_FIELDS[code])


@provokes("slow-pattern")
def _(lab):
    lab.patch.setattr(expressions, "SECONDS", 0.01)
    expressions.start_file("lora/adapter_config.json")
    for at in range(1000):
        expressions.expression(r"(a|a)*$", "target_modules").fullmatch("a" * 60 + f"!{at}!")


_NAMES = {
    "prefix": (START, START + "model.model."),
    "odd-key": (".lora_A.weight", ".lora_A"),
}


@provokes(*_NAMES)
def _(lab, code):
    lab.convert_adapter(renamed(*_NAMES[code]))


@provokes("adapter-name")
def _(lab):
    def named(tensors):
        rows = enumerate(tensors.items())
        return {k.replace(".weight", f".{'ab'[at % 2]}.weight"): t for at, (k, t) in rows}

    lab.convert_adapter(named)


@provokes("half")
def _(lab):
    lab.convert_adapter(without(QUERY.format("B")))


@provokes("parameter-order")
def _(lab):
    for part in LIBRARY.glob("_*.toml"):
        (lab.path / part.name).write_text(part.read_text())
    text = (LIBRARY / "mixtral.toml").read_text()
    table = text[text.index("[[parameters]]") : text.index("[[carry]]")]
    book = lab.file(text.replace(table, "").encode(), "mixtral.toml")
    lab.convert_adapter(options={"rules": [book]})


@provokes("nesting")
def _(lab):
    change = without(".base_layer.lora_")
    lab.convert_adapter(change, "qwen3_vl_moe", case="qwen3_vl_moe__params")


@provokes("dtype")
def _(lab):
    def cast(tensors):
        tensors[QUERY.format("A")] = tensors[QUERY.format("A")].astype(np.int8)

    lab.convert_adapter(cast)


@provokes("layout")
def _(lab):
    lab.convert_adapter(options={"source": V5})


@provokes("vocabulary")
def _(lab):
    def grow(tensors):
        return {
            name: np.concatenate([t, t[:, :4]], axis=1) if "embedding_A" in name else t
            for name, t in tensors.items()
        }

    lab.convert_adapter(grow, case="mixtral__embedding")


@provokes("no-model-type")
def _(lab):
    load_model(lab.json({"r": 4}, "config.json"))
