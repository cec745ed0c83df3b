"""State dicts of models that are spread over processes: gathered for one target after another, never all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regraft.arrays.lazy import Lazy
from regraft.bridges.torch_tensors import fault_of, place, whole
from regraft.live.memory import FORMAT, bytes_of
from regraft.live.ranks import is_sharded
from regraft.planning.slices import Strips


def is_spread(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has tensors of which this process holds a part."""
    return any(is_sharded(tensor) and not tensor.is_meta for tensor in state_dict.values())


class Spread:
    """A state dict whose tensors are gathered when they are needed. Every rank must ask in the same order."""

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self._tensors = list(state_dict.values())
        self._names = list(state_dict)
        self._gathered: dict[int, torch.Tensor] = {}
        """What the last target was made of; its siblings are often made of the same."""

    def state_dict(self) -> dict[str, Any]:
        """The tensors, not gathered yet; what is no plain tensor is left as it is."""
        return {
            name: tensor
            if fault_of(tensor) is not None or tensor.dtype not in FORMAT
            else Lazy(tuple(tensor.shape), FORMAT[tensor.dtype], row, read=self._read)
            for row, (name, tensor) in enumerate(zip(self._names, self._tensors, strict=True))
        }

    def finish(self, result: dict[str, Any], like: Mapping[str, Any]) -> None:
        """Make what is not made yet, one target after another, each as spread as the model has it."""
        done: dict[int, Any] = {}
        for name, tensor in result.items():
            if not isinstance(tensor, Lazy):
                continue
            if id(tensor) not in done:
                done[id(tensor)] = self._finished(tensor, like.get(name))
            result[name] = done[id(tensor)]
        self._gathered.clear()

    def _finished(self, lazy: Lazy, like: Any) -> Any:
        if lazy.row >= 0:
            tensor = self._tensors[lazy.row]
            if like is not None and _spread_alike(tensor, like):
                return tensor
        return place(self._make(lazy), like)

    def _make(self, lazy: Lazy) -> torch.Tensor:
        """A whole tensor."""
        rows = lazy.rows().tolist()
        for row in self._gathered.keys() - set(rows):
            del self._gathered[row]
        if lazy.row >= 0:
            found: torch.Tensor = whole(self._tensors[lazy.row])
            return found
        # Ranks gather in the order of the state dict, which is the same in each of them.
        for row in rows:
            if row not in self._gathered:
                self._gathered[row] = whole(self._tensors[row]).contiguous()
        like = self._gathered[rows[0]]
        made = like.new_zeros(lazy.shape)
        for strips in lazy.cut():
            self._copy(strips, made)
        return made

    @torch.no_grad()
    def _copy(self, strips: Strips, made: torch.Tensor) -> None:
        places = zip(
            strips.sources.tolist(),
            strips.source_at.tolist(),
            strips.target_at.tolist(),
            strict=True,
        )
        for row, there, here in places:
            if strips.bits:
                value = torch.frombuffer(bytearray(strips.bits), dtype=made.dtype).to(made.device)
                made.as_strided(strips.sizes, strips.target_strides, here).copy_(
                    value.expand(strips.sizes)
                )
                continue
            source = self._gathered[row]
            made.as_strided(strips.sizes, strips.target_strides, here).copy_(
                source.as_strided(
                    strips.sizes, strips.source_strides, source.storage_offset() + there
                )
            )

    def _read(self, lazy: Lazy) -> bytes:
        return bytes_of(self._make(lazy).cpu().contiguous()).tobytes()


def _spread_alike(one: Any, other: Any) -> bool:
    return (
        is_sharded(one)
        and is_sharded(other)
        and one.device_mesh == other.device_mesh
        and tuple(one.placements) == tuple(other.placements)
        and one.device == other.device
    )
