"""Families that multiply the base weight: IA3, OFT, BOFT, HRA, RoAd.

Source: PEFT 0.21.2, ``peft/tuners/{ia3,oft,boft,hra,road}/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import lcm
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    BASE,
    DENSE,
    FAMILY,
    IN,
    Cell,
    Family,
    NoImageError,
    Part,
    UnreadableError,
    Wide,
    as_wide,
    block_diagonal,
    cells,
    is_order,
    joined,
    narrowed,
    need,
    same_bits,
)
from regraft.adapters.form import Array
from regraft.names.keys import Ints
from regraft.storage.expressions import expression

_SAME = "all parts are adapted, by the same {}"


class Ia3(Family):
    """A factor for each row (``l`` is (out, 1)), or for each column where the module is a feedforward one."""

    types = ("IA3",)
    title = "IA³"
    prefix = "ia3_"
    formula = "diag(l) W, or W diag(l) in feedforward_modules"
    adds = False
    changes_bias = True
    table = cells(
        join_out=Cell(DENSE, FAMILY, "factors stand on out, or are the same"),
        join_in=Cell(DENSE, FAMILY, "factors stand on in, or are the same"),
        split_out=Cell(FAMILY),
        split_in=Cell(FAMILY),
        reorder_out=Cell(FAMILY),
        reorder_in=Cell(FAMILY),
        transpose=Cell(FAMILY),
        stack=Cell(DENSE),
    )

    def varies(self) -> bool:
        return True

    def settings(self, path: str) -> dict[str, Any]:
        named = self.config.get("feedforward_modules") or ()
        if isinstance(named, str):
            return {
                "feedforward": expression(named, "feedforward_modules").fullmatch(path) is not None
            }
        return {"feedforward": any(path.endswith(name) for name in named)}

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        factors = tensors["ia3_l"]
        size = factors.size
        if factors.shape[0 if settings["feedforward"] else 1] != 1:
            raise UnreadableError(
                f"ia3_l is {list(factors.shape)}, which does not go with feedforward_modules"
            )
        return (None, size) if settings["feedforward"] else (size, None)

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        forward = part.settings["feedforward"]
        index = columns if forward else rows
        out = part.out if rows is None else len(rows)
        into = part.into if columns is None else len(columns)
        factors = _factors_of(part)
        return _scaled(part, factors if index is None else factors[index], out, into, forward)

    def turn(self, part: Part) -> Part:
        forward = not part.settings["feedforward"]
        return _scaled(part, _factors_of(part), part.into, part.out, forward)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        return self._join(parts, outs, False)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return self._join(parts, intos, True)

    def _join(self, parts: Sequence[Part | None], sizes: Sequence[int], along_in: bool) -> Part:
        there = [p for p in parts if p is not None]
        first = there[0]
        out = first.out if along_in else sum(sizes)
        into = sum(sizes) if along_in else first.into
        if any(p.settings["feedforward"] != along_in for p in there):
            factors = [_factors_of(p) for p in there]
            alike = len({p.settings["feedforward"] for p in there}) == 1
            if alike and len(there) == len(parts) and same_bits(factors):
                return _scaled(first, factors[0], out, into, not along_in)
            raise NoImageError("the parts are multiplied by different factors across the joint")
        like = _factors_of(first).dtype
        made = [
            np.ones(size, like) if p is None else _factors_of(p)
            for p, size in zip(parts, sizes, strict=True)
        ]
        return _scaled(first, joined(made), out, into, along_in)

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        (factors,) = as_wide(_factors_of(part))
        spread = factors[None, :] if part.settings["feedforward"] else factors[:, None]
        return np.asarray(need(weight) * (spread - 1.0))

    def bias(self, part: Part, bias: Wide) -> Wide:
        if part.settings["feedforward"]:
            return bias
        return np.asarray(bias * _factors_of(part).astype(np.float64))


def _factors_of(part: Part) -> Array:
    return part["ia3_l"].reshape(-1)


def _scaled(part: Part, factors: Array, out: int, into: int, forward: bool) -> Part:
    shaped = factors[None, :] if forward else factors[:, None]
    settings = {**part.settings, "feedforward": forward}
    return replace(part, tensors={"ia3_l": shaped}, out=out, into=into, settings=settings)


class Oft(Family):
    """``W blockdiag(R)^T`` with R a Cayley transform of skew matrices, of which the upper triangles are stored."""

    types = ("OFT",)
    title = "OFT"
    prefix = "oft_"
    formula = "W blockdiag(R)ᵀ"
    adds = False
    table = cells(
        join_out=Cell(DENSE, FAMILY, _SAME.format("rotations")),
        join_in=Cell(FAMILY),
        split_out=Cell(FAMILY),
        split_in=Cell(DENSE, FAMILY, "the cut lies between two blocks"),
        reorder_out=Cell(FAMILY),
        reorder_in=Cell(DENSE, FAMILY, "blocks stay together"),
        transpose=Cell(DENSE),
        stack=Cell(DENSE),
    )

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        tensor = next(iter(tensors.values()))
        if self.config.get("block_share"):
            return None, None
        return None, tensor.shape[0] * _side(tensor.shape[1])

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        out = part.out if rows is None else len(rows)
        if columns is None:
            return replace(part, out=out)
        skew = self._skew(part)
        side = skew.shape[-1]
        order, within = _blocks(columns, part.into, side)
        made = np.stack([skew[b][np.ix_(w, w)] for b, w in zip(order, within, strict=True)])
        return _rotated(part, made, out, len(columns))

    def _skew(self, part: Part) -> Array:
        """The skew matrices, (blocks, side, side)."""
        (packed,) = part.tensors.values()
        side = _side(packed.shape[1])
        if self.config.get("block_share"):
            packed = np.broadcast_to(packed[:1], (part.into // side, packed.shape[1]))
        upper = np.triu_indices(side, 1)
        skew = np.zeros((len(packed), side, side), packed.dtype)
        skew[:, upper[0], upper[1]] = packed
        return skew - skew.swapaxes(-1, -2)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        if len(there) < len(parts) or not same_bits(
            [next(iter(p.tensors.values())) for p in there]
        ):
            raise NoImageError("the parts are turned by different rotations")
        return replace(there[0], out=sum(outs))

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        skews = [None if p is None else self._skew(p) for p in parts]
        side = lcm(*(s.shape[-1] for s in skews if s is not None))
        like = next(s for s in skews if s is not None)
        made = []
        for skew, into in zip(skews, intos, strict=True):
            if into % side:
                raise NoImageError("the parts have blocks of different sizes")
            if skew is None:
                made.append(np.zeros((into // side, side, side), like.dtype))
                continue
            times = side // skew.shape[-1]
            made += [
                block_diagonal(list(skew[i : i + times]))[None] for i in range(0, len(skew), times)
            ]
        return _rotated(there[0], joined(made), there[0].out, sum(intos))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        sides = {key: _side(next(iter(p.tensors.values())).shape[1]) for key, p in parts.items()}
        if len(set(sides.values())) > 1 and self.config.get("r"):
            counts = {p.into // sides[key] for key, p in parts.items()}
            if counts != {self.config["r"]}:
                raise NoImageError(
                    "its modules would need blocks of different sizes, and it has one for all"
                )
            return parts, {}
        if len(set(sides.values())) > 1:
            raise NoImageError(
                "its modules would need blocks of different sizes, and it has one for all"
            )
        changes: dict[str, Any] = {"r": 0, "oft_block_size": next(iter(sides.values()))}
        if self.config.get("block_share"):
            changes["block_share"] = False
            parts = {key: self._spread(p) for key, p in parts.items()}
        return parts, changes

    def _spread(self, part: Part) -> Part:
        (packed,) = part.tensors.values()
        if len(packed) == part.into // _side(packed.shape[1]):
            return part
        return _rotated(part, self._skew(part), part.out, part.into)

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        return _turned(need(weight), self.rotations(part))

    def rotations(self, part: Part) -> Wide:
        """The rotations, (blocks, side, side)."""
        (skew,) = as_wide(self._skew(part))
        one = np.eye(skew.shape[-1])
        if self.config.get("coft"):
            bound = self.config.get("eps", 6e-5) / np.sqrt(len(next(iter(part.tensors.values()))))
            length = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
            skew = np.where(length <= bound, skew, bound * skew / np.where(length == 0, 1, length))
        if not self.config.get("use_cayley_neumann", True):
            return np.asarray((one - skew) @ np.linalg.inv(one + skew))
        terms = self.config.get("num_cayley_neumann_terms", 5)
        result = np.broadcast_to(one, skew.shape).copy()
        power = skew
        for number in range(1, terms):
            result += power * (1.0 if number == terms - 1 and terms > 2 else 2.0)
            power = power @ skew
        return result


def _side(packed: int) -> int:
    """The side of a skew matrix from how many numbers are stored of it."""
    return (1 + int(np.sqrt(1 + 8 * packed) + 0.5)) // 2


def _blocks(columns: Ints, into: int, side: int) -> tuple[list[int], list[Ints]]:
    """Which blocks some columns are, and in which order each one's columns come."""
    if len(columns) % side:
        raise NoImageError("the cut goes through a block of the rotation")
    order, within = [], []
    for start in range(0, len(columns), side):
        some = columns[start : start + side]
        block = int(some[0]) // side
        inside = some - block * side
        if not is_order(inside, side):
            raise NoImageError("columns of one block of the rotation do not stay together")
        order.append(block)
        within.append(inside)
    return order, within


def _rotated(part: Part, skew: Array, out: int, into: int) -> Part:
    upper = np.triu_indices(skew.shape[-1], 1)
    (role,) = part.tensors
    return replace(part, tensors={role: skew[:, upper[0], upper[1]]}, out=out, into=into)


def _turned(weight: Wide, rotations: Wide) -> Wide:
    """``W blockdiag(R)^T - W``."""
    count, side, _ = rotations.shape
    parts = weight.reshape(len(weight), count, side)
    return np.asarray(np.einsum("onk,njk->onj", parts, rotations).reshape(weight.shape) - weight)


class Boft(Family):
    """``diag(s) W R^T`` with R of skew blocks; more than one factor of R needs PEFT's CUDA extension."""

    types = ("BOFT",)
    title = "BOFT"
    prefix = "boft_"
    formula = "diag(s) W Rᵀ"
    adds = False
    table = {
        **Oft.table,
        "join in": Cell(DENSE, FAMILY, "all parts are adapted, and scale rows by the same factors"),
    }

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        _, count, side, _ = tensors["boft_R"].shape
        return tensors["boft_s"].size, count * side

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        factors, scale = part["boft_R"], part["boft_s"]
        if rows is not None:
            scale = scale[rows]
        if columns is not None:
            _one_factor(part)
            order, within = _blocks(columns, part.into, factors.shape[-1])
            factors = np.stack(
                [factors[0, b][np.ix_(w, w)] for b, w in zip(order, within, strict=True)]
            )[None]
        into = part.into if columns is None else len(columns)
        return part.with_tensors(len(scale), into, boft_R=factors, boft_s=scale)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        if len(there) < len(parts) or not same_bits([p["boft_R"] for p in there]):
            raise NoImageError("the parts are turned by different rotations")
        scale = joined([p["boft_s"] for p in there])
        first = there[0]
        return first.with_tensors(sum(outs), first.into, boft_R=first["boft_R"], boft_s=scale)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        if len(there) < len(parts) or not same_bits([p["boft_s"] for p in there]):
            raise NoImageError("rows of the parts are scaled by different factors")
        for part in there:
            _one_factor(part)
        if len({p["boft_R"].shape[-1] for p in there}) > 1:
            raise NoImageError("the parts have blocks of different sizes")
        made = joined([p["boft_R"] for p in there], axis=1)
        first = there[0]
        return first.with_tensors(first.out, sum(intos), boft_R=made, boft_s=first["boft_s"])

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        sides = {p["boft_R"].shape[-1] for p in parts.values()}
        counts = {p["boft_R"].shape[1] for p in parts.values()}
        if len(sides) == 1:
            return parts, {"boft_block_size": sides.pop(), "boft_block_num": 0}
        if len(counts) == 1:
            return parts, {"boft_block_size": 0, "boft_block_num": counts.pop()}
        raise NoImageError(
            "its modules would need blocks of different sizes, and it has one for all"
        )

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        _one_factor(part)
        (skew, scale) = as_wide(part["boft_R"][0], part["boft_s"])
        skew = 0.5 * (skew - skew.swapaxes(-1, -2))
        one = np.eye(skew.shape[-1])
        base = need(weight)
        turned = base + _turned(base, (one - skew) @ np.linalg.inv(one + skew))
        return np.asarray(turned * scale.reshape(-1, 1) - base)


def _one_factor(part: Part) -> None:
    if len(part["boft_R"]) > 1:
        raise NoImageError(
            "its rotation is a product of butterflies, which depend on the whole of in"
        )


class Hra(Family):
    """``W H``, H a product of reflections; ``H - 1`` has the rank of their number."""

    types = ("HRA",)
    title = "HRA"
    prefix = "hra_"
    roles = {"hra_u": (IN, None)}
    formula = "W H, H a product of r reflections"
    rank = "r"
    batches = False
    adds = False
    table = cells(
        join_out=Cell(BASE, FAMILY, _SAME.format("reflections")),
        join_in=Cell(BASE, FAMILY, "every module gets as many reflections"),
        split_out=Cell(FAMILY),
        reorder_out=Cell(FAMILY),
        reorder_in=Cell(FAMILY),
        rest=Cell(BASE),
    )

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if not is_order(columns, part.into):
            raise NoImageError("a part of a reflection is none", needs_base=True)

    def turn(self, part: Part) -> Part:
        raise NoImageError("it multiplies from the side of in", needs_base=True)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        if len(there) < len(parts) or not same_bits([p["hra_u"] for p in there]):
            raise NoImageError("the parts are reflected differently", needs_base=True)
        return replace(there[0], out=sum(outs))

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        us = [
            np.zeros((into, 0), there[0]["hra_u"].dtype) if p is None else p["hra_u"]
            for p, into in zip(parts, intos, strict=True)
        ]
        return there[0].with_tensors(there[0].out, sum(intos), hra_u=block_diagonal(us))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        counts = {p["hra_u"].shape[1] for p in parts.values()}
        if len(counts) > 1:
            raise NoImageError(
                "its modules would need different numbers of reflections", needs_base=True
            )
        return parts, {"r": counts.pop()}

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        base = need(weight)
        (u,) = as_wide(part["hra_u"])
        count = u.shape[1]
        if self.config.get("apply_GS"):
            basis, upper = np.linalg.qr(u)
            del upper
            a, inner = basis.T, -2.0 * np.eye(count)
            left = basis
        else:
            left = u / np.linalg.norm(u, axis=0)
            a = left.T
            # H = 1 + U T U^T, reflection by reflection: T grows by a row and a column.
            inner = np.zeros((count, count))
            for number in range(count):
                column = inner[:number, :number] @ (left[:, :number].T @ left[:, number])
                inner[:number, number] = -2.0 * column
                inner[number, number] = -2.0
        b = base @ left @ inner
        return narrowed(a, part["hra_u"]), narrowed(np.asarray(b), part["hra_u"])


class Road(Family):
    """Rotations and scales of pairs of rows, half a group apart; it acts on the bias as well."""

    types = ("ROAD",)
    title = "RoAd"
    prefix = "road_"
    formula = "R W, R of 2×2 rotations of rows"
    adds = False
    changes_bias = True
    table = cells(
        join_out=Cell(FAMILY),
        join_in=Cell(DENSE, FAMILY, _SAME.format("rotations")),
        split_out=Cell(DENSE, FAMILY, "the cut lies between two groups"),
        split_in=Cell(FAMILY),
        reorder_out=Cell(DENSE, FAMILY, "groups stay together"),
        reorder_in=Cell(FAMILY),
        transpose=Cell(DENSE),
        stack=Cell(DENSE),
    )

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        return int(tensors["road_theta"].size * 2 / self._per_pair), None

    @property
    def _per_pair(self) -> int:
        """How many numbers a pair of rows has: 1, 2 or 4."""
        return int(self.config["variant"][-1])

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        into = part.into if columns is None else len(columns)
        if rows is None:
            return replace(part, into=into)
        group = self.config["group_size"]
        starts = rows[::group]
        whole = len(rows) % group == 0 and (starts % group == 0).all()
        if not whole or not np.array_equal(rows, (starts[:, None] + np.arange(group)).reshape(-1)):
            raise NoImageError("rows of one group do not stay together")
        tensors = {
            role: t.reshape(part.out // group, -1)[starts // group].reshape(-1)
            for role, t in part.tensors.items()
        }
        return part.with_tensors(len(rows), into, **tensors)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        first = next(p for p in parts if p is not None)
        neutral = {"road_theta": 0.0, "road_alpha": 1.0}
        group = self.config["group_size"]
        if any(out % group for out in outs):
            raise NoImageError("a part is no whole number of groups")
        tensors = {
            role: joined(
                [
                    np.full(out * self._per_pair // 2, value, first[role].dtype)
                    if p is None
                    else p[role]
                    for p, out in zip(parts, outs, strict=True)
                ]
            )
            for role, value in neutral.items()
        }
        return first.with_tensors(sum(outs), first.into, **tensors)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        same = len(there) == len(parts) and all(
            same_bits([p[role] for p in there]) for role in ("road_theta", "road_alpha")
        )
        if not same:
            raise NoImageError("the parts are turned by different rotations")
        return replace(there[0], into=sum(intos))

    def bias(self, part: Part, bias: Wide) -> Wide:
        return bias + self.delta(part, lambda: bias[:, None])[:, 0]

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        base = need(weight)
        theta, alpha = as_wide(part["road_theta"], part["road_alpha"])
        half = self.config["group_size"] // 2
        if self._per_pair == 1:
            theta, alpha = (
                x.reshape(-1, half).repeat(2, axis=0).reshape(-1) for x in (theta, alpha)
            )
        if self._per_pair == 4:
            t, a = (x.reshape(-1, 2, 2 * half) for x in (theta, alpha))
            first = (a[:, 0] * np.cos(t[:, 0])).reshape(-1)
            second = (a[:, 1] * np.sin(t[:, 1])).reshape(-1)
        else:
            first, second = alpha * np.cos(theta), alpha * np.sin(theta)
        halves = base.reshape(-1, 2, half, base.shape[1])
        turned = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(base.shape)
        return np.asarray(base * (first[:, None] - 1.0) + turned * second[:, None])
