"""A file's tensors by module, and what the tensors of one module are together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, prod

import numpy as np

from regraft.adapters.form import Array, is_float
from regraft.adapters.scale import Number
from regraft.dialects.image.delta import (
    BOFT,
    FULL,
    GLORA,
    IA3,
    LOHA,
    LOKR,
    LORA,
    NOTHING,
    OFT,
    OFT_V2,
    SET,
    Delta,
    is_older_glora,
    oft_block,
)
from regraft.dialects.image.leaves import has_no_weights, split_key, unread_kind
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.report import count_in_words


@dataclass(slots=True)
class ModuleTensors:
    """All tensors of one module, as the file names it."""

    stem: str
    tensors: dict[str, Array] = field(default_factory=dict)
    """By role."""
    spellings: set[str] = field(default_factory=set)
    scale_key: bool = False
    """Whether its new weight is a parameter called ``scale`` in the base."""


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """A file, module by module."""

    modules: dict[str, ModuleTensors]
    """By the name that the file has."""
    others: dict[str, Array]
    """What is no weight of the model: embeddings, a trainer's bookkeeping."""


def group_tensors(tensors: Mapping[str, Array], where: str) -> Grouped:
    """Sort a file's tensors by module.

    Raises ``BadInputError`` with all keys that no tool is known to write, ``RefusedError`` for adapters that cannot be
    read.
    """
    modules: dict[str, ModuleTensors] = {}
    others: dict[str, Array] = {}
    unknown: list[str] = []
    unread: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        if has_no_weights(key):
            others[key] = tensor
            continue
        kind = unread_kind(key)
        if kind is not None:
            unread.setdefault(kind, []).append(key)
            continue
        leaf = split_key(key)
        if leaf is None:
            unknown.append(key)
            continue
        role, _, parameter = leaf.role.partition(".")
        stem = leaf.stem
        if stem.endswith(".scale"):  # ComfyUI names parameters that are no weight in full
            stem, parameter = stem.removesuffix(".scale"), "scale"
        module = modules.setdefault(stem, ModuleTensors(stem))
        if role in module.tensors:
            unknown.append(key)
        module.tensors[role] = tensor
        module.scale_key |= bool(parameter)
        module.spellings.add(leaf.spelling)
    for stem, module in modules.items():
        if "ia3" in module.tensors and "on_input" not in module.tensors:
            unknown.append(f"{stem}.weight")
    if unread:
        raise RefusedError(
            Finding(
                "dialect",
                f"this is {kind}, which regraft does not read ({count_in_words(len(keys), 'tensor')})",
                where=where,
                key=keys[0],
                fix="export it as LoRA with the tool that made it",
            )
            for kind, keys in unread.items()
        )
    if unknown:
        raise BadInputError(
            Finding(
                "odd-key",
                "no tool is known to write this key, so nothing says what it adds to the base",
                where=where,
                key=key,
                fix="check the file; if it holds weights of the model besides the adapter, take them out",
            )
            for key in unknown
        )
    return Grouped(modules, others)


def number_of(alpha: Array) -> Number:
    """Alpha, whole where it can be.

    Raises ``MalformedError`` where it is not one number.

    >>> number_of(np.float16(2)), number_of(np.float32([0.5]))
    (2, 0.5)
    """
    given = np.asarray(alpha)
    if given.size != 1 or given.dtype.kind not in "iufV":
        message = f"its alpha is {given.size} numbers of {given.dtype}, and not one"
        raise MalformedError(message, "shape" if given.size != 1 else "dtype")
    value = float(given.reshape(-1)[0])
    if not isfinite(value):
        raise MalformedError(f"its alpha is {value}, and no finite number", "config")
    return int(value) if value.is_integer() else value


def size_of(module: ModuleTensors) -> tuple[int, int] | None:
    """Out and in of a module's weight, where its tensors' shapes show both."""
    own = {role: t for role, t in module.tensors.items() if role not in AROUND}
    try:
        algebra = algebra_of(own)
        if algebra not in (LORA, LOHA, LOKR, FULL):
            return None
        out, into, _ = _sizes(algebra, own, None)
    except (MalformedError, IndexError):
        return None
    return (out, into) if 1 not in (out, into) else None


AROUND = frozenset({"alpha", "magnitude", "dora_scale", "diff_b", "up_bias", "reshape"})
"""Roles of what stands around an algebra's own tensors."""


_PLAIN = ("alpha", "on_input", "reshape", "scaled_oft")
"""Roles of tensors that may hold whole numbers."""


class MalformedError(Exception):
    """A module's tensors do not fit together."""

    def __init__(self, message: str, code: str = "shape") -> None:
        super().__init__(message)
        self.code = code


def delta_of(
    module: ModuleTensors,
    kind: str,
    kernel: tuple[int, ...] | None,
    alpha: Number | None,
    *,
    rslora: bool,
) -> Delta:
    """What the tensors of a module are.

    ``kind`` is that of the base weight and ``kernel`` a convolution's, as far as it is known; ``alpha`` is what
    something beside the module's own key says.

    Raises ``MalformedError``.
    """
    t = dict(module.tensors)
    odd = next((r for r, x in t.items() if r not in _PLAIN and not is_float(x.dtype)), None)
    if odd is not None:
        raise MalformedError(f"its {odd} is {t[odd].dtype}, and no floating-point tensor", "dtype")
    own = t.pop("alpha", None)
    magnitude = t.pop("magnitude", None)
    if "oft_R" in t and ("dora_scale" in t) != ("initial_norm" in t):
        raise MalformedError("its OFT has one of dora_scale and initial_norm, and needs both")
    # Beside the lengths that the rows had, it is what OneTrainer's OFT multiplies them by.
    dora_scale = None if "initial_norm" in t else t.pop("dora_scale", None)
    bias = t.pop("diff_b", None)
    up_bias = t.pop("up_bias", None)
    reshape = t.pop("reshape", None)
    algebra = algebra_of(t)
    empty = next((role for role, tensor in t.items() if not tensor.size), None)
    if empty is not None:
        raise MalformedError(f"its {empty} has no numbers: {t[empty].shape}")
    conv = kind == "conv"
    if algebra == LORA:
        t = _lora_tensors(t, conv=conv, kernel=kernel)
    if bias is not None and up_bias is not None:
        raise MalformedError("it has two deltas of the bias")
    out, into, found = _sizes(algebra, t, bias if bias is not None else up_bias)
    if algebra in (FULL, SET) and len(next(iter(t.values())).shape) < 2:
        conv = False
    elif conv:
        found = found or _kernel_within(algebra, t, kernel, into)
    if own is not None:
        alpha, rslora = number_of(own), False
    if algebra == NOTHING and bias is None and up_bias is None:
        have = "an alpha" if own is not None else "nothing to add"
        raise MalformedError(f"it has {have}, and no factors")
    delta = Delta(
        algebra,
        t,
        out,
        into,
        kernel=found,
        alpha=alpha,
        rslora=rslora,
        alpha_dtype=None if own is None else np.asarray(own).dtype,
        bias=bias if bias is not None else up_bias,
        bias_scaled=up_bias is not None,
        conv=conv,
        reshape=None if reshape is None else tuple(int(n) for n in reshape.reshape(-1)),
    )
    if magnitude is None and dora_scale is None:
        return delta
    return _with_magnitude(delta, magnitude, dora_scale)


def algebra_of(t: Mapping[str, Array]) -> str:
    """The algebra that tensors of these roles are.

    Raises ``MalformedError`` where some are missing, or do not belong together.
    """
    roles = set(t)
    if not roles:
        return NOTHING
    if roles <= {"down", "up", "mid"}:
        if not {"down", "up"} <= roles:
            have = "down" if "down" in roles else "up"
            raise MalformedError(f"it has one half of a LoRA ({have}) and lacks the other")
        return LORA
    if roles <= {f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}:
        whole = {f"hada_w{n}_{x}" for n in "12" for x in "ab"}
        if not whole <= roles or len(roles - whole) == 1:
            raise MalformedError("some of its LoHa tensors are missing")
        return LOHA
    if all(role.startswith("lokr_") for role in roles):
        for name in ("lokr_w1", "lokr_w2"):
            pair = {f"{name}_a", f"{name}_b"}
            if (name in roles) == (pair <= roles):
                raise MalformedError(f"its LoKr has no {name}, or has it twice")
        if "lokr_t2" in roles and "lokr_w2" in roles:
            raise MalformedError("its LoKr has lokr_t2 beside a whole lokr_w2")
        return LOKR
    if roles == {"a1", "a2", "b1", "b2"}:
        return GLORA
    if roles <= {"oft_blocks", "rescale"} and "oft_blocks" in roles:
        dims = t["oft_blocks"].ndim
        if dims not in (3, 4):
            raise MalformedError(f"oft_blocks has {dims} dimensions, and 3 or 4 were expected")
        return OFT if dims == 3 else BOFT
    if "oft_R" in roles and roles <= _OFT_V2:
        if t["oft_R"].ndim != 2:
            raise MalformedError(f"oft_R has {t['oft_R'].ndim} dimensions, and 2 were expected")
        return OFT_V2
    if roles == {"ia3", "on_input"}:
        return IA3
    if roles == {"diff"}:
        return FULL
    if roles == {"set"}:
        return SET
    raise MalformedError(
        f"its tensors ({', '.join(sorted(roles))}) belong to no one kind of adapter"
    )


_OFT_V2 = frozenset({"oft_R", "scaled_oft", "dora_scale", "initial_norm"})


def _lora_tensors(
    t: dict[str, Array], *, conv: bool, kernel: tuple[int, ...] | None
) -> dict[str, Array]:
    """Factors of a linear as matrices, of a convolution with a kernel."""
    down, up = t["down"], t["up"]
    if any(x.ndim < 2 for x in t.values()):
        raise MalformedError(
            f"its factors have the shapes {down.shape} and {up.shape}: no matrices"
        )
    if "mid" in t:
        if t["mid"].shape[0] != up.shape[1] or t["mid"].shape[1] != down.shape[0]:
            raise MalformedError(
                f"lora_mid {t['mid'].shape} does not fit between {down.shape} and {up.shape}"
            )
    elif up.shape[1] != down.shape[0]:
        raise MalformedError(f"its factors have the shapes {down.shape} and {up.shape}: two ranks")
    if prod(up.shape[2:]) != 1:
        raise MalformedError(f"its up has a kernel: {up.shape}")
    if conv and down.ndim == 2:
        if kernel is not None and prod(kernel) == 1:
            return {
                "down": down.reshape(*down.shape, *kernel),
                "up": up.reshape(*up.shape[:2], *kernel),
            }
        raise MalformedError(f"the base is a convolution, and its down is a matrix {down.shape}")
    if not conv:
        if down.ndim != up.ndim:
            raise MalformedError(
                f"its factors have the shapes {down.shape} and {up.shape}: not of one kind"
            )
        if prod(down.shape[2:]) == 1 and "mid" not in t:
            return {"down": down.reshape(down.shape[:2]), "up": up.reshape(up.shape[:2])}
        raise MalformedError(f"the base is a linear, and its down has a kernel: {down.shape}")
    return {**t, "up": up.reshape(*up.shape[:2], *(1 for _ in down.shape[2:]))}


def _sizes(
    algebra: str, t: Mapping[str, Array], bias: Array | None
) -> tuple[int, int, tuple[int, ...]]:
    """Out, in with the kernel, and the kernel, as far as the tensors say it; 1 stands for what they do not say."""
    if algebra == LORA:
        down = t["down"]
        kernel = tuple(t.get("mid", down).shape[2:])
        return t["up"].shape[0], down.shape[1] * prod(kernel), kernel
    if algebra == LOHA:
        if "hada_t1" in t:
            kernel = tuple(t["hada_t1"].shape[2:])
            return t["hada_w1_a"].shape[1], t["hada_w1_b"].shape[1] * prod(kernel), kernel
        return t["hada_w1_a"].shape[0], t["hada_w1_b"].shape[1], ()
    if algebra == LOKR:
        (o1, i1, _), (o2, i2, kernel) = (_ends(t, name) for name in ("lokr_w1", "lokr_w2"))
        return o1 * o2, i1 * i2, kernel
    if algebra == GLORA:
        if any(x.ndim != 2 for x in t.values()):
            raise MalformedError("GLoRA of a convolution is not supported")
        if is_older_glora(t):
            return t["b2"].shape[0], t["a1"].shape[1], ()
        return t["b1"].shape[0], t["a1"].shape[0], ()
    if algebra in (OFT, BOFT):
        blocks = t["oft_blocks"]
        return blocks.shape[-3] * blocks.shape[-1], 1, ()
    if algebra == OFT_V2:
        count, elements = t["oft_R"].shape
        out = len(t["dora_scale"]) if "dora_scale" in t else 1
        return out, (count * oft_block(elements) if count > 1 else 1), ()
    if algebra == IA3:
        size = t["ia3"].size
        return (1, size, ()) if bool(np.asarray(t["on_input"]).reshape(-1)[0]) else (size, 1, ())
    if algebra in (FULL, SET):
        shape = next(iter(t.values())).shape
        return (shape[0] if shape else 1), prod(shape[1:]), tuple(shape[2:])
    return (1 if bias is None else bias.size), 1, ()


def _ends(t: Mapping[str, Array], name: str) -> tuple[int, int, tuple[int, ...]]:
    if name in t:
        return t[name].shape[0], prod(t[name].shape[1:]), tuple(t[name].shape[2:])
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in t:
        kernel = tuple(t["lokr_t2"].shape[2:])
        return a.shape[1], b.shape[1] * prod(kernel), kernel
    return a.shape[0], prod(b.shape[1:]), tuple(b.shape[2:])


def _kernel_within(
    algebra: str, t: Mapping[str, Array], kernel: tuple[int, ...] | None, into: int
) -> tuple[int, ...]:
    """A kernel that is flattened with the in dim, where it is known from the module's name."""
    if kernel is None or into == 1 or into % prod(kernel):
        return ()
    return kernel


def _with_magnitude(delta: Delta, magnitude: Array | None, scale: Array | None) -> Delta:
    """PEFT's magnitude stands on the out axis always; of ``dora_scale``, the dims show the axis."""
    given = magnitude if scale is None else scale
    assert given is not None
    channels = delta.into // prod(delta.kernel) if delta.kernel else delta.into
    on_in = scale is not None and given.ndim > 1 and given.shape[0] == 1 and given.size == channels
    if not on_in and given.size != delta.out:
        raise MalformedError(
            f"its magnitude {given.shape} stands neither on the {delta.out} rows nor on the {channels} columns "
            "of the weight"
        )
    return replace(delta, magnitude=given.reshape(-1), magnitude_in=on_in)
