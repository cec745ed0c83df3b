"""Rotations made of skew matrices, one beside the other in blocks: what OFT, BOFT and PSOFT train."""

from __future__ import annotations

import numpy as np

from regraft.adapters.families.base import NoImageError, Wide, is_order
from regraft.adapters.form import Array
from regraft.names.keys import Ints


def side_of(count: int) -> int:
    """The side of a skew matrix of which ``count`` numbers are stored.

    >>> side_of(6)
    4
    """
    return (1 + int(np.sqrt(1 + 8 * count) + 0.5)) // 2


def unpack(packed: Array, side: int) -> Array:
    """Skew matrices (..., side, side) from what stands above their diagonals, (..., side * (side - 1) / 2).

    >>> unpack(np.array([5.0]), 2).tolist()
    [[0.0, 5.0], [-5.0, 0.0]]
    """
    rows, columns = np.triu_indices(side, 1)
    skew = np.zeros((*packed.shape[:-1], side, side), packed.dtype)
    skew[..., rows, columns] = packed
    return skew - skew.swapaxes(-1, -2)


def pack(skew: Array) -> Array:
    """What stands above the diagonals of skew matrices."""
    rows, columns = np.triu_indices(skew.shape[-1], 1)
    return np.asarray(skew[..., rows, columns])


def cayley(skew: Wide) -> Wide:
    """``(1 + Q) (1 - Q)^-1``, a rotation."""
    one = np.eye(skew.shape[-1])
    return np.asarray((one + skew) @ np.linalg.inv(one - skew))


def cayley_neumann(skew: Wide, terms: int) -> Wide:
    """The first terms of ``1 + 2 Q + 2 Q² + …``, the last of three or more only once, as PEFT adds them up."""
    result = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    power = skew
    for number in range(1, terms):
        result += power * (1.0 if number == terms - 1 and terms > 2 else 2.0)
        power = power @ skew
    return result


def take_blocks(blocks: Array, columns: Ints) -> Array:
    """Rotations (n, side, side) of some columns, in some order.

    Raises ``NoImageError`` where columns of one block do not stay together.
    """
    side = blocks.shape[-1]
    if len(columns) % side:
        raise NoImageError("the cut goes through a block of the rotation")
    made = []
    for some in columns.reshape(-1, side):
        block = int(some[0]) // side
        inside = some - block * side
        if not is_order(inside, side):
            raise NoImageError("columns of one block of the rotation do not stay together")
        made.append(blocks[block][np.ix_(inside, inside)])
    return np.stack(made)


def rotated(weight: Wide, rotations: Wide) -> Wide:
    """``W blockdiag(R)^T`` of a weight (out, n * side) and rotations (n, side, side)."""
    count, side, _ = rotations.shape
    parts = weight.reshape(len(weight), count, side)
    return np.asarray(np.einsum("onk,njk->onj", parts, rotations).reshape(weight.shape))
