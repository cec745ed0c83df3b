"""A converter that is a command: it reads a folder and writes another one."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from regraft.errors import BadInputError, Finding, RegraftError
from regraft.learning.content import open_content
from regraft.storage.safetensors import write_tensors

_LINES = 6


@dataclass(frozen=True, slots=True)
class CommandConverter:
    """Calls a command on files with the tensors and the config of a probe.

    ``{src}`` and ``{dst}`` in its words become the folder to read and the path to write; no shell sees them.
    """

    command: str
    config: Mapping[str, Any] | None
    timeout: float

    def __call__(self, state: dict[str, Any]) -> Mapping[str, Any]:
        """What the command makes of the tensors.

        Raises ``BadInputError`` where it fails, takes too long, or writes no weights.
        """
        with tempfile.TemporaryDirectory(prefix="regraft-learn-") as folder:
            src, dst = Path(folder) / "src", Path(folder) / "dst"
            write_probe(src, state, self.config)
            words = [w.replace("{src}", str(src)).replace("{dst}", str(dst)) for w in self.words()]
            self._run(words, Path(folder))
            return _read(dst, self.command)

    def words(self) -> list[str]:
        """The command's words.

        Raises ``BadInputError`` where it does not say what to read and what to write.
        """
        try:
            words = shlex.split(self.command)
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
            raise self._failed(f"it ended with status {done.returncode}{_tail(text, folder)}")

    def _failed(self, message: str) -> BadInputError:
        return BadInputError(
            Finding(
                "converter",
                message,
                where=self.command,
                fix="try it by hand on a probe (regraft probe)",
            )
        )


def write_probe(folder: Path, state: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
    """A probe as a folder: its weights, and the config that goes with them."""
    folder.mkdir(parents=True)
    arrays = {key: np.ascontiguousarray(array) for key, array in state.items()}
    write_tensors(folder / "model.safetensors", arrays, {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))


def _tail(text: str, folder: Path) -> str:
    lines = [line for line in text.replace(str(folder), "…").splitlines() if line.strip()]
    if not lines:
        return ", and printed nothing"
    return "; its last lines:\n    " + "\n    ".join(lines[-_LINES:])


def _read(dst: Path, command: str) -> Mapping[str, Any]:
    """The tensors that a converter wrote: a folder, a file, or the path with a suffix."""
    found = dst if dst.exists() else next(iter(sorted(dst.parent.glob("dst.*"))), None)
    if found is None:
        message = "it ended well and wrote nothing to {dst}"
        raise BadInputError(Finding("converter", message, where=command))
    if found.is_dir():
        files = [
            p
            for p in sorted(found.rglob("*"))
            if p.suffix in (".safetensors", ".bin", ".pt", ".pth")
        ]
        if len(files) == 1:
            found = files[0]
    try:
        content = open_content(found)
    except RegraftError as error:
        message = f"what it wrote cannot be read: {error.findings[0].message}"
        raise BadInputError(Finding("converter", message, where=command)) from error
    return {name: np.array(tensor.typed) for name, tensor in content.tensors.items()}
