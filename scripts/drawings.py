"""Drawings of equations for the documentation, as SVG.

What goes where is not drawn by hand: labels are moved by the equation itself, so a drawing cannot say anything else
than what regraft does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from regraft.arrays.anonymous import rearrange

CELL, GAP, LEAD = 34, 26, 22
FILLS = ("#cfe3ff", "#ffe0b8", "#d3f0d0", "#f3d1ee", "#fff3b0", "#d9d4f7")
INK, FAINT, PAPER = "#1c2733", "#5b6875", "#ffffff"
FONT = "font-family='ui-monospace,Menlo,Consolas,monospace'"


@dataclass(frozen=True)
class Picture:
    """A matrix, or one slice of a stack, with a name below it."""

    name: str
    cells: np.ndarray
    """Labels, (rows, columns); an empty one is a zero."""


def slices(name: str, array: np.ndarray) -> list[Picture]:
    """A matrix, or the slices of a stack."""
    if array.ndim == 2:
        return [Picture(name, array)]
    return [Picture(f"{name}[{i}]", part) for i, part in enumerate(array)]


def draw(left: Sequence[Picture], right: Sequence[Picture], between: str, title: str) -> str:
    """Two sides and what stands between them; colours go by the first letter of the labels."""
    letters = dict.fromkeys(
        label[0] for picture in left for label in picture.cells.ravel() if label
    )
    fills = {letter: FILLS[i % len(FILLS)] for i, letter in enumerate(letters)}
    height = max(len(p.cells) for p in (*left, *right)) * CELL
    parts, at = [], GAP
    for number, side in enumerate((left, right)):
        for picture in side:
            parts += _picture(picture, at, LEAD, height, fills)
            at += max(picture.cells.shape[1] * CELL, 8 * len(picture.name)) + GAP
        if number == 0:
            wide = max(9 * len(between), 40)
            middle = LEAD + height / 2
            parts.append(
                f"<text x='{at + wide / 2}' y='{middle + 5}' text-anchor='middle' font-size='20' "
                f"fill='{FAINT}' {FONT}>{escape(between)}</text>"
            )
            at += wide + GAP
    size = f"{at} {LEAD + height + 40}"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {size}' width='{at}' role='img'>\n"
        f"<title>{escape(title)}</title>\n"
        f"<rect width='100%' height='100%' rx='8' fill='{PAPER}'/>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _picture(picture: Picture, x: int, y: int, height: int, fills: dict[str, str]) -> list[str]:
    rows, columns = picture.cells.shape
    top = y + (height - rows * CELL) // 2
    parts = []
    for row in range(rows):
        for column in range(columns):
            label = str(picture.cells[row, column])
            left, above = x + column * CELL, top + row * CELL
            fill = fills.get(label[:1], PAPER)
            parts.append(
                f"<rect x='{left}' y='{above}' width='{CELL}' height='{CELL}' fill='{fill}' "
                f"stroke='{FAINT}'/>"
                f"<text x='{left + CELL / 2}' y='{above + CELL / 2 + 4}' text-anchor='middle' "
                f"font-size='12' fill='{INK}' {FONT}>{escape(label or '0')}</text>"
            )
    parts.append(
        f"<text x='{x}' y='{y + height + 22}' font-size='13' fill='{FAINT}' {FONT}>"
        f"{escape(picture.name)}</text>"
    )
    return parts


def labels(letter: str, *shape: int) -> np.ndarray:
    """Labels such as ``g0``, one for each element."""
    count = int(np.prod(shape))
    return np.array([f"{letter}{i}" for i in range(count)]).reshape(shape)


def experts() -> str:
    """Gate and up of every expert become slices of one stack."""
    gate, up = labels("w", 2, 2, 2), labels("u", 2, 2, 2)
    (fused,) = rearrange("e a i, e b i == e (a + b) i", gate, up)
    left = [
        *(Picture(f"experts.{e}.w1", gate[e]) for e in range(2)),
        *(Picture(f"experts.{e}.w3", up[e]) for e in range(2)),
    ]
    return draw(left, slices("gate_up_proj", fused), "==", "e a i, e b i == e (a + b) i")


def rope() -> str:
    """Interleaved halves become halves one after the other."""
    rows = np.array([[f"{'xy'[i % 2]}{i // 2}"] for i in range(6)])
    (halves,) = rearrange("(h d two) i == (h two d) i where two = 2", rows, h=1)
    left, right = Picture("(h d two) i", rows), Picture("(h two d) i", halves)
    return draw([left], [right], "==", "(h d two) i == (h two d) i")


def grouped() -> str:
    """A grouped qkv becomes three matrices."""
    rows = np.array([[name] for name in ("q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1")])
    text = "(g (n + k + v) d) i == (g n d) i, (g k d) i, (g v d) i where k = 1, v = 1"
    parts = rearrange(text, rows, g=2, d=1)
    right = [Picture(f"(g {axis} d) i", part) for axis, part in zip("nkv", parts, strict=True)]
    return draw([Picture("(g (n + k + v) d) i", rows)], right, "==", text)


def factors() -> str:
    """The factors of gate and up become one pair: its B has two blocks, and ranks add."""
    gate_b, up_b = labels("g", 2, 1), labels("u", 2, 1)
    gate_a, up_a = labels("a", 1, 3), labels("b", 1, 3)
    zeros = np.full((2, 1), "")
    b = np.block([[gate_b, zeros], [zeros, up_b]])
    a = np.concatenate([gate_a, up_a])
    left = [
        Picture("B gate", gate_b),
        Picture("A gate", gate_a),
        Picture("B up", up_b),
        Picture("A up", up_a),
    ]
    right = [Picture("B", b), Picture("A", a)]
    return draw(left, right, "becomes", "two pairs of factors become one, and their ranks add")


DRAWINGS = {
    "equation-experts.svg": experts,
    "equation-rope.svg": rope,
    "equation-grouped.svg": grouped,
    "factors.svg": factors,
}
