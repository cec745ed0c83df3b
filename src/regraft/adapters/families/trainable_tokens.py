"""Trainable tokens.

Source: PEFT 0.21.2, ``peft/tuners/trainable_tokens/layer.py``.
"""

from __future__ import annotations

from regraft.adapters.families.base import Family, cells


class TrainableTokens(Family):
    """Rows of an embedding, by their numbers in the config."""

    types = ("TRAINABLE_TOKENS",)
    title = "trainable tokens"
    prefix = "trainable_tokens_"
    formula = "depends on its base weight, or on the input"
    fixed = "no rule says how it follows a weight that is laid out otherwise"
    table = cells()
