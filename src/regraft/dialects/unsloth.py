"""Unsloth: PEFT's files, in which the columns of a packed ``lora_B`` may stand in another order.

PEFT has the expert fastest in them (``rank_major``). Unsloth has had the experts one after the other
(``grouped_by_expert``) from its first packed adapters on, and since 2026.9.6 has it as PEFT. Shapes and norms are the
same either way. It records the order in the config; a file without a record is PEFT's, unless Unsloth saved it for one
of the families that it packed so, before there was a record.

Source: unsloth_zoo 2026.10.9, ``temporary_patches/moe_utils.py`` (``saved_lora_b_layouts``,
``convert_legacy_lora_b``, ``write_fused_expert_lora_layout``) and ``hf_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.detect import Known
from regraft.adapters.form import Array, Blob, Images, Saved, Written
from regraft.adapters.protocol import Opened
from regraft.dialects.base import Capabilities, Evidence
from regraft.dialects.judging import ToolReader
from regraft.dialects.peft.config import LoraConfig
from regraft.dialects.peft.dialect import PeftFiles, writer_for
from regraft.dialects.peft.source import Source, open_adapter
from regraft.dialects.peft.writer import PeftWriter
from regraft.dialects.tool_files import (
    INNER,
    OUTER,
    PREFIX,
    WRITTEN_BY,
    ToolSource,
    look_at,
    packed_parameters,
    tool_source,
)
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.layouts.names import Layout
from regraft.storage.json_files import folder_with_config, load_json
from regraft.values import replace

FLAT, RECORD, FIXED = "lora_B_layout", "unsloth_fused_expert_lora", "unsloth_fixed"
RANK_MAJOR, GROUPED = "rank_major", "grouped_by_expert"
FAMILIES = frozenset(
    {
        "deepseek_v3",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "gemma4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt_oss",
        "lfm2_moe",
        "mixtral",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl_moe",
    }
)
"""The model types whose experts Unsloth packed grouped before it recorded it."""


def _places(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where the record may stand, the place that counts first."""
    mapping = config.get("auto_mapping")
    yield "", config
    yield "auto_mapping.", mapping if isinstance(mapping, Mapping) else {}


def recorded(config: Mapping[str, Any]) -> tuple[dict[str, str], str] | None:
    """The order of columns by parameter that a config records, and the field; ``None`` where there is none.

    The record by parameter outranks the single word beside it.

    >>> recorded({"lora_B_layout": "rank_major"})
    ({'gate_up_proj': 'rank_major', 'down_proj': 'rank_major'}, 'lora_B_layout')
    """
    for place, fields in _places(config):
        record = fields.get(RECORD)
        if isinstance(record, Mapping):
            parameters = record.get("parameters")
            default = record.get(FLAT)
            found: dict[str, str] = {}
            if isinstance(parameters, Mapping):
                for name, entry in parameters.items():
                    said = entry.get(FLAT) if isinstance(entry, Mapping) else entry
                    found[name] = str(said)
            elif default is not None:
                found = dict.fromkeys((INNER, OUTER), str(default))
            if found:
                return found, place + RECORD
        if fields.get(FLAT) is not None:
            return dict.fromkeys((INNER, OUTER), str(fields[FLAT])), place + FLAT
    return None


def was_fixed(config: Mapping[str, Any]) -> bool:
    """Whether Unsloth saved it with the mark that it sets on what it loads."""
    mapping = config.get("auto_mapping")
    return isinstance(mapping, Mapping) and mapping.get(FIXED) is True


def without_marks(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without anything that says how Unsloth packed the file."""
    made = {name: value for name, value in config.items() if name not in (FLAT, RECORD)}
    mapping = made.get("auto_mapping")
    if isinstance(mapping, Mapping):
        rest = {k: v for k, v in mapping.items() if k not in (FLAT, RECORD, FIXED)}
        made["auto_mapping"] = rest or None
    return made


def is_marked(config: Mapping[str, Any]) -> bool:
    """Whether a config has any of Unsloth's marks."""
    return was_fixed(config) or any(
        name in fields for _, fields in _places(config) for name in (FLAT, RECORD)
    )


def _family(config: Mapping[str, Any], base: object) -> str | None:
    """The model type of the base, where the config or the base's folder says it."""
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else None
    if isinstance(library, str) and library.startswith("transformers.models."):
        return library.split(".")[2]
    folder = folder_with_config(base)
    if folder is not None:
        found = load_json(folder / "config.json").get("model_type")
        return found if isinstance(found, str) else None
    return None


def layouts_of(config: Mapping[str, Any]) -> tuple[Mapping[str, str], str] | None:
    """The order of columns by parameter, and what tells it; ``None`` where nothing does."""
    found = recorded(config)
    if found is not None:
        layouts, field = found
        shown = ", ".join(sorted({str(x) for x in layouts.values()}))
        return layouts, f"{field} says that lora_B of the packed experts is {shown}"
    if not was_fixed(config) or not config.get("target_parameters"):
        return None
    family = _family(config, config.get("base_model_name_or_path"))
    if family is not None and family not in FAMILIES:
        return None
    grouped = dict.fromkeys((INNER, OUTER), GROUPED)
    return grouped, (
        f"auto_mapping.{FIXED} and no record: Unsloth packed lora_B expert by expert before it recorded it"
    )


def ungroup(b: Array, experts: int) -> Array:
    """Columns expert by expert (``e * r + j``) as PEFT has them (``j * E + e``).

    >>> ungroup(np.array([[0, 1, 2, 10, 11, 12]]), 2).tolist()
    [[0, 10, 1, 11, 2, 12]]
    """
    turned = b.reshape(b.shape[0], experts, -1).transpose(0, 2, 1)
    return np.ascontiguousarray(turned).reshape(b.shape)


def as_peft(
    source: Source, layouts: Mapping[str, str] | None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """An adapter's tensors and config with every packed ``lora_B`` in PEFT's order.

    Raises ``BadInputError`` for an order that is unknown, ``RefusedError`` for one that differs from layer to layer.
    """
    config, tensors = without_marks(source.config), dict(source.tensors)
    findings: list[Finding] = []
    scales = LoraConfig(source.config)
    for name, (module, leaf) in packed_parameters(tensors, config.get("target_parameters")).items():
        layout = RANK_MAJOR if layouts is None else layouts.get(leaf, RANK_MAJOR)
        if layout == "mixed":
            raise RefusedError(
                Finding(
                    "dialect",
                    f"Unsloth recorded that the columns of {leaf} are in one order in some layers and in another in "
                    "others, and not which",
                    where=source.where,
                    key=name,
                    fix="save it again with Unsloth 2026.9.6 or later",
                )
            )
        if layout not in (RANK_MAJOR, GROUPED):
            findings.append(
                Finding(
                    "config",
                    f"Unsloth has no order of columns {layout!r} ({RANK_MAJOR} or {GROUPED})",
                    where=source.where,
                    key=name,
                    fix="use the adapter_config.json that was saved with these weights",
                )
            )
        elif layout == GROUPED and tensors[name].ndim == 2:
            columns, rank = tensors[name].shape[1], scales.scale(f"{module}.{leaf}").rank
            experts, left = divmod(columns, rank)
            if not left and experts:
                tensors[name] = ungroup(tensors[name], experts)
    if findings:
        raise BadInputError(findings)
    return tensors, config


class UnslothWriter(PeftWriter, frozen=True):
    """PEFT's files, with a record that packed experts are as PEFT has them."""

    def write_lora(
        self,
        made: Sequence[Images],
        saved: Sequence[Saved],
        entries: Sequence[str],
        returned: Mapping[str, Array],
        written: Sequence[Written],
    ) -> Blob:
        """A plain LoRA."""
        experts = {
            image.keys.template.rpartition(".")[2]: lora.a.shape[0]
            for image in made
            for lora in image.loras
            if lora is not None and image.kind.startswith("experts")
        }
        blob = PeftWriter.write_lora(self, made, saved, entries, returned, written)
        config = without_marks(blob.config)
        named = {name: n for name, n in experts.items() if name in (INNER, OUTER)}
        if named:
            config |= {FLAT: RANK_MAJOR, RECORD: record_of(named)}
        metadata = {**blob.metadata, WRITTEN_BY: "unsloth"}
        return replace(blob, config=config, metadata=metadata)


def record_of(experts: Mapping[str, int]) -> dict[str, Any]:
    """Unsloth's record for parameters that are packed as PEFT packs them, with their numbers of experts."""
    return {
        "lora_A_layout": GROUPED,
        FLAT: RANK_MAJOR,
        "parameters": {
            name: {FLAT: RANK_MAJOR, "num_experts": count}
            for name, count in sorted(experts.items())
        },
    }


class Unsloth(PeftFiles):
    """Unsloth and unsloth-zoo."""

    name = "unsloth"
    title = "Unsloth: PEFT's files, with a record of how the experts' factors are packed"
    layout = "transformers-v5"
    usage = "Load with Unsloth: FastModel.from_pretrained, with {path} as model_name"
    capabilities = Capabilities()
    forced: Mapping[str, str] | None = None
    """The order of columns, where it was said."""

    @property
    def readers(self) -> tuple[ToolReader, ...]:
        """How the tool loads adapters."""
        from regraft.dialects.judges.unsloth import READER

        return (READER,)

    def sniff(self, src: Path) -> Evidence | None:
        """A config with one of Unsloth's marks."""
        look = look_at(src)
        if look is None or look.config is None:
            return None
        if look.written_by == "unsloth":
            return Evidence(certain=True, why="regraft wrote it for Unsloth")
        if not is_marked(look.config):
            return None
        return Evidence(certain=True, why="adapter_config.json has Unsloth's marks")

    def open(self, folder: Path, root: Path, weights: Path | None) -> ToolSource:
        """One adapter."""
        source = open_adapter(folder, root, weights, foreign=True)
        if self.forced is not None:
            found: tuple[Mapping[str, str], str] | None = (
                self.forced,
                "it was said that its experts are grouped",
            )
        else:
            found = layouts_of(source.config)
        layouts, told = (None, []) if found is None else (found[0], [found[1]])
        tensors, config = as_peft(source, layouts)
        packed = bool(packed_parameters(tensors, None))
        return tool_source(
            source,
            "unsloth",
            told if packed else (),
            tensors=tensors,
            config=config,
            ready=source.config.get(FLAT) == RANK_MAJOR
            and RECORD in source.config
            and layouts is not None
            and set(layouts.values()) == {RANK_MAJOR}
            and not source.config.get("auto_mapping"),
        )

    def writer(self, opened: Opened, known: Known, to: Layout) -> PeftWriter:
        """What writes it."""
        return writer_for(UnslothWriter, opened, known, to)


class UnslothGrouped(Unsloth):
    """Files of Unsloth without a record, of which somebody knows that they are grouped; written they get one."""

    name = "unsloth-grouped"
    title = "Unsloth's packed experts without a record, one expert after the other (to read)"
    readers = ()
    forced = dict.fromkeys((INNER, OUTER), GROUPED)

    def sniff(self, src: Path) -> None:
        """Nothing tells them from PEFT's."""


UNSLOTH, UNSLOTH_GROUPED = Unsloth(), UnslothGrouped()
__all__ = ["PREFIX", "UNSLOTH", "UNSLOTH_GROUPED", "layouts_of", "ungroup"]
