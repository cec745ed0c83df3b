"""What vLLM does with an adapter.

Source: vllm 0.33.0, ``lora/peft_helper.py``, ``lora/utils.py``, ``lora/lora_model.py`` (``check_unexpected_modules``),
``lora/model_manager.py`` (``_create_merged_loras_inplace``), ``lora/lora_weights.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from regraft.dialects.judges.peft_like import (
    EXPERT,
    STACK,
    Module,
    PeftLike,
    beyond_layers,
    doubled,
    missing_experts,
    not_read,
    swapped,
)
from regraft.dialects.judging import (
    FAILS,
    IGNORED,
    LOADED,
    WRONG_SCALE,
    WRONG_VALUES,
    Files,
    Judgement,
)
from regraft.dialects.served import Demands, demands_table
from regraft.dialects.tool_files import INNER
from regraft.dialects.unsloth import GROUPED, layouts_of

_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_PLAIN_TEXT = ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
"""Text models whose names in a vision-language model are found as well."""


_HEADS = ("score", "classifier")
"""Heads of classifiers, whose whole weights and biases vLLM takes."""
_PASSED_OVER = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


def _whole(name: str) -> bool:
    """Whether vLLM takes a tensor that is no factor, or passes over it (``parse_fine_tuned_lora_name``)."""
    module, _, leaf = name.rpartition(".")
    head = module.rpartition(".")[2] in _HEADS and leaf in ("weight", "bias")
    return head or name.endswith(_PASSED_OVER)


class VllmReader:
    """vLLM's LoRA loader, with the flags it has if none is given."""

    tool = "vllm"
    versions = ("0.33.0",)
    basis = "its source"
    to = "vllm"

    def judge(self, files: Files, version: str) -> Judgement:
        """What it would do."""
        judged = Judgement()
        if not_read(files, "vLLM", judged):
            return judged
        source = PeftLike.of(files)
        judged.failures += self._config_failures(source.config)
        unknown = [name for name in source.others if not _whole(name)]
        judged.failures += [
            f"{name} is no key that it knows (unsupported LoRA weight)" for name in unknown[:1]
        ]
        types = files.types
        demands = demands_table("vllm").for_model(types)
        refused = [name for name in types if name in demands.refuses]
        if refused:
            judged.failures.append(f"it takes no LoRA for {refused[0]}")
        self._experts(source, demands, files, judged)
        done = {target.key for target in judged.targets}
        composite = files.model is not None and (
            files.model.is_composite() or any(name in _PLAIN_TEXT for name in types)
        )
        for module in source.modules.values():
            if module.path not in done:
                outcome, reason = self._module(module, source, demands, files, composite=composite)
                judged.add(module.path, outcome, reason)
        return judged

    def _config_failures(self, config: Mapping[str, Any]) -> list[str]:
        missing = [n for n in ("r", "lora_alpha", "target_modules") if n not in config]
        told = [f"adapter_config.json has no {', '.join(missing)}"] if missing else []
        if config.get("bias", "none") != "none":
            told.append("bias is not none")
        for name, what in (
            ("use_dora", "DoRA"),
            ("lora_bias", "lora_bias"),
            ("alora_invocation_tokens", "aLoRA"),
            ("layer_replication", "layer_replication"),
            ("use_bdlora", "BdLoRA"),
            ("use_qalora", "QA-LoRA"),
        ):
            if config.get(name):
                told.append(f"it does not have {what}")
        saved = [m for m in config.get("modules_to_save") or [] if m not in _HEADS]
        if saved:
            told.append(
                f"it takes no modules_to_save but score and classifier ({', '.join(saved)})"
            )
        init = config.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower() not in _INITS:
            told.append(f"it does not have init_lora_weights = {init!r}")
        return told

    def _module(
        self, module: Module, source: PeftLike, demands: Demands, files: Files, *, composite: bool
    ) -> tuple[str, str]:
        """What becomes of one module beside the experts."""
        if module.a is None or module.b is None:
            return FAILS, "it has no other half"
        if module.leaf == "unembed_tokens":
            return FAILS, "the head is called lm_head (unexpected module)"
        embeds = module.embedding or module.leaf in ("embed_tokens", "lm_head")
        if embeds and module.leaf not in demands.embeddings:
            return FAILS, f"{module.leaf} cannot be adapted in this model"
        if doubled(module.path) or beyond_layers(module, files.model):
            return IGNORED, "no module of the model has this path, and nothing is said"
        if files.model is not None and not composite and ".language_model." in f".{module.path}":
            return (
                IGNORED,
                "the model has no language_model: no LoRA is applied, and nothing is said",
            )
        return _misfit(module, source) or self._scale(module, source)

    def _scale(self, module: Module, source: PeftLike) -> tuple[str, str]:
        """Whether the scale is that of the tensors' rank, as vLLM takes it from the config alone."""
        scale = source.scale(module)
        rank = module.a[-2] if module.a is not None and len(module.a) > 1 else 0
        if scale is None or module.packed:
            return LOADED, ""
        if scale.rank != rank:
            return WRONG_SCALE, (
                f"the tensors' rank is {rank}, the config's {scale.rank}, and the scale is taken from the config"
            )
        return LOADED, ""

    def _experts(self, source: PeftLike, demands: Demands, files: Files, judged: Judgement) -> None:
        packs = {m.path: m for m in source.modules.values() if m.packed}
        singles = [path for path in source.modules if EXPERT.fullmatch(path)]
        stacks = [path for path in source.modules if STACK.fullmatch(path)]
        if stacks:
            judged.add(stacks, FAILS, "one tensor for all experts needs --enable-moe-shared-loras")
        if packs and not demands.packed:
            judged.add(
                list(packs),
                FAILS,
                "packed experts need --enable-mixed-moe-lora-format and is_3d_lora_weight in the request",
            )
        elif packs:
            self._packed(packs, source, files, judged)
        if not singles:
            return
        if demands.packed:
            judged.add(singles, FAILS, "it takes the experts of this model packed")
            return
        gate, up, down = demands.projections
        odd = [p for p in singles if p.rpartition(".")[2] not in (gate, up, down)]
        if odd:
            judged.add(odd, FAILS, f"an expert's projections are {gate}, {up} and {down}")
            singles = [p for p in singles if p not in set(odd)]
        if demands.block and any(".mlp.experts." in p for p in singles):
            there = [p for p in singles if ".mlp.experts." in p]
            judged.add(
                there,
                IGNORED,
                f"the module is called {demands.block}: no LoRA is applied, and nothing is said",
            )
            return
        lost = missing_experts(
            {p: source.modules[p] for p in singles}, demands.projections, files.model
        )
        ranks: dict[tuple[str, str], set[int]] = defaultdict(set)
        for path in singles:
            hit = EXPERT.fullmatch(path)
            a = source.modules[path].a
            if hit is not None and a is not None:
                ranks[hit["stem"], hit["leaf"]].add(a[0])
        for path in singles:
            hit = EXPERT.fullmatch(path)
            assert hit is not None
            if hit["stem"] in lost:
                gone = lost[hit["stem"]]
                judged.add(
                    path,
                    FAILS,
                    "it demands every expert and all three projections, and "
                    f"{gone[0].removeprefix(hit['stem'] + '.')} is missing",
                )
            elif len(ranks[hit["stem"], hit["leaf"]]) > 1:
                judged.add(path, FAILS, "the ranks of the experts differ")
            elif misfit := _misfit(source.modules[path], source):
                judged.add(path, *misfit)

    def _packed(
        self, packs: Mapping[str, Module], source: PeftLike, files: Files, judged: Judgement
    ) -> None:
        layouts = layouts_of(source.config)
        for path, module in packs.items():
            stem = path.removesuffix(".base_layer")
            leaf = source.name_of(module).rpartition(".")[2]
            if not {stem, f"{stem}.base_layer"} <= packs.keys():
                judged.add(
                    path, FAILS, "it demands gate_up_proj and down_proj, and only one is there"
                )
            elif swapped(source, module, files.model) and not _same_both_ways(files):
                judged.add(path, FAILS, "PEFT before 0.19 packed it with in and out exchanged")
            elif layouts is not None and layouts[0].get(leaf) == GROUPED:
                judged.add(
                    path,
                    WRONG_VALUES,
                    "Unsloth grouped its columns by expert, and they are read as PEFT's",
                )
            else:
                judged.add(path, LOADED)


def _misfit(module: Module, source: PeftLike) -> tuple[str, str] | None:
    """What becomes of a LoRA of another size: it is copied to the beginning of buffers that have the base's sizes."""
    misfit = source.misfit(module)
    if misfit is None:
        return None
    if misfit.larger:
        return FAILS, misfit.reason
    return WRONG_VALUES, f"{misfit.reason}, and the rest stays zero"


def _same_both_ways(files: Files) -> bool:
    """Whether a base stores its experts so that both of PEFT's packings are one."""
    return "gpt_oss" in files.types


READER = VllmReader()
__all__ = ["INNER", "READER", "VllmReader"]
