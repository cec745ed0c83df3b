"""Learn Megatron-Bridge's layout of llama and qwen3_moe (one rank, names of its Transformer Engine layers).

pip install --no-deps --target WHERE megatron-bridge==0.3.1
python scripts/learn/megatron_books.py OUT WHERE

Megatron-Core and Transformer Engine want a GPU, so stand-ins take their place here: the names come from the bridge's
own registry of mappings, fused tensors are made by the mappings' own functions, and what it maps one to one is copied,
which is what it does on one rank.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

from sizes import LLAMA, write_books

REAL = ("megatron.bridge.models.conversion.param_mapping", ("_bridge", "deepseek.common"))
"""Modules that are run; the rest of the package is stood in for."""
CONFIGS = {
    "llama": LLAMA,
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
MODULES = {
    "llama": "megatron.bridge.models.llama.llama_bridge",
    "qwen2": "megatron.bridge.models.qwen.qwen2_bridge",
    "qwen3": "megatron.bridge.models.qwen.qwen3_bridge",
    "qwen3_moe": "megatron.bridge.models.qwen.qwen3_moe_bridge",
    "mistral": "megatron.bridge.models.mistral.mistral_bridge",
    "deepseek_v2": "megatron.bridge.models.deepseek.deepseek_v2_bridge",
    "deepseek_v3": "megatron.bridge.models.deepseek.deepseek_v3_bridge",
}


class Bridge:
    """In place of the base class of bridges."""

    @staticmethod
    def register_bridge(**_):
        return lambda cls: cls


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that have whatever is asked of them."""

    def __init__(self, where):
        self.where = where

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ("megatron", "transformer_engine"):
            return None
        file = self.where / (name.replace(".", "/") + ".py")
        stood_in = name.endswith(("model_bridge", "auto_bridge", "peft_bridge"))
        if name == REAL[0] or (name.endswith(REAL[1]) and "models." in name and not stood_in):
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        held = {"MegatronModelBridge": Bridge, "MegatronMappingRegistry": lambda *each: each}
        module.__getattr__ = lambda name: held.get(name) or _made(held, name)
        return module

    def exec_module(self, module):
        """Nothing is there to run."""


def _made(held, name):
    if name.startswith("__"):
        raise AttributeError(name)
    # A name with a capital letter may be the base of a class.
    held[name] = type(name, (), {}) if name[0].isupper() else MagicMock(name=name)
    return held[name]


def mappings_of(name):
    """The bridge's own mappings, those for one layout of Megatron's layers."""
    module = importlib.import_module(MODULES[name])
    found = next(
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, Bridge) and cls is not Bridge
    )
    return found().mapping_registry()


def matches(pattern, names):
    """The numbers that stand in place of a pattern's ``*``, for each name that fits."""
    found = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    for name in names:
        match = found.fullmatch(name)
        if match is not None:
            yield match.groups()


def fill(pattern, numbers):
    given = iter(numbers)
    return re.sub(r"\*", lambda _: next(given), pattern)


def converter(name, config):
    """Megatron's state dict of a file's, by the bridge's mappings."""
    mappings = mappings_of(name)
    merge = sys.modules[REAL[0]].merge_qkv_weights
    provider = SimpleNamespace(
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config.get("head_dim"),
        hidden_size=config["hidden_size"],
    )

    def convert(state):
        made, used = {}, set()
        for each in mappings:
            hf = each.hf_param if isinstance(each.hf_param, dict) else {"": each.hf_param}
            for numbers in matches(next(iter(hf.values())), state):
                names = {part: fill(pattern, numbers) for part, pattern in hf.items()}
                target = fill(each.megatron_param, numbers)
                if used & set(names.values()) or any(n not in state for n in names.values()):
                    continue
                used |= set(names.values())
                parts = {part: state[n] for part, n in names.items()}
                if "q" in parts:
                    made[target] = merge(provider, parts["q"], parts["k"], parts["v"])
                elif "gate" in parts:
                    type(each).tp_size = property(lambda _: 1)
                    made[target] = each.hf_to_megatron(parts, None)
                else:
                    made[target] = parts[""].clone()
        return made

    return convert


def main():
    """Learn one book for each config."""
    sys.meta_path.insert(0, StandIns(Path(sys.argv[2])))
    write_books(
        "megatron",
        CONFIGS,
        lambda config: converter(config["model_type"], config),
        with_torch=True,
        source="megatron-bridge 0.3.1, its mappings on one rank, run on labels by scripts/learn/megatron_books.py",
    )


if __name__ == "__main__":
    main()
