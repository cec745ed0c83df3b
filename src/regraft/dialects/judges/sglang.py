"""What SGLang does with an adapter.

Source: sglang 0.5.23, ``srt/lora/lora.py``, ``lora_config.py``, ``utils.py``, ``mem_pool.py``
(``load_lora_weight_to_buffer``, which warns of names that match no target and goes on to look each one's target up, so
that it raises, whatever ``--lora-strict-loading`` says).
"""

from __future__ import annotations

from regraft.dialects.judges.peft_like import (
    LAYER,
    STACK,
    Module,
    PeftLike,
    beyond_layers,
    not_read,
)
from regraft.dialects.judging import FAILS, IGNORED, LOADED, WRONG_SCALE, Files, Judgement
from regraft.dialects.served import Demands, demands_table, language_config
from regraft.dialects.sglang import AS_TARGETS
from regraft.errors import BadInputError
from regraft.storage.json_files import load_json

_JOINED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
    "unembed_tokens": "lm_head",
    "output": "lm_head",
    "vocab_emb": "embed_tokens",
    "embeddings": "embed_tokens",
    "word_embeddings": "embed_tokens",
}
_EVERYTHING = ("all", "all-linear")
_RAISES = "(a warning, and a ValueError as soon as a request asks for the adapter)"


class SglangReader:
    """SGLang's LoRA loader, with the flags it has if none is given."""

    tool = "sglang"
    versions = ("0.5.23",)
    basis = "its source"
    to = "sglang"

    def judge(self, files: Files, version: str) -> Judgement:
        """What it would do."""
        judged = Judgement()
        if not_read(files, "SGLang", judged):
            return judged
        source = PeftLike.of(files)
        config = source.config
        missing = [n for n in ("r", "lora_alpha", "target_modules") if n not in config]
        if missing:
            judged.failures.append(f"adapter_config.json has no {', '.join(missing)}")
            return judged
        if str(config.get("peft_type", "")).lower() != "lora":
            judged.failures.append(f"it has LoRA only, and this is {config.get('peft_type')}")
        if config.get("use_dora"):
            judged.failures.append("it does not have DoRA")
        if _adds_tokens(files):
            judged.failures.append("added_tokens.json: it takes no adapter that adds tokens")
        targets = config["target_modules"]
        if isinstance(targets, str) and targets not in _EVERYTHING:
            judged.failures.append(
                "target_modules is an expression, and it takes a list, all or all-linear"
            )
        named = (
            None
            if isinstance(targets, str) or targets is None
            else {_joined(entry.rpartition(".")[2]) for entry in targets}
        )
        types = files.types
        demands = demands_table("sglang").for_model(types)
        known = {_joined(name) for name in demands.known if name not in AS_TARGETS}
        odd = sorted((named or set()) - known if known else (named or set()) & AS_TARGETS.keys())
        if odd:
            other = f": there it is called {AS_TARGETS[odd[0]]}" if odd[0] in AS_TARGETS else ""
            judged.failures.append(
                f"target_modules names {odd[0]}, for which it has no buffers (NotImplementedError){other}"
            )
        for name in source.others:
            if not LAYER.search(name):
                judged.add(name, IGNORED, "it reads LoRA factors only")
            elif "lora_" in name:
                judged.add(name, FAILS, "no factor that it knows")
            else:
                judged.add(name, FAILS, f"it matches no target {_RAISES}")
        for module in source.modules.values():
            judged.add(module.path, *self._module(module, source, named, demands, files))
        return judged

    def _module(
        self,
        module: Module,
        source: PeftLike,
        named: set[str] | None,
        demands: Demands,
        files: Files,
    ) -> tuple[str, str]:
        if module.a is None or module.b is None:
            return FAILS, "it has no other half"
        if module.packed:
            return FAILS, f"packed experts match no target {_RAISES}"
        unmatched = FAILS if LAYER.search(module.path) else IGNORED
        leaf = (
            AS_TARGETS.get(module.leaf, module.leaf) if ".experts." in module.path else module.leaf
        )
        if leaf in demands.unknown or (demands.known and leaf not in demands.known):
            return unmatched, f"{leaf} is no module that it can adapt"
        if named is not None and _joined(leaf) not in named:
            return unmatched, "target_modules does not name it"
        head = module.path.rpartition(".")[0]
        if module.leaf == "q_proj" and f"{head}.v_proj" not in source.modules:
            return FAILS, "it joins q with v, and v_proj is missing (KeyError)"
        if module.leaf in ("k_proj", "v_proj") and f"{head}.q_proj" not in source.modules:
            return FAILS, "it joins k and v with q, and q_proj is missing"
        if module.leaf == "up_proj" and f"{head}.gate_proj" not in source.modules:
            return FAILS, "it joins up with gate, and gate_proj is missing"
        if beyond_layers(module, files.model):
            return FAILS, "the base has no such layer (IndexError)"
        misfit = source.misfit(module)
        if misfit is not None:
            return FAILS, misfit.reason
        return self._scale(module, source)

    def _scale(self, module: Module, source: PeftLike) -> tuple[str, str]:
        """The scale that it uses for the whole file against what the config says of this module."""
        rank = module.a[-2] if module.a is not None else 0
        whole, config = source.config["lora_alpha"] / source.config["r"], source.config
        if not STACK.fullmatch(module.path) and rank != config["r"] and not module.embedding:
            return (
                FAILS,
                f"the tensors' rank is {rank}, and its buffers have the config's {config['r']}",
            )
        meant = source.scale(module)
        if meant is not None and meant.value != whole:
            why = "use_rslora" if config.get("use_rslora") else "alpha_pattern"
            return WRONG_SCALE, f"it does not read {why}: {whole:g} instead of {meant.value:g}"
        return LOADED, ""


def _adds_tokens(files: Files) -> bool:
    """Whether ``added_tokens.json`` has tokens that the base does not have; those that it has are left out of it."""
    file = files.folder / "added_tokens.json"
    if not file.is_file():
        return False
    try:
        added = load_json(file)
    except BadInputError:
        return False  # a broken file is passed over with a warning
    words = language_config(files.model).get("vocab_size")
    if not isinstance(words, int):
        return bool(added)
    return any(isinstance(number, int) and number >= words for number in added.values())


def _joined(leaf: str) -> str:
    return _JOINED.get(leaf, leaf)


READER = SglangReader()
