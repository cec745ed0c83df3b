"""Where factors that were extracted from a language model go: PEFT's files, or those of another dialect."""

from __future__ import annotations

from pathlib import Path

from regraft.adapters.convert import Converted, Identity, convert_adapter
from regraft.adapters.detect import find_books
from regraft.adapters.form import Array, Lora
from regraft.adapters.protocol import Hints, Into
from regraft.adapters.scale import Scale
from regraft.checkpoints.ties import is_input
from regraft.dialects.base import PlainFile, dialects
from regraft.errors import BadInputError, Finding
from regraft.layouts.names import DEFAULT, Layout
from regraft.merging.base import Base
from regraft.merging.extraction import Extraction
from regraft.names.keys import group_names
from regraft.planning.model import Foreign
from regraft.rules.kinds import KINDS
from regraft.storage.folder import staged_file, staged_folder
from regraft.storage.waiting import Waiting


class LanguageOutput:
    """An adapter of a language model that is being made."""

    def __init__(self, base: Base, dst: Path, to: Layout | None, foreign: Foreign) -> None:
        self.base, self.dst, self.foreign = base, dst, foreign
        self._waiting = Waiting(dst.parent)
        self.layout = Layout(base.layout or base.any_layout)
        self.target = to or self.layout
        self.dialect = dialects()[self.target.dialect or DEFAULT]
        can = self.dialect.capabilities
        self.file = dst.suffix in can.suffixes and not dst.is_dir()
        if not self.file and not can.folder:
            message = f"{self.dialect.name} adapters are one file"
            fix = f"name a file that ends in {' or '.join(can.suffixes)}"
            raise BadInputError(Finding("destination-is-file", message, where=str(dst), fix=fix))
        self.to = str(self.target)
        self.loras: dict[str, Lora] = {}
        self.kinds: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.replaced: dict[str, Array] = {}
        self._known = self._kinds_of_base()

    def _kinds_of_base(self) -> dict[str, str]:
        """The kinds of the base's tensors, as far as rule books tell them."""
        opened = self._opened(dict.fromkeys(self.base.rows, Lora(_NONE, _NONE, Scale(1, 1))))
        model = self.base.model
        known = find_books(opened.names(), opened.hints(), model, opened.where, self.foreign)
        side = Identity(known, self.layout.name, None, ()).side
        found: dict[str, str] = {}
        for group in group_names(list(self.base.rows)):
            told = side.find(group)
            kind = side.carried_kind(group) if told is None else told.kind
            found.update(dict.fromkeys(group.names(), kind or "any"))
        return found

    def kind_of(self, name: str) -> str | None:
        """The kind of a matrix that an adapter can have factors for; ``None`` for what is none."""
        shape = self.base.tensors.shapes[self.base.rows[name]] if name in self.base.rows else (0, 0)
        kind = self._known.get(name, "any")
        if kind == "any":
            if len(shape) != 2 or not name.endswith(".weight"):
                return None
            return "embedding" if is_input(name) else "linear"
        roles = KINDS[kind].roles
        return kind if roles is not None and kind != "vector" and len(shape) >= 2 else None

    def why_not_whole(self, name: str) -> str | None:
        """Why a tensor cannot be kept as a whole; ``None`` where it can."""
        module = name.rpartition(".")[0]
        inside = [n for n in self.base.rows if n.startswith(f"{module}.")]
        if self.dialect.name != DEFAULT:
            return f"{self.dialect.name} holds no changed norms and biases"
        if not module or any("." in n.removeprefix(f"{module}.") for n in inside):
            return "its module has others inside, and PEFT saves whole modules"
        return None

    def add(
        self, name: str, kind: str, factors: tuple[Array, Array], shape: tuple[int, ...]
    ) -> None:
        """Take the A and B of a weight."""
        a, b = map(self._waiting.put, factors)
        rank = a.shape[-2]
        if KINDS[kind].kernel:
            a = a.reshape(rank, *shape[1:])
            b = b.reshape(shape[0], rank, *(1 for _ in shape[2:]))
        self.loras[name], self.shapes[name] = Lora(a, b, Scale(rank, rank)), shape
        self.kinds[name] = kind

    def add_whole(self, name: str, delta: Array, after: Array) -> None:
        """Take a tensor as a whole."""
        self.replaced[name] = after

    def write(self, made: Extraction, *, overwrite: bool, dry_run: bool) -> list[str]:
        """Write the adapter, and say what is to be said."""
        notes = self._whole_modules(made)
        opened = self._opened(self.loras)
        into = Into(self.dialect, own=False)
        result = convert_adapter(
            opened,
            self.target,
            self.base.model,
            self.layout,
            foreign=self.foreign,
            into=into,
        )
        made.to = result.report.target_layout
        notes += [note for note in result.report.notes if note not in notes]
        if dry_run:
            return notes
        self._save(opened, result, overwrite=overwrite)
        return notes

    def _whole_modules(self, made: Extraction) -> list[str]:
        """PEFT saves a module with all of its tensors, so a module that is saved has no factors."""
        saved = {name.rpartition(".")[0] for name in self.replaced}
        both = [name for name in self.loras if name.rpartition(".")[0] in saved]
        if not both:
            return []
        from regraft.merging.base import Reader, open_base

        tuned = open_base(Path(made.tuned), None, self.foreign)
        reader = Reader(tuned.source)
        try:
            for module in saved:
                for name, row in tuned.rows.items():
                    if name.rpartition(".")[0] == module:
                        self.replaced[name] = reader.whole(row)
        finally:
            reader.close()
        for name in both:
            del self.loras[name]
        made.targets = [target for target in made.targets if target.key not in both]
        made.whole += both
        return [
            f"saved as whole modules, because their biases changed, too: {', '.join(sorted(both))}"
        ]

    def _opened(self, loras: dict[str, Lora]) -> PlainFile:
        model = self.base.model
        tensors = {
            f"{key}.{x}": t for key, lo in loras.items() for x, t in (("A", lo.a), ("B", lo.b))
        }
        said = Hints(
            "the base",
            model_type=None if model is None else model.model_type,
            base=str(self.base.path),
            layout=self.base.layout,
        )
        return PlainFile(
            "",
            str(self.base.path),
            {"dialect": DEFAULT},
            {**tensors, **self.replaced},
            dict(loras),
            self.shapes,
            self.kinds,
            self.replaced,
            said=said,
        )

    def _save(self, opened: PlainFile, result: Converted, *, overwrite: bool) -> None:
        size = sum(tensor.nbytes for tensor in result.tensors.values())
        stage = staged_file if self.file else staged_folder
        with stage(self.dst, overwrite=overwrite, size=size) as staged:
            self.dialect.save(staged, opened, result)


def _none() -> Array:
    import numpy as np

    return np.zeros((1, 1), np.float32)


_NONE = _none()
