"""Bone, which PEFT 0.19 replaced by MiSS; newer versions do not read it.

Source: PEFT 0.18.1, ``peft/tuners/bone/layer.py``.
"""

from __future__ import annotations

from regraft.adapters.families.miss import Miss


class Bone(Miss):
    """MiSS under its old name."""

    types = ("BONE",)
    title = "Bone"
    prefix = "bone_"
    formula = "W + bone_blockᵀ (1 1 … 1)"
    block = "bone_block"
