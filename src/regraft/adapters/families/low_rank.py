"""Families of factors through which a rank runs: what they can do follows from the roles that they declare.

With ``roles = {"lora_A": (RANK, IN), "lora_B": (OUT, RANK)}`` and the delta ``B A``:

- rows and columns are taken from the dims along out and in (`Family.take`);
- of the transposed weight, ``A`` is ``B.T``, and the other way round: a role goes to the one that runs along the same
  things in the opposite order, with out and in exchanged;
- where weights are joined, ranks add: the dims along the joint and along the rank are laid out one after the other,
  which makes one factor block-diagonal and puts the others beside each other. Where the whole is
  ``[W1; W2] + [B1 A1; B2 A2]``, it is ``[[B1, 0], [0, B2]] @ [A1; A2]``;
- a lower rank becomes a higher one by zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from regraft.adapters.families.base import (
    IN,
    OUT,
    RANK,
    Dims,
    Family,
    Part,
    each,
    present,
    same_bits,
    tensors_of,
)
from regraft.adapters.form import Array, common_dtype, rescale
from regraft.adapters.scale import Scale
from regraft.values import replace

_OTHER = {OUT: IN, IN: OUT}


class LowRank(Family):
    """A family whose roles say where the rank runs.

    Example: `regraft.adapters.families.unilora.UniLora` declares its roles and how its factors are made, and
    follows everything.
    """

    one_rank: ClassVar[bool] = False
    """Whether all modules have one rank, the config's ``r``."""
    alpha: ClassVar[str] = ""
    """The setting that holds a module's alpha, where the delta is multiplied by ``alpha / r`` of the module."""
    scaled: ClassVar[tuple[str, ...]] = ()
    """Roles to multiply, all of them, where a delta is to be multiplied."""

    def rank_of(self, part: Part) -> int:
        """The rank of a module."""
        return next(
            int(tensor.shape[dims.index(RANK)])
            for role, tensor in part.tensors.items()
            if RANK in (dims := self.along(role, tensor))
        )

    def scale(self, part: Part) -> Scale:
        """Rank and alpha of a module."""
        return Scale(part.settings["r"], part.settings[self.alpha])

    def turn(self, part: Part) -> Part:
        self.may_take(part, None, None)
        partners = mirrored(self.roles)
        tensors = {}
        for role, tensor in part.tensors.items():
            partner = partners.get(role)
            if partner is None:
                side = OUT if OUT in self.along(role, tensor) else IN
                raise self.refusal(f"what stands on {side} would have to stand on {_OTHER[side]}")
            tensors[role] = turned(part[partner], self.roles[partner])
        return part.with_tensors(part.into, part.out, **tensors)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        return self.join_ranks(parts, outs, OUT)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return self.join_ranks(parts, intos, IN)

    def join_ranks(self, parts: Sequence[Part | None], sizes: Sequence[int], along: str) -> Part:
        """Weights joined along out or in: ranks add."""
        for part in present(parts):
            self.may_take(part, None, None)
        parts = self.to_one_scale(parts)
        first = present(parts)[0]
        tensors = {role: self._laid_out(role, parts, sizes, along) for role in first.tensors}
        made = first.grown(along, sum(sizes), **tensors)
        if not self.alpha:
            return made
        rank = self.rank_of(made)
        told = {"r": rank, self.alpha: self.scale(first).at_rank(rank).alpha}
        return replace(made, settings={**first.settings, **told})

    def to_one_scale(self, parts: Sequence[Part | None]) -> Sequence[Part | None]:
        """Parts that are multiplied by what the first is multiplied by."""
        if not self.alpha:
            return parts
        scale = self.scale(present(parts)[0])
        return each(lambda p: multiplied(p, self.scaled, self.scale(p).ratio_to(scale)), parts)

    def neutral(self, role: str) -> float:
        """What a tensor along out or in holds where a weight is not adapted."""
        return 0.0

    def _laid_out(
        self, role: str, parts: Sequence[Part | None], sizes: Sequence[int], along: str
    ) -> Array:
        """A tensor of the joint weight: those of the parts one after the other, along the joint and the rank."""
        tensors = tensors_of(parts, role)
        own = [tensor for tensor in tensors if tensor is not None]
        dims = self.along(role, own[0])
        if along not in dims and RANK not in dims:
            if _OTHER[along] in dims or not same_bits(own):
                raise self.refusal(f"the parts would have to share one {role}")
            return own[0]
        gaps = len(own) < len(parts) and RANK not in dims
        return laid_out(tensors, dims, along, sizes, self.neutral(role) if gaps else 0.0)

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        if not self.one_rank:
            return parts, {}
        rank = max(map(self.rank_of, parts.values()))
        return {key: self.padded(part, rank) for key, part in parts.items()}, {"r": rank}

    def padded(self, part: Part, rank: int) -> Part:
        """A module of a higher rank: components of zeros."""
        tensors = {}
        for role, tensor in part.tensors.items():
            sizes = zip(self.along(role, tensor), tensor.shape, strict=True)
            tensors[role] = np.pad(
                tensor, [(0, rank - size if name == RANK else 0) for name, size in sizes]
            )
        return replace(part, tensors=tensors)


def mirrored(roles: Mapping[str, Dims]) -> dict[str, str]:
    """Which role a tensor is taken from where the weight is transposed, for roles that have such a one.

    Roles of one form go by their order.

    >>> mirrored({"A": (RANK, IN), "B": (OUT, RANK), "bias": (OUT,)})
    {'A': 'B', 'B': 'A'}
    """
    by_dims: dict[Dims, list[str]] = {}
    for role, dims in roles.items():
        by_dims.setdefault(dims, []).append(role)
    partners: dict[str, str] = {}
    for dims, names in by_dims.items():
        axes = turned_axes(dims)
        other = tuple(_OTHER.get(dims[axis] or "", dims[axis]) for axis in axes)
        partners.update(zip(names, by_dims.get(other, ()), strict=False))
    return partners


def turned(tensor: Array, dims: Dims) -> Array:
    """A tensor whose dims that run along something come in the opposite order."""
    return tensor.transpose(turned_axes(dims))


def turned_axes(dims: Dims) -> list[int]:
    """Where each dim of a turned tensor comes from.

    >>> turned_axes((None, RANK, IN))
    [0, 2, 1]
    """
    axes = list(range(len(dims)))
    named = [axis for axis in axes if dims[axis] is not None]
    for axis, origin in zip(named, reversed(named), strict=True):
        axes[axis] = origin
    return axes


def laid_out(
    tensors: Sequence[Array | None],
    dims: Dims,
    along: str,
    sizes: Sequence[int],
    fill: float = 0.0,
) -> Array:
    """Tensors one after the other in every dim along the joint (of ``sizes``) or along the rank.

    ``None`` stands for a weight that is not adapted: rank 0, and ``fill`` along the joint.

    >>> laid_out([np.ones((1, 2)), None, np.ones((1, 1))], (OUT, RANK), OUT, [1, 1, 1]).tolist()
    [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    there = [tensor for tensor in tensors if tensor is not None]
    shape = list(there[0].shape)
    for dim, name in enumerate(dims):
        if name == along:
            shape[dim] = sum(sizes)
        elif name == RANK:
            shape[dim] = sum(tensor.shape[dim] for tensor in there)
    made = np.full(shape, fill, common_dtype({tensor.dtype for tensor in there}))
    starts = {along: 0, RANK: 0}
    for tensor, size in zip(tensors, sizes, strict=True):
        if tensor is not None:
            place = [
                slice(starts[name], starts[name] + length) if name in starts else slice(None)
                for name, length in zip(dims, tensor.shape, strict=True)
            ]
            made[tuple(place)] = tensor
            starts[RANK] += tensor.shape[dims.index(RANK)] if RANK in dims else 0
        starts[along] += size
    return made


def multiplied(part: Part, roles: Sequence[str], ratio: float) -> Part:
    """A part with some of its tensors multiplied.

    Raises ``RefusedError`` where a number would leave the range of its dtype.
    """
    tensors = {
        role: rescale(tensor, ratio)[0] if role in roles else tensor
        for role, tensor in part.tensors.items()
    }
    return replace(part, tensors=tensors)
