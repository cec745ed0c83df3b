"""Where errors are provoked: files that are wrong, and what happened."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, write_folder
from making import HEAD

import regraft
from regraft.cli import main
from regraft.errors.codes import Code
from regraft.storage.header import read_header
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
BASES, CASES = GOLDEN / "bases", GOLDEN / "cases"
V4, V5 = "transformers-v4", "transformers-v5"
START = "base_model.model."
QUERY = f"{START}model.layers.0.self_attn.q_proj.lora_{{}}.weight"
EXPERT = f"{START}model.layers.0.block_sparse_moe.experts.{{}}.{{}}.lora_{{}}.weight"

TRIGGERS = {}
"""By code: what provokes it. It raises, or returns the exit status of a command and its findings."""


def provokes(*codes):
    """Note down a function that provokes these codes; with several it is given the code."""

    def note(function):
        for code in codes:
            assert Code(code) not in TRIGGERS, f"{code} is provoked twice"
            if len(codes) == 1:
                TRIGGERS[Code(code)] = function
            else:
                TRIGGERS[Code(code)] = lambda lab, code=code: function(lab, code)
        return function

    return note


@dataclass
class Lab:
    """A folder of its own, and ways to make things that are wrong."""

    path: Path
    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture

    @property
    def out(self):
        return self.path / "out"

    def file(self, content, name="adapter_model.safetensors"):
        path = self.path / name
        path.write_bytes(content)
        return path

    def json(self, value, name):
        return self.file(json.dumps(value).encode(), name)

    def header(self, header, data=b""):
        """A safetensors file with such a header."""
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return read_header(self.file(len(text).to_bytes(8, "little") + text + data))

    def tensor(self, **changes):
        """A safetensors file with one tensor of one byte, which is said to be something else."""
        entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], **changes}
        entry = {name: value for name, value in entry.items() if value is not ...}
        return self.header({"t": entry}, b"x")

    def adapter(self, change=None, case="mixtral__gud_attn", **fields):
        """A golden adapter with other tensors or fields."""
        folder = self.path / "adapter"
        folder.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(CASES / case / name, folder / name)
        config = json.loads((folder / "adapter_config.json").read_text()) | fields
        config = {name: value for name, value in config.items() if value is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if change is not None:
            file = folder / "adapter_model.safetensors"
            tensors = {k: np.array(v) for k, v in open_tensors(file, read_header(file)).items()}
            write_tensors(file, change(tensors) or tensors, {"format": "pt"})
        return folder

    def base(self, name="mixtral", **fields):
        """The config of a golden base with other fields."""
        folder = self.path / "base"
        folder.mkdir(exist_ok=True)
        config = json.loads((BASES / name / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    def checkpoint(self, tensors=None, config=MIXTRAL, **options):
        return write_folder(self.path / "src", tensors or mixtral(), config, **options)

    def convert(self, src, to=V5, **options):
        return regraft.convert(src, self.out, to=to, **options)

    def convert_adapter(self, change=None, base="mixtral", to=V5, options=None, **fields):
        """Convert a golden adapter that was changed."""
        case = fields.pop("case", "mixtral__gud_attn")
        model = BASES / base if isinstance(base, str) else base
        src = self.adapter(change, case, **fields)
        return self.convert(src, to, model=model, **(options or {}))

    def run(self, *args):
        """The exit status of a command and its findings."""
        self.capsys.readouterr()
        status = main([*map(str, args), "--json"])
        told = json.loads(self.capsys.readouterr().out)
        return status, list(_findings(told))

    def lint(self, body):
        """Lint a rule book with such a body."""
        return self.run("rules", "lint", self.file((HEAD + body).encode(), "book.toml"))


def _findings(value):
    """Everything in a report that has a code and a message."""
    if isinstance(value, dict):
        if "code" in value and "message" in value:
            yield value
        for inner in value.values():
            yield from _findings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _findings(inner)


def renamed(old, new):
    """A change of an adapter's tensors: another name."""
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(*parts):
    """A change of an adapter's tensors: those with all of these in their names are gone."""

    def change(tensors):
        return {n: t for n, t in tensors.items() if not all(part in n for part in parts)}

    return change


def kept(part):
    """A change of an adapter's tensors: only those with this in their names."""
    return lambda tensors: {name: t for name, t in tensors.items() if part in name}
