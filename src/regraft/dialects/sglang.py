"""SGLang: PEFT's two files, one adapter per module, with one rank and one scale for all.

SGLang reads ``r``, ``lora_alpha`` and ``target_modules`` and nothing else: no rsLoRA, no patterns. It joins q, k and v,
and gate and up, as it loads them, and looks for parts that are not there; packed experts are an error.

Source: sglang 0.5.23, ``srt/lora/lora.py``, ``lora_config.py``, ``utils.py``, ``mem_pool.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from regraft.adapters.detect import Known
from regraft.adapters.form import Lora, Written, zeros_like
from regraft.dialects.base import Capabilities
from regraft.dialects.judging import ToolReader
from regraft.dialects.peft.source import Source
from regraft.dialects.peft.writing import ConfigWriter
from regraft.dialects.served import (
    Pieces,
    ServedWriter,
    language_config,
    stacks_experts,
)
from regraft.dialects.vllm import Server
from regraft.errors import BadInputError, Finding

AS_TARGETS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""What ``target_modules`` has to say for an expert's projections of these names: tensors are renamed as they are loaded
(``_rename_expert_w_to_proj``), and entries are not (``get_normalized_target_modules``)."""


class SglangWriter(ServedWriter):
    """For SGLang: one rank, one scale, and what is joined is complete."""

    title = "SGLang"
    tool = "sglang"
    capabilities = Capabilities(scales=False, ranks=False, saved=False)

    def complete(self, pieces: Pieces) -> None:
        """Experts, and the parts of what is joined."""
        super().complete(pieces)
        parents: dict[str, dict[str, Lora]] = defaultdict(dict)
        for path, lora in pieces.modules.items():
            if ".experts." not in path:  # those are complete
                module, _, leaf = path.rpartition(".")
                parents[module][leaf] = lora
        for together in self.demands.complete:
            wanted = frozenset(together)
            for module, have in parents.items():
                if not wanted.isdisjoint(have) and not wanted <= have.keys():
                    self._fill(pieces, module, have, together)

    def why_not(self, key: str, kind: str, lora: Lora) -> str | None:
        """Beside what holds for all servers: a q_proj that stands beside a compressed k and v."""
        config = language_config(self.known.model)
        if key.endswith(".q_proj.weight") and config.get("kv_lora_rank"):
            return "joins q_proj with a k_proj and a v_proj, and this model has neither"
        return super().why_not(key, kind, lora)

    def _fill(
        self, pieces: Pieces, module: str, have: dict[str, Lora], together: Sequence[str]
    ) -> None:
        like = next(have[leaf] for leaf in together if leaf in have)
        plain_q = self.known.model is not None and not language_config(self.known.model).get(
            "q_lora_rank"
        )
        for leaf in together:
            if leaf not in have and not (leaf == "q_a_proj" and plain_q):
                size = self._size(f"{module}.{leaf}", leaf, have)
                zeros = zeros_like(like, size, like.a.shape[1])
                pieces.fill(f"{leaf} beside {'and '.join(sorted(have))}", f"{module}.{leaf}", zeros)

    def _size(self, path: str, leaf: str, have: dict[str, Lora]) -> int:
        """The rows of a projection that is not adapted."""
        partner = {
            "k_proj": "v_proj",
            "v_proj": "k_proj",
            "gate_proj": "up_proj",
            "up_proj": "gate_proj",
        }
        other = have.get(partner.get(leaf, ""))
        if other is not None:
            return len(other.b)
        config = language_config(self.known.model)
        heads = config.get("num_attention_heads")
        size = None
        if leaf in ("q_proj", "k_proj", "v_proj") and isinstance(heads, int):
            head_dim = config.get("head_dim") or config.get("hidden_size", 0) // heads
            count = heads if leaf == "q_proj" else config.get("num_key_value_heads") or heads
            size = count * head_dim
        elif leaf == "q_a_proj":
            size = config.get("q_lora_rank")
        elif leaf == "kv_a_proj_with_mqa":
            parts = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
            size = sum(parts) if all(isinstance(x, int) for x in parts) else None  # type: ignore[arg-type]
        if not size:
            raise BadInputError(
                Finding(
                    "unknown-size",
                    "SGLang reads it together with others that are adapted, so zeros have to stand for it, and "
                    "nothing says how many rows it has",
                    where=self.opened.where,
                    key=path,
                    fix="give the base model with --model (its folder or its config.json)",
                )
            )
        return int(size)

    def target_modules(self, paths: Sequence[str], numbers: ConfigWriter) -> list[str]:
        """Last segments in the names that it knows: it looks at no others."""
        leaves = sorted({path.rpartition(".")[2] for path in paths})
        return list(dict.fromkeys(AS_TARGETS.get(leaf, leaf) for leaf in leaves))

    def config(self, written: Sequence[Written]) -> dict[str, Any]:
        """One rank and one alpha; alpha takes the root of rsLoRA in."""
        made = super().config(written)
        del made["rank_pattern"], made["alpha_pattern"]
        if made["use_rslora"]:
            made["lora_alpha"] = written[0].scale.value * made["r"]
            made["use_rslora"] = False
        return made


class Sglang(Server):
    """SGLang's server."""

    name = "sglang"
    title = "SGLang: PEFT's files as its server takes them, one rank and one scale"
    layout = "transformers-v4"
    usage = "Serve with SGLang: python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths NAME={path}"
    writes = SglangWriter
    capabilities = SglangWriter.capabilities

    def understood(self, source: Source) -> dict[str, Any]:
        """What all servers take, and projections of experts under the names that it has for them."""
        changed = super().understood(source)
        said = changed["config"].get("target_modules")
        ends = {name.split(".")[-3] for name in changed["tensors"] if ".experts." in name}
        if isinstance(said, list):
            more = [w for w, name in AS_TARGETS.items() if name in said and w in ends]
            changed["config"] = {**changed["config"], "target_modules": [*said, *more]}
        return changed

    def layout_for(self, known: Known) -> str | None:
        """Where experts are stacked in every layout, names are those of transformers 5."""
        return "transformers-v5" if stacks_experts(known, self.layout) else None

    @property
    def readers(self) -> tuple[ToolReader, ...]:
        """How the tool loads adapters."""
        from regraft.dialects.judges.sglang import READER

        return (READER,)


SGLANG = Sglang()
