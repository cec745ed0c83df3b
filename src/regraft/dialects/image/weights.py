"""The base's weights, as far as they are there: a folder or a file of weights, in any layout of the family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from regraft.adapters.families.base import NoImageError, Wide
from regraft.adapters.form import Array
from regraft.arrays.apply import apply_plan
from regraft.dialects.image.families import DENOISER, Family
from regraft.dialects.image.modules import book_of
from regraft.errors import BadInputError, Finding
from regraft.layouts.graph import Edge
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.plan import Headers
from regraft.rules.book import Book
from regraft.storage.safetensors import TensorFile

_PREFIXES = ("", "unet.", "transformer.", "model.diffusion_model.", "diffusion_model.")
SECOND = "transformer_2"
"""The second transformer of a pipeline, whose names are those of the first."""
_CLIP = {
    "text_encoder": (
        "text_encoder.",
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("text_encoder_3.", "text_encoders.t5xxl.transformer."),
}


class ImageBase:
    """Weights of a base model, read when they are asked for; some may be missing."""

    def __init__(self, path: Path, family: Family) -> None:
        self.path, self.family = path, family

    @cached_property
    def _tensors(self) -> Mapping[str, Array]:
        return _Files(list(_files(self.path)))

    def weight(self, component: str, layout: str, key: str, shape: tuple[int, ...]) -> Array:
        """A weight in a layout.

        ``shape`` is what an adapter shows of it, with ones for what it does not show.

        Raises ``NoImageError`` where the base has it not.
        """
        if component not in (DENOISER, SECOND):
            return self._find(key, _CLIP.get(component, (f"{component}.",)))
        prefixes = _PREFIXES if component == DENOISER else (f"{SECOND}.",)
        try:
            return self._find(key, prefixes)
        except NoImageError:
            book = book_of(self.family)
            if book is None:
                raise
        return self._converted(book, layout, key, shape, prefixes)

    def _find(self, key: str, prefixes: tuple[str, ...]) -> Array:
        for prefix in prefixes:
            if prefix + key in self._tensors:
                return self._tensors[prefix + key]
        raise NoImageError(f"{self.path} does not have {key}", needs_base=True)

    def _converted(
        self, book: Book, layout: str, key: str, shape: tuple[int, ...], prefixes: tuple[str, ...]
    ) -> Array:
        """A weight that the base has in the other layout, in parts or as a part."""
        other = book.left if layout == book.right else book.right
        wanted = Headers(group_names([key]), [shape], ["float32"])
        there = build_plan(wanted, (Edge.to(book, other),), partial=True)
        parts = [name for group in there.targets() for name in group.names()]
        tensors = [self._find(name, prefixes) for name in parts]
        headers = Headers(
            group_names(parts), [x.shape for x in tensors], [x.dtype.name for x in tensors]
        )
        plan = build_plan(headers, (Edge.to(book, layout),), partial=True)
        if any((ids < 0).any() for entry in plan.entries for ids in entry.sources):
            raise NoImageError(f"{self.path} has only parts of {key}", needs_base=True)
        made = apply_plan(plan, tensors)
        if key not in made:
            raise NoImageError(f"{self.path} does not have {key}", needs_base=True)
        return np.asarray(made[key])


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    found = sorted(path.rglob("*.safetensors"))
    if not found:
        raise BadInputError(
            Finding(
                "no-weights",
                "there are no weights of a base model here",
                where=str(path),
                fix="give the base's folder, or one file of it, in safetensors",
            )
        )
    yield from found


class _Files(Mapping[str, Array]):
    """The tensors of several files; in a pipeline's folder each key begins with the component."""

    def __init__(self, paths: list[Path]) -> None:
        self._where: dict[str, tuple[TensorFile, str]] = {}
        for path in paths:
            file = TensorFile(path)
            folder = path.parent.name
            component = folder if folder.startswith(("text_encoder", SECOND)) else ""
            for name in file:
                self._where[f"{component}.{name}" if component else name] = (file, name)

    def __getitem__(self, key: str) -> Array:
        file, name = self._where[key]
        return file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: object) -> bool:
        return key in self._where


def as_matrix(array: Array) -> Wide:
    """A weight as a matrix (out, in) in float64."""
    return np.asarray(array.reshape(len(array), -1).astype(np.float64))
