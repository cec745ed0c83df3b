"""vLLM: PEFT's two files, one adapter per module, or packed experts for the models that vLLM keeps so.

vLLM reads ``r``, ``lora_alpha``, their patterns and ``use_rslora``; it passes over ``target_parameters`` and
``peft_version``. It demands every expert and all three projections of each. Only files that regraft wrote tell that
they are for vLLM; every other one is PEFT's.

Source: vllm 0.33.0, ``lora/peft_helper.py``, ``lora/utils.py``, ``lora/lora_model.py``, ``lora/model_manager.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.adapters.detect import Known
from regraft.adapters.form import Saved
from regraft.adapters.protocol import Opened
from regraft.dialects.base import Capabilities, Evidence
from regraft.dialects.judging import ToolReader
from regraft.dialects.peft.dialect import PeftFiles
from regraft.dialects.peft.packing import SINCE
from regraft.dialects.peft.source import Source, open_adapter
from regraft.dialects.peft.writing import PEFT_VERSION
from regraft.dialects.served import ServedWriter, demands_table, model_types_of, stacks_experts
from regraft.dialects.stacked import expand_stacks, stack_split
from regraft.dialects.tool_files import (
    INNER,
    OUTER,
    PACKED,
    PREFIX,
    SPLIT,
    ToolSource,
    look_at,
    tool_source,
    with_prefix,
)
from regraft.layouts.names import Layout


class VllmWriter(ServedWriter):
    """For vLLM: ranks and scales of their own are fine; experts are complete."""

    title = "vLLM"
    tool = "vllm"
    capabilities = Capabilities(saved=False)

    def can_save(self, item: Saved) -> bool:
        """The heads of classifiers."""
        return not item.rows and item.new in (
            "score.weight",
            "score.bias",
            "classifier.weight",
            "classifier.bias",
        )


def as_peft(source: Source) -> dict[str, Any]:
    """What vLLM takes and PEFT does not: keys without a prefix, packed experts that no config names.

    Returns the fields of a source to change.
    """
    tensors = with_prefix(source.tensors, source.where)
    config = dict(source.config)
    hits = [hit for name in tensors if (hit := PACKED.fullmatch(name))]
    if hits:
        # vLLM takes the inner factors for gate_up_proj, packs as PEFT has since 0.19, and looks at no version.
        config["peft_version"] = PEFT_VERSION[SINCE]
        if not config.get("target_parameters"):
            modules = {hit["module"].removeprefix(PREFIX) for hit in hits}
            config["target_parameters"] = [
                f"{m}.{x}" for m in sorted(modules) for x in (INNER, OUTER)
            ]
    if source.metadata.get(SPLIT):
        return stack_split(tensors, config)
    return expand_stacks(tensors, config)


class Server(PeftFiles):
    """What servers have in common: PEFT's two files, of which only those that regraft wrote say whom they are for."""

    name: str
    writes: type[ServedWriter]

    def sniff(self, src: Path) -> Evidence | None:
        """Only what regraft wrote says so."""
        look = look_at(src)
        if look is None or look.written_by != self.name:
            return None
        return Evidence(certain=True, why=f"regraft wrote it for {self.writes.title}")

    def open(self, folder: Path, root: Path, weights: Path | None) -> ToolSource:
        """One adapter."""
        source = open_adapter(folder, root, weights, foreign=True)
        return tool_source(source, self.name, **self.understood(source))

    def understood(self, source: Source) -> dict[str, Any]:
        """The fields of a source to change, so that PEFT would read it as the server does."""
        return as_peft(source)

    def writer(self, opened: Opened, known: Known, to: Layout) -> ServedWriter:
        """What writes it."""
        return self.writes(opened, known, to)


class Vllm(Server):
    """vLLM's server."""

    name = "vllm"
    title = "vLLM: PEFT's files as its server takes them"
    layout = "transformers-v4"
    usage = "Serve with vLLM: vllm serve BASE --enable-lora --lora-modules NAME={path}"
    writes = VllmWriter
    capabilities = VllmWriter.capabilities

    def layout_for(self, known: Known) -> str | None:
        """Models whose experts stay packed are named as in transformers 5."""
        packed = demands_table("vllm").for_model(model_types_of(known)).packed
        return "transformers-v5" if packed or stacks_experts(known, self.layout) else None

    @property
    def readers(self) -> tuple[ToolReader, ...]:
        """How the tool loads adapters."""
        from regraft.dialects.judges.vllm import READER

        return (READER,)


VLLM = Vllm()
