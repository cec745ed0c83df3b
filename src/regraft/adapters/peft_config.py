"""How PEFT reads ``adapter_config.json``: which modules are adapted, with which rank, alpha and scale.

Source: PEFT 0.18.1 and 0.21.2, ``peft/utils/other.py`` (``get_pattern_key``), ``peft/tuners/tuners_utils.py``
(``check_target_module_exists``, ``inject_adapter``) and ``peft/tuners/lora/layer.py`` (scaling).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import inf, isclose, isfinite, sqrt
from typing import Any

from regraft.errors import Finding, RefusedError

Number = int | float
ALL_LINEAR = "all-linear"

_SAME_SCALE = 1e-12
"""Closer than this, scales differ only because an alpha of rsLoRA is irrational."""

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` (or their beginnings) that change the base weights when the adapter loads."""

VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "use_bdlora": "BdLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
"""Config fields that make a LoRA something else than ``scale * B @ A``, and what that is called."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A LoRA's rank and alpha; what multiplies ``B @ A`` is ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA."""

    rank: int
    alpha: Number
    rslora: bool = False

    @property
    def value(self) -> float:
        """The factor before ``B @ A``.

        >>> Scale(4, 8).value, Scale(4, 8, rslora=True).value
        (2.0, 4.0)
        """
        return self.alpha / self.divisor

    @property
    def exact(self) -> Fraction:
        """The factor (its square for rsLoRA) as a fraction, so that equal scales are equal."""
        alpha = Fraction(self.alpha)
        return alpha * alpha / self.rank if self.rslora else alpha / self.rank

    def ratio_to(self, other: Scale) -> float:
        """What ``B`` must be multiplied by to move to another scale; 1.0 where they are the same.

        Raises ``RefusedError`` where no float64 holds the ratio.

        >>> Scale(4, 8).ratio_to(Scale(4, 2))
        4.0
        """
        if self == other:
            return 1.0
        if self.exact == other.exact and self.rslora == other.rslora:
            return 1.0
        if other.alpha == 0 or self.alpha == 0:
            return 0.0
        ratio = _float(Fraction(self.alpha) / Fraction(other.alpha))
        if self.rslora or other.rslora:
            ratio *= other.divisor / self.divisor
        else:
            ratio = _float(self.exact / other.exact)
        if ratio == 0 or not isfinite(ratio):
            raise out_of_range(f"the ratio of the scales {self} and {other}")
        return 1.0 if isclose(ratio, 1.0, rel_tol=_SAME_SCALE) else ratio

    def at_rank(self, rank: int) -> Scale:
        """The same scale at another rank; alpha is whole where it can be.

        Raises ``RefusedError`` where no float64 holds that alpha.

        >>> Scale(4, 8).at_rank(8)
        Scale(rank=8, alpha=16, rslora=False)
        """
        if rank == self.rank:
            return self
        ratio = Fraction(rank, self.rank)
        if self.rslora:
            root = Fraction(_root(ratio.numerator), _root(ratio.denominator))
            if root * root != ratio:
                alpha: Number = self.alpha * sqrt(rank / self.rank)
                if not isfinite(alpha):
                    raise out_of_range(f"{self} at rank {rank}")
                return Scale(rank, alpha, True)
            ratio = root
        exact = Fraction(self.alpha) * ratio
        alpha = _plain(exact)
        if not isfinite(alpha) or (exact and abs(Fraction(alpha) / exact - 1) > _SAME_SCALE):
            raise out_of_range(f"{self} at rank {rank}")
        return Scale(rank, alpha, self.rslora)

    @property
    def divisor(self) -> float:
        """What alpha is divided by."""
        return sqrt(self.rank) if self.rslora else self.rank

    def __str__(self) -> str:
        return f"{self.alpha:g}/{'√' if self.rslora else ''}{self.rank}"


def out_of_range(what: str) -> RefusedError:
    """A scale that no float64 holds."""
    return RefusedError(
        Finding(
            "not-representable",
            f"{what} is not a number that float64 can hold",
            fix="check lora_alpha, r, rank_pattern and alpha_pattern of adapter_config.json",
        )
    )


def _float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return inf


def _root(number: int) -> int:
    return int(sqrt(number) + 0.5)


def _plain(value: Fraction) -> Number:
    number = _float(value)
    return int(value) if value.denominator == 1 and isfinite(number) else number


class Patterns:
    """``rank_pattern`` or ``alpha_pattern``: the first entry whose expression fits the end of a module's path.

    The order is that of the sorted keys, because PEFT sorts them when it saves a config.
    """

    def __init__(self, patterns: Mapping[str, Any] | None) -> None:
        self.entries = sorted((patterns or {}).items())
        self._compiled = [(_ending(key), value) for key, value in self.entries]

    def __bool__(self) -> bool:
        return bool(self.entries)

    def find(self, path: str) -> Any | None:
        """The value for a module's path, ``None`` where no entry fits.

        >>> Patterns({"layers.0.*q_proj": 4}).find("model.layers.0.self_attn.q_proj")
        4
        """
        for pattern, value in self._compiled:
            if pattern.match(path):
                return value
        return None


class Anchored(Patterns):
    """Patterns of FourierFT and C3A: what they match stands behind a dot, or an entry is a module's whole path."""

    def find(self, path: str) -> Any | None:
        """The value for a module's path, ``None`` where no entry fits."""
        for key, value in self.entries:
            if re.match(rf".*\.{key}$", path):
                return value
        return dict(self.entries).get(path)


@lru_cache(maxsize=65536)
def _ending(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


class LoraConfig:
    """A LoRA's ``adapter_config.json`` as PEFT resolves it, module by module."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.rslora = bool(data.get("use_rslora"))
        self.ranks = Patterns(data.get("rank_pattern"))
        self.alphas = Patterns(data.get("alpha_pattern"))

    def scale(self, path: str) -> Scale:
        """Rank and alpha of a module (or of a parameter, by the module's path and the parameter's name)."""
        rank = self.ranks.find(path)
        alpha = self.alphas.find(path)
        return Scale(
            self.data["r"] if rank is None else rank,
            self.data["lora_alpha"] if alpha is None else alpha,
            self.rslora,
        )

    def variants(self) -> list[str]:
        """What makes this more than a plain LoRA, by the names people use."""
        return [name for field, name in VARIANTS.items() if self.data.get(field)]

    def changes_base(self) -> str | None:
        """The initialisation, where it changes the base weights when the adapter loads."""
        init = self.data.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
            return init
        return None


def targets_module(target_modules: str | Sequence[str] | None, path: str) -> bool:
    """Whether ``target_modules`` names a module. ``None`` (PEFT's own default) counts as naming everything.

    >>> targets_module(["q_proj"], "model.layers.0.self_attn.q_proj")
    True
    """
    if target_modules is None:
        return True
    if isinstance(target_modules, str):
        if target_modules.lower() == ALL_LINEAR:
            return True
        return re.fullmatch(target_modules, path) is not None
    return any(path == target or path.endswith("." + target) for target in target_modules)


def targets_parameter(target_parameters: Iterable[str] | None, name: str) -> bool:
    """Whether ``target_parameters`` names a parameter (module path, dot, parameter name)."""
    return any(name == entry or name.endswith("." + entry) for entry in target_parameters or ())


def in_order(path: str) -> list[tuple[int, str]]:
    """What sorts paths as a model lists its layers: by number where they have one.

    >>> sorted(["l.10.q", "l.9.q"], key=in_order)
    ['l.9.q', 'l.10.q']
    """
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]
