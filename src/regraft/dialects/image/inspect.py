"""What is in a file of LoRAs: family, tool, algorithms, ranks, alphas, base, text encoders; from the header alone.

Of the data only alphas are read, a few bytes each.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from regraft.dialects.image.delta import LORA
from regraft.dialects.image.families import DENOISER
from regraft.dialects.image.grouping import (
    AROUND,
    Grouped,
    MalformedError,
    ModuleTensors,
    algebra_of,
)
from regraft.dialects.image.leaves import has_no_weights, split_key, unread_kind
from regraft.dialects.image.read import ADAPTER_METADATA, fit_families, hinted_families, places_of
from regraft.errors import RegraftError
from regraft.names.keys import group_names
from regraft.storage.dtypes import DTYPES
from regraft.storage.safetensors import Header, TensorInfo, read_header

_MUSUBI = (
    "lora_wan",
    "lora_qwen_image",
    "lora_framepack",
    "lora_flux_2",
    "lora_flux_kontext",
    "lora_zimage",
)
_SHOWN = 6
"""Names of one template that are looked up: more tell nothing new."""


@dataclass(frozen=True, slots=True)
class ImageSummary:
    """One file."""

    file: str
    family: str = ""
    """The family, or several that all of its names fit."""
    dialect: str = ""
    trainer: str = ""
    """The tool that made it, as its header or its names say."""
    algorithms: Mapping[str, int] = field(default_factory=dict)
    """How many modules each has."""
    modules: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    """How many modules have each rank."""
    alphas: Mapping[str, int] = field(default_factory=dict)
    """How many modules have each alpha; ``rank`` where there is none."""
    base: str = ""
    """The base model, as the header names it."""
    text_encoders: tuple[str, ...] = ()
    tensors: int = 0
    size: int = 0
    problem: str = ""
    """Why it cannot be read; empty where it can."""

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain data."""
        return {
            "file": self.file,
            "family": self.family,
            "dialect": self.dialect,
            "trainer": self.trainer,
            "algorithms": dict(self.algorithms),
            "modules": self.modules,
            "ranks": dict(self.ranks),
            "alphas": dict(self.alphas),
            "base": self.base,
            "text_encoders": list(self.text_encoders),
            "tensors": self.tensors,
            "size": self.size,
            "problem": self.problem,
        }


@dataclass(frozen=True, slots=True)
class _Outline:
    """A tensor's shape, for what asks for no numbers."""

    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)


def summarize(path: Path) -> ImageSummary:
    """Tell what is in a file."""
    try:
        header = read_header(path)
        return _summary(path, header)
    except RegraftError as error:
        return ImageSummary(path.name, problem=error.findings[0].message)


def summaries(folder: Path) -> Iterator[ImageSummary]:
    """Every .safetensors file of a folder and its subfolders, in order."""
    for path in sorted(folder.rglob("*.safetensors")):
        if path.is_file():
            found = summarize(path)
            yield _named(found, str(path.relative_to(folder)))


def _named(summary: ImageSummary, name: str) -> ImageSummary:
    return replace(summary, file=name)


def _summary(path: Path, header: Header) -> ImageSummary:
    from regraft.dialects.image.convert import dialect_of

    modules: dict[str, ModuleTensors] = {}
    unknown = ""
    unread = ""
    for key, info in header.tensors.items():
        leaf = split_key(key)
        if leaf is None:
            kind = unread_kind(key)
            unread = unread or (kind or "")
            unknown = unknown or ("" if kind or has_no_weights(key) else key)
            continue
        module = modules.get(leaf.stem)
        if module is None:
            module = modules[leaf.stem] = ModuleTensors(leaf.stem)
        role, _, parameter = leaf.role.partition(".")
        outline: Any = _Outline(info.shape)
        module.tensors[role] = outline
        module.scale_key |= bool(parameter)
        module.spellings.add(leaf.spelling)
    size = header.size
    if not modules or (unknown and len(modules) * 2 < len(header.tensors) // 4):
        return ImageSummary(
            path.name,
            tensors=len(header.tensors),
            size=size,
            problem="no adapter of an image model",
        )
    grouped = Grouped(modules, {})
    family, problem = _family(grouped, header.metadata)
    algorithms = Counter(_algorithm(module) for module in modules.values())
    problem = (
        (unread and f"{unread} is not supported")
        or (unknown and f"unknown key: {unknown}")
        or problem
    )
    return ImageSummary(
        path.name,
        family,
        dialect_of(grouped, header.metadata),
        _trainer(header.metadata, grouped),
        dict(algorithms.most_common()),
        len(modules),
        _ranks(modules),
        _alphas(path, header, modules),
        _base(header.metadata),
        _text_encoders(grouped),
        len(header.tensors),
        size,
        problem,
    )


def _family(grouped: Grouped, metadata: Mapping[str, str]) -> tuple[str, str]:
    """The families that names fit, judged by some names of every kind; and what is wrong."""
    first: dict[str, ModuleTensors] = {}
    some: dict[str, ModuleTensors] = {}
    for group in group_names(list(grouped.modules)):
        step = max(len(group) // _SHOWN, 1)
        for row in {*range(0, len(group), step), len(group) - 1}:
            name = group.name(row)
            some[name] = grouped.modules[name]
        name = group.name(len(group) - 1)
        first[name] = grouped.modules[name]
    fits = fit_families(Grouped(first, {}))
    likely = [fit.family for fit in fits if not fit.missing]
    fits = fit_families(Grouped(some, {}), likely) if likely else fits
    whole = [fit for fit in fits if not fit.missing]
    if not whole:
        return "", f"no family has a module {fits[0].missing[0]}"
    whole = [fit for fit in whole if not fit.misfits and not fit.others] or whole
    hinted, _ = hinted_families(metadata)
    said = [fit for fit in whole if fit.family in hinted]
    wrong = bool(hinted) and not said
    certain = [fit for fit in whole if fit.certain]
    chosen = said or certain or whole
    problem = f"the header says {hinted[0].title}" if wrong else ""
    return " or ".join(fit.family.name for fit in chosen), problem


def _algorithm(module: ModuleTensors) -> str:
    roles = module.tensors
    own = {role: tensor for role, tensor in roles.items() if role not in AROUND}
    try:
        found = algebra_of(own)
    except MalformedError:
        return "incomplete"
    dora = "magnitude" in roles or "dora_scale" in roles
    if found == LORA:
        return "DoRA" if dora else "Tucker LoRA" if "mid" in roles else LORA
    return f"{found} with DoRA" if dora else found


def _ranks(modules: Mapping[str, ModuleTensors]) -> dict[str, int]:
    """The ranks, most common first."""
    found: Counter[int] = Counter()
    for module in modules.values():
        for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2"):
            tensor = module.tensors.get(role)
            if tensor is not None and tensor.shape:
                found[tensor.shape[0]] += 1
                break
    return {str(rank): count for rank, count in found.most_common()}


def _alphas(path: Path, header: Header, modules: Mapping[str, ModuleTensors]) -> dict[str, int]:
    keys = [key for key in header.tensors if key.endswith(".alpha")]
    if not keys:
        return _said_alphas(header.metadata, modules)
    found: Counter[float] = Counter()
    with path.open("rb") as file:
        for key in keys:
            found[_number(file.fileno(), header, header.tensors[key])] += 1
    return {f"{alpha:g}": count for alpha, count in found.most_common()}


def _number(file: int, header: Header, info: TensorInfo) -> float:
    data = os.pread(file, info.end - info.start, header.data_start + info.start)
    values = np.frombuffer(data, DTYPES[info.dtype].numpy)
    return float(values.reshape(-1)[0]) if values.size else float("nan")


def _said_alphas(
    metadata: Mapping[str, str], modules: Mapping[str, ModuleTensors]
) -> dict[str, int]:
    """What the header says where no tensor does."""
    try:
        said = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except ValueError:
        said = {}
    alphas = (
        {v for k, v in said.items() if k.endswith(".lora_alpha")}
        if isinstance(said, dict)
        else set()
    )
    if not alphas:
        return {"rank": len(modules)}
    return {f"{alpha} (header)": len(modules) for alpha in alphas}


def _trainer(metadata: Mapping[str, str], grouped: Grouped) -> str:
    module = metadata.get("ss_network_module", "")
    if "ot_revision" in metadata:
        return "OneTrainer"
    if "software" in metadata:
        try:
            return str(json.loads(metadata["software"]).get("name", "")) or metadata["software"]
        except (ValueError, AttributeError):
            return metadata["software"]
    if module.startswith("lycoris"):
        return "LyCORIS"
    if module:
        name = module.rpartition(".")[2]
        return "musubi-tuner" if name in _MUSUBI else "sd-scripts"
    if ADAPTER_METADATA in metadata:
        return "diffusers"
    spellings = {s for m in grouped.modules.values() for s in m.spellings}
    return "x-flux" if "xlabs" in spellings else ""


def _base(metadata: Mapping[str, str]) -> str:
    names = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    found = [value for name in names if (value := metadata.get(name, "").strip())]
    return found[0] if found else ""


def _text_encoders(grouped: Grouped) -> tuple[str, ...]:
    """The components besides the denoiser, as the file names them."""
    found = (p.component for p in places_of(grouped).values() if p.component != DENOISER)
    return tuple(sorted({c.removeprefix("te:").strip("_") for c in found}))


__all__ = ["ImageSummary", "summaries", "summarize"]
