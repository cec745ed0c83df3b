"""LitGPT: the adapter weights that ``litgpt finetune_lora`` saves.

``lit_model.pth.lora`` has, under ``model``, ``transformer.h.3.mlp.fc_1.lora_A`` (rank, in) and ``.lora_B`` (out, rank).
q, k and v are one tensor: A has the ranks of the adapted parts one below the other, B their rows, and each part has a
block of its own. ``hyperparameters.yaml`` says which modules are adapted (``lora_query``, ``lora_mlp`` ...), the same
in all layers, and one ``lora_r`` and ``lora_alpha``.

Source: litgpt 0.5.13 (``lora.py``, ``scripts/merge_lora.py``, ``finetune/lora.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct, field

from regraft.adapters.form import Array, Blob, Images, Lora, Saved, Written, zeros_like
from regraft.adapters.protocol import Hints, Opened, Reading
from regraft.adapters.scale import Scale
from regraft.dialects.base import (
    Capabilities,
    Delta,
    Evidence,
    Found,
    PlainFile,
    PlainNames,
    PlainWriter,
    adjust,
)
from regraft.dialects.everywhere import Sizes, as_images, layer_count, loras_of, most_common
from regraft.dialects.halves import config_of, narrow, one_file, pairs, shape_finding, whole
from regraft.dialects.litgpt_model import model_config
from regraft.errors import AmbiguousError, BadInputError, Choice, Finding, RegraftError
from regraft.errors.extras import install_line
from regraft.names.keys import MARK, fill_rows
from regraft.planning.side import Side
from regraft.report import count_in_words
from regraft.storage.folder import copy_file
from regraft.storage.probe import open_regular
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.adapters.base_weights import BaseWeights
    from regraft.adapters.convert import Converted
    from regraft.adapters.detect import Known
    from regraft.layouts.names import Layout

WEIGHTS, CONFIG, MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
_INSIDE = "model"
_BASE = "model_config"
"""What the result's config has for ``model_config.yaml``, until it is saved."""
_A, _B = ".lora_A", ".lora_B"
_LAYERS = "transformer.h."
_QKV = "attn.qkv"
_FUSED = f"{_QKV}.weight"
_HEAD = "lm_head.weight"
_PARTS = {"q": "lora_query", "k": "lora_key", "v": "lora_value"}
"""The switches of the parts of qkv, in the order in which they stand in it."""
_FOLLOWS = {"attn.proj": "lora_projection", "lm_head": "lora_head"}
"""The switches of other modules; what is left is ``lora_mlp``."""
_NAMED = Lora(np.empty((1, 1)), np.empty((1, 1)), Scale(1, 1))
"""Stands for factors where only the names count."""
VERSIONS = ("litgpt-q", "litgpt-k", "litgpt-v", "litgpt-qk", "litgpt-qv", "litgpt-kv", "litgpt-qkv")
"""Which parts of qkv are adapted, for who says it with ``--from``."""


def _yaml() -> Any:
    """PyYAML. Raises ``BadInputError`` where it is not installed."""
    try:
        import yaml
    except ImportError as error:
        raise BadInputError(
            Finding(
                "package-missing",
                "LitGPT's settings are YAML files, and the package PyYAML is not installed",
                fix=install_line("yaml"),
            )
        ) from error
    return yaml


_LARGEST = 1 << 18
"""Bytes of settings; a training's have about a thousand, and the reader of YAML takes seconds for a megabyte."""


def _load(path: Path) -> dict[str, Any]:
    """The fields of a YAML file; none where there is no such file.

    Raises ``BadInputError`` where it is none, or says one thing twice.
    """
    if not path.is_file():
        return {}
    yaml = _yaml()
    file, size = open_regular(path)
    with file:
        if size > _LARGEST:
            message = f"it has {size} bytes, and settings have at most {_LARGEST}"
            raise BadInputError(Finding("file-too-large", message, where=str(path)))
        text = file.read(_LARGEST)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError) as error:
        message = f"it is no YAML file: {(str(error) or type(error).__name__).splitlines()[0]}"
        raise BadInputError(Finding("config", message, where=str(path))) from error
    if not isinstance(loaded, dict):
        raise BadInputError(Finding("config", "it has no fields", where=str(path)))
    counts = Counter(name.value for name, _ in node.value)
    doubled = [
        Finding(
            "duplicate-key",
            f"the key stands {count} times, and which is meant is unclear",
            where=str(path),
            key=str(name)[:300],
            fix="keep one of them",
        )
        for name, count in counts.items()
        if count > 1
    ]
    if doubled:
        raise BadInputError(doubled)
    return loaded


class Rows(Struct, frozen=True):
    """How many rows q, k and v have."""

    q: int
    k: int
    v: int

    def of(self, parts: str) -> int:
        """The rows of some of them.

        >>> Rows(64, 32, 32).of("qv")
        96
        """
        return sum(getattr(self, part) for part in parts)


class LitgptFile(PlainFile):
    """A LoRA of LitGPT's: the factors of qkv are told apart when the base's sizes are known."""

    fused: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """A and B of qkv as they are in the file, by the key of the base tensor."""
    rank: int = 1
    alpha: float = 1
    switches: str | None = None
    """The parts of qkv that the settings say are adapted; ``None`` where they say nothing."""
    rows: Rows | None = None
    """The rows that the model's settings beside it say."""

    def names(self) -> Any:
        """The modules that it is about, qkv among them."""
        named = dict.fromkeys(self.fused, _NAMED)
        alone = replace(self, loras={**self.loras, **named}, fused={})
        return PlainFile.names(alone)

    def read(
        self,
        side: Side,
        packing: str | None = None,
        base: BaseWeights | None = None,
    ) -> Reading:
        """The factors, those of qkv as one block diagonal LoRA of the whole tensor."""
        if not self.fused:
            return PlainFile.read(self, side, packing, base)
        rows = self.rows or _rows_of(next((s.config for s in side.scopes.values() if s.config), {}))
        if rows is None:
            raise BadInputError(
                Finding(
                    "model-needed",
                    "q, k and v are one tensor, and nothing says how many rows each of them has",
                    where=self.where,
                    fix=f"put {MODEL} beside it, or give the base model with --model",
                )
            )
        parts = packing.removeprefix("litgpt-") if packing is not None else self.switches
        loras = dict(self.loras)
        for key, (a, b) in self.fused.items():
            chosen = self._parts(key, a, b, rows, parts)
            loras[key] = _block_diagonal(a, b, chosen, rows, self.rank, self.alpha)
        whole_file = replace(self, loras=loras, fused={})
        return PlainFile.read(whole_file, side, packing, base)

    def _parts(self, key: str, a: Array, b: Array, rows: Rows, said: str | None) -> str:
        """Which of q, k and v two factors are for: what was said, or what their sizes allow."""
        count = a.shape[0] // self.rank
        fitting = [
            version.removeprefix("litgpt-")
            for version in VERSIONS
            if len(version.removeprefix("litgpt-")) == count
            and rows.of(version.removeprefix("litgpt-")) == b.shape[0]
        ]
        if said is not None:
            if said in fitting:
                return said
            message = (
                f"{', '.join(said)} of qkv are said to be adapted, and lora_A has {a.shape[0]} rows at rank "
                f"{self.rank} and lora_B {b.shape[0]}, which are not theirs (q {rows.q}, k {rows.k}, v {rows.v})"
            )
            raise BadInputError(
                Finding("shape", message, where=self.where, key=key.removesuffix(".weight") + _A)
            )
        if len(fitting) == 1:
            return fitting[0]
        if not fitting:
            message = f"{b.shape[0]} rows and {count} parts are none of q, k and v"
            raise BadInputError(Finding("shape", message, where=self.where, key=key))
        raise AmbiguousError(
            Finding(
                "which-dialect",
                f"its sizes do not tell which of q, k and v are adapted, and {CONFIG} does not say it either",
                where=self.where,
                key=key,
                fix="say which with --from",
                choices=tuple(
                    Choice(f"litgpt/{each}", f"{' and '.join(each)} have these sizes", key)
                    for each in fitting
                ),
            )
        )


def _rows_of(config: Mapping[str, Any]) -> Rows | None:
    """The rows of q, k and v by transformers' config of the base."""
    heads, size = config.get("num_attention_heads"), config.get("head_dim")
    groups = config.get("num_key_value_heads") or heads
    hidden = config.get("hidden_size")
    if size is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        size = hidden // heads
    if not all(isinstance(each, int) for each in (heads, groups, size)):
        return None
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(size, int)
    return Rows(heads * size, groups * size, groups * size)


def _rows_beside(config: Mapping[str, Any]) -> Rows | None:
    """The same by LitGPT's own settings of the model."""
    named = {
        "num_attention_heads": config.get("n_head"),
        "num_key_value_heads": config.get("n_query_groups"),
        "head_dim": config.get("head_size"),
        "hidden_size": config.get("n_embd"),
    }
    return _rows_of(named)


def _block_diagonal(a: Array, b: Array, parts: str, rows: Rows, rank: int, alpha: float) -> Lora:
    """The LoRA of all of qkv: each part has components of its own."""
    wide = np.zeros((rows.of("qkv"), rank * len(parts)), b.dtype)
    taken = 0
    for number, part in enumerate(parts):
        start, size = rows.of("qkv"[: "qkv".index(part)]), rows.of(part)
        wide[start : start + size, number * rank : (number + 1) * rank] = b[taken : taken + size]
        taken += size
    return Lora(a, wide, Scale(rank, alpha).at_rank(rank * len(parts)))


class LitgptWriter(PlainWriter):
    """Writes all modules of the switches that are on, in all layers."""

    title = "LitGPT"
    capabilities = Capabilities(
        scales=False, ranks=False, embeddings=False, experts=False, saved=False, doubles=False
    )

    added = 0
    """How many modules that are not adapted got zeros."""

    on: frozenset[str] | set[str] = frozenset()
    """The switches that are on."""

    @cached_property
    def cut(self) -> list[tuple[Lora, list[Lora]]]:
        """The LoRAs of qkv, and what was made of each: the report is about the whole."""
        return []

    def arrange(self, made: Sequence[Images]) -> Sequence[Images]:
        """As below; the switches are noted that the result is about."""
        images = self._arranged(made)
        self.on = {
            _switch(image.keys.template)
            for image in images
            if any(lora is not None for lora in image.loras)
        }
        return images

    def _arranged(self, made: Sequence[Images]) -> Sequence[Images]:
        """LoRAs of one rank and scale, q, k and v apart, and zeros where LitGPT would adapt and the source does not.

        A part of qkv is called ``…attn.qkv.weight/q`` until the file is written.
        """
        if any(lora is not None and lora.a.ndim != 2 for image in made for lora in image.loras):
            return made  # refused by name afterwards
        rows = None
        fused = [image for image in made if image.keys.template.endswith(_FUSED)]
        images = [image for image in made if not image.keys.template.endswith(_FUSED)]
        parts: dict[str, Lora] = {}
        for key, lora in loras_of(fused).items():
            rows = rows or self._rows(key)
            cut = dict(_apart(key, lora, rows))
            self.cut.append((lora, list(cut.values())))
            parts.update(cut)
        images += as_images(parts)
        adjust(images, self.capabilities)
        missing = self._missing(images)
        if not missing:
            return images
        like = most_common([lora for image in images for lora in image.loras if lora is not None])
        sizes = Sizes(self.known, self.to.name, images, self.title, self.opened.where)
        added = {key: zeros_like(like, *sizes.of(key)) for key in missing}
        self.added = len({_weight(key) for key in missing} - {_weight(key) for key in parts})
        return [*images, *as_images(added)]

    def _rows(self, key: str) -> Rows:
        rows = _rows_of(config_of(self.known))
        if rows is not None:
            return rows
        raise BadInputError(
            Finding(
                "model-needed",
                "LitGPT keeps q, k and v as one tensor, and nothing says how many rows each of them has",
                where=self.opened.where,
                key=key,
                fix="give the base model with --model (its folder or its config.json)",
            )
        )

    def _missing(self, images: Sequence[Images]) -> list[str]:
        """Weights that LitGPT adapts besides."""
        inside: Counter[str] = Counter()
        for image in images:
            rows = np.array([lora is not None for lora in image.loras], dtype=bool)
            before, _, ending = image.keys.template.partition(f"{_LAYERS}{MARK}.")
            if ending and not before:
                numbers = image.keys.numbers[rows, 1:]
                inside.update(fill_rows(ending, numbers))
        if not inside:
            return []
        wanted = set(inside)
        if any(module.startswith("mlp.") for module in inside):
            wanted.update(self._mlp(wanted))
        count = layer_count(self.known, self.opened.where, self.title)
        short = sorted(ending for ending in wanted if inside[ending] < count)
        have = loras_of(images) if any(inside[ending] for ending in short) else {}
        names = [f"{_LAYERS}{layer}.{end}" for layer in range(count) for end in short]
        return [name for name in names if name not in have]

    def _mlp(self, inside: set[str]) -> Iterator[str]:
        """Every module that ``lora_mlp`` stands for in this model."""
        config = config_of(self.known)
        experts = next(
            (
                config[n]
                for n in ("num_local_experts", "num_experts")
                if isinstance(config.get(n), int)
            ),
            0,
        )
        mixture = any(module.startswith(("mlp.gate.", "mlp.experts.")) for module in inside)
        plain = any(module.startswith("mlp.fc.") for module in inside) or (
            self.known.model_type == "phi"
        )
        each = ("fc", "proj") if plain else ("fc_1", "fc_2", "proj")
        if not mixture:
            yield from (f"mlp.{name}.weight" for name in each)
            return
        yield "mlp.gate.weight"
        for expert in range(experts):
            yield from (f"mlp.experts.{expert}.{name}.weight" for name in each)

    def blob(self, deltas: Sequence[Delta], saved: Sequence[Saved]) -> Blob:
        """The tensors, qkv as one, and the settings."""
        tensors: dict[str, Array] = {}
        qkv: dict[str, dict[str, Lora]] = {}
        for delta in deltas:
            key, lora = delta.key, delta.lora
            if "/" in key:
                weight, _, part = key.partition("/")
                qkv.setdefault(weight, {})[part] = lora
            else:
                module = key.removesuffix(".weight")
                tensors[module + _A], tensors[module + _B] = lora.a, lora.b
        for key, parts in qkv.items():
            ordered = [parts[part] for part in "qkv" if part in parts]
            module = key.removesuffix(".weight")
            tensors[module + _A] = narrow(np.concatenate([lora.a for lora in ordered]))
            tensors[module + _B] = narrow(np.concatenate([lora.b for lora in ordered]))
        scale = deltas[0].lora.scale if deltas else Scale(1, 1)
        names = (*_PARTS.values(), *_FOLLOWS.values(), "lora_mlp")
        config: dict[str, Any] = {
            "dialect": "litgpt",
            "checkpoint_dir": self._checkpoint(),
            "precision": "32-true",
            "lora_r": scale.rank,
            "lora_alpha": whole(scale.value * scale.rank),
            "lora_dropout": 0.0,
            **{name: name in self.on for name in names},
        }
        model = model_config(self.known.model_type, config_of(self.known))
        if model is not None:
            config[_BASE] = model
        return Blob(config, tensors)

    def _checkpoint(self) -> str:
        said = self.opened.config.get("checkpoint_dir") or self.opened.hints().base
        return str(said) if said else f"checkpoints/{self.known.model_type or 'base'}"

    def write_lora(
        self,
        made: Sequence[Images],
        saved: Sequence[Saved],
        entries: Sequence[str],
        returned: Mapping[str, Array],
        written: Sequence[Written],
    ) -> Blob:
        """Adjust, then write; what is reported of qkv is reported of the whole tensor."""
        blob = super().write_lora(made, saved, entries, returned, written)
        for lora, parts in self.cut:
            lora.exact = lora.exact and all(part.exact for part in parts)
        fused = {_weight(each.key): each.scale for each in blob.written if "/" in each.key}
        told = [each for each in blob.written if "/" not in each.key]
        told += [Written(k, k.removesuffix(".weight"), None, s) for k, s in fused.items()]
        return replace(blob, written=tuple(told))

    def notes(self, blob: Blob, made: Sequence[Images]) -> list[str]:
        """How many factors are zeros."""
        notes = super().notes(blob, made)
        if self.added:
            notes.append(
                f"{count_in_words(self.added, 'module')} not adapted before got zeros: LitGPT adapts all layers alike"
            )
        if _BASE not in blob.config:
            notes.append(
                f"litgpt merge_lora wants a {MODEL} beside the adapter: copy it from the base's LitGPT checkpoint"
            )
        return notes


def _weight(key: str) -> str:
    """The weight that a part belongs to."""
    return key.partition("/")[0]


def _switch(key: str) -> str:
    """The switch that a weight belongs to."""
    stem, _, part = key.partition("/")
    if part:
        return _PARTS[part]
    module = stem.removesuffix(".weight")
    return next((s for end, s in _FOLLOWS.items() if module.endswith(end)), "lora_mlp")


def _apart(key: str, lora: Lora, rows: Rows) -> Iterator[tuple[str, Lora]]:
    """The parts of qkv that are adapted, each with the components that reach its rows."""
    start = 0
    for part in "qkv":
        size = rows.of(part)
        b = lora.b[start : start + size]
        start += size
        alive = (b != 0).any(axis=0) & (lora.a != 0).any(axis=1)
        if alive.any():
            index = np.flatnonzero(alive)
            scale = lora.scale.at_rank(len(index))
            yield f"{key}/{part}", Lora(lora.a[index], b[:, index], scale, lora.exact)


class Litgpt:
    """LitGPT's adapters."""

    name = "litgpt"
    title = (
        "LitGPT: lit_model.pth.lora and hyperparameters.yaml, as litgpt finetune_lora saves them"
    )
    versions = VERSIONS
    layout = "litgpt"
    usage = "Use it with: litgpt merge_lora {path} --pretrained_checkpoint_dir BASE"
    capabilities = LitgptWriter.capabilities
    spelling = PlainNames("", "lora_A", "lora_B")

    def sniff(self, src: Path) -> Evidence | None:
        """The file's name, or names of its tensors."""
        file = one_file(src, (WEIGHTS,), (".pth.lora",))
        if file is not None:
            return Evidence(certain=True, why=f"there is a {file.name}")
        if not (src.is_file() and src.suffix in (".pth", ".lora", ".pt")):
            return None
        from regraft.storage.torch_file import torch_names

        try:
            names = torch_names(src, _INSIDE)
        except (RegraftError, OSError):
            return None
        if names and all(name.endswith((_A, _B)) for name in names):
            return Evidence(certain=True, why=f"{src.name} has LitGPT's names ({names[0]})")
        return None

    def find(self, src: Path) -> Found:
        """The weights, and the settings beside them."""
        file = src if src.is_file() else one_file(src, (WEIGHTS,), (".pth.lora",))
        if file is None:
            message = f"there is no {WEIGHTS} here"
            raise BadInputError(Finding("not-an-adapter", message, where=str(src)))
        beside = tuple(path for name in (CONFIG, MODEL) if (path := file.parent / name).is_file())
        if src.is_file():
            return Found(src.parent, (src.parent,), file, beside=beside)
        others = tuple(
            sorted(
                path.relative_to(src)
                for path in src.rglob("*")
                if path.is_file() and path not in (file, *beside)
            )
        )
        return Found(src, (src,), file, others, beside)

    def open(self, folder: Path, root: Path, weights: Path | None) -> LitgptFile:
        """Its factors by base tensor."""
        from regraft.storage.torch_file import open_torch

        path = weights if weights is not None else folder / WEIGHTS
        settings = _load(path.parent / CONFIG)
        model = _load(path.parent / MODEL)
        where = str(path)
        rank, alpha = _numbers(settings, path.parent / CONFIG)
        tensors = open_torch(path, _INSIDE)
        loras: dict[str, Lora] = {}
        fused: dict[str, tuple[Array, Array]] = {}
        findings = []
        for module, (a, b) in pairs(tensors, (_A, _B), where).items():
            key = f"{module}.weight"
            if a.ndim != 2 or b.ndim != 2 or b.shape[1] != rank or a.shape[0] % rank:
                findings.append(shape_finding(where, module + _A, a, b))
            elif module.endswith(_QKV):
                fused[key] = a, b
            elif a.shape[0] != rank:
                findings.append(shape_finding(where, module + _A, a, b))
            else:
                loras[key] = Lora(a, b, Scale(rank, alpha))
        if findings:
            raise BadInputError(findings)
        said = "".join(part for part, name in _PARTS.items() if settings.get(name))
        base = settings.get("checkpoint_dir")
        return LitgptFile(
            "",
            where,
            {**settings, "dialect": self.name},
            tensors,
            loras,
            said=Hints(CONFIG, base=str(base) if base else None, layout=self.layout),
            spelling=self.spelling,
            fused=fused,
            rank=rank,
            alpha=alpha,
            switches=said if any(name in settings for name in _PARTS.values()) else None,
            rows=_rows_beside(model),
        )

    def writer(self, opened: Opened, known: Known, to: Layout) -> LitgptWriter:
        """What writes one."""
        return LitgptWriter(opened, known, to, self.spelling)

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """Write the weights and the settings."""
        from regraft.storage.torch_write import write_torch

        source = Path(opened.where)
        if result.report.copied:
            copy_file(source, folder / WEIGHTS)
            for name in (CONFIG, MODEL):
                if (source.parent / name).is_file():
                    copy_file(source.parent / name, folder / name)
            return
        yaml = _yaml()
        write_torch(folder / WEIGHTS, result.tensors, _INSIDE)
        settings = {k: v for k, v in result.config.items() if k not in ("dialect", _BASE)}
        text = yaml.safe_dump(settings, sort_keys=True)
        (folder / CONFIG).write_text(text, encoding="utf-8")
        if _BASE in result.config:
            text = yaml.safe_dump(result.config[_BASE], sort_keys=True)
            (folder / MODEL).write_text(text, encoding="utf-8")


def _numbers(settings: Mapping[str, Any], path: Path) -> tuple[int, float]:
    """Rank and alpha.

    Raises ``BadInputError`` where the settings do not say them.
    """
    rank, alpha = settings.get("lora_r"), settings.get("lora_alpha")
    findings = [
        Finding(
            "no-config" if not settings else "config",
            f"nothing says {name}" if value is None else f"{name} is no number above 0",
            where=str(path),
            key=name,
            fix=f"put the {CONFIG} of the training beside the weights",
        )
        for name, value, kind in (("lora_r", rank, int), ("lora_alpha", alpha, int | float))
        if isinstance(value, bool)
        or not isinstance(value, kind)
        or (name == "lora_r" and isinstance(value, int) and value < 1)
    ]
    findings += [
        Finding("config", "it is neither true nor false", where=str(path), key=name)
        for name in _PARTS.values()
        if name in settings and not isinstance(settings[name], bool)
    ]
    if findings:
        raise BadInputError(findings)
    assert isinstance(rank, int) and isinstance(alpha, int | float)
    return rank, alpha


LITGPT = Litgpt()
