"""Files beside an adapter: which of them mean the same in another layout.

A model card or a tokenizer does. Weights of a base do not: their tensors have the old layout's names. The state of an
optimiser goes with the parameters of its training, in their order and shapes, so a training cannot go on from it
after a conversion.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|trainer_state|random_states|sampler)(?![a-z]).*"
    r"|.*_(optim|model)_states\.pt|pytorch_model_fsdp.*|zero_pp_rank.*|latest|zero_to_fp32\.py",
    re.IGNORECASE,
)
TRAINING_ARGUMENTS = "training_args.bin"
"""What a Trainer was told: no tensors."""
_ENDINGS = (
    ".pt",
    ".pth",
    ".ckpt",
    ".bin",
    ".h5",
    ".msgpack",
    ".gguf",
    ".npz",
    ".onnx",
    ".pkl",
    ".safetensors",
)
_INDEX = ".index.json"
_HEAD = 9


def sort_files(root: Path, files: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The files (relative to ``root``) that another layout can have as they are, and notes on those it cannot.

    >>> sort_files(Path("."), [Path("README.md")])
    ([PosixPath('README.md')], [])
    """
    kept, weights, training = [], [], []
    for file in files:
        if is_training_state(file):
            training.append(str(file))
        elif _is_weights(root / file):
            weights.append(str(file))
        else:
            kept.append(file)
    notes = []
    if training:
        notes.append(
            f"left out: {', '.join(training)}; the state of a training belongs to the parameters of the old layout, "
            "so a training cannot go on from it"
        )
    if weights:
        notes.append(
            f"left out: {', '.join(weights)}; these weights are not the adapter's, and were not converted. A model's "
            f"are, with: regraft convert {root / weights[0]} DST --to LAYOUT"
        )
    return kept, notes


def is_training_state(file: Path) -> bool:
    """Whether a file has the state of a training, and not weights or words: by its name."""
    return _TRAINING.fullmatch(file.name) is not None or any(
        re.fullmatch(r"global_step\d+|(optimizer|pytorch_model_fsdp)_\d+", part)
        for part in file.parts[:-1]
    )


def _is_weights(path: Path) -> bool:
    """By content where it tells, by the name where it does not."""
    name = path.name.lower()
    if name == TRAINING_ARGUMENTS:
        return False
    if name.endswith(_INDEX) or name.endswith(_ENDINGS):
        return True
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    size = int.from_bytes(head[:8], "little")
    return head.startswith(b"GGUF") or (head[8:] == b"{" and 0 < size < 100_000_000)
