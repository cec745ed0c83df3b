"""What dialects share whose files have two halves of each LoRA, under names that end in two suffixes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.detect import Known
from regraft.adapters.form import Array, cast_down, common_dtype, is_float
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.planning.model import ModelConfig


def pairs(
    tensors: Mapping[str, Array],
    ends: tuple[str, str],
    where: str,
    others: Sequence[str] = (),
) -> dict[str, tuple[Array, Array]]:
    """The two halves by what stands before their suffixes.

    ``others`` are suffixes of tensors that may be there besides.

    Raises ``BadInputError`` with every tensor that is none of these, is no half of anything, or holds no
    floating-point numbers.
    """
    findings = []
    found: dict[str, tuple[Array, Array]] = {}
    for name, tensor in tensors.items():
        end = next((end for end in (*ends, *others) if name.endswith(end)), None)
        if end is None:
            what = (
                f"it ends in none of {', '.join((*ends, *others))}, so that it is no part of a LoRA"
            )
            findings.append(Finding("unmatched", what, where=where, key=name))
            continue
        if not is_float(tensor.dtype):
            what = f"a LoRA factor is a floating-point tensor, this one is {tensor.dtype}"
            findings.append(Finding("dtype", what, where=where, key=name))
        if end in others:
            continue
        stem = name.removesuffix(end)
        other = ends[end == ends[0]]
        if stem + other not in tensors:
            what = f"{stem}{other} is not there, and one is nothing without the other"
            findings.append(Finding("half", what, where=where, key=name))
        elif end == ends[0]:
            found[stem] = tensor, tensors[stem + other]
    if findings:
        raise BadInputError(findings)
    return found


def shape_finding(where: str, key: str, a: Array, b: Array) -> Finding:
    """That two halves do not fit together."""
    return Finding(
        "shape", f"{list(a.shape)} and {list(b.shape)} do not fit together", where=where, key=key
    )


def config_of(known: Known) -> Mapping[str, Any]:
    """The config of the base's language model; empty where the base is not known."""
    return {} if known.model is None else config_of_model(known.model)


def config_of_model(model: ModelConfig) -> Mapping[str, Any]:
    """The config of a model's language model."""
    data = model.data
    inner = data.get("text_config")
    return inner if isinstance(inner, Mapping) else data


def is_tied(known: Known) -> bool:
    """Whether the base has one tensor for its embedding and its head, as far as its config says it."""
    if known.model is None:
        return False
    said = [part.get("tie_word_embeddings") for _, part in known.model.parts()]
    told = [each for each in said if isinstance(each, bool)]
    if told:
        return told[0]
    return bool(known.model_type and known.model_type.startswith("gemma"))


def refuse_tied_head(known: Known, keys: Iterable[str], head: str, title: str, where: str) -> None:
    """Raise ``RefusedError`` where a head is adapted that the base does not have apart from its embedding."""
    if head in set(keys) and is_tied(known):
        raise RefusedError(
            Finding(
                "no-image",
                f"the base's head is its embedding (tie_word_embeddings), and {title} has no place for a LoRA of the "
                "head alone",
                where=where,
                key=head,
                fix="merge the adapter into its base and convert the base",
            )
        )


def same_dtype(a: Array, b: Array) -> tuple[Array, Array]:
    """Both in the narrowest dtype that holds them, at most float32."""
    dtype = common_dtype({a.dtype, b.dtype})
    return narrow(a, dtype), narrow(b, dtype)


def narrow(array: Array, dtype: np.dtype[Any] | None = None) -> Array:
    """An array in a dtype, its own if omitted; float64 becomes float32.

    Raises ``RefusedError`` where a finite number would become infinite.
    """
    dtype = array.dtype if dtype is None else dtype
    if dtype == np.float64:
        return array if array.dtype == np.float32 else cast_down(array, np.dtype(np.float32))
    return array if array.dtype == dtype else array.astype(dtype)


def one_file(src: Path, names: Sequence[str], ends: Sequence[str] = ()) -> Path | None:
    """The weights file that a path is or has: by its name, or the only one with one of some endings."""
    if src.is_file():
        return src if src.name in names or src.name.endswith(tuple(ends)) else None
    if not src.is_dir():
        return None
    for name in names:
        if (src / name).is_file():
            return src / name
    found = sorted(p for p in src.iterdir() if p.is_file() and p.name.endswith(tuple(ends)))
    return found[0] if ends and len(found) == 1 else None


def whole(number: float) -> int | float:
    """A number as a whole one where it is."""
    return int(number) if float(number).is_integer() else float(number)
