"""What a file adds to one base weight: LoRA, Tucker, LoHa, LoKr, GLoRA, three OFTs, IA3, or a full delta.

A weight is seen as a matrix (out, in); a convolution's in dim and kernel are flattened to one. Around any algebra
there may be a magnitude (DoRA, on either axis) and a delta of the bias.

Sources: lycoris-lora 4.1.3 (``lycoris/modules``, ``lycoris/functional``), its forward and not its ``merge_to``, which
multiplies by alpha / rank twice in LoHa and LoKr; PEFT 0.21.2 for the magnitude;
OneTrainer (``modules/module/LoRAModule.py``, ``oft_utils.py``) for OFT v2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any

import numpy as np

from regraft.adapters.families.base import NoImageError, Wide, as_wide, joined, same_bits
from regraft.adapters.form import Array, common_dtype
from regraft.adapters.scale import Number, Scale
from regraft.arrays.pieces import multiply
from regraft.names.keys import Ints

Weight = Callable[[], Wide] | None
"""Gives the base weight as a matrix (out, in); ``None`` where no base was given."""

LORA, LOHA, LOKR, GLORA, OFT, BOFT, OFT_V2, IA3, FULL, SET, NOTHING = (
    "LoRA",
    "LoHa",
    "LoKr",
    "GLoRA",
    "OFT",
    "BOFT",
    "OFT v2",
    "IA3",
    "full delta",
    "new weight",
    "bias only",
)

_MULTIPLIES = (GLORA, OFT, BOFT, OFT_V2, IA3)
"""Algebras whose delta depends on the base weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """The adapter of one module of the base."""

    algebra: str
    tensors: Mapping[str, Array]
    """By role, with the shapes that the file has."""
    out: int
    into: int
    """In, times the kernel."""
    kernel: tuple[int, ...] = ()
    """Of a convolution, as far as the tensors show it."""
    alpha: Number | None = None
    """``None`` where the file has none: the scale is 1 then."""
    rslora: bool = False
    """Whether alpha is divided by the root of the rank."""
    alpha_dtype: np.dtype[Any] | None = None
    """The dtype of the file's alpha."""
    magnitude: Array | None = None
    """DoRA's, (out,) or (in,)."""
    magnitude_in: bool = False
    """Whether the magnitude stands on the in axis."""
    bias: Array | None = None
    """What is added to the base's bias, before the scale where ``bias_scaled``."""
    bias_scaled: bool = False
    exact: bool = True
    """Whether every number is one of the file's."""
    reshape: tuple[int, ...] | None = None
    """The shape that the base weight is padded to first, where the file says it."""
    padded: bool = False
    """Whether its last rows stand for rows that the file does not adapt."""
    conv: bool = False
    """Whether the base weight is a convolution's."""

    @property
    def rank(self) -> int:
        """What alpha is divided by; 0 where there is no rank."""
        t = self.tensors
        if self.algebra == LORA:
            return int(t["down"].shape[0])
        if self.algebra == LOHA:
            return int(t["hada_w1_b"].shape[0])
        if self.algebra == LOKR:
            rank = t.get("lokr_w2_b", t.get("lokr_w1_b"))
            return 0 if rank is None else int(rank.shape[0])
        if self.algebra == GLORA:
            return int(_glora(t)[0].shape[1])
        return 0

    @property
    def scale(self) -> Scale:
        """Alpha / rank; 1 where there is no alpha, or nothing that it is divided by.

        A LoKr whose factors are both whole is not scaled: what such files have as alpha means nothing.
        """
        rank = self.rank or 1
        if self.alpha is None or not self.rank:
            return Scale(rank, rank)
        return Scale(rank, self.alpha, self.rslora)

    @property
    def needs_weight(self) -> bool:
        """Whether what it adds depends on the base weight."""
        return self.algebra in _MULTIPLIES or self.magnitude is not None

    @property
    def name(self) -> str:
        """What to call it in reports."""
        if self.magnitude is None:
            return "Tucker LoRA" if self.algebra == LORA and "mid" in self.tensors else self.algebra
        return "DoRA" if self.algebra == LORA else f"{self.algebra} with DoRA"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base weight, with a kernel of ones where it is not known."""
        if self.algebra in (FULL, SET):
            return tuple(next(iter(self.tensors.values())).shape)
        if not self.conv:
            return self.out, self.into
        kernel = self.kernel or (1, 1)
        return (self.out, self.into // prod(kernel), *kernel)

    @property
    def bias_delta(self) -> Wide | None:
        """What is added to the base's bias, scaled."""
        if self.bias is None:
            return None
        return np.asarray(
            self.bias.astype(np.float64) * (self.scale.value if self.bias_scaled else 1.0)
        )


# -- as LoRA


def plain_lora(delta: Delta) -> Delta:
    """The same as a plain LoRA of scale ``delta.scale``; the magnitude and the bias stay.

    Raises ``NoImageError`` where it is none of lower rank.
    """
    if delta.algebra == LORA:
        return _without_mid(delta) if "mid" in delta.tensors else delta
    if delta.algebra == LOHA:
        b, a = _loha_factors(delta)
    elif delta.algebra == LOKR:
        b, a = _lokr_factors(delta)
    elif delta.algebra == GLORA:
        raise NoImageError("GLoRA multiplies the base weight", needs_base=True)
    elif delta.algebra in (OFT, BOFT, OFT_V2, IA3):
        raise NoImageError(f"{delta.algebra} multiplies the base weight", needs_base=True)
    elif delta.algebra == NOTHING:
        return delta
    else:
        raise NoImageError(f"a {delta.algebra} has full rank")
    if len(a) >= min(delta.out, delta.into):
        raise NoImageError(f"{delta.algebra} of this rank has a delta of full rank")
    return _as_factors(delta, b * delta.scale.value, a, len(a), exact=False)


def dense_lora(delta: Delta, weight: Weight) -> Delta:
    """The same as a LoRA of full rank, with the magnitude's effect in it; the bias stays.

    Raises ``NoImageError`` where a base weight is needed that is not there, or it is no delta.
    """
    if delta.algebra == NOTHING:
        return delta
    full = full_delta(delta, weight)
    one = np.eye(min(full.shape))
    a, b = (full, one) if full.shape[0] <= full.shape[1] else (one, full)
    made = _as_factors(replace(delta, magnitude=None), b, a, len(one), exact=False)
    bias = delta.bias_delta
    return replace(made, bias=None if bias is None else bias.astype(np.float32), bias_scaled=False)


def full_delta(delta: Delta, weight: Weight) -> Wide:
    """The whole delta in float64, (out, in).

    Raises ``NoImageError`` where a base weight is needed that is not there.
    """
    if delta.algebra == SET:
        raise NoImageError("it takes the place of a weight, and adds to none")
    base = _need(weight) if delta.needs_weight else None
    added = _added(delta, base)
    if delta.magnitude is None:
        return added
    assert base is not None
    whole = base + added
    m = delta.magnitude.astype(np.float64).reshape(-1)
    if not delta.magnitude_in:
        return np.asarray(whole * (m / np.linalg.norm(whole, axis=1))[:, None] - base)
    per_in = whole.reshape(len(whole), len(m), -1)
    lengths = np.sqrt((per_in**2).sum(axis=(0, 2)))
    return np.asarray((per_in * (m / lengths)[:, None]).reshape(whole.shape) - base)


def _need(weight: Weight) -> Wide:
    if weight is None:
        raise NoImageError("its delta depends on the base weight", needs_base=True)
    return weight()


def _added(delta: Delta, base: Wide | None) -> Wide:
    """The delta without magnitude, scaled."""
    t = delta.tensors
    if delta.algebra == LORA:
        (up,) = as_wide(_matrix(t["up"]))
        down = _down_with_mid(t) if "mid" in t else t["down"].astype(np.float64)
        return multiply(up, _matrix(down)) * delta.scale.value
    if delta.algebra == LOHA:
        if "hada_t1" in t:
            one, two = (
                _tucker(t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in "12"
            )
            return np.asarray(_matrix(one * two) * delta.scale.value)
        b1, a1, b2, a2 = as_wide(*(t[f"hada_w{n}_{x}"] for n in "12" for x in "ab"))
        return np.asarray((b1 @ a1) * (b2 @ a2) * delta.scale.value)
    if delta.algebra == LOKR:
        whole = _kron(_whole(t, "lokr_w1"), _matrix(_whole(t, "lokr_w2")))
        return np.asarray(whole * delta.scale.value)
    if delta.algebra == FULL:
        return np.asarray(_matrix(t["diff"]).astype(np.float64))
    assert base is not None
    if delta.algebra == GLORA:
        a1, a2, b1, b2 = as_wide(*_glora(t))
        return np.asarray((base @ a1 @ a2 + b1 @ b2) * delta.scale.value)
    if delta.algebra == IA3:
        w = t["ia3"].astype(np.float64).reshape(-1)
        if _ia3_on_input(t):
            return np.asarray(
                (base.reshape(len(base), len(w), -1) * w[:, None]).reshape(base.shape)
            )
        return np.asarray(base * w[:, None])
    if delta.algebra == OFT:
        return _rotated(delta, base) - base
    if delta.algebra == OFT_V2:
        return _turned_columns(delta, base) - base
    return _butterflied(delta, base) - base


def _matrix(array: Array) -> Array:
    return array.reshape(len(array), -1)


def _down_with_mid(t: Mapping[str, Array]) -> Wide:
    """A Tucker LoRA's down with its kernel."""
    mid, down = as_wide(t["mid"], t["down"])
    return np.asarray(np.einsum("ab...,bi->ai...", mid, _matrix(down)))


def _without_mid(delta: Delta) -> Delta:
    """A Tucker LoRA as a LoRA whose down has the kernel."""
    whole = _down_with_mid(delta.tensors)
    dtype = common_dtype({delta.tensors["mid"].dtype, np.dtype(np.float32)})
    tensors = {"down": whole.astype(dtype), "up": delta.tensors["up"]}
    return replace(delta, tensors=tensors, exact=False)


def _as_factors(delta: Delta, b: Wide, a: Wide, rank: int, *, exact: bool) -> Delta:
    """A LoRA of scale 1 from matrices, with the kernel of a convolution."""
    wide = any(x.dtype == np.float64 for x in delta.tensors.values())
    dtype = np.dtype(np.float64 if wide else np.float32)
    down, up = a.astype(dtype), b.astype(dtype)
    if delta.conv:
        if not delta.kernel:
            raise NoImageError("the size of the convolution's kernel is not known", needs_base=True)
        ones = (1,) * len(delta.kernel)
        down = down.reshape(rank, delta.into // prod(delta.kernel), *delta.kernel)
        up = up.reshape(delta.out, rank, *ones)
    bias = delta.bias_delta
    return replace(
        delta,
        algebra=LORA,
        tensors={"down": down, "up": up},
        alpha=rank,
        rslora=False,
        alpha_dtype=None,
        bias=None if bias is None else bias.astype(np.float32),
        bias_scaled=False,
        exact=exact,
    )


# -- the algebras


def _tucker(core: Array, a: Array, b: Array) -> Wide:
    """``sum core[r, s, ...] a[r, out] b[s, in]``."""
    wide_core, wide_a, wide_b = as_wide(core, a, b)
    return np.asarray(np.einsum("rs...,ro,si->oi...", wide_core, wide_a, wide_b, optimize=True))


def _loha_factors(delta: Delta) -> tuple[Wide, Wide]:
    """(a1 b1) o (a2 b2) as one product, of rank r1 r2."""
    t = delta.tensors
    if "hada_t1" in t:
        raise NoImageError("Tucker LoHa has a delta of full rank")
    b1, a1, b2, a2 = as_wide(*(t[f"hada_w{n}_{x}"] for n in "12" for x in "ab"))
    rank = b1.shape[1] * b2.shape[1]
    if rank >= min(delta.out, delta.into):
        raise NoImageError("LoHa of this rank has a delta of full rank")
    b = (b1[:, :, None] * b2[:, None, :]).reshape(len(b1), rank)
    a = (a1[:, None, :] * a2[None, :, :]).reshape(rank, a1.shape[1])
    return b, a


def _whole(t: Mapping[str, Array], name: str) -> Wide:
    """A factor of a LoKr as one tensor."""
    if name in t:
        return np.asarray(t[name].astype(np.float64))
    a, b = as_wide(t[f"{name}_a"], t[f"{name}_b"])
    if name == "lokr_w2" and "lokr_t2" in t:
        return _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    return np.asarray(a @ b.reshape(len(b), -1))


def _lokr_factors(delta: Delta) -> tuple[Wide, Wide]:
    """kron(w1, w2) as a product: kron(b1, b2) kron(a1, a2), where a whole factor is itself beside the identity."""
    t = delta.tensors
    pairs = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in t or ("lokr_t2" in t and name == "lokr_w2"):
            whole = _matrix(_whole(t, name))
            one = np.eye(min(whole.shape))
            pairs.append((one, whole) if whole.shape[0] <= whole.shape[1] else (whole, one))
        else:
            b, a = as_wide(t[f"{name}_a"], t[f"{name}_b"])
            pairs.append((b, _matrix(a)))
    (b1, a1), (b2, a2) = pairs
    if a1.shape[0] * a2.shape[0] >= min(delta.out, delta.into):
        raise NoImageError("LoKr with these factors has a delta of full rank")
    return _kron(b1, b2), _kron(a1, a2)


def _kron(one: Wide, two: Wide) -> Wide:
    return np.asarray(np.kron(one, two))


def is_older_glora(t: Mapping[str, Array]) -> bool:
    """Whether a GLoRA has a1 (r, in), a2 (in, r), b1 (r, in), b2 (out, r), as older files do.

    On a square weight both readings fit, and the one of lower rank is meant.
    """
    a1, a2, b1, b2 = (t[role].shape for role in ("a1", "a2", "b1", "b2"))
    newer = a1[1] == a2[0] == b1[1] == b2[0]
    older = a1[0] == a2[1] == b1[0] == b2[1]
    return older and (not newer or a1[0] < a1[1])


def _glora(t: Mapping[str, Array]) -> tuple[Array, Array, Array, Array]:
    """a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in)."""
    a1, a2, b1, b2 = (t[role] for role in ("a1", "a2", "b1", "b2"))
    return (a2, a1, b2, b1) if is_older_glora(t) else (a1, a2, b1, b2)


def _ia3_on_input(t: Mapping[str, Array]) -> bool:
    return bool(np.asarray(t["on_input"]).reshape(-1)[0])


def _rotations(blocks: Wide, limit: float) -> Wide:
    """Cayley's rotations of blocks (..., b, b), whose skew parts together are not longer than a limit (0: none)."""
    skew = blocks - np.swapaxes(blocks, -1, -2)
    length = float(np.sqrt((skew**2).sum()))
    if limit > 0 and length > limit:
        skew = skew * (limit / length)
    one = np.eye(blocks.shape[-1])
    return np.asarray((one + skew) @ np.linalg.inv(one - skew))


def _limit(delta: Delta) -> float:
    """LyCORIS stores the constraint in place of alpha, and multiplies it by out."""
    return float(delta.alpha or 0) * delta.out


def _rotated(delta: Delta, base: Wide) -> Wide:
    blocks = delta.tensors["oft_blocks"].astype(np.float64)
    turns = _rotations(blocks, _limit(delta))
    count, size = turns.shape[0], turns.shape[1]
    made = np.einsum("knm,kni->kmi", turns, base.reshape(count, size, -1)).reshape(base.shape)
    return np.asarray(_rescaled(delta, made))


def _butterflied(delta: Delta, base: Wide) -> Wide:
    """Stage i turns blocks whose rows stand 2^i half blocks apart."""
    turns = _rotations(delta.tensors["oft_blocks"].astype(np.float64), _limit(delta))
    size = turns.shape[-1]
    made = base
    for stage, each in enumerate(turns):
        step = 2**stage * (size // 2)
        rows = made.reshape(-1, 2, step, base.shape[1])
        mixed = rows.transpose(0, 2, 1, 3).reshape(-1, size, base.shape[1])
        turned = np.einsum("dij,djx->dix", each, mixed)
        apart = turned.reshape(-1, step, 2, base.shape[1]).transpose(0, 2, 1, 3)
        made = apart.reshape(base.shape)
    return np.asarray(_rescaled(delta, made))


def oft_block(elements: int) -> int:
    """The size of a block whose upper triangle has so many elements.

    >>> oft_block(6)
    4
    """
    return (1 + isqrt(1 + 8 * elements)) // 2


def _turned_columns(delta: Delta, base: Wide) -> Wide:
    """OneTrainer's OFT: blocks of the in axis are turned, by the first terms of Cayley's series.

    One block may stand for all. A linear turns its input, a convolution its kernel, the other way round.
    """
    t = delta.tensors
    upper = t["oft_R"].astype(np.float64)
    count, elements = upper.shape
    if "scaled_oft" in t:
        upper = upper / elements**0.5
    size = oft_block(elements)
    skew = np.zeros((count, size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = upper
    skew -= skew.transpose(0, 2, 1)
    square = skew @ skew
    turns = np.eye(size) + 2 * (skew + square + square @ skew) + square @ square
    if not delta.conv:
        turns = turns.transpose(0, 2, 1)
    if base.shape[1] % size or count not in (1, base.shape[1] // size):
        raise NoImageError(
            f"its {count} blocks of {size} do not fit the weight's {base.shape[1]} columns"
        )
    made = (base.reshape(len(base), -1, 1, size) @ turns).reshape(base.shape)
    if "initial_norm" not in t:
        return np.asarray(made)
    m, norm = (t[role].astype(np.float64).reshape(-1, 1) for role in ("dora_scale", "initial_norm"))
    return np.asarray(made * (m / norm))


def _rescaled(delta: Delta, made: Wide) -> Wide:
    factor = delta.tensors.get("rescale")
    if factor is None:
        return made
    return np.asarray(made * factor.astype(np.float64).reshape(-1)[:, None])


# -- following rows of the base


def take_rows(delta: Delta, rows: Ints) -> Delta:
    """The adapter of some rows of the weight, in some order, in the same algebra.

    Raises ``NoImageError`` where the algebra does not allow it.
    """
    whole = len(rows) == delta.out and bool((np.sort(rows) == np.arange(delta.out)).all())
    if whole and (rows == np.arange(delta.out)).all():
        return delta
    if delta.magnitude is not None and delta.magnitude_in and not whole:
        raise NoImageError(
            "DoRA on the in axis divides by the length of whole columns, and only some rows are taken",
            needs_base=True,
        )
    tensors = _TAKES.get(delta.algebra, _take_nothing)(delta, rows)
    return replace(
        delta,
        tensors=tensors,
        out=len(rows),
        magnitude=_some_rows(delta.magnitude, rows) if not delta.magnitude_in else delta.magnitude,
        bias=_some_rows(delta.bias, rows),
    )


def _some_rows(array: Array | None, rows: Ints) -> Array | None:
    return None if array is None else array[rows]


def _take_nothing(delta: Delta, rows: Ints) -> dict[str, Array]:
    raise NoImageError(f"{delta.algebra} cannot follow rows of its weight")


def _take_lora(delta: Delta, rows: Ints) -> dict[str, Array]:
    return {**delta.tensors, "up": delta.tensors["up"][rows]}


def _take_loha(delta: Delta, rows: Ints) -> dict[str, Array]:
    axis = 1 if "hada_t1" in delta.tensors else 0
    taken = {r: delta.tensors[r].take(rows, axis=axis) for r in ("hada_w1_a", "hada_w2_a")}
    return {**delta.tensors, **taken}


def _take_lokr(delta: Delta, rows: Ints) -> dict[str, Array]:
    t = delta.tensors
    left = "lokr_w1" if "lokr_w1" in t else "lokr_w1_a"
    size = delta.out // len(t[left])
    groups = rows[::size] // size
    if len(rows) % size or not (rows == (groups[:, None] * size + np.arange(size)).ravel()).all():
        raise NoImageError(
            "LoKr's factors do not divide into these rows: they would cut through a block of w2"
        )
    return {**t, left: t[left][groups]}


def _take_glora(delta: Delta, rows: Ints) -> dict[str, Array]:
    a1, a2, b1, b2 = _glora(delta.tensors)
    return {"a1": a1, "a2": a2, "b1": b1[rows], "b2": b2}


def _take_ia3(delta: Delta, rows: Ints) -> dict[str, Array]:
    t = delta.tensors
    if _ia3_on_input(t):
        return dict(t)
    return {**t, "ia3": t["ia3"].reshape(-1)[rows]}


def _take_oft_v2(delta: Delta, rows: Ints) -> dict[str, Array]:
    own = {r: t[rows] for r, t in delta.tensors.items() if r in ("dora_scale", "initial_norm")}
    return {**delta.tensors, **own}


def _take_full(delta: Delta, rows: Ints) -> dict[str, Array]:
    return {role: tensor[rows] for role, tensor in delta.tensors.items()}


_TAKES: dict[str, Callable[[Delta, Ints], dict[str, Array]]] = {
    LORA: _take_lora,
    LOHA: _take_loha,
    LOKR: _take_lokr,
    GLORA: _take_glora,
    IA3: _take_ia3,
    OFT_V2: _take_oft_v2,
    FULL: _take_full,
    SET: _take_full,
    NOTHING: _take_full,
}


def join_rows(parts: Sequence[Delta | None]) -> Delta:
    """The adapter of weights one below the other, where all are of one algebra that allows it.

    Raises ``NoImageError``. Plain LoRAs are joined elsewhere (`regraft.adapters.move`).
    """
    there = [part for part in parts if part is not None]
    first = there[0]
    if len(there) < len(parts):
        raise NoImageError(
            f"{first.algebra} of a fused weight needs all of its parts to be adapted"
        )
    if any(part.algebra != first.algebra for part in there):
        raise NoImageError("the parts of a fused weight have different kinds of adapters")
    if any(part.magnitude_in for part in there if part.magnitude is not None):
        raise NoImageError(
            "DoRA on the in axis divides by the length of columns, which would be those of all parts",
            needs_base=True,
        )
    along = {
        FULL: ("diff",),
        SET: ("set",),
        IA3: ("ia3",),
        GLORA: ("b1",),
        LOHA: ("hada_w1_a", "hada_w2_a"),
        OFT_V2: ("dora_scale", "initial_norm"),
    }
    if first.algebra not in along or "hada_t1" in first.tensors:
        raise NoImageError(f"{first.algebra} cannot follow weights that are fused")
    if len({part.scale.exact for part in there}) > 1:
        raise NoImageError("the parts of a fused weight have different scales")
    tensors = {}
    for role in first.tensors:
        own = [part.tensors[role] for part in there]
        if role in along[first.algebra] and not (role == "ia3" and _ia3_on_input(first.tensors)):
            tensors[role] = joined(own)
        elif same_bits(own):
            tensors[role] = own[0]
        else:
            raise NoImageError(
                f"the parts of a fused weight have {first.algebra}s that do not agree"
            )
    return replace(
        first,
        tensors=tensors,
        out=sum(part.out for part in there),
        magnitude=join_vectors([part.magnitude for part in there], "DoRA's magnitudes"),
        bias=join_vectors([part.bias for part in there], "deltas of biases"),
    )


def join_vectors(vectors: Sequence[Array | None], what: str) -> Array | None:
    """Vectors one after the other; ``None`` where there is none.

    Raises ``NoImageError`` where only some are there.
    """
    there = [x for x in vectors if x is not None]
    if not there:
        return None
    if len(there) < len(vectors):
        raise NoImageError(f"only some parts of a fused weight have {what}", needs_base=True)
    return joined(there)


def split_components(delta: Delta, parts: Sequence[Ints]) -> list[Ints] | None:
    """Which components of a LoRA belong to which rows, where its up is block diagonal; ``None`` where it is not.

    The blocks must stand in the order of the parts, so that joining them again gives the same factors.
    """
    up = _matrix(delta.tensors["up"])
    alive = [np.flatnonzero((up[rows] != 0).any(axis=0)) for rows in parts]
    if any(not len(each) for each in alive) or len(alive) < 2:
        return None
    together = np.concatenate(alive)
    return alive if np.array_equal(together, np.arange(up.shape[1])) else None


def take_components(delta: Delta, components: Ints) -> Delta:
    """Some components of a LoRA, at the same scale."""
    tensors = {
        "down": delta.tensors["down"][components],
        "up": delta.tensors["up"][:, components],
    }
    scale = delta.scale.at_rank(len(components))
    return replace(delta, tensors=tensors, alpha=None if delta.alpha is None else scale.alpha)


def whole_w1(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """A LoKr's tensors with w1 as one matrix."""
    made = {role: t for role, t in tensors.items() if role not in ("lokr_w1_a", "lokr_w1_b")}
    return {"lokr_w1": _whole(tensors, "lokr_w1").astype(np.float32), **made}
