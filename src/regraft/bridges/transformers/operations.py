"""A converter's chain of operations as one equation.

The chain is run on named axes instead of tensors: a source begins with one axis for each dim; an operation that
cuts or turns an axis writes the axis down as the sum or the product that it must have been.

Source: the operations of ``transformers.core_model_loading`` (5.4 to 5.24).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Dim = list["Dim"] | str
"""An axis' name, or ``["+", ...]`` or ``["*", ...]``."""


class UnknownOperationError(Exception):
    """No equation is known for it; the text says for what."""


@dataclass(slots=True)
class Chain:
    """The equation of a converter while it is made."""

    patterns: tuple[Sequence[str], Sequence[str]]
    """The converter's own, of its sources and of its targets."""
    shapes: Sequence[Sequence[int]]
    """Those of the targets."""
    config: Any
    turned: bool
    """Whether a transpose that looks at the shapes acts."""
    sources: list[list[str]] = field(default_factory=list)
    """The axes of each source's dims, as they begin."""
    targets: list[list[Dim]] = field(default_factory=list)
    made: dict[str, Dim] = field(default_factory=dict)
    """What an axis turned out to be."""
    where: dict[str, str] = field(default_factory=dict)
    """Axis and what it equals."""
    is_turned: bool = False
    """Whether two dims changed places."""
    index: Dim | None = None
    """What the ``*`` of the sources' keys holds."""
    fresh: int = 0

    def axis(self, letter: str) -> str:
        """A new axis."""
        self.fresh += 1
        return f"{letter}{self.fresh}"

    def settle(self, dim: Dim) -> Dim:
        """A dim with everything that is known of its axes."""
        if isinstance(dim, str):
            return self.settle(self.made[dim]) if dim in self.made else dim
        return [dim[0], *(self.settle(part) for part in dim[1:])]

    def same(self, one: Dim, other: Dim) -> None:
        """Make two dims one."""
        one, other = self.settle(one), self.settle(other)
        if one == other:
            return
        if isinstance(other, str):
            self.made[other] = one
        elif isinstance(one, str):
            self.made[one] = other
        else:
            raise UnknownOperationError("dims that are joined were cut in different ways")

    def write(self, dims: Sequence[Dim]) -> str:
        """Dims in the notation."""
        return " ".join(write_dim(self.settle(dim)) for dim in dims)

    def clauses(self) -> list[str]:
        """What the equation says of sizes."""
        return [f"{axis} = {value}" for axis, value in self.where.items()]

    def forget(self, axis: str, sizes: Mapping[str, int]) -> None:
        """Say nothing of an axis any more, and of those that were as large as it their numbers."""
        self.where.pop(axis, None)
        for other in [name for name, value in self.where.items() if value == axis]:
            self.where[other] = str(sizes[other])

    def open(self, dim: Dim) -> str:
        """A dim that is still one axis.

        Raises ``UnknownOperationError``.
        """
        dim = self.settle(dim)
        if not isinstance(dim, str):
            raise UnknownOperationError("a dim is cut twice")
        return dim


def write_dim(dim: Dim) -> str:
    """A dim in the notation.

    >>> write_dim(["*", "g", ["+", "a", ["*", "h", "d"]]])
    '(g (a + h d))'
    """
    if isinstance(dim, str):
        return dim
    parts = [write_dim(part) for part in dim[1:]]
    if dim[0] == "+":
        return (
            "("
            + " + ".join(p[1:-1] if d[0] == "*" else p for p, d in zip(parts, dim[1:], strict=True))
            + ")"
        )
    return "(" + " ".join(parts) + ")"


def run(
    operations: Sequence[Any],
    sources: Sequence[str],
    targets: Sequence[str],
    shapes: Sequence[Sequence[int]],
    config: Any,
    *,
    turned: bool,
) -> Chain:
    """The equation's dims for a chain.

    ``sources`` and ``targets`` are the converter's patterns, ``shapes`` are those of the targets, ``turned`` tells
    whether a transpose that looks at the shapes acts.

    Raises ``UnknownOperationError``.
    """
    chain = Chain((sources, targets), shapes, config, turned)
    dims = len(shapes[0])
    for operation in operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist" or kind == "ErnieFuseAndSplitTextVisionExperts":
            dims -= 1
        if kind == "Conv3dToLinear":
            dims += 3
    if dims < 1:
        raise UnknownOperationError(f"its target has {len(shapes[0])} dims")
    chain.sources = [[chain.axis("abcdfg"[min(d, 5)]) for d in range(dims)] for _ in sources]
    tensors: list[list[Dim]] = [list(axes) for axes in chain.sources]
    for operation in operations:
        step = _STEPS.get(type(operation).__name__)
        if step is None:
            raise UnknownOperationError(f"no equation is known for {type(operation).__name__}")
        tensors = step(chain, operation, tensors)
    if len(tensors) != len(shapes):
        raise UnknownOperationError(f"it makes {len(tensors)} tensors for {len(shapes)} targets")
    chain.targets = tensors
    return chain


def knows(operations: Sequence[Any]) -> bool:
    """Whether an equation is known for each of some operations."""
    return all(type(operation).__name__ in _STEPS for operation in operations)


Tensors = list[list[Dim]]


def _with(tensor: list[Dim], at: int, dim: Dim) -> list[Dim]:
    """A tensor's dims with another one in a place."""
    return [*tensor[:at], dim, *tensor[at + 1 :]]


def _pieces(chain: Chain, tensors: Tensors, at: int) -> list[Dim]:
    """What tensors have in the dim in which they are joined; their other dims are one."""
    for other in tensors[1:]:
        for place, (one, two) in enumerate(zip(tensors[0], other, strict=True)):
            if place != at:
                chain.same(one, two)
    return [chain.settle(tensor[at]) for tensor in tensors]


def _merge(chain: Chain, op: Any, tensors: Tensors) -> Tensors:
    first = tensors[0]
    for other in tensors[1:]:
        if len(other) != len(first):
            raise UnknownOperationError("stacked tensors differ in dims")
    axis = "e"
    chain.index = axis
    chain.where["e"] = str(chain.shapes[0][op.dim])
    return [[*t[: op.dim], axis, *t[op.dim :]] for t in tensors]


def _concatenate(chain: Chain, op: Any, tensors: Tensors) -> Tensors:
    at = op.dim % len(tensors[0])
    if getattr(op, "num_shards_attribute", None) is not None:
        chain.index = "s"
        text = chain.config.get_text_config()
        chain.where["s"] = str(getattr(text, op.num_shards_attribute))
        (tensor,) = tensors
        return [_with(tensor, at, ["*", "s", tensor[at]])]
    pieces = _pieces(chain, tensors, at)
    lone = [p for p in pieces if isinstance(p, str)]
    if len(lone) == len(pieces):
        for piece in lone[1:]:
            chain.where[piece] = lone[0]
    return [_with(tensors[0], at, ["+", *pieces])] if len(pieces) > 1 else [tensors[0]]


def _chunk(chain: Chain, op: Any, tensors: Tensors) -> Tensors:
    if getattr(op, "num_shards_attribute", None) is not None:
        raise UnknownOperationError("a chunk into a number of parts that the config tells")
    (tensor,) = tensors
    at = op.dim % len(tensor)
    count = len(chain.shapes)
    dim = chain.settle(tensor[at])
    if isinstance(dim, list) and dim[0] == "*" and chain.where.get(str(dim[1])) == str(count):
        tags = [chain.axis("k") for _ in range(count)]
        del chain.where[str(dim[1])]
        chain.made[str(dim[1])] = ["+", *tags]
        chain.where.update(dict.fromkeys(tags, "1"))
        return [_with(tensor, at, ["*", tag, *dim[2:]]) for tag in tags]
    axis = chain.open(dim)
    parts = [chain.axis("p") for _ in range(count)]
    chain.made[axis] = ["+", *parts]
    for part, shape in zip(parts, chain.shapes, strict=True):
        if part != parts[0]:
            chain.where[part] = parts[0]
        if shape[at] != chain.shapes[0][at]:
            raise UnknownOperationError("its equal parts have targets of different sizes")
    return [_with(tensor, at, part) for part in parts]


def _split(chain: Chain, op: Any, tensors: Tensors) -> Tensors:
    (tensor,) = tensors
    at = op.dim % len(tensor)
    parts = [chain.axis("p") for _ in chain.shapes]
    chain.made[chain.open(tensor[at])] = ["+", *parts]
    for part, shape in zip(parts, chain.shapes, strict=True):
        chain.where[part] = str(shape[at])
    return [_with(tensor, at, part) for part in parts]


def _interleave(chain: Chain, op: Any, tensors: Tensors) -> Tensors:
    (tensor,) = tensors
    at = op.dim % len(tensor)
    axis, n, two = chain.open(tensor[at]), chain.axis("n"), chain.axis("t")
    chain.where[two] = "2"
    pair: tuple[Dim, Dim] = (["*", n, two], ["*", two, n])
    chain.made[axis], made = pair[::-1] if op.inverse else pair
    return [_with(tensor, at, made)]


def _transpose(chain: Chain, op: Any, tensors: Tensors) -> Tensors:
    (tensor,) = tensors
    if op.check_dims and not chain.turned:
        return tensors
    result = list(tensor)
    result[op.dim0], result[op.dim1] = result[op.dim1], result[op.dim0]
    chain.is_turned = True
    return [result]


def _flatten(chain: Chain, op: Any, tensors: Tensors) -> Tensors:
    (tensor,) = tensors
    for axis, size in zip(tensor[1:], (op.in_channels, *op.kernel_size), strict=True):
        chain.where[str(axis)] = str(size)
    return [[tensor[0], ["*", *tensor[1:]]]]


def _permute(chain: Chain, op: Any, tensors: Tensors) -> Tensors:
    named = op.permute_layer_names
    config, shapes = chain.config, chain.shapes
    part = getattr(config, op.subconfig_key, config) if op.subconfig_key is not None else config
    heads = getattr(part, "num_attention_heads", 1)
    names = chain.patterns[len(tensors) != len(chain.sources)]
    seen = names if len(names) == len(tensors) else [""] * len(tensors)
    result: Tensors = []
    for number, (name, tensor) in enumerate(zip(seen, tensors, strict=True)):
        if named is not None and not any(text in name for text in named):
            result.append(tensor)
            continue
        axis = chain.open(tensor[0])
        h, d, two = chain.axis("h"), chain.axis("d"), chain.axis("t")
        chain.where[h], chain.where[two] = str(heads), "2"
        pair: tuple[Dim, Dim] = (["*", h, d, two], ["*", h, two, d])
        chain.made[axis], made = pair[::-1] if op.inverse else pair
        if len(tensors) == len(shapes) > 1:
            chain.where[d] = str(shapes[number][0] // heads // 2)
        chain.forget(axis, {str(t[0]): s[0] for t, s in zip(tensors, shapes, strict=False)})
        result.append([made, *tensor[1:]])
    return result


def _ernie(chain: Chain, op: Any, tensors: Tensors) -> Tensors:
    rest = {tuple(s for d, s in enumerate(shape) if d != op.stack_dim) for shape in chain.shapes}
    if len(rest) > 1:
        raise UnknownOperationError("its experts for text and for vision have different sizes")
    kinds = [chain.axis("e") for _ in chain.shapes]
    for kind, shape in zip(kinds, chain.shapes, strict=True):
        chain.where[kind] = str(shape[op.stack_dim])
    chain.index = ["+", *kinds]
    at = op.concat_dim - (op.concat_dim > op.stack_dim)
    pieces = _pieces(chain, tensors, at)
    for piece in pieces[1:]:
        chain.where[str(piece)] = str(pieces[0])
    fused: Dim = ["+", *pieces] if len(pieces) > 1 else pieces[0]
    body = _with(tensors[0], at, fused)
    return [[*body[: op.stack_dim], kind, *body[op.stack_dim :]] for kind in kinds]


_STEPS = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Interleave": _interleave,
    "Transpose": _transpose,
    "Conv3dToLinear": _flatten,
    "PermuteForRope": _permute,
    "ErnieFuseAndSplitTextVisionExperts": _ernie,
}
"""An operation, and what it does to the dims of the tensors that reach it."""
