"""One equation applied to arrays without names: the shortest way to use the notation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from regraft.arrays.move import move
from regraft.equation.lower import check_equation, flat_shape, lower, nest_of
from regraft.equation.notation import parse_equation
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
        has_where = equation.where or equation.bounds
        equation = parse_equation(f"{text}, {clauses}" if has_where else f"{text} where {clauses}")
    check_equation(equation)
    read, written = equation.sides(reverse)
    if len(arrays) != len(read):
        raise BadInputError(
            Finding(
                "arrays", f"{len(read)} arrays are read by {equation}, {len(arrays)} were given"
            )
        )
    shapes: Sequence[tuple[int, ...]] = [array.shape for array in arrays]
    solved, rest = solve_sizes(equation, zip(read, shapes, strict=True))
    results = [np.empty(shape_of(term, solved, rest), arrays[0].dtype) for term in written]
    for copy in lower(equation, solved, reverse):
        source, target = read[copy.source], written[copy.target]
        nest = nest_of(copy, flat_shape(source, solved), flat_shape(target, solved))
        move(nest, arrays[copy.source], results[copy.target])
    return tuple(results)
