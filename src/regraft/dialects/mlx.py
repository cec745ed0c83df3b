"""MLX: what mlx-lm's LoRA and DoRA training writes.

A Linear or an Embedding has ``MODULE.lora_a`` (in, rank) and ``MODULE.lora_b`` (rank, out), transposed against PEFT;
stacked experts have (E, rank, in) and (E, out, rank), and until mlx-lm 0.26 an A whose experts stand one below the
other. ``lora_parameters.scale`` of the config multiplies the product as it is; one rank and one scale hold for all.
DoRA has ``MODULE.m`` besides.

Source: mlx-lm 0.32.2 (``tuner/{utils,lora,dora}.py``); of old releases 0.19, 0.22 and 0.26.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adapters.form import Array, Blob, Lora
from regraft.adapters.protocol import Hints, Opened
from regraft.adapters.scale import Scale, is_finite
from regraft.dialects.base import Capabilities, Delta, Evidence, Found, PlainNames
from regraft.dialects.dora import DORA_CONFIG, DoraFile, DoraWriter
from regraft.dialects.halves import (
    config_of,
    narrow,
    one_file,
    pairs,
    refuse_tied_head,
    shape_finding,
    whole,
)
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError
from regraft.storage.folder import copy_file
from regraft.storage.json_files import load_json
from regraft.storage.safetensors import open_tensors, read_header, write_tensors

if TYPE_CHECKING:
    from regraft.adapters.convert import Converted
    from regraft.adapters.detect import Known
    from regraft.dialects.judging import ToolReader
    from regraft.layouts.names import Layout

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_CHECKPOINT = "_adapters.safetensors"
BLOCK = re.compile(r"(?:language_model\.)?model\.layers\.(\d+)\.(.+)")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")


class MlxFile(DoraFile):
    """An adapter of mlx-lm's."""

    older: bool = False
    """Whether it has the form of releases that today's do not read: experts in one flat tensor, ``lora_layers``."""

    def is_ready(self, to: Layout, known: Known, packing: str | None) -> bool:
        """Whether today's mlx-lm reads it as it is."""
        return not self.older


class MlxWriter(DoraWriter):
    """Writes factors turned over, and the config that makes modules of them."""

    title = "MLX"
    capabilities = Capabilities(scales=False, ranks=False, saved=False, doubles=False)

    def file(self, deltas: Sequence[Delta], magnitudes: Mapping[str, Array]) -> Blob:
        """Factors with modules' inputs first, and a config whose keys cover them."""
        modules = [delta.key for delta in deltas]
        for head in _HEADS:
            refuse_tied_head(self.known, modules, head, self.title, self.opened.where)
        tensors = {}
        for delta in deltas:
            module, lora = delta.key.removesuffix(".weight"), delta.lora
            a, b = narrow(lora.a), narrow(lora.b)
            stacked = a.ndim == 3
            tensors[f"{module}.lora_a"] = a if stacked else a.T
            tensors[f"{module}.lora_b"] = b if stacked else b.T
            if delta.key in magnitudes:
                tensors[f"{module}.m"] = narrow(magnitudes[delta.key])
        scale = deltas[0].lora.scale if deltas else Scale(1, 1)
        keys, layers = _targets([d.key.removesuffix(".weight") for d in deltas], self._layers())
        base = self.opened.hints().base
        config: dict[str, Any] = {
            "dialect": "mlx",
            **({"model": base} if base else {}),
            "fine_tune_type": "dora" if magnitudes else "lora",
            "num_layers": layers,
            "lora_parameters": {
                "rank": scale.rank,
                "scale": float(scale.value),
                "dropout": 0.0,
                "keys": keys,
            },
        }
        return Blob(config, tensors)

    def _layers(self) -> int | None:
        count = config_of(self.known).get("num_hidden_layers")
        return count if isinstance(count, int) else None


def _targets(modules: Sequence[str], count: int | None) -> tuple[list[str], int]:
    """``keys`` and ``num_layers`` that make these modules; -1 stands for all layers.

    >>> _targets(["model.layers.3.mlp.up_proj", "lm_head"], 4)
    (['lm_head', 'mlp.up_proj'], 1)
    """
    inside = [match for match in map(BLOCK.fullmatch, modules) if match is not None]
    outside = {module for module in modules if BLOCK.fullmatch(module) is None}
    keys = sorted(outside | {match[2] for match in inside})
    if not inside or count is None:
        return keys, -1
    return keys, count - min(int(match[1]) for match in inside)


class Mlx:
    """mlx-lm's adapters."""

    name = "mlx"
    title = "MLX: adapters.safetensors and adapter_config.json, as mlx-lm trains them"
    layout = "mlx"
    usage = "Use it with: mlx_lm.generate --model BASE --adapter-path {path}"
    capabilities = MlxWriter.capabilities
    spelling = PlainNames("", "lora_a", "lora_b")

    @property
    def readers(self) -> tuple[ToolReader, ...]:
        """How the tool loads adapters."""
        from regraft.dialects.judges.mlx import READER

        return (READER,)

    def sniff(self, src: Path) -> Evidence | None:
        """Tensors that end in ``.lora_a``."""
        file = one_file(src, (WEIGHTS,), (_CHECKPOINT,))
        if file is None and src.is_file() and src.suffix == ".safetensors":
            file = src
        if file is None:
            return None
        try:
            names = read_header(file).tensors
        except (RegraftError, OSError):
            return None
        if any(name.endswith(".lora_a") for name in names):
            return Evidence(certain=True, why=f"{file.name} has tensors that end in .lora_a")
        return None

    def find(self, src: Path) -> Found:
        """The weights, and the config beside them."""
        file = src if src.is_file() else one_file(src, (WEIGHTS,), (_CHECKPOINT,))
        if file is None:
            message = f"there is no {WEIGHTS} here"
            raise BadInputError(Finding("not-an-adapter", message, where=str(src)))
        config = file.parent / CONFIG
        if src.is_file():
            return Found(src.parent, (src.parent,), file, beside=(config,) * config.is_file())
        others = tuple(
            sorted(
                path.relative_to(src)
                for path in src.rglob("*")
                if path.is_file() and path not in (file, config)
                if not path.name.endswith(_CHECKPOINT)
            )
        )
        return Found(src, (src,), file, others, (config,) * config.is_file())

    def open(self, folder: Path, root: Path, weights: Path | None) -> DoraFile:
        """Its modules by base tensor."""
        path = weights if weights is not None else folder / WEIGHTS
        config = _config(path.parent / CONFIG)
        tensors = dict(open_tensors(path))
        metadata = dict(read_header(path).metadata)
        where = str(path)
        rank, scale = _parameters(config, str(path.parent / CONFIG))
        loras: dict[str, Lora] = {}
        findings: list[Finding] = []
        for module, (a, b) in pairs(tensors, (".lora_a", ".lora_b"), where, (".m",)).items():
            lora = _factors(a, b, scale)
            if lora is None:
                findings.append(shape_finding(where, f"{module}.lora_a", a, b))
                continue
            if rank is not None and lora.scale.rank != rank:
                message = f"its rank is {lora.scale.rank}, and {CONFIG} says {rank}"
                findings.append(Finding("rank", message, where=where, key=f"{module}.lora_a"))
            loras[f"{module}.weight"] = lora
        findings += _not_made(list(loras), config, where)
        findings += _below_the_last(list(loras), config, where)
        magnitudes = {
            f"{name.removesuffix('.m')}.weight": tensor
            for name, tensor in tensors.items()
            if name.endswith(".m")
        }
        dora = config.get("fine_tune_type") == "dora"
        findings += _odd_magnitudes(loras, magnitudes, dora=dora, where=where)
        if findings:
            raise BadInputError(findings)
        base = config.get("model")
        return MlxFile(
            "",
            where,
            {**config, "dialect": self.name, **(DORA_CONFIG if magnitudes else {})},
            tensors,
            loras,
            kinds={k: "embedding" for k in loras if k.endswith("embed_tokens.weight")},
            metadata=metadata,
            said=Hints(CONFIG, base=base if isinstance(base, str) else None, layout=self.layout),
            spelling=self.spelling,
            magnitudes=magnitudes,
            older="lora_layers" in config
            or any(
                tensors[f"{k.removesuffix('.weight')}.lora_a"].ndim != x.a.ndim
                for k, x in loras.items()
            ),
        )

    def writer(self, opened: Opened, known: Known, to: Layout) -> MlxWriter:
        """What writes one."""
        return MlxWriter(opened, known, to, self.spelling)

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """Write the weights and the config."""
        if result.report.copied:
            source = Path(opened.where)
            copy_file(source, folder / WEIGHTS)
            if (source.parent / CONFIG).is_file():
                copy_file(source.parent / CONFIG, folder / CONFIG)
            return
        write_tensors(folder / WEIGHTS, result.tensors, result.metadata)
        config = {name: value for name, value in result.config.items() if name != "dialect"}
        (folder / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInputError(
            Finding(
                "no-config",
                f"there is no {CONFIG} beside the weights, and nothing else says the scale",
                where=str(path),
                fix=f"put the {CONFIG} of the training beside them",
            )
        )
    config = load_json(path)
    if config.get("fine_tune_type") == "full":
        raise RefusedError(
            Finding(
                "no-image",
                "it holds whole weights (fine_tune_type is full), and no adapter",
                where=str(path),
                fix="fuse it with mlx_lm.fuse, and convert the model",
            )
        )
    return config


def _parameters(config: Mapping[str, Any], where: str) -> tuple[int | None, float]:
    """The rank and what multiplies the product.

    Releases that counted in ``lora_layers`` multiplied ``scale`` by ``alpha / rank``; those since then know no alpha.
    """
    said = config.get("lora_parameters")
    said = said if isinstance(said, Mapping) else {}
    rank, scale, alpha = (said.get(name) for name in ("rank", "scale", "alpha"))
    wrong = [
        name
        for name, value in (("rank", rank), ("scale", scale), ("alpha", alpha))
        if value is not None
        and (isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value))
    ]
    if scale is None or wrong:
        message = (
            f"lora_parameters.{wrong[0]} is no finite number"
            if wrong
            else "lora_parameters has no scale, which multiplies what the adapter adds"
        )
        fix = "mlx-lm's scale is not alpha: set it to what the training used"
        raise BadInputError(Finding("config", message, where=where, key="lora_parameters", fix=fix))
    if alpha is not None and rank and "lora_layers" in config and "num_layers" not in config:
        scale = float(scale) * float(alpha) / float(rank)
    return (int(rank) if isinstance(rank, int | float) else None), float(scale)


def _factors(a: Array, b: Array, scale: float) -> Lora | None:
    """A and B as the internal form has them; ``None`` where they do not fit together."""
    if b.ndim == 3:
        experts, _, rank = b.shape
        if a.ndim == 2 and a.shape[0] == experts * rank:
            a = a.reshape(experts, rank, -1)
        fits = a.ndim == 3 and a.shape[:2] == (experts, rank)
        return Lora(a, b, Scale(rank, whole(scale * rank))) if fits else None
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        return None
    return Lora(a.T, b.T, Scale(b.shape[0], whole(scale * b.shape[0])))


def _not_made(keys: Sequence[str], config: Mapping[str, Any], where: str) -> list[Finding]:
    """Modules for which the config makes no layers, so that mlx-lm refuses their factors, or ignores them."""
    said = config.get("lora_parameters")
    wanted = said.get("keys") if isinstance(said, Mapping) else None
    if not isinstance(wanted, list):
        return []
    missed = []
    for key in keys:
        module = key.removesuffix(".weight")
        match = BLOCK.fullmatch(module)
        if module not in wanted and (match is None or match[2] not in wanted):
            missed.append(module)
    if not missed:
        return []
    return [
        Finding(
            "not-targeted",
            f"lora_parameters.keys of {CONFIG} does not name this module, so mlx-lm would not load its factors"
            + (f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""),
            where=where,
            key=f"{missed[0]}.lora_a",
            fix="use the config that was saved with these weights",
        )
    ]


def _below_the_last(keys: Sequence[str], config: Mapping[str, Any], where: str) -> list[Finding]:
    """Layers that are not among the last ``num_layers``, whatever the model has: mlx-lm leaves their factors unread."""
    count = config.get("num_layers", config.get("lora_layers"))
    blocks = [match for key in keys if (match := BLOCK.fullmatch(key.removesuffix(".weight")))]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1 or not blocks:
        return []
    first = max(int(match[1]) for match in blocks) + 1 - count
    return [
        Finding(
            "not-targeted",
            f"num_layers of {CONFIG} is {count}, so mlx-lm makes adapters in the last {count} layers alone, and would "
            "not load its factors",
            where=where,
            key=f"{match[0]}.lora_a",
            fix="use the config that was saved with these weights; -1 stands for all layers",
        )
        for match in blocks
        if int(match[1]) < first
    ][:1]


def _odd_magnitudes(
    loras: Mapping[str, Lora], magnitudes: Mapping[str, Array], *, dora: bool, where: str
) -> list[Finding]:
    findings = []
    for key in sorted(magnitudes.keys() - loras.keys()):
        message = "a magnitude without factors"
        findings.append(Finding("half", message, where=where, key=key.removesuffix("weight") + "m"))
    if bool(magnitudes) != dora and loras:
        message = (
            "the file has magnitudes, and fine_tune_type is not dora"
            if magnitudes
            else "fine_tune_type is dora, and the file has no magnitudes"
        )
        findings.append(Finding("config", message, where=where, key=f"{CONFIG}: fine_tune_type"))
    missing = sorted(loras.keys() - magnitudes.keys()) if magnitudes else []
    if missing:
        message = f"{len(missing)} of {len(loras)} modules have no magnitude"
        findings.append(Finding("half", message, where=where, key=missing[0]))
    for key in magnitudes.keys() & loras.keys():
        rows = loras[key].b.shape[-2]
        if loras[key].b.ndim != 2 or magnitudes[key].size not in (rows, loras[key].a.shape[1]):
            message = f"{magnitudes[key].size} magnitudes for {rows} rows"
            findings.append(Finding("shape", message, where=where, key=key))
    return findings


MLX = Mlx()
