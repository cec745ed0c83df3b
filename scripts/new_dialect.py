"""Start a dialect: a module that works, and its test by the public conformance kit.

python scripts/new_dialect.py mytool --out src/regraft/dialects   # and mytool's real names go into NAMES
"""

from __future__ import annotations

import argparse
from pathlib import Path

MODULE = '''"""Adapters of {name}: where its files and names are known from (a release and a file of its source)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from regraft.adapters.convert import Converted
from regraft.adapters.detect import Known
from regraft.adapters.form import Blob, Lora, Saved
from regraft.adapters.protocol import Opened
from regraft.adapters.scale import Scale
from regraft.dialects.base import Capabilities, Evidence, Found, PlainFile, PlainNames, PlainWriter
from regraft.layouts.names import Layout
from regraft.storage.safetensors import open_tensors, read_header, write_tensors

FILE = "{name}.safetensors"
"""What the tool calls its file."""
NAMES = PlainNames(prefix="{name}.", a="down", b="up")
"""How it spells the factors of a module: the prefix, and what follows for A (rank, in) and B (out, rank)."""
ALPHA = ".alpha"
"""One number for each module."""


class {title}Writer(PlainWriter):
    """Writes the factors of each module, and its alpha."""

    title = "{title}"
    capabilities = Capabilities(embeddings=False, saved=False, suffixes=(".safetensors",))

    def blob(self, deltas: Any, saved: list[Saved]) -> Blob:
        """The tensors of a file."""
        tensors = {{}}
        for each in deltas:
            down, up = self.spelling.factor_names(each.key)
            tensors[down], tensors[up] = each.lora.a, each.lora.b
            tensors[NAMES.spell(each.key) + ALPHA] = np.array(each.lora.scale.alpha, np.float64)
        return Blob({{"dialect": "{name}"}}, tensors, {{"format": "pt"}})


class {title}(Struct, frozen=True):
    """One file, with names of its own."""

    name: str = "{name}"
    title: str = "{title}: one file, NAME.down, NAME.up and NAME.alpha"
    layout: str = "transformers-v5"
    capabilities: Capabilities = {title}Writer.capabilities

    def sniff(self, src: Path) -> Evidence | None:
        """By the names in the header; it must not claim the file of another tool."""
        path = src / FILE if src.is_dir() else src
        if path.suffix != ".safetensors" or not path.is_file():
            return None
        names = read_header(path).tensors
        fits = bool(names) and all(name.startswith(NAMES.prefix) for name in names)
        return Evidence(certain=True, why=f"its keys begin with {{NAMES.prefix}}") if fits else None

    def find(self, src: Path) -> Found:
        """The file."""
        path = src / FILE if src.is_dir() else src
        return Found(path.parent, (path.parent,), path)

    def open(self, folder: Path, root: Path, weights: Path | None) -> Opened:
        """Every module with its factors and its scale."""
        assert weights is not None
        tensors = open_tensors(weights)
        loras = {{}}
        for name, down in tensors.items():
            if name.endswith("." + NAMES.a):
                key = name.removeprefix(NAMES.prefix).removesuffix("." + NAMES.a)
                alpha = float(tensors[NAMES.spell(key) + ALPHA])
                up = tensors[NAMES.factor_names(key)[1]]
                loras[key] = Lora(down, up, Scale(down.shape[-2], alpha))
        where, config = str(weights), {{"dialect": "{name}"}}
        return PlainFile("", where, config, tensors, loras, spelling=NAMES)

    def writer(self, opened: Opened, known: Known, to: Layout) -> {title}Writer:
        """What writes an adapter in this dialect."""
        return {title}Writer(opened, known, to, NAMES)

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """The file."""
        write_tensors(folder / FILE, result.tensors, result.metadata)
'''

TEST = '''"""{title} keeps the law: what it writes, it reads back, and it adds the same."""

from {package}{name} import {title}

from regraft.testing import check_dialect


def test_the_conformance_kit(tmp_path):
    check_dialect({title}(), tmp_path)
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="what users will call it after --to, such as mytool")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder to write to")
    given = parser.parse_args()
    write(given.name, given.out, MODULE, TEST)


def write(name: str, folder: Path, module: str, test: str) -> None:
    """A module and its test, which must not be there yet."""
    if not name.isidentifier():
        raise SystemExit(f"{name!r} is not a name of a module: use letters, digits and _")
    inside = (folder / "__init__.py").is_file() and folder.resolve().parent.name == "regraft"
    package = f"regraft.{folder.resolve().name}." if inside else ""
    title = "".join(part.capitalize() for part in name.split("_"))
    words = {"name": name, "title": title, "upper": name.upper(), "package": package}
    for path, text in ((folder / f"{name}.py", module), (folder / f"test_{name}.py", test)):
        if path.exists():
            raise SystemExit(f"{path} exists already")
        path.write_text(text.format(**words), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
