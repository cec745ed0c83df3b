"""torchtune: the adapter weights that its LoRA and DoRA recipes save.

``adapter_model.pt`` has ``layers.3.attn.q_proj.lora_a.weight`` (rank, in), ``.lora_b.weight`` (out, rank) and, for
DoRA, ``.magnitude``; the rows of q and k are in the order of Meta's rotary embeddings. ``adapter_config.json`` is
PEFT's, with ``r`` and ``lora_alpha``. A recipe adapts the same modules in all layers, and w1, w2 and w3 all or not at
all.

Source: torchtune 0.6.1 (``training/checkpointing/_checkpointer.py``, ``modules/peft``, ``models/convert_weights.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.adapters.form import Array, Blob, Images, Lora, zeros_like
from regraft.adapters.protocol import Hints, Opened
from regraft.adapters.scale import Scale
from regraft.dialects.base import Capabilities, Delta, Evidence, Found, PlainNames
from regraft.dialects.dora import DORA_CONFIG, DoraFile, DoraWriter
from regraft.dialects.everywhere import Sizes, as_images, layer_count, loras_of, most_common
from regraft.dialects.halves import narrow, one_file, pairs, refuse_tied_head, shape_finding, whole
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError
from regraft.report import count_in_words
from regraft.storage.folder import copy_file
from regraft.storage.json_files import load_json
from regraft.storage.torch_file import open_torch, read_torch
from regraft.storage.torch_write import write_torch

if TYPE_CHECKING:
    from regraft.adapters.convert import Converted
    from regraft.adapters.detect import Known
    from regraft.layouts.names import Layout

WEIGHTS, CONFIG = "adapter_model.pt", "adapter_config.json"
_A, _B, _M = ".lora_a.weight", ".lora_b.weight", ".magnitude"
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
_MLP = ("mlp.w1", "mlp.w2", "mlp.w3")
_HEAD = "output.weight"
_TARGETS = {
    "attn.q_proj": "q_proj",
    "attn.k_proj": "k_proj",
    "attn.v_proj": "v_proj",
    "attn.output_proj": "o_proj",
    "mlp.w1": "gate_proj",
    "mlp.w2": "down_proj",
    "mlp.w3": "up_proj",
    "output": "lm_head",
}
"""What torchtune calls its modules in PEFT's ``target_modules``."""


class TorchtuneWriter(DoraWriter):
    """Writes the same modules in all layers."""

    title = "torchtune"
    capabilities = Capabilities(
        scales=False, ranks=False, embeddings=False, experts=False, saved=False, doubles=False
    )

    def arrange(self, made: Sequence[Images]) -> Sequence[Images]:
        """LoRAs of one rank and scale, and zeros where a recipe would adapt and the source does not."""
        made = super().arrange(made)
        loras = loras_of(made)
        missing = self._missing(loras)
        if not missing:
            return made
        like = most_common(list(loras.values()))
        sizes = Sizes(self.known, self.to.name, made, self.title, self.opened.where)
        added = {key: zeros_like(like, *sizes.of(key)) for key in missing}
        return [*made, *as_images(added)]

    def _missing(self, keys: Mapping[str, object]) -> list[str]:
        """Weights that torchtune adapts besides."""
        inside = {match[2] for key in keys if (match := _LAYER.fullmatch(key)) is not None}
        if not inside:
            return []
        wanted = [*sorted(inside), *(w for w in _MLP if inside & set(_MLP) and w not in inside)]
        count = layer_count(self.known, self.opened.where, self.title)
        names = [f"layers.{layer}.{module}.weight" for layer in range(count) for module in wanted]
        return [name for name in names if name not in keys]

    def completed(
        self, deltas: list[Delta], magnitudes: dict[str, Array]
    ) -> tuple[list[Delta], dict[str, Array]]:
        """With DoRAs that change nothing, where a recipe would adapt and the source does not.

        Raises ``RefusedError`` where the base's weights are not at hand, whose rows' lengths are their magnitudes.
        """
        loras = {delta.key: delta.lora for delta in deltas}
        for key in self._missing(loras):
            like = most_common(list(loras.values()))
            weight = self.base.matrix(key, "linear")
            if weight is None:
                raise self._needs_weights(key)
            deltas.append(Delta(key, "linear", zeros_like(like, *weight.shape)))
            magnitudes[key] = np.linalg.norm(weight, axis=1).astype(np.float32)
        return deltas, magnitudes

    def _needs_weights(self, key: str) -> RefusedError:
        return RefusedError(
            Finding(
                "needs-base-weights",
                "torchtune adapts this weight as well, and a DoRA that changes nothing has the lengths of its rows as "
                "magnitudes",
                where=self.opened.where,
                key=key,
                fix="give the base's folder with its weights as --model",
            )
        )

    def file(self, deltas: Sequence[Delta], magnitudes: Mapping[str, Array]) -> Blob:
        """Factors in the order of layers, and PEFT's config."""
        keys = [delta.key for delta in deltas]
        refuse_tied_head(self.known, keys, _HEAD, self.title, self.opened.where)
        tensors = {}
        for delta in sorted(deltas, key=lambda d: _place(d.key)):
            module = delta.key.removesuffix(".weight")
            tensors[module + _A] = narrow(delta.lora.a)
            tensors[module + _B] = narrow(delta.lora.b)
            if delta.key in magnitudes:
                tensors[module + _M] = narrow(magnitudes[delta.key])
        scale = deltas[0].lora.scale if deltas else Scale(1, 1)
        config: dict[str, Any] = {
            "dialect": "torchtune",
            "r": scale.rank,
            "lora_alpha": whole(scale.value * scale.rank),
            "target_modules": _targets(keys),
            "peft_type": "LORA",
        }
        if magnitudes:
            config["use_dora"] = True
        base = self.opened.hints().base
        if base:
            config["base_model_name_or_path"] = base
        return Blob(config, tensors)

    def notes(self, blob: Blob, made: Sequence[Images]) -> list[str]:
        """How many factors are zeros."""
        given = len(loras_of(made))
        added = sum(name.endswith(_A) for name in blob.tensors) - given
        notes = super().notes(blob, made)
        if added <= 0 or not given:
            return notes
        return [
            *notes,
            f"{count_in_words(added, 'module')} not adapted before got zeros: torchtune adapts all layers alike",
        ]


def _place(key: str) -> tuple[int, str]:
    match = _LAYER.fullmatch(key)
    return (1 << 30, key) if match is None else (int(match[1]), match[2])


def _targets(keys: Sequence[str]) -> list[str]:
    modules = {_place(key)[1].removesuffix(".weight") for key in keys}
    return [name for module, name in _TARGETS.items() if module in modules]


class Torchtune:
    """torchtune's adapters."""

    name = "torchtune"
    title = "torchtune: adapter_model.pt and adapter_config.json, as its recipes save them"
    layout = "torchtune"
    usage = "Use it with: checkpointer.adapter_checkpoint={path}/adapter_model.pt of a recipe"
    capabilities = TorchtuneWriter.capabilities
    spelling = PlainNames("", "lora_a.weight", "lora_b.weight")

    def sniff(self, src: Path) -> Evidence | None:
        """A file of torch's whose tensors have torchtune's names."""
        file = one_file(src, (WEIGHTS,))
        if file is None and src.is_file() and src.suffix in (".pt", ".bin", ".pth"):
            file = src
        if file is None:
            return None
        try:
            names = read_torch(file)
        except (RegraftError, OSError):
            return None
        if names and all(name.endswith((_A, _B, _M)) for name in names):
            return Evidence(
                certain=True, why=f"{file.name} has torchtune's names ({next(iter(names))})"
            )
        return None

    def find(self, src: Path) -> Found:
        """The weights, and the config beside them; PEFT's export in the same folder is left alone."""
        file = src if src.is_file() else one_file(src, (WEIGHTS,))
        if file is None:
            message = f"there is no {WEIGHTS} here"
            raise BadInputError(Finding("not-an-adapter", message, where=str(src)))
        config = file.parent / CONFIG
        return Found(file.parent, (file.parent,), file, beside=(config,) * config.is_file())

    def open(self, folder: Path, root: Path, weights: Path | None) -> DoraFile:
        """Its modules by base tensor."""
        path = weights if weights is not None else folder / WEIGHTS
        tensors = open_torch(path)
        where = str(path)
        config = _config(path.parent / CONFIG)
        loras: dict[str, Lora] = {}
        findings = []
        for module, (a, b) in pairs(tensors, (_A, _B), where, (_M,)).items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                findings.append(shape_finding(where, module + _A, a, b))
                continue
            if a.shape[0] != config["r"]:
                message = f"its rank is {a.shape[0]}, and {CONFIG} says r = {config['r']}"
                findings.append(Finding("rank", message, where=where, key=module + _A))
            loras[f"{module}.weight"] = Lora(a, b, Scale(a.shape[0], config["lora_alpha"]))
        magnitudes = {
            f"{name.removesuffix(_M)}.weight": tensor
            for name, tensor in tensors.items()
            if name.endswith(_M)
        }
        for key in loras.keys() ^ magnitudes.keys() if magnitudes else ():
            message = "factors without a magnitude, or a magnitude without factors"
            findings.append(Finding("half", message, where=where, key=key))
        for key in loras.keys() & magnitudes.keys():
            if magnitudes[key].size != loras[key].b.shape[0]:
                message = f"{magnitudes[key].size} magnitudes for {loras[key].b.shape[0]} rows"
                findings.append(Finding("shape", message, where=where, key=key))
        if findings:
            raise BadInputError(findings)
        base = config.get("base_model_name_or_path")
        return DoraFile(
            "",
            where,
            {**config, "dialect": self.name, **(DORA_CONFIG if magnitudes else {})},
            tensors,
            loras,
            said=Hints(CONFIG, base=base if isinstance(base, str) else None, layout=self.layout),
            spelling=self.spelling,
            magnitudes=magnitudes,
        )

    def writer(self, opened: Opened, known: Known, to: Layout) -> TorchtuneWriter:
        """What writes one."""
        return TorchtuneWriter(opened, known, to, self.spelling)

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """Write the weights and the config."""
        if result.report.copied:
            source = Path(opened.where)
            copy_file(source, folder / WEIGHTS)
            if (source.parent / CONFIG).is_file():
                copy_file(source.parent / CONFIG, folder / CONFIG)
            return
        write_torch(folder / WEIGHTS, result.tensors)
        config = {name: value for name, value in result.config.items() if name != "dialect"}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(path: Path) -> dict[str, Any]:
    """The config, with a rank and an alpha."""
    fix = f"put the {CONFIG} of the training beside the weights"
    if not path.is_file():
        message = f"there is no {CONFIG} beside the weights, and nothing else says lora_alpha"
        raise BadInputError(Finding("no-config", message, where=str(path), fix=fix))
    config = load_json(path)
    findings = [
        Finding("config", f"{name} is no number", where=str(path), key=name, fix=fix)
        for name in ("r", "lora_alpha")
        if isinstance(config.get(name), bool) or not isinstance(config.get(name), int | float)
    ]
    if findings:
        raise BadInputError(findings)
    return config


TORCHTUNE = Torchtune()
