"""Writing factors as PEFT reads them: tensor names, nesting of parameters, and the config that goes with them.

Source: PEFT 0.21.2, ``peft/tuners/tuners_utils.py`` (``inject_adapter``) and ``peft/tuners/lora/layer.py``
(``ParamWrapper``).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from regraft.adapters.form import Array, Images, Lora, Written
from regraft.adapters.scale import Scale
from regraft.dialects.peft.attention import join_attentions
from regraft.dialects.peft.config import LoraConfig, tail_of, targets_module
from regraft.dialects.peft.nesting import untold_order
from regraft.dialects.peft.packing import BEFORE, SINCE, pack, swaps
from regraft.dialects.peft.scan import PREFIX
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.names.keys import Group, fill_rows, group_names, in_order
from regraft.planning.model import ModelConfig
from regraft.planning.side import Side
from regraft.rules.kinds import KINDS

PEFT_VERSION = {BEFORE: "0.18.1", SINCE: "0.19.0"}
"""The ``peft_version`` that tells a packing to whoever reads the file."""


class Result(Struct):
    """An adapter's tensors and what they adapt."""

    tensors: dict[str, Array] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)
    wrappers: dict[str, int] = field(default_factory=dict)
    """How many adapters are nested around each module."""


def write_factors(
    images: Iterable[Images], side: Side, packing: str, reclaimed: Sequence[str]
) -> Result:
    """Name and pack factors for a layout.

    Leaf names in ``reclaimed`` go through ``target_parameters`` even where the module is a Linear, because PEFT
    would move them to the experts' parameters otherwise.

    Raises ``RefusedError`` for what PEFT cannot hold, ``BadInputError`` where no table says in which order a module
    registers several of these parameters.
    """
    images = list(images)
    result = Result()
    nested: dict[str, dict[str, tuple[str, str, Lora]]] = defaultdict(dict)
    templates: dict[str, tuple[str, ...] | None] = {}
    for image in images:
        kind = KINDS[image.kind]
        template, _, leaf = image.keys.template.rpartition(".")
        modules = Group(template, image.keys.ids, image.keys.numbers[:, : template.count("\0")])
        is_module = kind.module and leaf == "weight"
        if is_module and template.rpartition(".")[2].replace("\0", "") not in {
            name.rstrip("0123456789") for name in reclaimed
        }:
            _write_modules(image, modules, result)
            continue
        paths = fill_rows(modules.template, modules.numbers)
        keys = image.keys.names()
        for path, key, lora in zip(paths, keys, image.loras, strict=True):
            if lora is None:
                continue
            if is_module and path.rpartition(".")[2] not in reclaimed:
                _put_module(path, key, lora, embedding=False, result=result)
                continue
            nested[path][key.rpartition(".")[2]] = (key, image.kind, lora)
            templates[path] = templates.get(template) or side.parameters(modules)
    findings = {
        (finding.where, finding.fix): finding
        for path, parameters in nested.items()
        if len(parameters) > 1 and not set(parameters) <= set(templates[path] or ())
        for finding in [untold_order(side, path, list(parameters))]
    }
    if findings:
        raise BadInputError(list(findings.values()))
    for path, parameters in nested.items():
        names = sorted(parameters, key=(templates[path] or tuple(parameters)).index)
        result.wrappers[path] = len(names)
        for depth, name in enumerate(reversed(names)):
            key, kind_name, lora = parameters[name]
            a, b = lora.a, lora.b
            if kind_name.startswith("experts"):
                _check_single(key, kind_name, a, b, packing)
                a, b = pack(a, b, swapped=swaps(packing, kind_name, a.shape[0]))
            place = PREFIX + path + ".base_layer" * depth
            result.tensors[f"{place}.lora_A.weight"] = a
            result.tensors[f"{place}.lora_B.weight"] = b
            result.written.append(Written(key, path, name, lora.scale))
    join_attentions(result, images, lambda key: _is_joined(side, key))
    return result


def path_of(written: Written) -> str:
    """What a config says that a delta is of: a module, or a parameter by its module's path."""
    module, parameter = written.module, written.parameter
    return module if parameter is None else f"{module}.{parameter}"


def _is_joined(side: Side, key: str) -> bool:
    """Whether the tensor of this name is made of several of the other layout.

    One that only has another name there was in the source, too, and what is beside it keeps the form that it had.
    """
    found = side.find(group_names([key])[0])
    if found is None:
        return False
    equation, term = found.rule.equation, found.term
    other = equation.right if term in equation.left else equation.left
    return len(other) > 1


def _write_modules(image: Images, modules: Group, result: Result) -> None:
    embedding = image.kind == "embedding"
    ends = (
        ("lora_embedding_A", "lora_embedding_B")
        if embedding
        else ("lora_A.weight", "lora_B.weight")
    )
    paths = fill_rows(modules.template, modules.numbers)
    for path, lora in zip(paths, image.loras, strict=True):
        if lora is not None:
            result.tensors[f"{PREFIX}{path}.{ends[0]}"] = lora.a
            result.tensors[f"{PREFIX}{path}.{ends[1]}"] = lora.b
            result.written.append(Written(path + ".weight", path, None, lora.scale))
            result.wrappers[path] = 1


def _put_module(path: str, key: str, lora: Lora, *, embedding: bool, result: Result) -> None:
    ends = (
        ("lora_embedding_A", "lora_embedding_B")
        if embedding
        else ("lora_A.weight", "lora_B.weight")
    )
    result.tensors[f"{PREFIX}{path}.{ends[0]}"] = lora.a
    result.tensors[f"{PREFIX}{path}.{ends[1]}"] = lora.b
    result.written.append(Written(key, path, None, lora.scale))
    result.wrappers[path] = 1


def _check_single(key: str, kind: str, a: Array, b: Array, packing: str) -> None:
    out_size, in_size = b.shape[1], a.shape[2]
    awkward = kind != "experts" or packing != SINCE
    if a.shape[0] == 1 and awkward and out_size != in_size:
        raise RefusedError(
            Finding(
                "single-expert",
                "PEFT cannot hold a LoRA on a parameter of one single expert that is stored this way "
                f"({in_size} in, {out_size} out)",
                key=key,
                fix="merge the adapter into its base and convert the base",
            )
        )


class ConfigWriter:
    """The config of a converted LoRA; what need not change stays."""

    def __init__(
        self,
        source: Mapping[str, Any],
        result: Result,
        model: ModelConfig | None,
        there: Side,
    ) -> None:
        self.source, self.result, self.model, self.there = source, result, model, there

    def write(self, packing: str) -> dict[str, Any]:
        """The new config; every target's rank and scale resolve to what its factors need."""
        config = dict(self.source)
        scales = {path_of(w): w.scale for w in self.result.written}
        rank, alpha, ranks, alphas = self.patterns(scales)
        config["r"], config["lora_alpha"] = rank, alpha
        config["rank_pattern"], config["alpha_pattern"] = ranks, alphas
        rslora = any(scale.rslora for scale in scales.values())
        if scales and bool(config.get("use_rslora")) != rslora:
            config["use_rslora"] = rslora
        modules = [w.module for w in self.result.written if w.parameter is None]
        parameters = [path_of(w) for w in self.result.written if w.parameter is not None]
        config["target_modules"] = self.target_modules(modules)
        if parameters or self.source.get("target_parameters"):
            config["target_parameters"] = self.shorten(parameters) or None
        for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
            if name in config:
                config[name] = None
        if parameters:
            if config.get("lora_dropout"):
                config["lora_dropout"] = 0.0
            config["init_lora_weights"] = True
            if config.get("fan_in_fan_out"):
                # ParamWrapper raises where it is set, and on modules it says nothing: PEFT goes by their class.
                config["fan_in_fan_out"] = False
        if any(w.parameter is not None for w in self.result.written) or self.has_packing():
            config["peft_version"] = PEFT_VERSION[packing]
        return config

    def has_packing(self) -> bool:
        """Whether the source had packed parameters, so that its version meant something."""
        return bool(self.source.get("target_parameters"))

    def target_modules(self, modules: Sequence[str]) -> list[str]:
        """An explicit list; the source's own entries where they still name the same and nothing else."""
        entries = self.source.get("target_modules")
        if not isinstance(entries, list) or is_filtered(self.source):
            return self.shorten(modules)
        result: list[str] = []
        covered: set[str] = set()
        for entry in entries:
            now = {m for m in modules if targets_module([entry], m)}
            if now and not self.there.names_others("." + entry, now):
                result.append(entry)
                covered |= now
        return result + self.shorten([m for m in modules if m not in covered])

    def shorten(self, paths: Sequence[str]) -> list[str]:
        """Suffixes where they provably name these paths and nothing else: the same in every layer."""
        layers = None
        if self.model is not None and not self.model.is_composite():
            value = self.model.data.get("num_hidden_layers")
            layers = value if isinstance(value, int) else None
        tails: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            tails[tail_of(path)].append(path)
        result = []
        for tail, same in tails.items():
            numbers = [re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path) for path in same]
            heads = {path[: -len(tail)].rstrip("0123456789.") for path in same}
            every = (
                layers is not None
                and len(heads) == 1
                and all(len(n) == 1 for n in numbers)
                and sorted(int(n[0]) for n in numbers) == list(range(layers))
                and not self.there.names_others("." + tail, same)
            )
            result.extend([tail] if every else sorted(same, key=in_order))
        return result

    def exceptions(
        self, values: Mapping[str, Any], common: Any, *, anchored: bool
    ) -> dict[str, Any]:
        """Patterns for paths whose value is not the common one; ``anchored`` for those that PEFT reads with a dot."""
        tails: dict[str, set[Any]] = defaultdict(set)
        for path, value in values.items():
            tails[tail_of(path)].add(value)
        made = {}
        for path, value in values.items():
            if value == common:
                continue
            tail = tail_of(path)
            alone = len(tails[tail]) == 1 and not any(
                other.endswith("." + tail) and tails[other] != tails[tail] for other in tails
            )
            if alone and (not anchored or tail != path):
                made[re.escape(tail)] = value
            else:
                made[path if anchored else "^" + re.escape(path)] = value
        return dict(sorted(made.items()))

    def patterns(
        self, scales: Mapping[str, Scale]
    ) -> tuple[int, Any, dict[str, int], dict[str, Any]]:
        """Rank and alpha for most targets, and patterns that exclude each other for the rest."""
        old = self.source.get("r"), self.source.get("lora_alpha")
        counts = Counter((s.rank, s.alpha) for s in scales.values())
        if not counts:
            return self.source["r"], self.source["lora_alpha"], {}, {}
        best = max(counts.values())
        common = next(p for p in counts if counts[p] == best)
        if counts.get(old) == best:  # type: ignore[arg-type]
            common = old  # type: ignore[assignment]
        if len(counts) == 1:
            return common[0], common[1], {}, {}
        tails: dict[str, set[tuple[int, Any]]] = defaultdict(set)
        for path, scale in scales.items():
            tails[tail_of(path)].add((scale.rank, scale.alpha))
        ranks: dict[str, int] = {}
        alphas: dict[str, Any] = {}
        for path, scale in scales.items():
            pair = scale.rank, scale.alpha
            if pair == common:
                continue
            tail = tail_of(path)
            alone = len(tails[tail]) == 1 and not any(
                other.endswith("." + tail) and tails[other] != tails[tail] for other in tails
            )
            pattern = re.escape(tail) if alone else "^" + re.escape(path)
            if pair[0] != common[0]:
                ranks[pattern] = pair[0]
            if pair[1] != common[1]:
                alphas[pattern] = pair[1]
        return common[0], common[1], dict(sorted(ranks.items())), dict(sorted(alphas.items()))


def is_filtered(config: Mapping[str, Any]) -> bool:
    """Whether an adapter has fewer modules than its ``target_modules`` name."""
    return config.get("layers_to_transform") is not None or bool(config.get("exclude_modules"))


def plain_entries(config: Mapping[str, Any]) -> list[str]:
    """Entries of ``target_modules`` that name no module but those that the adapter has."""
    entries = config.get("target_modules")
    return [] if not isinstance(entries, list) or is_filtered(config) else entries


def check_config(config: Mapping[str, Any], written: Sequence[Written]) -> list[str]:
    """Paths whose rank or scale PEFT would not resolve from a config as their factors need it."""
    if not written:
        return []
    lora, wrong = LoraConfig(config), []
    for path, wanted in ((path_of(w), w.scale) for w in written):
        scale = lora.scale(path)
        if scale == wanted:
            continue
        if scale.rank != wanted.rank or scale.ratio_to(wanted) != 1.0:
            wrong.append(path)
    return wrong


__all__ = ["ConfigWriter", "Result", "Written", "check_config", "path_of", "write_factors"]
