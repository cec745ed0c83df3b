"""What PEFT builds on LoRA: DoRA, trained biases, aLoRA, BdLoRA, KaSA, and initialisations that change the base.

Source: PEFT 0.21.2, ``peft/tuners/lora/variants.py``, ``dora.py`` and ``layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import numpy as np

from regraft.adapters.families.base import (
    BASE,
    DENSE,
    FAMILY,
    IN,
    LORA,
    NONE,
    OUT,
    Cell,
    Family,
    NoImageError,
    Part,
    UnreadableError,
    Wide,
    as_wide,
    block_diagonal,
    cells,
    joined,
    narrowed,
    need,
)
from regraft.adapters.form import Array, rescale
from regraft.adapters.scale import Scale
from regraft.dialects.peft.config import LoraConfig
from regraft.names.keys import Ints

_ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_diag": "diag",
}


class LoraVariant(Family):
    """Factors A and B, and what a variant has beside them."""

    types = ("LORA",)
    prefix = "lora_"
    batches = False
    fields = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    roles = {"A": (None, IN), "B": (OUT, None), "bias": (OUT,), "m": (OUT,), "diag": (None,)}
    needed: ClassVar[tuple[str, ...]] = ("A", "B")
    """Roles that every module has."""
    names: ClassVar[Mapping[str, str]] = {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "bias": "lora_B.bias",
        "m": "lora_magnitude_vector",
        "diag": "lora_diag",
    }

    def read(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        return {_ROLES.get(name, name): tensor for name, tensor in tensors.items()}

    def write(self, part: Part) -> dict[str, Array]:
        names = dict(self.names)
        if part.kind == "embedding":
            names |= {"A": "lora_embedding_A", "B": "lora_embedding_B"}
        return {names.get(role, role): tensor for role, tensor in part.tensors.items()}

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        missing = [self.names[role] for role in self.needed if role not in tensors]
        if missing:
            raise UnreadableError(f"{' and '.join(missing)} is missing")
        a, b = tensors["A"], tensors["B"]
        if a.ndim == b.ndim == 2 and a.shape[0] != b.shape[1]:
            raise UnreadableError(f"its ranks differ: A {list(a.shape)}, B {list(b.shape)}")
        if a.ndim < 3 or a.ndim != b.ndim:
            return super().sizes(tensors, settings)
        return b.shape[0], prod(a.shape[1:])  # a convolution: in has its kernel's dims, too

    def scale(self, part: Part) -> Scale:
        """Rank and alpha of a part."""
        rslora = bool(self.config.get("use_rslora"))
        return Scale(part.settings["r"], part.settings["lora_alpha"], rslora)

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if part["A"].ndim != 2:
            raise NoImageError("it stands on a convolution")

    def turn(self, part: Part) -> Part:
        if set(part.tensors) != {"A", "B"}:
            raise NoImageError("what stands on out would have to stand on in")
        return part.with_tensors(part.into, part.out, A=part["B"].T, B=part["A"].T)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        scale = self.scale(there[0])
        bs: list[Array] = []
        vectors: dict[str, list[Array]] = {
            role: [] for role in ("bias", "m") if role in there[0].tensors
        }
        for part, out in zip(parts, outs, strict=True):
            if part is None:
                bs.append(np.zeros((out, 0), there[0]["B"].dtype))
                for role, values in vectors.items():
                    values.append(self.neutral(role, out, there[0][role]))
                continue
            ratio = self.scale(part).ratio_to(scale)
            bs.append(rescale(part["B"], ratio)[0])
            for role, values in vectors.items():
                values.append(rescale(part[role], ratio)[0] if role == "bias" else part[role])
        a = joined([p["A"] for p in there])
        tensors = {"A": a, "B": block_diagonal(bs)}
        tensors |= {role: joined(values) for role, values in vectors.items()}
        settings = {
            **there[0].settings,
            "r": len(a),
            "lora_alpha": scale.at_rank(len(a)).alpha,
        }
        made = replace(there[0], tensors=tensors, out=sum(outs), settings=settings)
        return made

    def neutral(self, role: str, size: int, like: Array) -> Array:
        """What a vector is where a part is not adapted."""
        return np.zeros(size, like.dtype)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        turned = [None if part is None else self.turn(part) for part in parts]
        return self.turn(self.join_out(turned, intos))

    def _product(self, part: Part) -> tuple[Array, Array]:
        a, b = part["A"], part["B"]
        return a, rescale(b, self.scale(part).value)[0]

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        a, b = as_wide(part["A"], part["B"])
        if a.ndim > 2:
            a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        return np.asarray(b @ a * self.scale(part).value)


class Dora(LoraVariant):
    """``(m / |V|) o V`` with ``V = W + scale B A`` and the lengths of its rows."""

    title = "DoRA"
    formula = "m / ‖V‖ ∘ V, V = W + scale · B A"
    adds = False
    table = cells(
        join_out=Cell(DENSE, FAMILY, "all parts are adapted"),
        split_out=Cell(FAMILY),
        reorder_out=Cell(FAMILY),
        reorder_in=Cell(FAMILY),
        rest=Cell(DENSE),
    )

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        super().may_take(part, rows, columns)
        if columns is not None and len(columns) != part.into:
            raise NoImageError("the lengths of its rows would change")

    def neutral(self, role: str, size: int, like: Array) -> Array:
        if role == "m":
            raise NoImageError(
                "a part that is not adapted would need the lengths of its base's rows"
            )
        return super().neutral(role, size, like)

    def turn(self, part: Part) -> Part:
        raise NoImageError("its magnitudes stand on out, and would have to stand on in")

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        raise NoImageError("rows of several parts would have one length")

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        raise NoImageError("it is DoRA, whose delta has full rank")

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        base = need(weight)
        (m,) = as_wide(part["m"].reshape(-1))
        with np.errstate(
            all="ignore"
        ):  # rows of zeros, and NaN in the factors, give NaN in PEFT as well
            added = base + super().delta(part, weight)
            return np.asarray(added * (m / np.linalg.norm(added, axis=1))[:, None] - base)


class LoraBias(LoraVariant):
    """A LoRA whose B has a bias, which adds to the module's own."""

    needed = ("A", "B", "bias")

    title = "LoRA with lora_bias"
    formula = "W + scale · B A, and the bias + scale · b"
    changes_bias = True
    table = cells(
        join_out=Cell(FAMILY),
        split_out=Cell(FAMILY),
        reorder_out=Cell(FAMILY),
        reorder_in=Cell(FAMILY),
        rest=Cell(NONE, LORA, "all its biases are zero"),
    )

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        super().may_take(part, rows, columns)
        if columns is not None and len(columns) != part.into:
            raise NoImageError("its bias would be added once for each piece")

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        if part["bias"].any():
            raise NoImageError("it has lora_bias, and a parameter's LoRA has no bias")
        return self._product(part)

    def bias(self, part: Part, bias: Wide) -> Wide:
        return np.asarray(bias + part["bias"].astype(np.float64) * self.scale(part).value)


class ALora(LoraVariant):
    """A LoRA that is switched on by tokens of the input."""

    title = "aLoRA"
    formula = "W + scale · B A, after the invocation tokens"
    merges = False
    table = cells(stack=Cell(NONE), rest=Cell(FAMILY))

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        raise NoImageError(
            "it is aLoRA, which acts on some tokens only, and a parameter's LoRA acts on all"
        )

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        raise NoImageError("it is aLoRA, which acts on some tokens only")


class Whole(LoraVariant):
    """A variant that follows a new name only, or leaves the family."""

    why: ClassVar[str] = ""
    asks: ClassVar[bool] = False
    """Whether the base's weights would help."""

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        raise NoImageError(self.why, needs_base=self.asks)

    def turn(self, part: Part) -> Part:
        raise NoImageError(self.why, needs_base=self.asks)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        raise NoImageError(self.why, needs_base=self.asks)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        raise NoImageError(self.why, needs_base=self.asks)

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        a, b = as_wide(*self.lora(part, weight))
        return np.asarray(b @ a)


class BdLora(Whole):
    """A LoRA with one block-diagonal factor, of which the blocks are stored one below the other."""

    title = "BdLoRA"
    formula = "W + scale · B A, A or B block-diagonal"
    rank = "r"
    why = "its config names modules by parts of their names"
    table = {**cells(rest=Cell(LORA)), "rename": Cell(LORA)}

    def varies(self) -> bool:
        return True

    def settings(self, path: str) -> dict[str, Any]:
        return {**super().settings(path), "name": path.rpartition(".")[2]}

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        a, b = self._dense(tensors, settings["name"])
        return b.shape[-2], a.shape[-1]

    def rename(self, part: Part, old: str, new: str) -> Part:
        raise NoImageError(self.why)

    def _dense(self, tensors: Mapping[str, Array], name: str) -> tuple[Array, Array]:
        options = self.config["use_bdlora"]
        count = int(options.get("nblocks") or 1)
        found = {}
        for role, field in (("A", "target_modules_bd_a"), ("B", "target_modules_bd_b")):
            tensor = tensors[role]
            if any(text in name for text in options.get(field) or ()):
                tensor = block_diagonal(np.split(tensor, count))
            found[role] = tensor
        return found["A"], found["B"]

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        a, b = self._dense(part.tensors, part.settings["name"])
        return a, rescale(b, self.scale(part).value)[0]


class Kasa(Whole):
    """``scale B diag(d) A``, and the base loses its smallest singular components when the adapter loads."""

    title = "KaSA"
    formula = "W − tail_r(W) + scale · B diag(d) A"
    rank = "2 r"
    why = "it takes singular components off the whole base weight"
    asks = True
    adds = False
    table = cells(rest=Cell(BASE))

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        base = need(weight, self.why)
        a, b, d = as_wide(part["A"], part["B"], part["diag"])
        rank = len(a)
        u, s, v = np.linalg.svd(base, full_matrices=False)
        b = b * d * self.scale(part).value
        return _sum((a, b), (v[-rank:], -u[:, -rank:] * s[-rank:]), part["A"])


class BaseChanging(Whole):
    """A LoRA whose initialisation takes what it starts with off the base, each time it loads: PiSSA and OLoRA."""

    title = "LoRA started by PiSSA or OLoRA"
    formula = "W − scale · B₀ A₀ + scale · B A"
    rank = "2 r"
    why = "its initialisation takes something off the whole base weight when it loads"
    asks = True
    adds = False
    table = cells(rest=Cell(BASE))

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        init = str(self.config["init_lora_weights"]).lower()
        if init not in ("pissa", "olora"):
            raise NoImageError(
                f"the initialisation {init!r} changes base weights in a way that cannot be repeated; save "
                "it again with path_initial_model_for_weight_conversion"
            )
        base = need(weight, self.why)
        a, b = as_wide(part["A"], part["B"])
        rank, scale = len(a), self.scale(part).value
        if init == "pissa":
            u, s, v = np.linalg.svd(base, full_matrices=False)
            return _sum((a, b * scale), (v[:rank], -u[:, :rank] * s[:rank]), part["A"])
        q, r = np.linalg.qr(base)
        return _sum((a, b * scale), (r[:rank], -q[:, :rank] * scale), part["A"])


class Plainly(Whole):
    """Variants that only train otherwise: what they save is a plain LoRA."""

    title = "VeLoRA, MonteCLoRA"
    formula = "W + scale · B A"
    rank = "r"
    why = "what it has for training does not follow"
    table = cells(rest=Cell(LORA))

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        return self._product(part)


class QaLora(LoraVariant):
    """A LoRA that reads the mean of each group of inputs, times the number of groups; A is (r, in/group)."""

    title = "QA-LoRA"
    formula = "W + scale · B A (sums of groups) · in/group²"
    rank = "r"
    table = cells(
        join_out=Cell(FAMILY), split_out=Cell(FAMILY), reorder_out=Cell(FAMILY), rest=Cell(LORA)
    )

    @property
    def _group(self) -> int:
        return int(self.config.get("qalora_group_size") or 16)

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        out, groups = super().sizes(tensors, settings)
        return out, None if groups is None else groups * self._group

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        super().may_take(part, rows, columns)
        if columns is not None:
            raise NoImageError("its inputs are put together in groups")

    def turn(self, part: Part) -> Part:
        raise NoImageError("its inputs are put together in groups")

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        a, b = self._product(part)
        (wide,) = as_wide(a)
        spread = np.repeat(wide, self._group, axis=-1) * (wide.shape[-1] / self._group)
        return narrowed(spread, a), b

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        a, b = as_wide(*self.lora(part, weight))
        return np.asarray(b @ a)


class Routed(Whole):
    """Arrow: which LoRA acts depends on the input."""

    title = "Arrow"
    merges = False
    formula = "depends on the input"
    why = "its effect depends on the input"
    table = cells()

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        return None, None

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        raise NoImageError(self.why)


def _sum(first: tuple[Wide, Wide], second: tuple[Wide, Wide], like: Array) -> tuple[Array, Array]:
    a = np.concatenate([first[0], second[0]])
    b = np.concatenate([first[1], second[1]], axis=1)
    return narrowed(a, like), narrowed(b, like)


_BY_FIELD = {
    "use_dora": Dora,
    "lora_bias": LoraBias,
    "alora_invocation_tokens": ALora,
    "use_bdlora": BdLora,
    "kasa_config": Kasa,
    "use_qalora": QaLora,
    "arrow_config": Routed,
    "velora_config": Plainly,
    "monteclora_config": Plainly,
}

VARIANTS: tuple[type[LoraVariant], ...] = (
    Dora,
    LoraBias,
    ALora,
    BdLora,
    Kasa,
    BaseChanging,
    Plainly,
    QaLora,
    Routed,
)


def variant_of(config: Mapping[str, Any]) -> type[LoraVariant] | None:
    """The variant that a LoRA's config asks for; ``None`` for plain LoRA.

    Of several, the first that can do the least.
    """
    found = [variant for field, variant in _BY_FIELD.items() if config.get(field)]
    if LoraConfig(config).changes_base() is not None:
        found.append(BaseChanging)
    if len(set(found)) > 1:
        return Mixed
    return found[0] if found else None


class Mixed(Routed):
    """Several variants at once: they follow a new name, and nothing else."""

    title = "several variants of LoRA at once"
    why = "it is several variants at once"
