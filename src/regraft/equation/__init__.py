"""The notation: parse an equation, solve its sizes, lower it to copies. No I/O, no torch."""

from regraft.equation.lower import Copy, CopyAxis, Nest, Place, check_equation, lower, nest_of
from regraft.equation.notation import Equation, parse_equation, parse_key
from regraft.equation.sizes import SizeError, UnknownSizeError, solve_sizes, undetermined

__all__ = [
    "Copy",
    "CopyAxis",
    "Equation",
    "Nest",
    "Place",
    "SizeError",
    "UnknownSizeError",
    "check_equation",
    "lower",
    "nest_of",
    "parse_equation",
    "parse_key",
    "solve_sizes",
    "undetermined",
]
