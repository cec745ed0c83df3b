"""A converter that is a command: it reads a folder and writes another one."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from regraft.errors import BadInputError, Finding, RegraftError
from regraft.learning.content import open_content
from regraft.storage.safetensors import write_tensors
from regraft.storage.torch_write import write_torch

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
"""The files that a probe's weights may be in. A folder has one of them, as genuine ones have."""
_LINES = 3
"""How many of the last lines of what a command printed are told."""


class _NothingMadeError(Exception):
    """A command that made no weights of a probe; perhaps it reads the other form."""


@dataclass(slots=True)
class Command:
    """A converter's command.

    ``{src}`` and ``{dst}`` in its words become the folder to read and the path to write; no shell sees them.
    """

    text: str
    timeout: float
    """In seconds."""
    form: str | None = None
    """The file that it reads: it is found out in the first run, and stays the same in all others."""

    def on(self, config: Mapping[str, Any] | None) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
        """The converter of state dicts that go with a config."""
        return lambda state: self.convert(state, config)

    def convert(
        self, state: Mapping[str, Any], config: Mapping[str, Any] | None
    ) -> Mapping[str, Any]:
        """What the command makes of the tensors: as safetensors, or where it fails on that, as torch saves them.

        Raises ``BadInputError`` where it fails on both, takes too long, or writes no weights.
        """
        failed: dict[str, str] = {}
        for form in (self.form,) if self.form else (SAFETENSORS, TORCH):
            try:
                made = self._made(state, config, form)
            except _NothingMadeError as error:
                failed[form] = str(error)
            else:
                self.form = form
                return made
        if len(set(failed.values())) == 1:
            raise self._failed(failed.popitem()[1])
        each = (self._failed(f"given {form}, {why}") for form, why in failed.items())
        raise BadInputError([finding for error in each for finding in error.findings])

    def notes(self) -> tuple[str, ...]:
        """What is to be known about how it was run."""
        if self.form != TORCH:
            return ()
        return (f"the converter fails on {SAFETENSORS}, and was given {TORCH} instead",)

    def _made(
        self, state: Mapping[str, Any], config: Mapping[str, Any] | None, form: str
    ) -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory(prefix="regraft-learn-") as folder:
            src, dst = Path(folder) / "src", Path(folder) / "dst"
            write_probe(src, state, config, form)
            words = [w.replace("{src}", str(src)).replace("{dst}", str(dst)) for w in self.words()]
            self._run(words, Path(folder))
            return _read(dst)

    def words(self) -> list[str]:
        """The command's words.

        Raises ``BadInputError`` where it does not say what to read and what to write.
        """
        try:
            words = shlex.split(self.text)
        except ValueError as error:
            raise self._failed(f"it is no command: {error}") from None
        if not all(any(hole in word for word in words) for hole in ("{src}", "{dst}")):
            raise self._failed(
                "it must have {src} and {dst}: the folder to read and the path to write"
            )
        return words

    def _run(self, words: list[str], folder: Path) -> None:
        try:
            done = subprocess.run(
                words,
                check=False,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            last = error.stderr or error.stdout or b""
            text = last.decode("utf-8", "replace") if isinstance(last, bytes) else last
            raise self._failed(
                f"it took longer than {self.timeout:g} s{_tail(text, folder)}"
            ) from None
        except OSError as error:
            raise self._failed(f"it cannot be run: {error.strerror or error}") from None
        if done.returncode:
            text = done.stderr.strip() or done.stdout
            raise _NothingMadeError(f"it ended with status {done.returncode}{_tail(text, folder)}")

    def _failed(self, message: str) -> BadInputError:
        return BadInputError(
            Finding(
                "converter",
                message,
                where=self.text,
                fix="try it by hand on a probe (regraft probe)",
            )
        )


def write_probe(
    folder: Path,
    state: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    form: str = SAFETENSORS,
) -> None:
    """A probe as a folder: its weights in a file of that name and form, and the config that goes with them."""
    folder.mkdir(parents=True)
    arrays = {key: np.ascontiguousarray(array) for key, array in state.items()}
    if form == TORCH:
        write_torch(folder / form, arrays)
    else:
        write_tensors(folder / form, arrays, {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))


def _tail(text: str, folder: Path) -> str:
    """The last lines that say something, in one line; marks below Python's lines say nothing."""
    lines = [line.strip() for line in text.replace(str(folder), "…").splitlines()]
    lines = [line for line in lines if line.strip("^~ ")]
    if not lines:
        return ", and printed nothing"
    return "; its last lines: " + " | ".join(lines[-_LINES:])


def _read(dst: Path) -> Mapping[str, Any]:
    """The tensors that a converter wrote: a folder, a file, or the path with a suffix."""
    found = dst if dst.exists() else next(iter(sorted(dst.parent.glob("dst.*"))), None)
    if found is None:
        raise _NothingMadeError("it ended well and wrote nothing to {dst}")
    if found.is_dir():
        files = [
            p
            for p in sorted(found.rglob("*"))
            if p.suffix in (".safetensors", ".bin", ".pt", ".pth")
        ]
        if len(files) == 1:
            found = files[0]
    try:
        tensors = open_content(found).tensors
    except RegraftError as error:
        raise _NothingMadeError(
            f"what it wrote cannot be read: {error.findings[0].message}"
        ) from error
    if not tensors:
        raise _NothingMadeError("it ended well and wrote no tensors")
    return {name: np.array(tensor.typed) for name, tensor in tensors.items()}
