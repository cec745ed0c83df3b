"""Megatron-Bridge's export: names of Hugging Face without PEFT's prefix, and no config. Read only.

Rank and alpha stand in the run's config; ``run_config.json`` beside the weights has them as ``peft.dim`` and
``peft.alpha``, or they are said with ``--alpha`` (and ``--rank``). Later releases write an ``adapter_config.json``.

Source: megatron-bridge 0.3.1, ``models/conversion/peft_bridge.py`` (``export_adapter_weights``), ``peft/lora.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.dialects.base import Capabilities, Evidence, Found
from regraft.dialects.peft.family_config import fresh_config
from regraft.dialects.peft.source import Source, open_adapter
from regraft.dialects.tool_files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    ReadOnly,
    ToolSource,
    find_weights,
    look_at,
    tool_source,
    with_prefix,
)
from regraft.errors import BadInputError, Finding
from regraft.storage.json_files import load_json
from regraft.storage.safetensors import open_tensors, read_header

RUN = "run_config.json"
_FACTOR = ".lora_A.weight"


def read_run(
    folder: Path, ranks: set[int], alpha: float | None = None, rank: int | None = None
) -> dict[str, Any]:
    """``r`` and ``lora_alpha`` of a run, or those that were said.

    Raises ``BadInputError`` where nothing says them, or where a file says something else.
    """
    file = folder / RUN
    loaded = load_json(file).get("peft") if file.is_file() else None
    fields = loaded if isinstance(loaded, Mapping) else {}
    findings = [
        Finding(
            "option",
            f"{option} is {said}, and {RUN} says {fields[name]}",
            where=str(file),
            key=f"peft.{name}",
            fix=f"leave {option} out, or take {RUN} away if it is not this run's",
        )
        for option, name, said in (("--alpha", "alpha", alpha), ("--rank", "dim", rank))
        if said is not None and fields.get(name) not in (None, said)
    ]
    if findings:
        raise BadInputError(findings)
    alpha, rank = fields.get("alpha", alpha), fields.get("dim", rank)
    if not _is_number(alpha):
        rank_known = f'"dim": {min(ranks)}, ' if len(ranks) == 1 else '"dim": RANK, '
        raise BadInputError(
            Finding(
                "no-config",
                "Megatron-Bridge writes no config beside its export, and alpha stands nowhere in the weights"
                if not file.is_file()
                else f"{RUN} has no peft.alpha, and alpha stands nowhere in the weights",
                where=str(folder),
                key=RUN,
                fix=f'say it with --alpha ALPHA, or put the run\'s config beside it: {{"peft": {{{rank_known}"alpha": '
                f"ALPHA}}}} in {RUN}",
            )
        )
    if rank is None and len(ranks) == 1:
        rank = next(iter(ranks))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise BadInputError(
            Finding(
                "config",
                f"its factors have the ranks {sorted(ranks)}, and nothing says which alpha is divided by"
                if rank is None
                else f"{rank!r} is no rank",
                where=str(file),
                key="peft.dim",
                fix="say it with --rank RANK, or give the run's own config",
            )
        )
    return {"r": rank, "lora_alpha": alpha}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class MegatronBridge(ReadOnly):
    """NVIDIA's Megatron-Bridge."""

    name = "megatron-bridge"
    title = "Megatron-Bridge's export of a LoRA: Hugging Face's names, no config (to read)"
    layout = "transformers-v4"
    capabilities = Capabilities()
    unwritten = (
        "Megatron-Bridge's",
        "it imports the checkpoints of its own trainer only",
        "convert it to transformers-v5 or vllm",
    )

    def __init__(self, alpha: float | None = None, rank: int | None = None) -> None:
        self.alpha, self.rank = alpha, rank

    def told(self, alpha: float | None, rank: int | None) -> MegatronBridge:
        """The same for files that have no config, with what was said of them."""
        return MegatronBridge(alpha, rank)

    def sniff(self, src: Path) -> Evidence | None:
        """Factors under Hugging Face's names, all of them without PEFT's prefix."""
        look = look_at(src)
        if look is None or not look.shapes:
            return None
        factors = [name for name in look.shapes if name.endswith(_FACTOR)]
        if not factors or any(not n.startswith("model.") or PREFIX in n for n in factors):
            return None
        return Evidence(certain=True, why=f"its keys have no {PREFIX!r} before them ({factors[0]})")

    def find(self, src: Path) -> Found:
        """A folder with the weights, or the weights file."""
        return find_weights(src)

    def open(self, folder: Path, root: Path, weights: Path | None) -> ToolSource:
        """One adapter; rank and alpha come from its config, or from the run's."""
        if (folder / CONFIG).is_file() and (self.alpha is not None or self.rank is not None):
            message = (
                f"--alpha and --rank are for an export without a config, and there is a {CONFIG}"
            )
            raise BadInputError(Finding("option", message, where=str(folder), fix="leave them out"))
        if (folder / CONFIG).is_file():
            source = open_adapter(folder, root, weights, foreign=True)
            return tool_source(source, self.name, tensors=with_prefix(source.tensors, source.where))
        file = weights or folder / WEIGHTS
        header = read_header(file)
        tensors = with_prefix(open_tensors(file, header), str(file))
        ranks = {x.shape[0] for n, x in tensors.items() if n.endswith(_FACTOR) and x.ndim}
        config = fresh_config(None, None) | read_run(folder, ranks, self.alpha, self.rank)
        modules = {n.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for n in tensors}
        config["target_modules"] = sorted({module.rpartition(".")[2] for module in modules})
        source = Source("", str(folder), config, tensors, dict(header.metadata), file)
        told = (
            f"rank and alpha are those of {RUN}" if (folder / RUN).is_file() else "alpha was said"
        )
        return tool_source(source, self.name, [told])


MEGATRON_BRIDGE = MegatronBridge()
