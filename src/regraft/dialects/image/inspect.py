"""What is in a file of LoRAs: family, tool, algorithms, ranks, alphas, base, text encoders; from the header alone.

Of the data only alphas are read, a few bytes each.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regraft.dialects.image.convert import form_of_place, tool_of
from regraft.dialects.image.delta import LORA
from regraft.dialects.image.families import DENOISER
from regraft.dialects.image.grouping import (
    AROUND,
    Grouped,
    MalformedError,
    ModuleTensors,
    algebra_of,
)
from regraft.dialects.image.header import ADAPTER_METADATA
from regraft.dialects.image.leaves import has_no_weights, split_key, unread_kind
from regraft.dialects.image.peft import said_in_header
from regraft.dialects.image.prefixes import FLAT, Place, place_of
from regraft.dialects.image.read import (
    families_with,
    fit_families,
    hinted_families,
    strange_prefix,
)
from regraft.dialects.image.recognise import config_beside
from regraft.errors import Finding, RegraftError
from regraft.errors.codes import Status
from regraft.names.keys import group_names
from regraft.shown import Shown
from regraft.storage.dtypes import DTYPES
from regraft.storage.json_files import told_in_json
from regraft.storage.safetensors import Header, TensorInfo, read_header
from regraft.values import replace

_MUSUBI = (
    "lora_wan",
    "lora_qwen_image",
    "lora_framepack",
    "lora_flux_2",
    "lora_flux_kontext",
    "lora_zimage",
)
_SHOWN = 4
"""Names of one template that are looked up: more tell nothing new."""


@dataclass(frozen=True, slots=True, repr=False)
class ImageSummary(Shown):
    """A file of LoRAs for an image or video model; a folder of them has one in each line."""

    file: str
    """Its name, or its path in the folder."""
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

    @property
    def problems(self) -> list[Finding]:
        """Nothing, since its words and its JSON say what is wrong."""
        return []

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE if not self.problem else Status.BAD_INPUT

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


@dataclass(frozen=True, slots=True, repr=False)
class ImageFolder(Shown):
    """A folder of files of LoRAs for image and video models."""

    source: str
    files: list[ImageSummary]

    @property
    def problem(self) -> str:
        """Why the first file that cannot be read cannot; empty where all can."""
        return next((f"{each.file}: {each.problem}" for each in self.files if each.problem), "")

    @property
    def problems(self) -> list[Finding]:
        """Nothing, since its words and its JSON say what is wrong."""
        return []

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE if not self.problem else Status.BAD_INPUT

    def to_dict(self) -> dict[str, Any]:
        """The summaries as plain data."""
        return {"source": self.source, "files": [each.to_dict() for each in self.files]}


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
        config = config_beside(path)
        if config is not None:
            header = replace(header, metadata={**header.metadata, **said_in_header(config)})
            return dataclasses.replace(_summary(path, header), dialect="peft-image", trainer="PEFT")
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
    return dataclasses.replace(summary, file=name)


def _summary(path: Path, header: Header) -> ImageSummary:
    modules, spellings, unknown, unread = _modules(header)
    size = header.size
    if not modules or (unknown and len(modules) * 2 < len(header.tensors) // 4):
        return ImageSummary(
            path.name,
            tensors=len(header.tensors),
            size=size,
            problem="no adapter of an image model",
        )
    stems = list(modules)
    groups = [[stems[i] for i in group.ids.tolist()] for group in group_names(stems)]
    heads = _heads(groups)
    family, problem = _family(modules, groups, header.metadata)
    algorithms, ranks = _algorithms(modules)
    problem = (
        (unread and f"{unread} is not supported")
        or (unknown and f"unknown key: {unknown}")
        or problem
    )
    return ImageSummary(
        path.name,
        family,
        _dialect(heads, spellings, header.metadata),
        _trainer(header.metadata, spellings),
        algorithms,
        len(modules),
        ranks,
        _alphas(path, header, modules),
        _base(header.metadata),
        _text_encoders(heads),
        len(header.tensors),
        size,
        problem,
    )


_Roles = dict[str, TensorInfo]
"""A module's tensors by role."""


def _modules(header: Header) -> tuple[dict[str, _Roles], set[str], str, str]:
    """The modules by name, their spellings, the first key that no tool writes, the first kind that is not read.

    Names that differ in numbers only are alike, so most leaves are told once for all of them.
    """
    names, infos = list(header.tensors), list(header.tensors.values())
    modules: defaultdict[str, _Roles] = defaultdict(dict)
    spellings: set[str] = set()
    unknown = unread = ""
    for group in group_names(names):
        ids = group.ids.tolist()
        first = names[ids[0]]
        leaf = split_key(first)
        end = None if leaf is None else first.removeprefix(leaf.stem)
        if leaf is None or end is None or end == first or _DIGIT.search(end) is not None:
            for i in ids:
                leaf = split_key(names[i])
                if leaf is not None:
                    modules[leaf.stem][leaf.role] = infos[i]
                    spellings.add(leaf.spelling)
                    continue
                kind = unread_kind(names[i])
                unread = unread or (kind or "")
                unknown = unknown or ("" if kind or has_no_weights(names[i]) else names[i])
            continue
        role, cut = leaf.role, -len(end)
        spellings.add(leaf.spelling)
        for i in ids:
            modules[names[i][:cut]][role] = infos[i]
    return modules, spellings, unknown, unread


_DIGIT = re.compile("[0-9]")
_HEAD = re.compile(r"text_encoders\.\w+\.\w+\.|base_model\.model\.\w+\.|\w+?[a-z]\.|")
"""What stands before a module; the component, and the form of a name, are told by it."""


def _heads(groups: Sequence[Sequence[str]]) -> dict[str, tuple[Place, int]]:
    """A module's place for each of the ways that names begin, and how many begin so."""
    counts: Counter[str] = Counter()
    samples: dict[str, str] = {}
    for group in groups:
        first = _head(group[0])
        alike = _DIGIT.search(first) is None  # names of a group differ in their numbers only
        for head, stem in ((first, group[0]),) if alike else ((_head(x), x) for x in group):
            counts[head] += len(group) if alike else 1
            samples.setdefault(head, stem)
    return {head: (place_of(samples[head]), count) for head, count in counts.items()}


def _head(stem: str) -> str:
    found = FLAT.match(stem) or _HEAD.match(stem)
    return found[0] if found is not None else ""


def _dialect(
    heads: Mapping[str, tuple[Place, int]], spellings: set[str], metadata: Mapping[str, str]
) -> str:
    forms: Counter[str] = Counter()
    for place, count in heads.values():
        forms[form_of_place(place)] += count
    return tool_of(spellings, metadata) or forms.most_common(1)[0][0]


def _outlined(stem: str, roles: _Roles) -> ModuleTensors:
    """A module of which only shapes are known."""
    module = ModuleTensors(stem)
    for name, info in roles.items():
        role, _, parameter = name.partition(".")
        outline: Any = _Outline(info.shape)
        module.tensors[role] = outline
        module.scale_key |= bool(parameter)
    return module


def _family(
    modules: Mapping[str, _Roles], groups: Sequence[Sequence[str]], metadata: Mapping[str, str]
) -> tuple[str, str]:
    """The families that names fit, judged by some names of every kind; and what is wrong."""
    first: dict[str, ModuleTensors] = {}
    some: dict[str, ModuleTensors] = {}
    for group in groups:
        step = max(len(group) // _SHOWN, 1)
        for stem in (*group[:-1:step], group[-1]):
            some[stem] = _outlined(stem, modules[stem])
        first[group[-1]] = some[group[-1]]
    likely = families_with(Grouped(first, {}))
    fits = fit_families(Grouped(some, {}), likely)
    whole = [fit for fit in fits if not fit.missing]
    if not whole:
        strange = strange_prefix(fits[0].missing)
        if strange is not None:
            return "", f"no tool is known to write {strange[0]!r} before a module's name"
        return "", f"no family has a module {fits[0].missing[0]}"
    whole = [fit for fit in whole if not fit.misfits and not fit.others] or whole
    hinted, _ = hinted_families(metadata)
    said = [fit for fit in whole if fit.family in hinted]
    wrong = bool(hinted) and not said
    certain = [fit for fit in whole if fit.certain]
    chosen = said or certain or whole
    problem = f"the header says {hinted[0].title}" if wrong else ""
    return " or ".join(fit.family.name for fit in chosen), problem


def _algorithms(modules: Mapping[str, _Roles]) -> tuple[dict[str, int], dict[str, int]]:
    """How many modules each algorithm has, and how many each rank, most common first.

    Modules with the same roles have the same algorithm, and the rank in the same place.
    """
    kinds: defaultdict[tuple[str, ...], list[_Roles]] = defaultdict(list)
    for roles in modules.values():
        kinds[tuple(roles)].append(roles)
    found: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    for kind, alike in kinds.items():
        if "oft_blocks" in kind:  # of how many dimensions it is tells OFT from BOFT
            found.update(_algorithm(_outlined("", roles)) for roles in alike)
        else:
            found[_algorithm(_outlined("", alike[0]))] += len(alike)
        ranked = next((role for role in _RANKED if role in kind), None)
        if ranked is not None:
            shapes = [roles[ranked].shape for roles in alike]
            ranks.update([shape[0] for shape in shapes if shape])
    return dict(found.most_common()), {str(rank): n for rank, n in ranks.most_common()}


_RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2")
"""Roles of tensors whose first size is the rank."""


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


def _alphas(path: Path, header: Header, modules: Mapping[str, _Roles]) -> dict[str, int]:
    infos = [roles["alpha"] for roles in modules.values() if "alpha" in roles]
    if not infos:
        return _said_alphas(header.metadata, len(modules))
    found: Counter[float] = Counter()
    with path.open("rb") as file:
        number = file.fileno()
        for dtype in {info.dtype for info in infos}:
            numpy = np.dtype(DTYPES[dtype].numpy)
            size, starts = numpy.itemsize, [x.start for x in infos if x.dtype == dtype]
            first = b"".join([os.pread(number, size, header.data_start + x) for x in starts])
            found.update(np.frombuffer(first, numpy).real.astype(float).tolist())
    return {f"{alpha:g}": count for alpha, count in found.most_common()}


def _said_alphas(metadata: Mapping[str, str], modules: int) -> dict[str, int]:
    """What the header says where no tensor does."""
    said = told_in_json(metadata.get(ADAPTER_METADATA, "{}"))
    fields = said.items() if isinstance(said, dict) else ()
    alphas = {v for k, v in fields if k.endswith(".lora_alpha") and isinstance(v, int | float)}
    if not alphas:
        return {"rank": modules}
    return {f"{alpha} (header)": modules for alpha in alphas}


def _trainer(metadata: Mapping[str, str], spellings: set[str]) -> str:
    module = metadata.get("ss_network_module", "")
    if "ot_revision" in metadata:
        return "OneTrainer"
    if "software" in metadata:
        told = told_in_json(metadata["software"])
        name = told.get("name") if isinstance(told, dict) else None
        return str(name or metadata["software"])
    if module.startswith("lycoris"):
        return "LyCORIS"
    if module:
        name = module.rpartition(".")[2]
        return "musubi-tuner" if name in _MUSUBI else "sd-scripts"
    if ADAPTER_METADATA in metadata:
        return "diffusers"
    return "x-flux" if "xlabs" in spellings else ""


def _base(metadata: Mapping[str, str]) -> str:
    names = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    found = [value for name in names if (value := metadata.get(name, "").strip())]
    return found[0] if found else ""


def _text_encoders(heads: Mapping[str, tuple[Place, int]]) -> tuple[str, ...]:
    """The components besides the denoiser, as the file names them."""
    found = (place.component for place, _ in heads.values() if place.component != DENOISER)
    return tuple(sorted({c.removeprefix("te:").strip("_") for c in found}))


__all__ = ["ImageSummary", "summaries", "summarize"]
