"""What multiplies ``B @ A``, as an exact number."""

from __future__ import annotations

from fractions import Fraction
from math import inf, isclose, isfinite, sqrt

from msgspec import Struct

from regraft.errors import Finding, RefusedError

Number = int | float

_SAME_SCALE = 1e-12
"""Closer than this, scales differ only because an alpha of rsLoRA is irrational."""


class Scale(Struct, frozen=True, gc=False):
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
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

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
        alpha: Number
        if isinstance(self.alpha, int) and not self.rslora:
            alpha, rest = divmod(self.alpha * rank, self.rank)
            if not rest and abs(alpha) < 1 << 53:
                return Scale(rank, alpha)
        ratio = Fraction(rank, self.rank)
        if self.rslora:
            root = Fraction(_root(ratio.numerator), _root(ratio.denominator))
            if root * root != ratio:
                alpha = self.alpha * sqrt(rank / self.rank)
                if not isfinite(alpha):
                    raise out_of_range(f"{self} at rank {rank}")
                return Scale(rank, alpha, rslora=True)
            ratio = root
        exact = Fraction(self.alpha) * ratio
        alpha = _plain(exact)
        if not isfinite(alpha) or (exact and abs(Fraction(alpha) / exact - 1) > _SAME_SCALE):
            raise out_of_range(f"{self} at rank {rank}")
        return Scale(rank, alpha, self.rslora)

    def times(self, factor: int) -> Scale:
        """A scale that is a whole number of times as large.

        >>> Scale(4, 8).times(2)
        Scale(rank=4, alpha=16, rslora=False)
        """
        return self if factor == 1 else Scale(self.rank, self.alpha * factor, self.rslora)

    @property
    def divisor(self) -> float:
        """What alpha is divided by."""
        return sqrt(self.rank) if self.rslora else self.rank

    def __str__(self) -> str:
        return f"{self.alpha:g}/{'√' if self.rslora else ''}{self.rank}"


def is_finite(value: Number) -> bool:
    """Whether a number is one that float64 holds.

    >>> is_finite(16), is_finite(float("nan")), is_finite(10**400)
    (True, False, False)
    """
    try:
        return isfinite(value)
    except OverflowError:
        return False


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
