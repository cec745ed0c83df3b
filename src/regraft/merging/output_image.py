"""Where factors that were extracted from an image or video model go: a file of LoRAs in one of its dialects."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

from regraft.adapters.form import Array
from regraft.checkpoints.pipelines import DIFFUSERS
from regraft.dialects.image import DIALECTS
from regraft.dialects.image.delta import FULL, LORA, NOTHING, Delta
from regraft.dialects.image.dialect import WEIGHTS
from regraft.dialects.image.families import DENOISER
from regraft.dialects.image.modules import body_names, names_of
from regraft.dialects.image.moving import Ways, move_deltas
from regraft.dialects.image.read import Home
from regraft.dialects.image.write import fit_to, write_deltas, writing
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.layouts.names import Layout
from regraft.merging.base import Base, BasePart
from regraft.merging.extraction import Extraction
from regraft.planning.model import Foreign
from regraft.storage.folder import staged_file, staged_folder
from regraft.storage.safetensors import write_tensors
from regraft.storage.waiting import Waiting


class ImageOutput:
    """A file of LoRAs that is being made."""

    def __init__(self, base: Base, dst: Path, to: Layout | None, foreign: Foreign) -> None:
        assert base.family is not None
        self.base, self.dst, self.family = base, dst, base.family
        self._waiting = Waiting(dst.parent)
        self.to = (to.dialect if to is not None else None) or DIFFUSERS
        if self.to not in DIALECTS:
            message = f"{to} holds no LoRAs of image and video models"
            fix = f"name one of {', '.join(DIALECTS)}"
            raise RefusedError(Finding("dialect", message, where=str(base.path), fix=fix))
        self.file = dst.suffix == ".safetensors" and not dst.is_dir()
        self.deltas: dict[Home, Delta] = {}
        self._homes: dict[str, Home | str] = {}
        self._places = {
            row: (part, name) for part in base.parts.values() for name, row in part.rows.items()
        }

    def _home(self, name: str) -> Home | str:
        """The module of a tensor, or why it is in none."""
        if name not in self._homes:
            self._homes[name] = self._found(name)
        return self._homes[name]

    def _found(self, name: str) -> Home | str:
        place = self._places.get(self.base.rows[name])
        if place is None:
            return "it belongs to no part that a LoRA can be for"
        part, key = place
        module = key.rpartition(".")[0]
        if part.name == DENOISER:
            names = names_of(self.family, part.layout)
            found = None if names is None else names.find(module, flat=False)
            return (
                "no tool has a module of this name"
                if found is None
                else Home(DENOISER, part.layout, found.key, found.kind)
            )
        return self._in_encoder(part, module)

    def _in_encoder(self, part: BasePart, module: str) -> Home | str:
        encoder = self.family.text_encoder(part.name)
        if encoder is None:
            return f"no LoRA is for the {part.name.replace('_', ' ')}"
        if part.book is not None and part.layout != DIFFUSERS:
            return "its text encoder has other names and shapes in this file: convert both models to diffusers first"
        found = body_names(encoder.body).find(module, flat=False)
        if found is None:
            return "no tool has a module of this name"
        return Home(part.name, "transformers-v4", found.key, "linear")

    def kind_of(self, name: str) -> str | None:
        """The kind of a matrix that a LoRA can be for; ``None`` for what is none."""
        home = self._home(name)
        if isinstance(home, str) or not name.endswith(home.key.rpartition(".")[2]):
            return None
        shape = self.base.tensors.shapes[self.base.rows[name]]
        if len(shape) < 2 or home.kind == "vector":
            return None
        return "conv" if len(shape) > 2 else "linear"

    def why_not_whole(self, name: str) -> str | None:
        """Why a tensor cannot be kept as a whole; ``None`` where it can."""
        home = self._home(name)
        if isinstance(home, str):
            return home
        if self.to not in ("kohya", "comfyui"):
            return f"{self.to} holds no changed norms and biases; --to kohya and --to comfyui do"
        return None

    def add(
        self, name: str, kind: str, factors: tuple[Array, Array], shape: tuple[int, ...]
    ) -> None:
        """Take the A and B of a weight."""
        home = self._home(name)
        assert isinstance(home, Home)
        a, b = map(self._waiting.put, factors)
        rank, kernel = len(a), tuple(shape[2:])
        tensors = {"down": a, "up": b}
        conv = len(shape) > 2
        if conv:
            tensors = {
                "down": a.reshape(rank, *shape[1:]),
                "up": b.reshape(shape[0], rank, *(1 for _ in kernel)),
            }
        made = Delta(LORA, tensors, shape[0], prod(shape[1:]), kernel, rank, conv=conv)
        before = self.deltas.get(home)
        self.deltas[home] = made if before is None else replace(made, bias=before.bias)

    def add_whole(self, name: str, delta: Array, after: Array) -> None:
        """Take a change as a whole: a norm's, or a bias'."""
        home = self._home(name)
        assert isinstance(home, Home)
        values = delta.astype("float32")
        before = self.deltas.get(home)
        if name.endswith(".bias"):
            if before is not None:
                self.deltas[home] = replace(before, bias=values)
            else:
                self.deltas[home] = Delta(NOTHING, {}, len(values), 1, bias=values)
            return
        bias = None if before is None else before.bias
        into = prod(values.shape[1:])
        self.deltas[home] = Delta(FULL, {"diff": values}, len(values), into, bias=bias)

    def write(self, made: Extraction, *, overwrite: bool, dry_run: bool) -> list[str]:
        """Write the file, and say what is to be said."""
        how = writing(self.to, self.family)
        ways = Ways(str(self.base.path))
        deltas = fit_to(move_deltas(self.deltas, self.family, how.layout, ways), how, ways)
        written = write_deltas(deltas, how, None)
        if not written.tensors:
            raise BadInputError(Finding("empty", "nothing is left to write", where=str(self.dst)))
        header = {"format": "pt", **written.header}
        if dry_run:
            return []
        size = sum(tensor.nbytes for tensor in written.tensors.values())
        stage = staged_file if self.file else staged_folder
        with stage(self.dst, overwrite=overwrite, size=size) as staged:
            write_tensors(staged / WEIGHTS, written.tensors, header)
        return []


__all__ = ["Foreign", "ImageOutput"]
