"""The internal form of a LoRA: factors by base tensor, free of any packing.

``A`` is (rank, in) and ``B`` is (out, rank); for stacked experts (E, rank, in) and (E, out, rank). The delta of the
base weight is ``scale * B @ A`` in (out, in) orientation, whatever way the base stores it: a tensor's kind says that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field

from regraft.adapters.scale import Scale
from regraft.errors import Finding, RefusedError
from regraft.names.keys import Group
from regraft.planning.plan import Headers
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.adapters.families.base import Family
    from regraft.adapters.tuned import TunedModules

Array = npt.NDArray[Any]


class Factors(Struct):
    """LoRA factors by the id of their base tensor in ``headers``."""

    headers: Headers
    a: list[Array]
    b: list[Array]
    scales: list[Scale]
    kinds: list[tuple[Group, str]] = field(default_factory=list)
    """The base keys of each kind."""


class Lora(Struct, gc=False):
    """The LoRA of one base tensor."""

    a: Array
    b: Array
    scale: Scale
    exact: bool = True
    """Whether every number of the factors is one of the source's (or zero): nothing was rescaled."""
    changed: tuple[int, ...] = ()
    """The sources whose factors got other bits or another dtype, so that they alone do not give them back."""
    decomposed: bool = False
    """Whether the factors are those of a decomposition of the delta, of which no number is the source's."""


def zeros_like(lora: Lora, out: int, into: int) -> Lora:
    """A LoRA that adds nothing, of the rank, scale and dtypes of another."""
    head, rank = lora.a.shape[:-2], lora.a.shape[-2]
    a = np.zeros((*head, rank, into), lora.a.dtype)
    return Lora(a, np.zeros((*head, out, rank), lora.b.dtype), lora.scale)


def widened(lora: Lora, rank: int) -> Lora:
    """The same LoRA with components of zeros up to a rank.

    >>> lora = Lora(np.ones((2, 5)), np.ones((3, 2)), Scale(2, 4))
    >>> wide = widened(lora, 4)
    >>> wide.a.shape, wide.b.shape, wide.scale
    ((4, 5), (3, 4), Scale(rank=4, alpha=8, rslora=False))
    """
    have = lora.a.shape[-2]
    if have >= rank:
        return lora
    # In the order in memory that they have: B may be as PEFT packs it, experts fastest.
    a = np.zeros_like(lora.a, shape=(*lora.a.shape[:-2], rank, lora.a.shape[-1]))
    b = np.zeros_like(lora.b, shape=(*lora.b.shape[:-1], rank))
    a[..., :have, :], b[..., :have] = lora.a, lora.b
    return replace(lora, a=a, b=b, scale=lora.scale.at_rank(rank))


class Images(Struct):
    """LoRAs of base tensors whose keys share a template; row i belongs to key i, ``None`` where it has none."""

    keys: Group
    kind: str
    loras: list[Lora | None]
    why: str = "carried over"
    """The rule that made them, or why they stayed, for reports."""


def rescale(b: Array, ratio: float) -> tuple[Array, bool]:
    """``b * ratio``, and whether that is exact in every bit.

    A 16-bit factor keeps its dtype where the ratio is a power of two and nothing overflows or underflows;
    otherwise the result is float32 (float64 stays).

    Raises ``RefusedError`` where a finite number would become infinite, or one that is not zero would lose digits
    below the smallest normal number.

    >>> rescale(np.float16([1.5]), 2.0)
    (array([3.], dtype=float16), True)
    """
    if ratio == 1.0:
        return b, True
    mantissa, _ = np.frexp(ratio)
    with np.errstate(all="ignore"):
        if abs(mantissa) == 0.5:
            scaled = (b * b.dtype.type(ratio)).astype(b.dtype)
            back = (scaled / scaled.dtype.type(ratio)).astype(b.dtype)
            if np.ascontiguousarray(back).tobytes() == np.ascontiguousarray(b).tobytes():
                return scaled, True
        wide = np.dtype(np.float64 if b.dtype == np.float64 else np.float32)
        product = b.astype(np.float64) * ratio
        made = product.astype(wide)
        lost = np.isfinite(b) & ~np.isfinite(made)
        if ratio:
            lost |= (b != 0) & (np.abs(made) < SMALLEST[wide])
    if lost.any():
        raise _not_representable(f"multiplied by {ratio:.3g}, a factor", wide)
    return made, False


SMALLEST = {
    np.dtype(np.float32): float(np.finfo(np.float32).tiny),
    np.dtype(np.float64): float(np.finfo(np.float64).tiny),
}
"""The smallest normal numbers: below them, digits are lost."""


def _not_representable(what: str, dtype: np.dtype[Any]) -> RefusedError:
    return RefusedError(
        Finding(
            "not-representable",
            f"{what} would leave the range of {dtype}",
            fix="check lora_alpha and alpha_pattern of adapter_config.json; merge the adapter into its base and "
            "convert the base",
        )
    )


def cast_down(values: Array, dtype: np.dtype[Any]) -> Array:
    """Values in a narrower dtype.

    Raises ``RefusedError`` where a finite one would become infinite.
    """
    with np.errstate(all="ignore"):
        made = values.astype(dtype)
        overflows = not np.isfinite(np.add.reduce(made, axis=None, dtype=float)) and bool(
            (np.isfinite(values) & ~np.isfinite(made)).any()
        )
    if overflows:
        raise _not_representable("a number", dtype)
    return made


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is of floating-point numbers, ml_dtypes' included."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def is_finite(values: Array) -> bool:
    """Whether there is no NaN and no infinity among values; a sum tells it faster than a look at each."""
    with np.errstate(all="ignore"):
        if np.isfinite(np.add.reduce(values, axis=None, dtype=float)):
            return True
        return bool(np.isfinite(values).all())


def not_finite(tensors: Mapping[str, Array]) -> dict[str, int]:
    """How many values of each tensor are NaN or infinite, for those that hold any.

    Small tensors are looked at many at a time: a file may have tens of thousands.
    """
    found: dict[str, int] = {}
    for names in _batches(tensors):
        together = [tensors[name] for name in names]
        if together[0].dtype.kind not in "fV" or is_finite(
            together[0] if len(together) == 1 else np.concatenate(together, axis=None)
        ):
            continue
        counts = ((name, int((~np.isfinite(tensors[name])).sum())) for name in names)
        found.update((name, count) for name, count in counts if count)
    return found


_BATCH = 1 << 20
"""How many values are put together to be looked at at once."""


def _batches(tensors: Mapping[str, Array]) -> Iterator[list[str]]:
    """Names of tensors of one dtype that follow each other, of moderate size together."""
    names: list[str] = []
    size, dtype = 0, None
    for name, tensor in tensors.items():
        size += tensor.size
        if names and (size > _BATCH or tensor.dtype != dtype):
            yield names
            names, size = [], tensor.size
        dtype = tensor.dtype
        names.append(name)
    if names:
        yield names


def common_dtype(dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    """The narrowest dtype that holds every value of all of them exactly.

    >>> common_dtype({np.dtype("float16"), np.dtype("float32")})
    dtype('float32')
    """
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def delta(lora: Lora) -> npt.NDArray[np.float64]:
    """The delta in float64, (out, in) or (E, out, in)."""
    product = lora.b.astype(np.float64) @ lora.a.astype(np.float64)
    return np.asarray(product * lora.scale.value)


class SavedGroup(Struct, frozen=True, eq=False):
    """Saved tensors whose keys share a template: they take the place of tensors of the base, or of some rows of one."""

    keys: Group
    """The base tensors that they stand for; ids are numbers in the file."""
    rows: bool = False
    """Whether each holds some rows of its base tensor only (trained tokens of an embedding)."""
    style: object = None
    """How the dialect spells them; nobody else reads it."""
    copy_of: Group | None = None
    """The base tensors of which these are further copies, held one module deeper; they go where those go."""


class Saved(Struct, frozen=True):
    """One saved tensor: the base tensor that it stands for, before and after a move."""

    old: str
    new: str
    tensor: Array
    rows: bool = False
    style: object = None
    bound: bool = True
    """Whether it belongs to a module of the base at all; a prompt does not."""


class Adapter(Struct, frozen=True, eq=False):
    """What an adapter adds to its base, free of any file's form.

    A plain LoRA is ``factors``; every other family is ``modules``, which ``family`` understands. Ids in both are
    those of the base tensors in ``headers``.
    """

    factors: Factors | None = None
    modules: TunedModules | None = None
    family: Family | None = None

    @property
    def headers(self) -> Headers:
        """The base tensors that it adapts: names, shapes, dtypes."""
        adapted = self.factors if self.factors is not None else self.modules
        assert adapted is not None
        return adapted.headers


class Written(Struct, frozen=True, gc=False):
    """One delta of a result: the base tensor's key, where the dialect put it, and its scale."""

    key: str
    module: str
    parameter: str | None
    """The parameter's name where the dialect adapts parameters apart from modules."""
    scale: Scale


class Blob(Struct, frozen=True, eq=False):
    """An adapter as a dialect writes it: a config, tensors by their names in the file, and the file's metadata."""

    config: dict[str, Any]
    tensors: dict[str, Array]
    metadata: dict[str, str] = field(default_factory=dict)
    sidecar: dict[str, Array] = field(default_factory=dict)
    """Factors that the layout cannot hold, for a file beside the result."""
    written: tuple[Written, ...] = ()
    notes: tuple[str, ...] = ()
    """What the user should know of it."""
