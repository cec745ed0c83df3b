"""Ranks: what is allowed only by name, and factors of fewer components."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from msgspec import Struct

from regraft.adapters.families.base import as_wide, narrowed
from regraft.adapters.follow import trimmed
from regraft.adapters.form import Array, Images, Lora, is_finite, widened
from regraft.errors import BadInputError, Finding, RefusedError

MERGE = "merge"
"""What cannot be held is added to the base's weights."""

_VIA = re.compile(
    r"dense|merge|svd:(?:[1-9][0-9]*|0?\.[0-9]*[1-9][0-9]*|[1-9](?:\.[0-9]+)?[eE]-[0-9]+)"
)


class Options(Struct, frozen=True):
    """What a conversion does only where it is asked to."""

    via: str | None = None
    """``dense``: deltas of full rank; ``svd:RANK`` or ``svd:TOLERANCE``: the best ones of a lower rank; ``merge``: the
    base with the adapter in its weights, where the result cannot hold it."""
    compact: bool = False
    """Leave out components that add nothing, to rounding."""
    uniform: bool = False
    """Give all targets one rank, with zeros, so that no ``rank_pattern`` is needed."""

    @property
    def asks(self) -> bool:
        """Whether anything is asked for."""
        return self.via is not None or self.changes_ranks

    @property
    def changes_ranks(self) -> bool:
        """Whether ranks are to be others than those that come about."""
        return self.compact or self.uniform

    def __post_init__(self) -> None:
        if self.via is not None and _VIA.fullmatch(self.via) is None:
            raise BadInputError(
                Finding(
                    "option",
                    f"there is no way {self.via!r}",
                    fix="use dense, svd:RANK (svd:16), svd:TOLERANCE (svd:1e-3) or merge",
                )
            )


def tighten(made: Iterable[Images], via: str | None) -> dict[str, float]:
    """Bring deltas of full rank down to what was asked for, in place.

    Returns, for svd, the relative error by target.
    """
    errors: dict[str, float] = {}
    for image in made:
        for row, lora in enumerate(image.loras):
            if lora is None:
                continue
            if via is not None and via.startswith("svd:"):
                errors[image.keys.name(row)] = cut(lora, via.removeprefix("svd:"))
            else:
                _trim(lora)
    return errors


_NOTHING = {"float64": 1e-12}
"""A singular value so small, relative to the largest, is rounding; 1e-6 for narrower dtypes."""


def compact(made: Iterable[Images]) -> list[tuple[int, int]]:
    """Leave out components that add nothing to rounding, in place; the ranks before and after, where they changed."""
    changed = []
    for image in made:
        for lora in image.loras:
            if lora is None:
                continue
            a, b = as_wide(lora.a, lora.b)
            pairs = zip(a, b, strict=True) if a.ndim == 3 else [(a, b)]
            least = _NOTHING.get(lora.a.dtype.name, 1e-6)
            values = [_split(x, y)[1] for x, y in pairs]
            rank = max(int((s > least * s.max(initial=0.0)).sum()) for s in values)
            before = a.shape[-2]
            if 0 < rank < before:
                cut(lora, str(rank))
                changed.append((before, rank))
    return changed


def make_uniform(made: Iterable[Images]) -> int:
    """Give all LoRAs the largest rank there is, with components of zeros, in place; the rank."""
    loras = [lora for image in made for lora in image.loras if lora is not None]
    ranks = [lora.a.shape[-2] for lora in loras]
    rank = max(ranks, default=0)
    if ranks.count(rank) == len(ranks):
        return rank
    for lora in loras:
        wide = widened(lora, rank)
        lora.a, lora.b, lora.scale = wide.a, wide.b, wide.scale
    return rank


def _trim(lora: Lora) -> None:
    """At most as many components as rows or columns."""
    if lora.a.ndim == 2:
        pair = trimmed(lora.a, lora.b)
        if pair is not None:
            _put(lora, *pair)
    elif lora.a.shape[1] > min(lora.b.shape[1], lora.a.shape[2]):
        pairs = [trimmed(a, b) for a, b in zip(lora.a, lora.b, strict=True)]
        done = [pair for pair in pairs if pair is not None]
        _put(lora, np.stack([a for a, _ in done]), np.stack([b for _, b in done]))


def _put(lora: Lora, a: Array, b: Array) -> None:
    lora.a, lora.b = a, b
    rank = a.shape[-2]
    lora.scale = lora.scale.at_rank(rank)


def cut(lora: Lora, how: str) -> float:
    """The best LoRA of a rank (a whole number) or within a tolerance; the error relative to the delta's norm.

    Experts share one rank: the largest that one of them needs.
    """
    a, b = as_wide(lora.a, lora.b)
    batched = a.ndim == 3
    if not batched:
        a, b = a[None], b[None]
    parts = [_split(x, y) for x, y in zip(a, b, strict=True)]
    rank = max(_rank(s, how) for _, s, _ in parts)
    rank = max(1, min(rank, min(len(s) for _, s, _ in parts)))
    lost = sum(float((s[rank:] ** 2).sum()) for _, s, _ in parts)
    whole = sum(float((s**2).sum()) for _, s, _ in parts)
    roots = [np.sqrt(s[:rank]) for _, s, _ in parts]
    new_a = np.stack([v[:rank] * r[:, None] for (_, _, v), r in zip(parts, roots, strict=True)])
    new_b = np.stack([u[:, :rank] * r for (u, _, _), r in zip(parts, roots, strict=True)])
    like = lora.a, lora.b
    lora.a = narrowed(new_a if batched else new_a[0], *like)
    lora.b = narrowed(new_b if batched else new_b[0], *like)
    lora.scale = lora.scale.at_rank(rank)
    lora.exact, lora.decomposed = False, True
    return float(np.sqrt(lost / whole)) if whole else 0.0


def _split(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """The singular vectors and values of ``b @ a``, without making the product.

    Raises ``RefusedError`` where the factors, or their product, are not finite.
    """
    if not (is_finite(a) and is_finite(b)):
        raise RefusedError(
            Finding(
                "not-finite",
                "a factor holds NaN or infinite values, so its delta has no singular values",
                fix="convert without --via svd and --compact",
            )
        )
    qb, rb = np.linalg.qr(b)
    qa, ra = np.linalg.qr(a.T)
    with np.errstate(all="ignore"):
        middle = rb @ ra.T
    if not is_finite(middle):
        raise RefusedError(
            Finding(
                "not-representable",
                "the product of the factors leaves the range of float64",
                fix="convert without --via svd and --compact",
            )
        )
    u, s, v = np.linalg.svd(middle)
    count = len(s)
    return qb @ u[:, :count], s, v[:count] @ qa.T


def _rank(values: Array, how: str) -> int:
    if how.isdigit():
        return int(how)
    left = np.sqrt(np.cumsum(values[::-1] ** 2))[::-1]
    return int((left > float(how) * (left[0] if len(left) else 0.0)).sum())
