"""Families that add a delta made in their own way: MiSS, VeRA, PVeRA, VB-LoRA, FourierFT, RandLoRA, SHiRA, C3A.

Source: PEFT 0.21.2, ``peft/tuners/{miss,vera,pvera,vblora,fourierft,randlora,shira,c3a}/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil, lcm
from typing import Any, ClassVar

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    LORA,
    OUT,
    Cell,
    Family,
    NoImageError,
    Part,
    Wide,
    as_wide,
    cells,
    joined,
    narrowed,
    need,
    same_bits,
)
from regraft.adapters.families.seeded import random_order, random_uniform
from regraft.adapters.form import Array
from regraft.names.keys import Ints

_ALIKE = "all parts are adapted, with the same other factor"
_CUT = "vectors stay whole"
_EQUAL = "blocks have one size"
_WHOLE = "blocks stay whole"


class Miss(Family):
    """``block^T T`` where T repeats the identity along in; all modules share one r."""

    types = ("MISS",)
    title = "MiSS"
    prefix = "miss_"
    formula = "W + miss_blockᵀ (1 1 … 1)"
    rank = "r"
    table = cells(
        join_out=Cell(FAMILY),
        split_out=Cell(FAMILY),
        split_in=Cell(FAMILY),
        reorder_out=Cell(FAMILY),
        reorder_in=Cell(LORA, FAMILY, "columns are shifted by a constant"),
        rest=Cell(LORA),
    )

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        block = tensors["miss_block"]
        if block.ndim == 3:
            return block.shape[0] * block.shape[1], None
        return (None if self._mini else block.shape[1]), None

    @property
    def _mini(self) -> bool:
        return self.config.get("init_weights") == "mini"

    def _block(self, part: Part) -> Array:
        """(r, out)."""
        block = part["miss_block"]
        if block.ndim == 3:
            raise NoImageError("what it adds depends on the base weight (init_weights is 'bat')")
        return np.tile(block, (1, part.out // block.shape[1])) if self._mini else block

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        block = self._block(part)
        if rows is not None:
            block = block[:, rows]
        into = part.into
        if columns is not None:
            into = len(columns)
            shift = int(columns[0])
            if ((columns - np.arange(into) - shift) % len(block)).any():
                raise NoImageError("its columns repeat, and they would not any more")
            block = np.roll(block, -(shift % len(block)), axis=0)
        return part.with_tensors(block.shape[1], into, miss_block=block)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        first = next(p for p in parts if p is not None)
        blocks = [None if p is None else self._block(p) for p in parts]
        like = next(b for b in blocks if b is not None)
        rank = lcm(*(len(b) for b in blocks if b is not None))
        made = [
            np.zeros((rank, out), like.dtype) if b is None else np.tile(b, (rank // len(b), 1))
            for b, out in zip(blocks, outs, strict=True)
        ]
        return first.with_tensors(sum(outs), first.into, miss_block=joined(made, axis=1))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        blocks = {key: self._block(p) for key, p in parts.items()}
        rank = lcm(*(len(b) for b in blocks.values()))
        if any(rank > p.into for p in parts.values()):
            raise NoImageError("its modules would need different ranks, and it has one for all")
        made = {
            key: p.with_tensors(p.out, p.into, miss_block=np.tile(b, (rank // len(b), 1)))
            for (key, p), b in zip(parts.items(), blocks.values(), strict=True)
        }
        return made, {"r": rank, **({"init_weights": True} if self._mini else {})}

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        block = part["miss_block"]
        if self.config.get("init_weights") == "bat":
            raise NoImageError("what it adds depends on the base weight, and has full rank")
        if self._mini:
            block = np.tile(block, part.out // block.shape[-1])
        rank = block.shape[-2]
        ones = (np.arange(part.into) % rank == np.arange(rank)[:, None]).astype(block.dtype)
        return np.broadcast_to(ones, (*block.shape[:-2], *ones.shape)), block.swapaxes(-1, -2)

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        if self.config.get("init_weights") != "bat":
            return super().delta(part, weight)
        (block,) = as_wide(part["miss_block"])
        base = need(weight)
        side = block.shape[-1]
        tiles = base.reshape(len(base) // side, side, base.shape[1] // side, side)
        made = tiles.transpose(2, 0, 1, 3) @ block + block
        return np.asarray(made.transpose(1, 2, 0, 3).reshape(base.shape))


class Vera(Family):
    """``diag(b) B diag(d) A`` with A and B shared by all modules, each taking the first rows and columns."""

    types = ("VERA",)
    title = "VeRA"
    prefix = "vera_lambda_"
    roles = {"vera_lambda_b": (OUT,), "vera_lambda_d": (None,)}
    shared = ("base_model.vera_A", "base_model.vera_B")
    formula = "W + diag(b) B diag(d) A, A and B shared"
    rank = "r"
    spread: ClassVar[int] = 1
    """How many times as many rows A has as the rank."""
    table = cells(rest=Cell(LORA))

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        raise NoImageError(
            "all modules share one A and one B, whose first rows and columns they take"
        )

    def __init__(self, config: Mapping[str, Any], shared: Mapping[str, Array]) -> None:
        super().__init__(config, shared)
        self._largest = 0, 0

    def survey(self, parts: Mapping[str, Part]) -> None:
        self._largest = max(p.out for p in parts.values()), max(p.into for p in parts.values())

    def _projections(self) -> tuple[Array, Array]:
        """A (rank, largest in) and B (largest out, rank): PEFT draws them again where it did not save them."""
        a, b = (self.common.get(name) for name in self.shared)
        if a is None or b is None:
            if self.config.get("save_projection", True):
                raise NoImageError(
                    "its projections are not in the file, though save_projection is on"
                )
            out, into = self._largest
            rank = int(self.config["r"])
            shapes = (rank * self.spread, into), (out, rank)
            a, b = random_uniform(shapes, int(self.config["projection_prng_key"]))
        return a, b

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        a, b = self._projections()
        lb, ld = as_wide(*(part[role] for role in self.roles))
        rank = ld.shape[-1]
        a, b = a[:rank, : part.into], b[: part.out]
        wide = lb[..., :, None] * b.astype(np.float64) * ld[..., None, :]
        made = np.broadcast_to(a, (*lb.shape[:-1], *a.shape))
        return made, narrowed(wide, *part.tensors.values(), b)


class PVera(Vera):
    """VeRA whose ``d`` is the mean of a distribution."""

    types = ("PVERA",)
    title = "PVeRA"
    prefix = "pvera_lambda_"
    roles = {"pvera_lambda_b": (OUT,), "pvera_lambda_d": (None,)}
    shared = ("base_model.pvera_A", "base_model.pvera_B")
    formula = "as VeRA, with the mean of d"
    spread = 2

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        if self.config.get("sample_at_inference"):
            raise NoImageError("it draws numbers as it runs (sample_at_inference)")
        half = part["pvera_lambda_d"].shape[-1] // 2
        tensors = {**part.tensors, "pvera_lambda_d": part["pvera_lambda_d"][..., :half]}
        return super().lora(replace(part, tensors=tensors), weight)


class VbLora(Family):
    """LoRA factors put together from the vectors of a bank, which all modules share."""

    types = ("VBLORA",)
    title = "VB-LoRA"
    prefix = "vblora_"
    shared = ("base_model.vblora_vector_bank",)
    formula = "W + B A, both of vectors of one bank"
    rank = "r"
    table = cells(
        join_out=Cell(LORA, FAMILY, _ALIKE),
        join_in=Cell(LORA, FAMILY, _ALIKE),
        split_out=Cell(LORA, FAMILY, _CUT),
        split_in=Cell(LORA, FAMILY, _CUT),
        reorder_out=Cell(LORA, FAMILY, _CUT),
        reorder_in=Cell(LORA, FAMILY, _CUT),
        transpose=Cell(FAMILY),
        stack=Cell(LORA),
    )

    @property
    def _length(self) -> int:
        return int(self.config["vector_length"])

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        a = next(t for name, t in tensors.items() if name.startswith("vblora_logits_A"))
        b = next(t for name, t in tensors.items() if name.startswith("vblora_logits_B"))
        return b.shape[0] * self._length, a.shape[1] * self._length

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        tensors = {}
        for role, tensor in part.tensors.items():
            index = columns if role.startswith("vblora_logits_A") else rows
            if index is not None:
                tensor = tensor.take(
                    self._vectors(index), axis=1 if role.startswith("vblora_logits_A") else 0
                )
            tensors[role] = tensor
        out = part.out if rows is None else len(rows)
        into = part.into if columns is None else len(columns)
        return part.with_tensors(out, into, **tensors)

    def _vectors(self, index: Ints) -> Ints:
        length = self._length
        if len(index) % length == 0:
            starts = index[::length]
            whole = (starts[:, None] + np.arange(length)).reshape(-1)
            if (starts % length == 0).all() and np.array_equal(whole, index):
                return np.asarray(starts // length)
        raise NoImageError("its vectors would be cut")

    def turn(self, part: Part) -> Part:
        swap = {"A": "B", "B": "A"}
        at = len("vblora_logits_")
        tensors = {
            role[:at] + swap[role[at]] + role[at + 1 :]: t.swapaxes(0, 1)
            for role, t in part.tensors.items()
        }
        return part.with_tensors(part.into, part.out, **tensors)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        shared = [role for role in there[0].tensors if role.startswith("vblora_logits_A")]
        if len(there) < len(parts) or any(not same_bits([p[r] for p in there]) for r in shared):
            raise NoImageError("ranks add, and all modules share one r")
        tensors = {
            role: t if role in shared else joined([p[role] for p in there])
            for role, t in there[0].tensors.items()
        }
        return there[0].with_tensors(sum(outs), there[0].into, **tensors)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        turned = [None if part is None else self.turn(part) for part in parts]
        return self.turn(self.join_out(turned, intos))

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        bank = self.common.get(self.shared[0])
        if bank is None:
            raise NoImageError("its vector bank is not in the file")
        a = self._mixed(part, "A", bank)
        b = self._mixed(part, "B", bank)
        rows = a.reshape(*a.shape[:-2], -1)
        columns = b.swapaxes(-1, -2)
        columns = columns.reshape(*columns.shape[:-3], -1, columns.shape[-1])
        return narrowed(rows, bank), narrowed(columns, bank)

    def _mixed(self, part: Part, letter: str, bank: Array) -> Wide:
        (wide,) = as_wide(bank)
        whole = part.tensors.get(f"vblora_logits_{letter}")
        if whole is not None:
            count = int(self.config["topk"])
            (logits,) = as_wide(whole)
            index = np.argsort(-logits, axis=-1, kind="stable")[..., :count]
            top = np.take_along_axis(logits, index, axis=-1)
            weights = np.exp(top - top.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
        else:
            index = part[f"vblora_logits_{letter}_topk_indices"].astype(np.int64)
            (weights,) = as_wide(part[f"vblora_logits_{letter}_topk_weights"])
            last = 1.0 - weights.sum(axis=-1, keepdims=True)
            if weights.shape[-1] + 1 == index.shape[-1]:
                weights = np.concatenate([weights, last], axis=-1)
        return np.asarray((weights[..., None] * wide[index]).sum(axis=-2))


class FourierFt(Family):
    """The real part of a sparse spectrum, at places that a seed and the weight's shape tell."""

    types = ("FOURIERFT",)
    title = "FourierFT"
    prefix = "fourierft_"
    fields = {"n_frequency": "n_frequency_pattern"}
    formula = "W + scaling · Re(ifft2(spectrum))"
    anchored = True
    rank = "2 n"
    table = cells(rest=Cell(LORA))

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        raise NoImageError("its frequencies are those of the whole weight")

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        (spectrum,) = as_wide(part["fourierft_spectrum"])
        count = spectrum.shape[-1]
        seed = int(self.config.get("random_loc_seed") or 777)
        places = random_order(part.out * part.into, seed)[:count]
        p, q = np.divmod(places, part.into)
        rows = 2 * np.pi * np.outer(np.arange(part.out), p) / part.out
        columns = 2 * np.pi * np.outer(q, np.arange(part.into)) / part.into
        each = spectrum[..., :, None] * (float(self.config["scaling"]) / (part.out * part.into))
        a = np.concatenate([each * np.cos(columns), each * np.sin(columns)], axis=-2)
        b = np.concatenate([np.cos(rows), -np.sin(rows)], axis=-1)
        made = np.broadcast_to(b, (*spectrum.shape[:-1], *b.shape))
        like = part["fourierft_spectrum"]
        return narrowed(np.asarray(a), like), narrowed(np.asarray(made), like)


class RandLora(Family):
    """A sum of random bases, scaled: of full rank."""

    types = ("RANDLORA",)
    title = "RandLoRA"
    prefix = "randlora_"
    shared = ("base_model.randlora_A", "base_model.randlora_B")
    formula = "W + alpha/r Σ B diag(λ) A diag(γ), A and B shared"
    table = cells(rest=Cell(DENSE))

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        return None, None

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        raise NoImageError("all modules share one A and one B")

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        a, b = (self.common.get(name) for name in self.shared)
        if a is None or b is None:
            raise NoImageError("its bases are not in the file (save_projection was off)")
        short, long = sorted((part.out, part.into))
        lam, gamma, wide_a, wide_b = as_wide(part["randlora_lambda"], part["randlora_gamma"], a, b)
        rank, count = lam.shape
        first = (lam[:, :, None] * wide_a[:rank, :count, :short] * gamma[:, :short]).reshape(
            -1, short
        )
        made = wide_b[:long, :count, :rank].reshape(long, -1) @ first
        made *= float(self.config["randlora_alpha"]) / rank
        return np.asarray(made if part.into == short else made.T)


class Shira(Family):
    """Single elements of the weight, at stored places; every module has r (in + out) of them."""

    types = ("SHIRA",)
    title = "SHiRA"
    prefix = "shira_"
    formula = "W + single elements"
    table = cells(stack=Cell(DENSE), rest=Cell(FAMILY))

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        return None, None

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        places, values = part["shira_indices"], part["shira_weight"]
        result = part
        for axis, index in enumerate((rows, columns)):
            if index is None:
                continue
            size = part.into if axis else part.out
            new = np.full(size, -1, dtype=places.dtype)
            new[index] = np.arange(len(index))
            kept = new[places[axis]] >= 0
            places, values = places[:, kept], values[kept]
            places = np.stack([new[p] if a == axis else p for a, p in enumerate(places)])
        result = part.with_tensors(
            part.out if rows is None else len(rows),
            part.into if columns is None else len(columns),
            shira_indices=places,
            shira_weight=values,
        )
        return result

    def turn(self, part: Part) -> Part:
        return part.with_tensors(
            part.into,
            part.out,
            shira_indices=part["shira_indices"][::-1],
            shira_weight=part["shira_weight"],
        )

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        first = next(p for p in parts if p is not None)
        at, places, values = 0, [], []
        for part, out in zip(parts, outs, strict=True):
            if part is not None:
                offset = np.array([[at], [0]], dtype=part["shira_indices"].dtype)
                places.append(part["shira_indices"] + offset)
                values.append(part["shira_weight"])
            at += out
        return first.with_tensors(
            at,
            first.into,
            shira_indices=np.concatenate(places, axis=1),
            shira_weight=joined(values),
        )

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        turned = [None if part is None else self.turn(part) for part in parts]
        return self.turn(self.join_out(turned, intos))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        rank = max(ceil(p["shira_weight"].size / (p.out + p.into)) for p in parts.values())
        result = {}
        for key, part in parts.items():
            need_count = rank * (part.out + part.into)
            if need_count > part.out * part.into:
                raise NoImageError("its modules would need more elements than the weight has")
            result[key] = _padded(part, need_count)
        return result, {"r": rank}

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        made = np.zeros((part.out, part.into))
        np.add.at(made, tuple(part["shira_indices"]), part["shira_weight"].astype(np.float64))
        return made


def _padded(part: Part, count: int) -> Part:
    """Zeros at free places until there are as many as PEFT expects."""
    places, values = part["shira_indices"], part["shira_weight"]
    missing = count - len(values)
    if not missing:
        return part
    flat = places[0].astype(np.int64) * part.into + places[1]
    free = np.setdiff1d(np.arange(part.out * part.into), flat)[:missing]
    more = np.stack(np.divmod(free, part.into)).astype(places.dtype)
    return part.with_tensors(
        part.out,
        part.into,
        shira_indices=np.concatenate([places, more], axis=1),
        shira_weight=np.concatenate([values, np.zeros(missing, values.dtype)]),
    )


class C3a(Family):
    """Circulant blocks, divided by the size of in."""

    types = ("C3A",)
    title = "C3A"
    prefix = "c3a_"
    fields = {"block_size": "block_size_pattern"}
    formula = "W + circulant blocks / in"
    anchored = True
    table = cells(
        join_out=Cell(DENSE, FAMILY, _EQUAL),
        join_in=Cell(DENSE, FAMILY, _EQUAL),
        split_out=Cell(DENSE, FAMILY, _WHOLE),
        split_in=Cell(DENSE, FAMILY, _WHOLE),
        reorder_out=Cell(DENSE, FAMILY, _WHOLE),
        reorder_in=Cell(DENSE, FAMILY, _WHOLE),
        transpose=Cell(FAMILY),
        stack=Cell(DENSE),
    )

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        rows, columns, side = tensors["c3a_kernel"].shape
        return rows * side, columns * side

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        kernel = part["c3a_kernel"]
        side = kernel.shape[-1]
        for axis, index in enumerate((rows, columns)):
            if index is None:
                continue
            starts = index[::side]
            if (
                len(index) % side
                or (starts % side).any()
                or not np.array_equal(index, (starts[:, None] + np.arange(side)).reshape(-1))
            ):
                raise NoImageError("its blocks would be cut")
            kernel = kernel.take(starts // side, axis=axis)
        out, into = kernel.shape[0] * side, kernel.shape[1] * side
        return part.with_tensors(out, into, c3a_kernel=_ratio(kernel, into, part.into))

    def turn(self, part: Part) -> Part:
        kernel = np.roll(np.flip(part["c3a_kernel"], -1), 1, -1).swapaxes(0, 1)
        return part.with_tensors(
            part.into, part.out, c3a_kernel=_ratio(kernel, part.out, part.into)
        )

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        return self._join(parts, outs, 0)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return self._join(parts, intos, 1)

    def _join(self, parts: Sequence[Part | None], sizes: Sequence[int], axis: int) -> Part:
        there = [p for p in parts if p is not None]
        first = there[0]
        side = first["c3a_kernel"].shape[-1]
        if any(p["c3a_kernel"].shape[-1] != side for p in there) or any(s % side for s in sizes):
            raise NoImageError("the parts have blocks of different sizes")
        out = sum(sizes) if axis == 0 else first.out
        into = sum(sizes) if axis == 1 else first.into
        made = []
        for part, size in zip(parts, sizes, strict=True):
            shape = list(first["c3a_kernel"].shape)
            shape[axis] = size // side
            kernel = (
                np.zeros(shape, first["c3a_kernel"].dtype) if part is None else part["c3a_kernel"]
            )
            made.append(_ratio(kernel, into, into if part is None else part.into))
        joint = np.concatenate(made, axis=axis)
        return first.with_tensors(out, into, c3a_kernel=joint)

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        (kernel,) = as_wide(part["c3a_kernel"])
        side = kernel.shape[-1]
        turn = (np.arange(side) - np.arange(side)[:, None]) % side
        return np.asarray(
            kernel[:, :, turn].transpose(0, 2, 1, 3).reshape(part.out, part.into) / part.into
        )


def _ratio(kernel: Array, new: int, old: int) -> Array:
    """A kernel for another size of in, by which PEFT divides."""
    return kernel if new == old else (kernel.astype(np.float64) * (new / old)).astype(kernel.dtype)
