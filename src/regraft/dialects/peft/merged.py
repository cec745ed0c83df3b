"""LoRA on a fused layer as PEFT had it until 0.2: ``enable_lora`` says which of its parts are adapted.

Each part has factors of its own: ``lora_A`` has them one below the other, ``lora_B`` is a convolution of one tap whose
groups are the parts. As a plain LoRA, B is block-diagonal, with rows of zeros for parts that are left as they are.

Source: PEFT 0.2.0, ``peft/tuners/lora.py``, ``MergedLinear``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regraft.adapters.form import Array
from regraft.adapters.scale import Scale
from regraft.dialects.peft.scan import PREFIX
from regraft.errors import BadInputError, Finding

FIELD = "enable_lora"
_FIELDS = (FIELD, "merge_weights")
_B = ".lora_B.weight"


def unmerged(
    config: Mapping[str, Any], tensors: Mapping[str, Array], where: str
) -> tuple[dict[str, Any], Mapping[str, Array], str | None]:
    """The config and tensors of a plain LoRA that adds the same, and what was done, if anything.

    Raises ``BadInputError`` where sizes and ``enable_lora`` do not go together.
    """
    enabled = config.get(FIELD)
    names = [n for n in tensors if n.endswith(_B) and tensors[n].ndim == 3] if enabled else []
    if not names:
        return dict(config), tensors, None
    made, ranks = dict(tensors), {}
    findings = []
    for name in names:
        path = name.removesuffix(_B)
        a = tensors.get(f"{path}.lora_A.weight")
        b = _spread(a, tensors[name], enabled)
        if b is None:
            shapes = [list(x.shape) for x in (a, tensors[name]) if x is not None]
            findings.append(
                Finding(
                    "shape",
                    f"its factors {' and '.join(map(str, shapes))} are not those of the parts that {FIELD} = "
                    f"{enabled!r} says are adapted",
                    where=where,
                    key=name,
                    fix="use the adapter_config.json that was saved with these weights",
                )
            )
            continue
        made[name] = b
        ranks[path.removeprefix(PREFIX)] = b.shape[1]
    if findings:
        raise BadInputError(findings)
    plain = {k: v for k, v in config.items() if k not in _FIELDS}
    _rank(plain, ranks, everything=2 * len(names) == len(tensors))
    return plain, made, f"{FIELD} was taken apart: {len(names)} fused layers have plain LoRA now"


def _spread(a: Array | None, b: Array, enabled: object) -> Array | None:
    """B (out, rank of all parts) from a grouped convolution's; ``None`` where the sizes do not fit."""
    if not isinstance(enabled, Sequence) or not all(isinstance(x, bool) for x in enabled):
        return None
    parts = sum(enabled)
    if a is None or a.ndim != 2 or not parts or b.shape[2] != 1 or not all(b.shape):
        return None
    groups, left = divmod(len(a), b.shape[1])
    if left or not groups or len(b) % groups or len(b) % parts:
        return None
    rows, rank, size = len(b) // groups, b.shape[1], len(b) // parts
    spread = np.zeros((len(b), len(a)), b.dtype)
    for group in range(groups):
        here = slice(group * rows, (group + 1) * rows)
        spread[here, group * rank : (group + 1) * rank] = b[here, :, 0]
    whole = np.zeros((size * len(enabled), len(a)), b.dtype)
    whole[np.repeat(enabled, size)] = spread
    return whole


def _rank(config: dict[str, Any], ranks: Mapping[str, int], *, everything: bool) -> None:
    """Give the config ranks of all parts together, at the scale that there was."""
    scale = Scale(config["r"], config["lora_alpha"], bool(config.get("use_rslora")))
    if everything and len(set(ranks.values())) == 1:
        wide = scale.at_rank(next(iter(ranks.values())))
        config["r"], config["lora_alpha"] = wide.rank, wide.alpha
        return
    keys = {path: "^" + re.escape(path) for path in ranks}
    more = {keys[path]: rank for path, rank in ranks.items()}
    alphas = {keys[path]: scale.at_rank(rank).alpha for path, rank in ranks.items()}
    config["rank_pattern"] = {**more, **(config.get("rank_pattern") or {})}
    config["alpha_pattern"] = {**alphas, **(config.get("alpha_pattern") or {})}
