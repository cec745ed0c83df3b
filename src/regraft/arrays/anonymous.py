"""One equation applied to arrays without names: the shortest way to use the notation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from regraft.arrays.move import move, view_of
from regraft.equation.lower import (
    Padding,
    check_equation,
    flat_shape,
    lower,
    nest_of,
    paddings,
    repeats,
)
from regraft.equation.notation import Equation, Term, parse_equation
from regraft.equation.sizes import shape_of, solve_sizes
from regraft.errors import BadInputError, Finding


def rearrange(
    text: str, *arrays: npt.NDArray[np.generic], reverse: bool = False, **sizes: int
) -> tuple[npt.NDArray[np.generic], ...]:
    """Apply an equation whose terms have no keys; one array for each term of the side that is read.

    >>> rearrange("(a + b) i == a i, b i", np.arange(6).reshape(3, 2), a=1)[1].tolist()
    [[2, 3], [4, 5]]

    Raises ``BadInputError`` for an equation that is no bijection, ``SizeError`` for shapes that do not fit.
    """
    equation = parse_equation(text)
    if sizes:
        clauses = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
        has_where = " where " in str(equation)
        equation = parse_equation(f"{text}, {clauses}" if has_where else f"{text} where {clauses}")
    check_equation(equation)
    read, written = equation.sides(reverse=reverse)
    if len(arrays) != len(read):
        raise BadInputError(
            Finding(
                "arrays", f"{len(read)} arrays are read by {equation}, {len(arrays)} were given"
            )
        )
    shapes: Sequence[tuple[int, ...]] = [array.shape for array in arrays]
    solved, rest = solve_sizes(equation, zip(read, shapes, strict=True))
    _check_read(equation, read, arrays, solved, reverse=reverse)
    results = [np.empty(shape_of(term, solved, rest), arrays[0].dtype) for term in written]
    for padding in paddings(equation, solved, written=True, reverse=reverse):
        view = _block(results[padding.term], padding)
        view[...] = padding.value
    for copy in lower(equation, solved, reverse=reverse):
        source, target = read[copy.source], written[copy.target]
        nest = nest_of(copy, flat_shape(source, solved), flat_shape(target, solved))
        move(nest, arrays[copy.source], results[copy.target])
    return tuple(results)


def _check_read(
    equation: Equation,
    read: Sequence[Term],
    arrays: Sequence[npt.NDArray[np.generic]],
    sizes: dict[str, int],
    *,
    reverse: bool,
) -> None:
    """What lies along copies is equal, and padding holds its value."""
    for copy in repeats(equation, sizes, reverse=reverse):
        shapes = [flat_shape(read[n], sizes) for n in (copy.source, copy.target)]
        nest = nest_of(copy, *shapes)
        one = view_of(arrays[copy.source], nest.sizes, nest.source_strides, nest.source_offset)
        other = view_of(arrays[copy.target], nest.sizes, nest.target_strides, nest.target_offset)
        if not (one == other).all():
            message = f"what lies along {', '.join(equation.copies)} is not the same each time"
            raise BadInputError(Finding("copies-differ", message))
    for padding in paddings(equation, sizes, written=False, reverse=reverse):
        if not (_block(arrays[padding.term], padding) == padding.value).all():
            message = f"what would be cut off is not padding: not all of it is {padding.value:g}"
            raise BadInputError(Finding("padding", message))


def _block(array: npt.NDArray[np.generic], padding: Padding) -> npt.NDArray[np.generic]:
    strides = [stride // array.itemsize for stride in array.strides]
    offset = sum(a * b for a, b in zip(padding.start, strides, strict=True))
    sizes = tuple(size for size, _ in padding.axes)
    return as_strided(
        array.reshape(-1)[offset:],
        sizes,
        [place.step * strides[place.index] * array.itemsize for _, place in padding.axes],
    )
