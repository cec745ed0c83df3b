"""NeMo Automodel: PEFT's two files and its own config beside them, with a stamp of how packed experts lie.

Three forms of stacked experts: its own grouped tensors (``lora_gate_and_up_A`` and the like, 3-D), one adapter per
expert, and PEFT's packing. It writes one rank and one alpha, both whole. Reading one adapter per expert it takes gate's
``lora_A`` for up as well, so what is written is packed.

Source: nemo-automodel 0.7.0, ``components/moe/state_dict_mixin.py``, ``components/_peft/lora.py`` and
``lora_experts.py``, ``components/checkpoint/addons.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.convert import Converted
from regraft.adapters.detect import Known
from regraft.adapters.form import Array, Images, Lora, Written, rescale
from regraft.adapters.protocol import Opened
from regraft.adapters.scale import Scale
from regraft.dialects.base import Capabilities, Evidence, Found
from regraft.dialects.judging import ToolReader
from regraft.dialects.peft.dialect import PeftFiles
from regraft.dialects.peft.packing import BEFORE, SINCE
from regraft.dialects.peft.source import Source, open_adapter
from regraft.dialects.peft.writing import PEFT_VERSION, path_of
from regraft.dialects.served import Pieces, ServedWriter
from regraft.dialects.tool_files import (
    PACKED,
    PREFIX,
    Renamed,
    ToolSource,
    look_at,
    tool_source,
)
from regraft.errors import BadInputError, Finding
from regraft.layouts.names import Layout
from regraft.names.keys import in_order
from regraft.storage.json_files import folder_with_config, load_json

OWN = "automodel_peft_config.json"
STAMP = "paramwrapper_layout"
STAMPS = {"peft-0.18": BEFORE, "peft-0.19.1": SINCE}
"""What the stamp may say, and how the experts lie then."""
NATIVE = re.compile(r"(?P<module>.+\.experts)\.lora_(?P<part>gate_and_up|down)_(?P<letter>[AB])")
_VERSION_OF = {BEFORE: PEFT_VERSION[BEFORE], SINCE: "0.19.1"}


def stamped(stamp: object) -> str | None:
    """How experts lie by a stamp; ``None`` where there is none, or one that is not known.

    >>> stamped("peft-0.18") == BEFORE, stamped(["peft-0.18"])
    (True, None)
    """
    return STAMPS.get(stamp) if isinstance(stamp, str) else None


def own_config(folder: Path) -> dict[str, Any]:
    """Its own config beside an adapter; empty where there is none. Raises ``BadInputError``."""
    file = folder / OWN
    return load_json(file) if file.is_file() else {}


def as_peft(source: Source, own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors and config as PEFT has them, and what told it. Raises ``BadInputError``."""
    config, told = dict(source.config), []
    tensors = dict(source.tensors)
    native = [name for name in tensors if NATIVE.fullmatch(name)]
    stamp = own.get(STAMP, config.pop(STAMP, None))
    packing = stamped(stamp)
    if native:
        tensors, ranks = _pack_native(tensors, source.where)
        config["target_parameters"] = list(ranks)
        config["peft_version"] = _VERSION_OF[SINCE]
        told.append("its experts are grouped as in NeMo Automodel's memory")
    elif stamp is not None and any(map(PACKED.fullmatch, tensors)):
        if packing is None:
            raise BadInputError(
                Finding(
                    "config",
                    f"{STAMP} is {stamp!r}, which is none of {', '.join(STAMPS)}",
                    where=str(Path(source.where) / OWN),
                    key=STAMP,
                    fix="give the file that was saved with these weights",
                )
            )
        config["peft_version"] = _VERSION_OF[packing]
        told.append(f"{OWN} says that its experts are packed as by {stamp}")
    if own.get("moe_rank_scaling"):
        if native:
            given = config.get("rank_pattern") or {}
            config["rank_pattern"] = {
                **given,
                **{"^" + re.escape(path): rank for path, rank in ranks.items()},
            }
        _scale_ranks(tensors, config, own, source.where)
        told.append(f"{OWN} says moe_rank_scaling: the experts' rank is that of their tensors")
    changed: dict[str, Any] = {"tensors": tensors, "config": config}
    if packing is not None and not native:
        changed["packed_as"] = packing
    return changed, told


def _pack_native(
    tensors: Mapping[str, Array], where: str
) -> tuple[dict[str, Array], dict[str, int]]:
    """Grouped tensors, (E, in, rank) and (E, rank, out), as PEFT packs them, and the ranks by the parameters' names."""
    rest = Renamed(where)
    found: dict[tuple[str, str], dict[str, Array]] = {}
    for name, tensor in tensors.items():
        hit = NATIVE.fullmatch(name)
        if hit is None:
            rest[name] = tensor
        else:
            found.setdefault((hit["module"], hit["part"]), {})[hit["letter"]] = tensor
    findings = []
    ranks: dict[str, int] = {}
    for (module, part), pair in found.items():
        a, b = pair.get("A"), pair.get("B")
        fits = (
            a is not None
            and b is not None
            and a.ndim == b.ndim == 3
            and a.size
            and b.size
            and (len(a), a.shape[2]) == (len(b), b.shape[1])
        )
        if not fits:
            findings.append(
                Finding(
                    "half" if len(pair) < 2 else "shape",
                    "it has no other half beside it"
                    if len(pair) < 2
                    else f"its factors {[list(x.shape) for x in pair.values()]} do not fit together",
                    where=where,
                    key=f"{module}.lora_{part}_{'A' if 'A' in pair else 'B'}",
                    fix="save the adapter again",
                )
            )
            continue
        assert a is not None
        assert b is not None
        leaf = "gate_up_proj" if part == "gate_and_up" else "down_proj"
        ranks[f"{module.removeprefix(PREFIX)}.{leaf}"] = a.shape[2]
        inside = part == "gate_and_up" and (module, "down") in found
        place = module + ".base_layer" * inside
        rest[f"{place}.lora_A.weight"] = np.ascontiguousarray(a.transpose(0, 2, 1)).reshape(
            -1, a.shape[1]
        )
        rest[f"{place}.lora_B.weight"] = np.ascontiguousarray(b.transpose(2, 1, 0)).reshape(
            b.shape[2], -1
        )
    if findings:
        raise BadInputError(findings)
    return rest.checked(), ranks


def _scale_ranks(
    tensors: Mapping[str, Array], config: dict[str, Any], own: Mapping[str, Any], where: str
) -> None:
    """Ranks of experts that are smaller than the config's, in its ``rank_pattern``.

    NeMo divides the rank of experts by the number of active ones, and alpha by the rank that comes out. Raises
    ``BadInputError`` where experts are packed and nothing says how many there are.
    """
    ranks = dict(config.get("rank_pattern") or {})
    for name, tensor in tensors.items():
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        hit = PACKED.fullmatch(name)
        if hit is not None and hit["letter"] == "A":
            b = tensors.get(name.replace("lora_A", "lora_B"))
            leaf = "gate_up_proj" if hit["depth"] else "down_proj"
            pattern = "^" + re.escape(f"{hit['module'].removeprefix(PREFIX)}.{leaf}")
            if pattern in ranks:
                continue
            experts = _experts_of(config, own, tensor, b)
            if not experts:
                raise BadInputError(
                    Finding(
                        "model-needed",
                        f"{OWN} says moe_rank_scaling: the experts' rank is the config's divided by the number of "
                        "active experts, and nothing beside the file says how many experts there are",
                        where=where,
                        key=name,
                        fix="name the base's folder as base_model_name_or_path in adapter_config.json",
                    )
                )
            ranks[pattern] = len(tensor) // experts
        elif (
            name.endswith(".lora_A.weight")
            and ".experts." in name
            and len(tensor) != config.get("r")
        ):
            ranks["^" + re.escape(module)] = len(tensor)
    config["rank_pattern"] = ranks


def _experts_of(
    config: Mapping[str, Any], own: Mapping[str, Any], a: Array, b: Array | None
) -> int | None:
    """How many experts packed factors have, where the rank of experts was divided.

    The number of active experts divides the rank and is in the base's config; where that is not at hand, the rank is
    not known.
    """
    folder = folder_with_config(config.get("base_model_name_or_path"))
    if folder is None:
        return None
    fields = load_json(folder / "config.json")
    inner = fields.get("text_config")
    fields = {**fields, **inner} if isinstance(inner, dict) else fields
    for name in ("num_local_experts", "n_routed_experts", "num_experts"):
        count = fields.get(name)
        if isinstance(count, int) and count > 0 and len(a) % count == 0:
            return count
    return None


class NemoWriter(ServedWriter):
    """For NeMo Automodel: one whole rank, one whole alpha, experts packed with both parameters."""

    title = "NeMo Automodel"
    tool = "nemo"
    capabilities = Capabilities(scales=False, ranks=False, saved=False)

    def complete(self, pieces: Pieces) -> None:
        """Both parameters of packed experts; a whole alpha."""
        self.complete_packed(pieces)
        loras = list(pieces.loras())
        if loras:
            self._make_whole(loras)

    def _make_whole(self, loras: Sequence[Lora]) -> None:
        """One alpha that is a whole number: what is left of the scale goes into B."""
        scale = loras[0].scale
        rank = loras[0].a.shape[-2]
        value = Fraction(scale.alpha) / rank if not scale.rslora else Fraction(scale.value)
        alpha = value * rank
        if not scale.rslora and alpha.denominator == 1:
            return
        whole = max(1, round(alpha)) if alpha > 0 else min(-1, round(alpha))
        target = Scale(rank, whole)
        # The nearest whole alpha whose ratio is a power of two keeps every bit; there may be none.
        for candidate in sorted(
            {1 << n for n in range(20)}, key=lambda n: abs(n - abs(float(alpha)))
        ):
            ratio = alpha / candidate
            if ratio and _is_power_of_two(abs(ratio)):
                target = Scale(rank, candidate if alpha > 0 else -candidate)
                break
        ratio = float(alpha / Fraction(target.alpha)) if alpha else 0.0
        for lora in loras:
            lora.b, exact = rescale(lora.b, ratio)
            lora.exact = lora.exact and exact
            lora.scale = target

    def config(self, written: Sequence[Written]) -> dict[str, Any]:
        """The fields that it writes, and no others: it knows no patterns and no version."""
        made = super().config(written)
        fields = (
            "task_type",
            "peft_type",
            "r",
            "lora_alpha",
            "use_dora",
            "bias",
            "base_model_name_or_path",
        )
        config = {name: made[name] for name in fields}
        config["lora_alpha"] = int(config["lora_alpha"])  # whole by now, and 0.0 is no int
        if config["task_type"] is None:
            config["task_type"] = "CAUSAL_LM"
        if made["auto_mapping"] is not None:
            # It reads none of this file's fields; other readers learn the family of the base here alone.
            config["auto_mapping"] = made["auto_mapping"]
        modules = [w.module for w in written if w.parameter is None]
        parameters = [path_of(w) for w in written if w.parameter is not None]
        config["target_modules"] = sorted(modules, key=in_order)
        if parameters:
            config["target_parameters"] = sorted(parameters, key=in_order)
        return config


def _is_power_of_two(value: Fraction) -> bool:
    top, bottom = value.numerator, value.denominator
    return top & (top - 1) == 0 and bottom & (bottom - 1) == 0


def own_config_for(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its own config for an adapter that was not trained by it."""
    made: dict[str, Any] = {
        "dropout": 0.0,
        "dropout_position": "post",
        "exclude_modules": [],
        "lora_A_init": "xavier",
        "lora_dtype": None,
        "match_all_linear": False,
        "moe_rank_scaling": False,
        "target_modules": list(config.get("target_modules") or []),
        "use_dora": False,
        "use_triton": False,
    }
    if config.get("target_parameters"):
        made["target_modules"] += sorted(
            {entry.rpartition(".")[0] for entry in config["target_parameters"]}, key=in_order
        )
        made[STAMP] = "peft-0.19.1"
    return made


class Nemo(PeftFiles):
    """NVIDIA's NeMo Automodel."""

    name = "nemo"
    title = "NeMo Automodel: PEFT's files and automodel_peft_config.json"
    layout = "transformers-v5"
    usage = (
        "Use it with: cp {path}/* RUN/CHECKPOINT/model/ and checkpoint.restore_from: CHECKPOINT in a recipe of "
        "NeMo Automodel, or Checkpointer.load_model(model, {path})"
    )
    versions = (BEFORE, SINCE)
    capabilities = NemoWriter.capabilities

    @property
    def readers(self) -> tuple[ToolReader, ...]:
        """How the tool loads adapters."""
        from regraft.dialects.judges.nemo import READER

        return (READER,)

    def sniff(self, src: Path) -> Evidence | None:
        """Its config beside PEFT's, or its grouped tensors."""
        look = look_at(src)
        if look is None or look.config is None:
            return None
        if (look.folder / OWN).is_file():
            return Evidence(certain=True, why=f"there is a {OWN}")
        key = next(filter(NATIVE.fullmatch, look.shapes), None)
        if key is not None:
            return Evidence(certain=True, why=f"it has {key}")
        if STAMP in look.config:
            return Evidence(certain=True, why=f"adapter_config.json has {STAMP}")
        return None

    def find(self, src: Path) -> Found:
        """A folder, one weights file, or a folder with adapters in subfolders."""
        found = super().find(src)
        others = tuple(path for path in found.others if path.name != OWN)
        return Found(found.root, found.folders, found.weights, others)

    def open(self, folder: Path, root: Path, weights: Path | None) -> ToolSource:
        """One adapter."""
        source = open_adapter(folder, root, weights, foreign=True)
        changed, told = as_peft(source, own_config(folder))
        return tool_source(source, self.name, told, **changed)

    def writer(self, opened: Opened, known: Known, to: Layout) -> NemoWriter:
        """What writes it."""
        return NemoWriter(opened, known, to)

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """The three files."""
        super().save(folder, opened, result)
        text = json.dumps(own_config_for(result.config), indent=2, sort_keys=True) + "\n"
        (folder / OWN).write_text(text, encoding="utf-8")


NEMO = Nemo()
__all__ = ["NEMO", "Images", "Nemo", "NemoWriter", "as_peft"]
