"""Kinds of tensors: which dims are batch, out and in. They come from the layout, never from a shape.

Source: how torch's and transformers' modules store their weights, and how PEFT reads them
(``peft/tuners/lora/layer.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from msgspec import Struct

from regraft.equation.notation import Term

BATCH, OUT, IN, NONE = "batch", "out", "in", "none"


class Kind(Struct, frozen=True):
    """The role of every dim of a tensor.

    ``module`` is True where PEFT adapts the module (``target_modules``), False where it adapts the parameter
    (``target_parameters``).
    """

    name: str
    roles: tuple[str, ...] | None
    module: bool
    kernel: bool = False
    """Whether any number of dims may follow, which belong to the last role: a convolution's kernel."""

    def fits(self, term: Term) -> bool:
        """Whether a term can be of this kind."""
        if self.roles is None:
            return True
        dims = len(term.dims)
        if self.kernel:
            return term.ends_open or dims >= len(self.roles)
        return dims <= len(self.roles) if term.ends_open else dims == len(self.roles)

    def role(self, dim: int) -> str:
        """The role of a dim.

        >>> KINDS["experts"].role(0)
        'batch'
        """
        if self.roles is None:
            return NONE
        return self.roles[min(dim, len(self.roles) - 1)] if self.kernel else self.roles[dim]


class Laid(Struct, frozen=True, eq=False):
    """The dims of a tensor of some shape, by their roles."""

    roles: tuple[str, ...]
    """Of every dim."""
    sizes: Mapping[str, int]
    """How many positions the dims of a role have together."""
    steps: Mapping[str, tuple[int, ...]]
    """For a role, how far one step in each dim moves among its positions; 0 in dims of others."""


KINDS = {
    kind.name: kind
    for kind in (
        Kind("linear", (OUT, IN), module=True),
        Kind("conv", (OUT, IN, IN), module=True, kernel=True),
        Kind("conv1d", (IN, OUT), module=True),
        Kind("embedding", (IN, OUT), module=True),
        Kind("parameter", (OUT, IN), module=False),
        Kind("experts", (BATCH, OUT, IN), module=False),
        Kind("experts-transposed", (BATCH, IN, OUT), module=False),
        Kind("experts-unmarked", (BATCH, IN, OUT), module=False),
        Kind("vector", (NONE,), module=False),
        Kind("any", None, module=True),
    )
}
"""``linear`` (out, in), ``conv`` (out, in and the kernel's dims), transformers' ``Conv1D`` (in, out), ``embedding``
(vocabulary = in, hidden = out), a ``parameter`` of its own (out, in), ``experts`` (E, out, in),
``experts-transposed`` (E, in, out) on a module that says so (``is_transposed``), ``experts-unmarked`` the same on a
module that does not, ``vector`` and ``any`` for what has no delta."""


def fitting(kinds: Sequence[str], terms: Sequence[Term]) -> tuple[str, ...]:
    """Each term's kind where it can be of it, and else ``any``."""
    pairs = zip(kinds, terms, strict=True)
    return tuple(kind if KINDS[kind].fits(term) else "any" for kind, term in pairs)


@lru_cache(maxsize=4096)
def lay_out(kind: str, shape: tuple[int, ...]) -> Laid:
    """The dims of a tensor of a kind.

    >>> laid = lay_out("conv", (8, 4, 3, 3))
    >>> laid.sizes[IN], laid.steps[IN]
    (36, (0, 9, 3, 1))
    """
    roles = tuple(map(KINDS[kind].role, range(len(shape))))
    sizes: dict[str, int] = {}
    steps: dict[str, tuple[int, ...]] = {}
    for role in (BATCH, OUT, IN):
        step, found = 1, [0] * len(shape)
        for dim in reversed(range(len(shape))):
            if roles[dim] == role:
                found[dim] = step
                step *= shape[dim]
        sizes[role], steps[role] = step, tuple(found)
    return Laid(roles, sizes, steps)
