"""What judges of tools that read PEFT's two files have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from regraft.adapters.form import Array
from regraft.adapters.scale import Scale
from regraft.dialects.judges.places import Places
from regraft.dialects.judging import Files, Judgement
from regraft.dialects.peft.config import LoraConfig, targets_parameter
from regraft.dialects.peft.field_types import is_count, is_number
from regraft.dialects.served import count_experts, language_config
from regraft.dialects.tool_files import INNER, PACKED, PREFIX, parameter_of
from regraft.errors import RegraftError
from regraft.planning.model import ModelConfig
from regraft.rules.releases import layouts_of

_PAIR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<letter>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
EXPERT = re.compile(r"(?P<stem>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)")
STACK = re.compile(r"(?P<stem>(?:.+\.)?experts)\.(?P<leaf>w[123]|gate_proj|up_proj|down_proj)")
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(slots=True)
class Module:
    """One adapted module as a file has it."""

    path: str
    """Without PEFT's prefix."""
    a: tuple[int, ...] | None = None
    b: tuple[int, ...] | None = None
    embedding: bool = False
    bare: bool = False
    """Whether its names have no prefix of PEFT's before them."""

    @property
    def leaf(self) -> str:
        """Its last segment."""
        return self.path.rpartition(".")[2]

    @property
    def packed(self) -> bool:
        """Whether it is packed experts."""
        return self.path.endswith((".experts", ".experts.base_layer"))


class Misfit(NamedTuple):
    """That a LoRA is of another size than its weight."""

    reason: str
    larger: bool
    """Whether one of its sizes is larger than the weight's."""


@dataclass(slots=True)
class PeftLike:
    """The modules of PEFT's two files, the other tensors, and what the config says of them."""

    config: Mapping[str, Any]
    places: Places | None = None
    """The weights of the base, where it is known."""
    modules: dict[str, Module] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    _sizes: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)

    @staticmethod
    def of(files: Files) -> PeftLike:
        """Sort the tensors of some files."""
        made = PeftLike(files.config or {})
        if files.model is not None:
            made.places = Places(files.model, *layouts_of("transformers"))
        for name, tensor in shapes_of(files.tensors).items():
            hit = _PAIR.fullmatch(name.removeprefix(PREFIX))
            if hit is None:
                made.others.append(name)
                continue
            module = made.modules.setdefault(hit["module"], Module(hit["module"]))
            module.embedding = bool(hit["embedding"])
            module.bare = not name.startswith(PREFIX)
            if (hit["letter"] or hit["embedding"]) == "A":
                module.a = tensor
            else:
                module.b = tensor
        return made

    def name_of(self, module: Module) -> str:
        """What PEFT's patterns are matched with: a parameter's name for packed experts."""
        if not module.packed:
            weight = f"{module.path}.weight"
            named = targets_parameter(self.config.get("target_parameters"), weight)
            return weight if named else module.path
        stem = module.path.removesuffix(".base_layer")
        both = f"{stem}.base_layer" in self.modules
        depth = ".base_layer" if module.path.endswith(".base_layer") else ""
        return f"{stem}.{parameter_of(stem, depth, both=both, entries=self.config.get('target_parameters'))}"

    def misfit(self, module: Module) -> Misfit | None:
        """What a linear module's LoRA and its weight differ in, where the base's sizes are known."""
        a, b = module.a, module.b
        if self.places is None or a is None or b is None or module.packed or module.embedding:
            return None
        if len(a) != 2 or len(b) != 2:
            return None
        # Layers and experts have one size each, so one name of a kind is looked up.
        base = self._sizes_of(_NUMBER.sub("0", module.path))
        pairs = [(m, s) for m, s in zip((b[0], a[1]), base, strict=True) if s not in (None, m)]
        if not pairs:
            return None
        told = ", ".join(f"{mine} where the base has {size}" for mine, size in pairs)
        larger = any(size is not None and mine > size for mine, size in pairs)
        return Misfit(f"its shape is another one: {told}", larger)

    def _sizes_of(self, path: str) -> tuple[int | None, int | None]:
        if path not in self._sizes:
            assert self.places is not None
            self._sizes[path] = self.places.sizes(f"{path}.weight") or (None, None)
        return self._sizes[path]

    def scale(self, module: Module) -> Scale | None:
        """Rank and scale as PEFT resolves them; ``None`` where the config does not have them."""
        try:
            return LoraConfig(self.config).scale(self.name_of(module))
        except (KeyError, TypeError, RegraftError):
            return None


def shapes_of(tensors: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, without reading any where a header has them."""
    header = getattr(tensors, "header", None)
    if header is not None:
        return {name: tuple(info.shape) for name, info in header.tensors.items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def not_read(files: Files, tool: str, judged: Judgement) -> bool:
    """Note that a tool reads PEFT's two files only, where these are none, or have no numbers where these belong."""
    if files.config is None or "peft_type" not in files.config:
        what = (
            "it has no adapter_config.json" if files.config is None else "its config is not PEFT's"
        )
        judged.failures.append(
            f"{tool} reads PEFT's two files, and {what} (it is {files.dialect}'s)"
        )
        return True
    if not files.tensors:
        judged.failures.append("there is no adapter_model.safetensors with tensors")
        return True
    is_lora = str(files.config["peft_type"]).upper() == "LORA"
    odd = list(_no_numbers(files.config)) if is_lora else []
    judged.failures += [f"adapter_config.json: {name} is {value!r:.100}" for name, value in odd]
    return bool(odd)


def _no_numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What of a LoRA's config is to be reckoned with, and is no number for it."""
    for name, accepts in (("r", is_count), ("lora_alpha", is_number)):
        if name in config and not accepts(config[name]):
            yield name, config[name]
    for name, accepts in (("rank_pattern", is_count), ("alpha_pattern", is_number)):
        table = config.get(name)
        if table is None:
            continue
        if not isinstance(table, dict) or not all(map(accepts, table.values())):
            yield name, table


def beyond_layers(module: Module, model: ModelConfig | None) -> bool:
    """Whether a module is of a layer that the base does not have."""
    layers = language_config(model).get("num_hidden_layers")
    found = LAYER.search(module.path)
    return isinstance(layers, int) and found is not None and int(found[1]) >= layers


def doubled(path: str) -> bool:
    """Whether a path repeats a segment at its beginning, as wrappers leave it."""
    head = path.split(".")[:4]
    return any(one == other for one, other in pairwise(head))


def missing_experts(
    modules: Mapping[str, Module], projections: tuple[str, str, str], model: ModelConfig | None
) -> dict[str, list[str]]:
    """For each stack of experts what is missing of all experts and all projections."""
    stacks: dict[str, set[tuple[int, str]]] = {}
    for path in modules:
        hit = EXPERT.fullmatch(path)
        if hit is not None:
            stacks.setdefault(hit["stem"], set()).add((int(hit["expert"]), hit["leaf"]))
    count = count_experts(model)
    lost = {}
    for stem, have in stacks.items():
        number = count or max(e for e, _ in have) + 1
        gone = [
            f"{stem}.{e}.{leaf}"
            for e in range(number)
            for leaf in projections
            if (e, leaf) not in have
        ]
        if gone:
            lost[stem] = gone
    return lost


def swapped(source: PeftLike, module: Module, model: ModelConfig | None) -> bool:
    """Whether packed factors have in and out in each other's place, as PEFT before 0.19 packed them.

    Told by the base's sizes, by those of the other parameter, or by the version where they do not tell.
    """
    config = language_config(model)
    hidden, experts = config.get("hidden_size"), count_experts(model)
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size")
    if module.a is None or module.b is None or source.config is None:
        return False
    if isinstance(hidden, int) and isinstance(inner, int) and experts:
        leaf = source.name_of(module).rpartition(".")[2]
        right = (hidden, 2 * inner) if leaf == INNER else (inner, hidden)
        have = module.a[-1], module.b[0]
        if have in (right, right[::-1]) and right[0] != right[1]:
            return have != right
    told = _swapped_by_each_other(source, module)
    if told is not None:
        return told
    version = re.match(r"(\d+)\.(\d+)", str(source.config.get("peft_version") or ""))
    return version is not None and (int(version[1]), int(version[2])) < (0, 19)


def _swapped_by_each_other(source: PeftLike, module: Module) -> bool | None:
    """What both parameters of a module's experts tell: the hidden size is the one's input and the other's output."""
    stem = module.path.removesuffix(".base_layer")
    both = [source.modules.get(path) for path in (stem, f"{stem}.base_layer")]
    sizes = {
        source.name_of(each).rpartition(".")[2]: (each.a[-1], each.b[0])
        for each in both
        if each is not None and each.a and each.b
    }
    if len(sizes) != 2 or INNER not in sizes:
        return None
    inner, outer = sizes.pop(INNER), next(iter(sizes.values()))
    # As they should be: (hidden, 2 * width) and (width, hidden).
    right = inner[0] == outer[1] and inner[1] == 2 * outer[0]
    wrong = inner[1] == outer[0] and inner[0] == 2 * outer[1]
    return None if right == wrong else wrong


__all__ = [
    "EXPERT",
    "LAYER",
    "PACKED",
    "STACK",
    "Misfit",
    "Module",
    "PeftLike",
    "beyond_layers",
    "doubled",
    "missing_experts",
    "not_read",
    "swapped",
]
