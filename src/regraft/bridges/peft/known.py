"""Converting an adapter's files for a live model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import nn

from regraft.adapters.convert import convert_adapter
from regraft.adapters.form import Array
from regraft.adapters.protocol import Into, Opened
from regraft.arrays.lazy import Lazy
from regraft.bridges.peft.slots import base_slots
from regraft.bridges.torch_tensors import whole
from regraft.bridges.transformers.imported import import_model
from regraft.bridges.transformers.making import LEFT, RIGHT
from regraft.bridges.transformers.registry import warn_of_release
from regraft.dialects.base import Found, dialects
from regraft.dialects.opening import find_source
from regraft.dialects.peft.packing import packing_of_version
from regraft.dialects.peft.scan import PREFIX
from regraft.dialects.peft.source import CONFIG, Source, find_adapters, open_adapter
from regraft.errors import AmbiguousError, Finding
from regraft.layouts.names import DEFAULT, Layout
from regraft.live.ruled import Ruled
from regraft.names.live import skeleton_of, walk
from regraft.planning.model import ModelConfig, TiedNames, Told
from regraft.report import AdapterReport
from regraft.rules.book import own_books
from regraft.rules.releases import layout_of
from regraft.storage.dtypes import DTYPES

_CARRIED = {
    DTYPES[name].numpy: (carrier, dtype)
    for name, carrier, dtype in (
        ("BF16", np.uint16, torch.bfloat16),
        ("F8_E4M3", np.uint8, torch.float8_e4m3fn),
        ("F8_E5M2", np.uint8, torch.float8_e5m2),
    )
}
"""Types that numpy itself knows nothing of: what carries their bits to torch."""

Arriving = Mapping[int, Lazy]
"""By the ``id`` of a model's tensor the values that it is about to be given."""

_CARRIERS = {dtype: (carrier, name) for name, (carrier, dtype) in _CARRIED.items()}


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in the layout of a live model."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    where: str
    report: AdapterReport

    @property
    def peft_type(self) -> str:
        """``LORA``, ``IA3``, ..."""
        return str(self.config["peft_type"])

    def anywhere(self) -> Adapter:
        """The same for a model somewhere below the module that PEFT is given: expressions may begin below it, too."""
        config = dict(self.config)
        for field in ("target_modules", "exclude_modules"):
            expression = config.get(field)
            if isinstance(expression, str) and expression.lower() != "all-linear":
                config[field] = rf"(?:.*\.)?(?:{expression})"
        return replace(self, config=config)

    @contextmanager
    def config_folder(self) -> Iterator[str]:
        """A folder with its config, for PEFT to read; gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
            (Path(folder) / CONFIG).write_text(json.dumps(dict(self.config)), encoding="utf-8")
            yield folder


def open_any(path: Path) -> Opened:
    """The one adapter of a path, whatever dialect it is in.

    Raises ``BadInputError``, or ``AmbiguousError`` where there are several.
    """
    opening = find_source(path)
    if opening.dialect.name != DEFAULT:
        return opening.one()
    if (path / CONFIG).is_file():
        return opening.open(path)
    if len(opening.found.folders) > 1:
        raise _several(opening.found, path)
    return opening.open(opening.found.folders[0])


def open_one(path: Path) -> Source:
    """The one adapter of a path in PEFT's files.

    Raises ``BadInputError``, or ``AmbiguousError`` where there are several.
    """
    if (path / CONFIG).is_file():
        return open_adapter(path, path)
    found = find_adapters(path)
    if len(found.folders) > 1:
        raise _several(found, path)
    return open_adapter(found.folders[0], found.root, found.weights)


def _several(found: Found, path: Path) -> AmbiguousError:
    """That one adapter was expected, and there are more."""
    names = ", ".join(str(folder.relative_to(found.root)) for folder in found.folders)
    return AmbiguousError(
        Finding(
            "which-adapter",
            f"there are several adapters here: {names}",
            where=str(path),
            fix="give the folder of one of them",
        )
    )


class LiveWeights:
    """The tensors of a live model by the names of its layout, PEFT's layers left out; read when asked for."""

    def __init__(self, model: nn.Module, arriving: Arriving | None = None) -> None:
        self._slots = base_slots(model)
        self._arriving = arriving or {}

    def __contains__(self, name: str) -> bool:
        slot = self._slots.get(name)
        if slot is None or not slot.tensor.is_floating_point():
            return False
        return not slot.tensor.is_meta or id(slot.tensor) in self._arriving

    def names(self) -> list[str]:
        """The names of all tensors that can be read."""
        return [name for name in self._slots if name in self]

    def read(self, name: str) -> Array:
        """One tensor, copied to the CPU."""
        tensor = self._slots[name].tensor
        arriving = self._arriving.get(id(tensor))
        if arriving is None:
            return to_numpy(tensor)
        return to_numpy(to_torch(arriving.array()).to(tensor.dtype))


def known_model(model: Any, arriving: Arriving | None = None) -> ModelConfig:
    """What conversions need to know of a live model: its config, and its weights when they are asked for.

    ``arriving`` are values that the model is about to be given.
    """
    return ModelConfig(
        model.config.to_dict(),
        f"the {type(model).__name__} in memory",
        LiveWeights(model, arriving),
    )


@dataclass(frozen=True, slots=True)
class LiveTransformers:
    """What the installed transformers knows of one live model."""

    live: Any

    def book(
        self,
        model: ModelConfig,
        keys: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        classes: Sequence[str],
        *,
        adapter: bool,
        task: str | None = None,
        spelled: Sequence[str] = (),
    ) -> Told:
        """The rule book for the model, from its own modules; see `plan.model.Foreign`."""
        imported = import_model(skeleton_of(self.live))
        imported.check_known()
        told = f"transformers {transformers.__version__} has a registry for {imported.name}"
        warn_of_release()
        return Told(imported.book(keys, shapes, adapter=adapter), told, architecture=imported.name)

    def has_class(self, names: Sequence[str]) -> bool | None:
        """A live model has its own modules itself; nobody asks."""
        return None

    def tied(
        self, model: ModelConfig, keys: Sequence[str], classes: Sequence[str]
    ) -> list[TiedNames] | None:
        """A live model's tied tensors are one; nobody asks."""
        return None


def live_layout() -> Layout:
    """The layout of models in the transformers that is installed, with experts packed as its PEFT packs them."""
    layout = Layout(layout_of("transformers", transformers.__version__))
    packing = packing_of_version(peft.__version__)
    return layout if packing == layout.usual_packing else replace(layout, packing=packing)


def layout_in_memory(model: Any) -> Layout:
    """The layout of a live model: where only rule books of the user's own know it, the one that its names tell.

    Raises ``BadInputError`` where its names are of several layouts.
    """
    usual = live_layout()
    books = [book for book in own_books() if not book.is_addition]
    if not books or type(model).__module__.startswith("transformers."):
        return usual
    found = walk(model).models
    ruled = Ruled.of(found[0], books) if len(found) == 1 and not found[0].path else None
    if ruled is None or ruled.own_layout in (LEFT, RIGHT):
        return usual
    return Layout(ruled.own_layout)


def convert_for(model: Any, source: Opened, arriving: Arriving | None = None) -> Adapter:
    """An adapter's files as PEFT has them in the layout of ``model``, a transformers model.

    Raises as ``convert_adapter`` does.
    """
    foreign = LiveTransformers(model)
    into = None if isinstance(source, Source) else Into(dialects()[DEFAULT], own=False)
    known = known_model(model, arriving)
    done = convert_adapter(source, layout_in_memory(model), known, foreign=foreign, into=into)
    tensors = {name: to_torch(tensor) for name, tensor in done.tensors.items()}
    return Adapter(done.config, tensors, source.where, done.report)


def below(source: Opened, path: str) -> Source | None:
    """The adapter as one of the model at ``path`` in a holder; ``None`` where its keys do not begin with that path."""
    start = f"{PREFIX}{path}."
    if not isinstance(source, Source) or not path:
        return None
    if not all(name.startswith(start) for name in source.tensors):
        return None
    tensors = {PREFIX + name.removeprefix(start): x for name, x in source.tensors.items()}
    return replace(source, tensors=tensors)


def to_torch(array: Array) -> torch.Tensor:
    """An array as a tensor of its own, every bit as it is."""
    copied = np.array(array, order="C")
    if copied.dtype in _CARRIED:
        carrier, dtype = _CARRIED[copied.dtype]
        return torch.from_numpy(copied.view(carrier)).view(dtype)
    return torch.from_numpy(copied)


def to_numpy(tensor: torch.Tensor) -> Array:
    """A tensor as an array, every bit as it is."""
    plain: torch.Tensor = whole(tensor).detach().cpu().contiguous()
    if plain.dtype in _CARRIERS:
        carrier, name = _CARRIERS[plain.dtype]
        carried = plain.view(torch.int16 if carrier is np.uint16 else torch.uint8)
        array: Array = carried.numpy().view(name)
        return array
    bits: Array = plain.numpy()
    return bits
