"""Bone, which PEFT 0.19 made a part of MiSS; newer versions do not read it.

Source: PEFT 0.18.1, ``peft/tuners/bone/layer.py``.
"""

from __future__ import annotations

from regraft.adapters.families.base import Family, cells


class Bone(Family):
    """Blocks that are added to the weight, or multiplied with it."""

    types = ("BONE",)
    title = "Bone"
    prefix = "bone_"
    formula = "depends on its base weight, or on the input"
    fixed = "no rule says how it follows a weight that is laid out otherwise"
    table = cells()
