"""Writing PEFT's files for tools that read them by rules of their own: servers, and trainers.

They have one adapter per module, or packed experts, and each demands something more than PEFT does: every expert and
every projection of an expert, one rank for all, q with v. What a tool demands and an adapter does not have is written
as a block of zeros, which adds nothing. What each of them demands for which model types is data, in ``servers.toml``.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from math import prod
from typing import Any

import numpy as np
from msgspec import Struct, field

from regraft.adapters.detect import Known
from regraft.adapters.form import Array, Blob, Images, Lora, Saved, Written, widened, zeros_like
from regraft.adapters.protocol import Opened
from regraft.adapters.scale import Scale
from regraft.dialects.base import Capabilities, PlainWriter, adjust
from regraft.dialects.peft.packing import SINCE, fast_experts
from regraft.dialects.peft.source import PeftNames
from regraft.dialects.peft.writing import PEFT_VERSION, ConfigWriter, Result, path_of
from regraft.dialects.tool_files import INNER, OUTER, PREFIX, SPLIT, WRITTEN_BY
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.layouts.names import Layout
from regraft.names.keys import MARK, group_names, in_order
from regraft.planning.model import ModelConfig
from regraft.planning.side import Side
from regraft.rules.kinds import BATCH, KINDS
from regraft.values import replace

_MERGE = "merge the adapter into its base and serve that"
_COUNTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")


class Table(Struct, frozen=True):
    """What a tool in one release demands, by model type; `for_model` has the row for one."""

    tool: str
    version: str
    rows: Mapping[str, Any]

    def for_model(self, model_types: Iterable[str]) -> Demands:
        """What it demands for a model with these types (its own, and those of its parts)."""
        types = list(model_types)
        merged = dict(self.rows["default"])
        for row in self.rows.get("models", ()):
            if any(name in row["model_types"] for name in types):
                merged |= {k: v for k, v in row.items() if k != "model_types"}
        merged["projections"] = tuple(merged["projections"])
        for name in ("embeddings", "unknown", "known", "adapts", "refuses"):
            merged[name] = tuple(merged.get(name, ()))
        merged["complete"] = tuple(map(tuple, merged.get("complete", ())))
        return Demands(**{k: v for k, v in merged.items() if k in Demands.__struct_fields__})


class Demands(Struct, frozen=True):
    """How one tool wants the adapter of one model."""

    packed: bool
    """Whether experts are packed as PEFT packs them since 0.19, and not one by one."""
    projections: tuple[str, str, str]
    """An expert's gate, up and down."""
    interleaved: bool = False
    """Whether gate and up are interleaved in the rows of the base's ``gate_up_proj``."""
    experts: bool = True
    """Whether it takes adapters of experts at all."""
    embeddings: tuple[str, ...] = ()
    """Embeddings and heads that can be adapted."""
    unknown: tuple[str, ...] = ()
    """Last segments of modules that it cannot adapt."""
    known: tuple[str, ...] = ()
    """Last segments of the only modules that it can adapt; every one where there are none."""
    adapts: tuple[str, ...] = ()
    """Model types that it is known to adapt; nothing is known of any where there are none."""
    refuses: tuple[str, ...] = ()
    """Model types that it takes no adapters for."""
    block: str = ""
    """The module that the experts are in, where that has another name than in transformers 5."""
    complete: tuple[tuple[str, ...], ...] = ()
    """Modules that are read together, so that zeros stand for the missing ones."""
    serve: str = ""
    """How to serve the result."""


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    return tomllib.loads((files("regraft.dialects") / "servers.toml").read_text("utf-8"))


@lru_cache(maxsize=4)
def demands_table(tool: str) -> Table:
    """The table of a tool."""
    data = _tables()[tool]
    return Table(tool, data["version"], data)


def demands_apart(tool: str, model_types: Iterable[str] | None = None) -> list[str]:
    """A model type for each way in which a tool treats some types, or all that its table names; ``""`` is the rest.

    Types that it takes no adapters for are left out where there are others.

    >>> demands_apart("vllm", ["mixtral", "phimoe"])
    ['mixtral']
    """
    table = demands_table(tool)
    if model_types is None:
        rows = table.rows.get("models", ())
        model_types = ["", *(name for row in rows for name in row["model_types"])]
    refused = table.for_model([]).refuses
    names = list(model_types)
    names = [name for name in names if name not in refused] or names
    return list({table.for_model([name]): name for name in reversed(names)}.values())[::-1]


def has_demands(tool: str) -> bool:
    """Whether what a tool demands hangs on the family of the base."""
    return tool in _tables()


def model_types_of(known: Known) -> list[str]:
    """The model types of the base, as far as they are known; those of the books where nothing says more."""
    if known.model is not None:
        return known.model.model_types()
    if known.model_type is not None:
        return [known.model_type]
    return [name for book in known.books[:1] for name in book.model_types]


def stacks_experts(known: Known, layout: str) -> bool:
    """Whether the base has its experts in stacked parameters in a layout."""
    side = Side(known.books, layout, known.scopes)
    return any(BATCH in (KINDS[item.kind].roles or ()) for item in side.terms)


def language_config(model: ModelConfig | None) -> Mapping[str, Any]:
    """The fields of the language model in a base's config; nothing where it is not known."""
    if model is None:
        return {}
    data = model.data
    for name in ("text_config", "thinker_config", "llm_config", "language_config"):
        inner = data.get(name)
        if isinstance(inner, Mapping):
            inner = inner.get("text_config", inner)
            return {**data, **inner}
    return data


def count_experts(model: ModelConfig | None) -> int | None:
    """How many experts a layer of the base has, where its config says it."""
    config = language_config(model)
    for name in _COUNTS:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None


class Pieces(Struct):
    """A LoRA as a tool's file has it: modules by path, and packed parameters by module and name."""

    modules: dict[str, Lora] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    packed: dict[str, dict[str, Lora]] = field(default_factory=dict)
    split_from: bool = False
    """Whether experts were stacked in the layout, and were split."""
    filled: dict[str, int] = field(default_factory=dict)
    """How many blocks of zeros were added, by why."""

    def loras(self) -> Iterator[Lora]:
        """All of them."""
        yield from self.modules.values()
        for parameters in self.packed.values():
            yield from parameters.values()

    def fill(self, why: str, path: str, lora: Lora) -> None:
        """Add a module that adds nothing."""
        self.modules[path] = lora
        self.filled[why] = self.filled.get(why, 0) + 1


class ServedWriter(PlainWriter):
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json`` for a tool that demands more than PEFT."""

    capabilities = Capabilities()
    tool = ""

    def __init__(self, opened: Opened, known: Known, to: Layout) -> None:
        super().__init__(opened, known, to, PeftNames())
        self.demands = demands_table(self.tool).for_model(model_types_of(known))
        self.pieces = Pieces()
        self.left_out: list[str] = []
        """Keys that the file cannot hold, and whose factors add nothing."""

    # -- what the file has

    def write_lora(
        self,
        made: Sequence[Images],
        saved: Sequence[Saved],
        entries: Sequence[str],
        returned: Mapping[str, Array],
        written: Sequence[Written],
    ) -> Blob:
        """Adjust, split, fill up, then write."""
        self.refuse(made, saved)
        adjust(made, self.capabilities)
        self.pieces = pieces = self.split(made)
        self.complete(pieces)
        blob = self.put(pieces, returned, written)
        blob = self.put_saved(blob, saved) if saved else blob
        return replace(blob, notes=tuple(self.notes(blob, made)))

    def put_saved(self, blob: Blob, saved: Sequence[Saved]) -> Blob:
        """Add saved tensors that can be written."""
        tensors = {PREFIX + item.new: item.tensor for item in saved}
        modules = dict.fromkeys(item.new.rpartition(".")[0] for item in saved)
        config = blob.config | {"modules_to_save": list(modules)}
        return replace(blob, config=config, tensors={**blob.tensors, **tensors})

    def refuse(self, made: Sequence[Images], saved: Sequence[Saved]) -> None:
        """Refuse by name everything that the tool's file cannot hold. Raises ``RefusedError``."""
        findings = [
            self._refusal(item.new, self.why_not_saved(item))
            for item in saved
            if not self.can_save(item)
        ]
        refused = [name for name in model_types_of(self.known) if name in self.demands.refuses]
        if refused:
            findings.append(self._refusal(refused[0], f"takes no LoRA for {refused[0]}"))
        if self.opened.hints().replicated:
            findings.append(
                self._refusal("layer_replication", "does not build a model of repeated layers")
            )
        for image in made:
            told: dict[tuple[int, int], str | None] = {}
            for row, lora in enumerate(image.loras):
                if lora is None:
                    continue
                # Keys of one template are alike in all that counts here.
                dims = lora.a.ndim, lora.b.ndim
                if dims not in told:
                    told[dims] = self.why_not(image.keys.name(row), image.kind, lora)
                why = told[dims]
                if why is None:
                    continue
                if _adds_nothing(lora):
                    image.loras[row] = None
                    self.left_out.append(image.keys.name(row))
                else:
                    findings.append(self._refusal(image.keys.name(row), why))
        if findings:
            raise RefusedError(grouped(findings))

    def _refusal(self, key: str, why: str) -> Finding:
        return Finding(
            "no-image", f"{self.title} {why}", where=self.opened.where, key=key, fix=_MERGE
        )

    def can_save(self, item: Saved) -> bool:
        """Whether a saved tensor can be written beside the factors."""
        return False

    def why_not_saved(self, item: Saved) -> str:
        """Why a saved tensor cannot be held."""
        what = "some rows of a weight" if item.rows else "whole weights of the base"
        return f"cannot hold {what}"

    def why_not(self, key: str, kind: str, lora: Lora) -> str | None:
        """Why a LoRA cannot be held; ``None`` where it can."""
        demands, leaf = self.demands, key.removesuffix(".weight").rpartition(".")[2]
        if kind == "embedding" or leaf in ("embed_tokens", "lm_head"):
            return None if leaf in demands.embeddings else f"takes no LoRA on {leaf} of this model"
        if lora.a.ndim == 3:
            if not demands.experts:
                return "takes no LoRA on the experts of this model"
            known = key.endswith((f".experts.{INNER}", f".experts.{OUTER}"))
            return None if known else "has no name for this parameter of stacked experts"
        if leaf in demands.unknown or (demands.known and leaf not in demands.known):
            return f"takes no LoRA on {leaf}"
        if not key.endswith(".weight"):
            return "adapts modules, and this is a parameter of its own"
        if kind == "conv1d":
            return "takes LoRA on Linear layers, and this weight is stored (in, out)"
        if lora.b.ndim != 2:
            return "takes LoRA on Linear layers, and this is a convolution"
        return None

    # -- splitting

    def split(self, made: Sequence[Images]) -> Pieces:
        """The LoRAs by module; stacked experts one by one, unless the tool has them packed."""
        pieces = Pieces()
        for image in made:
            for name, lora in zip(image.keys.names(), image.loras, strict=True):
                if lora is None:
                    continue
                if lora.a.ndim == 3:
                    module, _, leaf = name.rpartition(".")
                    if self.demands.packed:
                        pieces.packed.setdefault(module, {})[leaf] = lora
                    else:
                        self._split_experts(pieces, module, leaf, lora)
                    continue
                path = name.removesuffix(".weight")
                pieces.modules[path] = lora
                if image.kind == "embedding":
                    pieces.embeddings.add(path)
        return pieces

    def _split_experts(self, pieces: Pieces, module: str, leaf: str, lora: Lora) -> None:
        pieces.split_from = True
        gate, up, down = self.demands.projections
        rows = lora.b.shape[1]
        parts = {down: slice(None)}
        if leaf == INNER and self.demands.interleaved:
            parts = {gate: slice(0, None, 2), up: slice(1, None, 2)}
        elif leaf == INNER:
            parts = {gate: slice(0, rows // 2), up: slice(rows // 2, None)}
        for expert in range(lora.a.shape[0]):
            for name, part in parts.items():
                path = f"{module}.{expert}.{name}"
                b = np.ascontiguousarray(lora.b[expert, part])
                pieces.modules[path] = replace(lora, a=lora.a[expert], b=b)

    # -- filling up

    def complete(self, pieces: Pieces) -> None:
        """Add zeros for what the tool demands and the adapter does not have."""
        self.complete_packed(pieces)
        self.complete_experts(pieces)

    def complete_packed(self, pieces: Pieces) -> None:
        """Both parameters, where experts are packed."""
        for parameters in pieces.packed.values():
            have = parameters.get(INNER), parameters.get(OUTER)
            if have[0] is None and have[1] is not None:
                inner = have[1].a.shape[-1]
                parameters[INNER] = zeros_like(have[1], 2 * inner, have[1].b.shape[1])
            elif have[1] is None and have[0] is not None:
                rows = have[0].b.shape[1] // 2
                parameters[OUTER] = zeros_like(have[0], have[0].a.shape[-1], rows)
            else:
                continue
            why = "the other parameter of packed experts"
            pieces.filled[why] = pieces.filled.get(why, 0) + 1

    def complete_experts(self, pieces: Pieces) -> None:
        """All experts, and all three projections of each, of one rank each."""
        stacks = stacks_of(pieces.modules)
        if not stacks:
            return
        count = count_experts(self.known.model)
        gate, up, down = self.demands.projections
        odd = sorted({leaf for have in stacks.values() for _, leaf in have} - {gate, up, down})
        if odd:
            raise RefusedError(
                Finding(
                    "no-image",
                    f"{self.title} calls an expert's projections {gate}, {up} and {down}, and has nothing for "
                    f"{', '.join(odd)}",
                    where=self.opened.where,
                    fix=_MERGE,
                )
            )
        for stem, have in stacks.items():
            experts = self._count(stem, have, count)
            if len(have) == 3 * experts and _of_one_rank(have):
                continue
            ranks: dict[str, int] = defaultdict(int)
            for (_, leaf), lora in have.items():
                ranks[leaf] = max(ranks[leaf], lora.a.shape[0])
            for expert in range(experts):
                for leaf in (gate, up, down):
                    path = f"{stem}.{expert}.{leaf}"
                    mine = have.get((expert, leaf))
                    if mine is not None:
                        pieces.modules[path] = widened(mine, ranks[leaf])
                        continue
                    like, shape = self._like(have, leaf)
                    zeros = zeros_like(like, *shape)
                    if leaf in ranks:
                        zeros = widened(zeros, ranks[leaf])
                    pieces.fill("experts and projections that are not adapted", path, zeros)

    def _count(self, stem: str, have: Mapping[tuple[int, str], Lora], count: int | None) -> int:
        most = max(expert for expert, _ in have) + 1
        if count is None:
            if {expert for expert, _ in have} == set(range(most)):
                return most
            raise BadInputError(
                Finding(
                    "unknown-size",
                    f"only some experts are adapted, {self.title} demands all of them, and nothing says how many "
                    "there are",
                    where=self.opened.where,
                    key=stem,
                    fix="give the base model with --model (its folder or its config.json)",
                )
            )
        return max(count, most)

    def _like(
        self, have: Mapping[tuple[int, str], Lora], leaf: str
    ) -> tuple[Lora, tuple[int, int]]:
        """A LoRA of the same stack, and the (out, in) that the projection has."""
        gate, up, down = self.demands.projections
        for other in (leaf, gate, up, down):
            for (_, name), lora in have.items():
                if name == other:
                    shape = len(lora.b), lora.a.shape[1]
                    return lora, shape if (name == down) == (leaf == down) else shape[::-1]
        raise AssertionError("a stack has something in it")

    # -- the files

    def put(
        self, pieces: Pieces, returned: Mapping[str, Array], written: Sequence[Written]
    ) -> Blob:
        """Names and config."""
        tensors: dict[str, Array] = {}
        done: list[Written] = []
        for path, lora in pieces.modules.items():
            embedding = path in pieces.embeddings
            ends = (
                ("lora_embedding_A", "lora_embedding_B")
                if embedding
                else ("lora_A.weight", "lora_B.weight")
            )
            tensors[f"{PREFIX}{path}.{ends[0]}"] = lora.a
            tensors[f"{PREFIX}{path}.{ends[1]}"] = lora.b
            done.append(Written(path + ".weight", path, None, lora.scale))
        for module, parameters in pieces.packed.items():
            for leaf, lora in parameters.items():
                place = PREFIX + module + ".base_layer" * (leaf == INNER)
                tensors[f"{place}.lora_A.weight"] = lora.a.reshape(-1, lora.a.shape[-1])
                tensors[f"{place}.lora_B.weight"] = fast_experts(lora.b)
                done.append(Written(f"{module}.{leaf}", module, leaf, lora.scale))
        tensors |= returned
        everything = (*done, *written)
        config = self.config(everything)
        metadata = {WRITTEN_BY: self.tool}
        if pieces.split_from:
            metadata[SPLIT] = "true"
        return Blob(config, tensors, metadata, written=everything)

    @property
    def side(self) -> Side:
        """What the books say of the layout."""
        return Side(self.known.books, self.to.name, self.known.scopes)

    def config(self, written: Sequence[Written]) -> dict[str, Any]:
        """``adapter_config.json``: what PEFT would need, so that PEFT reads the file as well."""
        hints = self.opened.hints()
        fresh = {"r": 1, "lora_alpha": 1}
        scales = {path_of(w): w.scale for w in written}
        numbers = ConfigWriter(fresh, Result(written=list(written)), self.known.model, self.side)
        rank, alpha, ranks, alphas = numbers.patterns(scales)
        rslora = any(w.scale.rslora for w in written)
        modules = [w.module for w in written if w.parameter is None]
        parameters = [path_of(w) for w in written if w.parameter is not None]
        made: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": hints.task,
            "auto_mapping": self.class_of_base(),
            "base_model_name_or_path": hints.base,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "bias": "none",
            "use_rslora": rslora,
            "use_dora": False,
            "init_lora_weights": True,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "target_modules": self.target_modules(modules, numbers),
            "modules_to_save": None,
        }
        if parameters:
            made["target_parameters"] = sorted(parameters, key=in_order)
            made["peft_version"] = PEFT_VERSION[SINCE]
        return made

    def class_of_base(self) -> dict[str, str] | None:
        """What PEFT notes of the base's class, where the source said it; no other field tells the family."""
        hints = self.opened.hints()
        family, named = hints.model_type, next(iter(hints.classes), None)
        if family is None or named is None:
            return None
        library = f"transformers.models.{family}.modeling_{family}"
        return {"base_model_class": named, "parent_library": library}

    def target_modules(self, paths: Sequence[str], numbers: ConfigWriter) -> list[str]:
        """Leaf names where they name these modules and no others, paths otherwise."""
        config = language_config(self.known.model)
        layers, experts = config.get("num_hidden_layers"), count_experts(self.known.model)
        leaves: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            leaves[path.rpartition(".")[2]].append(path)
        made: list[str] = []
        for leaf, same in sorted(leaves.items()):
            everywhere = (
                isinstance(layers, int)
                and not (self.known.model is not None and self.known.model.is_composite())
                and _everywhere(same, layers, experts)
                and not numbers.there.names_others(
                    "." + leaf, same[:1]
                )  # one template has them all
            )
            made += [leaf] if everywhere else _as_listed(same)
        return made

    def notes(self, blob: Blob, made: Sequence[Images]) -> list[str]:
        """What was added, and how to serve the result."""
        notes = [
            f"{count} blocks of zeros for {why}: {self.title} demands them, and they add nothing"
            for why, count in self.pieces.filled.items()
        ]
        if self.left_out:
            notes.append(
                f"{len(self.left_out)} LoRAs that add nothing were left out, because {self.title} cannot hold them "
                f"({self.left_out[0]}, …)"
            )
        types = model_types_of(self.known)
        if self.demands.adapts and types and not set(types) & set(self.demands.adapts):
            version = demands_table(self.tool).version
            notes.append(
                f"{self.title} {version} has no model of its own for {types[0]} that takes adapters: names are those "
                "of its checkpoint, and whether it takes them is not known"
            )
        if self.demands.serve:
            notes.append(self.demands.serve)
        return notes


def _adds_nothing(lora: Lora) -> bool:
    """Whether one of the factors is zero, as where a tool wants a module that was not trained."""
    return not lora.b.any() or not lora.a.any()


def _as_listed(paths: Sequence[str]) -> list[str]:
    """Paths as a model lists them, like ``sorted(paths, key=in_order)``, and fast where only numbers differ.

    >>> _as_listed(["l.10.q", "l.9.q"]), _as_listed(["lm_head"])
    (['l.9.q', 'l.10.q'], ['lm_head'])
    """
    groups = group_names(paths)
    if len(groups) != 1 or not groups[0].numbers.size:
        return sorted(paths, key=in_order)
    (group,) = groups
    return group.take(np.lexsort(group.numbers.T[::-1])).names()


def _everywhere(paths: Sequence[str], layers: int, experts: int | None) -> bool:
    """Whether modules of one name are adapted in every layer, and in every expert of it.

    >>> _everywhere(["layers.0.q", "layers.1.q"], 2, None), _everywhere(["layers.0.q"], 2, None)
    (True, False)
    """
    groups = group_names(paths)
    if len(groups) != 1:
        return False
    (group,) = groups
    sizes = [layers] if f".experts.{MARK}." not in group.template else [layers, experts or 0]
    return len(set(paths)) == prod(sizes) and group.numbers.shape[1] == len(sizes)


def _of_one_rank(have: Mapping[tuple[int, str], Lora]) -> bool:
    """Whether each projection of a stack has one rank in all experts."""
    ranks = {(leaf, lora.a.shape[0]) for (_, leaf), lora in have.items()}
    return len(ranks) == len({leaf for leaf, _ in ranks})


def stacks_of(modules: Mapping[str, Lora]) -> dict[str, dict[tuple[int, str], Lora]]:
    """The experts among modules: by the path of the stack, then by expert and projection."""
    stacks: dict[str, dict[tuple[int, str], Lora]] = defaultdict(dict)
    for path, lora in modules.items():
        above, found, inside = path.rpartition("experts.")
        expert, _, leaf = inside.partition(".")
        if found and expert.isdecimal() and leaf and "." not in leaf and above[-1:] in ("", "."):
            stacks[f"{above}experts"][int(expert), leaf] = lora
    return stacks


def grouped(findings: Sequence[Finding], most: int = 20) -> list[Finding]:
    """Findings that say the same of keys that are alike as one."""
    first: dict[tuple[str, str], Finding] = {}
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for finding in findings:
        place = finding.message, re.sub(r"\d+", "#", finding.key or "")
        first.setdefault(place, finding)
        counts[place] += 1
    made = [
        dataclasses.replace(f, message=f"{f.message} ({counts[place]} like this one)")
        if counts[place] > 1
        else f
        for place, f in first.items()
    ]
    return made[:most]


__all__ = [
    "KINDS",
    "Demands",
    "Pieces",
    "Scale",
    "ServedWriter",
    "count_experts",
    "demands_table",
    "grouped",
    "language_config",
    "model_types_of",
    "stacks_of",
]
