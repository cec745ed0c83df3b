"""Which tensors of a model the installed transformers cuts among ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from regraft.checkpoints.ranks import ParallelPlan
from regraft.errors import Finding, UnmatchedKeysError
from regraft.errors.extras import lacking


def installed_plan(config: Mapping[str, Any], classes: Sequence[str], where: str) -> ParallelPlan:
    """The plans of a model's config class and of the classes around it.

    Raises ``UnmatchedKeysError`` where transformers is not there, or has no plan for the model.
    """
    tp: dict[str, str] = {}
    ep: dict[str, str] = {}
    if find_spec("transformers") is not None:
        import transformers
        from transformers import CONFIG_MAPPING

        parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
        for part in parts:
            name = str(part.get("model_type"))
            if name in CONFIG_MAPPING:
                known: Any = CONFIG_MAPPING[name]
                tp |= getattr(known, "base_model_tp_plan", None) or {}
                ep |= getattr(known, "base_model_ep_plan", None) or {}
        for name in classes:
            tp |= getattr(getattr(transformers, name, None), "_tp_plan", None) or {}
    if not tp and not ep:
        line = lacking("transformers")
        give = 'give one with --plan FILE: {"tp": {"layers.*.self_attn.q_proj": "colwise"}}'
        raise UnmatchedKeysError(
            Finding(
                "parallel-plan",
                "the installed transformers has no plan that says how this model is cut among ranks"
                if line is None
                else "transformers, whose plan says how this model is cut among ranks, is not installed",
                where=where,
                fix=f"{'' if line is None else f'{line}, or '}{give}",
            )
        )
    return ParallelPlan(tp, ep)
