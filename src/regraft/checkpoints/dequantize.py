"""Turning quantised weights into bfloat16 ones, file by file, a few rows at a time.

It changes numbers, so it is done on request only. The formulas:

* FP8: ``weight * scale``, one scale for a block, a row or the whole (DeepSeek-V3's technical report, arXiv 2412.19437,
  section 3.3; ``fp8_cast_bf16.py`` beside its weights);
* MXFP4: two E2M1 numbers a byte, the low half first, ``e2m1 * 2 ** (scale - 127)`` for every 32 (OCP Microscaling
  Formats specification 1.0, sections 5.2 and 5.3); 255 as a scale is not a number. gpt-oss keeps it so, files of
  compressed-tensors do, and FP8 checkpoints whose experts are in it (``"expert_dtype": "fp4"``);
* NVFP4: the same numbers, ``e2m1 * scale * scale_2`` for every 16 (ModelOpt; compressed-tensors keeps the
  reciprocal of the second scale as ``weight_global_scale``).

All is computed in float32 and rounded once. Transformers 5.23 gives the same numbers where it reads the format.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from regraft.checkpoints.companions import Companions, find_companions
from regraft.checkpoints.convert import Progress, convert_checkpoint
from regraft.checkpoints.prepare import model_of
from regraft.checkpoints.quantization import block_step
from regraft.checkpoints.sharding import make_head
from regraft.checkpoints.source import CONFIG, INDEX, SINGLE, Source, open_checkpoint
from regraft.checkpoints.tiles import read_into
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError
from regraft.planning.model import Foreign
from regraft.report import CheckpointReport
from regraft.storage.beside import narrow
from regraft.storage.dtypes import DTYPES
from regraft.storage.folder import check_destination, copy_file, staged_folder
from regraft.storage.weights import open_source

Wide = npt.NDArray[np.float32]

_MODELOPT = "hf_quant_config.json"
_STEP = 1 << 20
"""Numbers that are computed at once, about."""
_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
_EXPONENTS = frozenset({"U8", "F8_E8M0"})
"""What scales that are powers of two are stored in."""
_MX_BYTES = 16
"""The bytes of MXFP4 that share a scale."""
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_HALVES = np.concatenate([_E2M1, -_E2M1])
_PAIRS: Wide = np.stack([np.tile(_HALVES, 16), np.repeat(_HALVES, 16)], axis=1)
"""The two numbers of every byte, the low half first."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a weight is made of its parts; the numbers are rows of the checkpoint's tensors."""

    name: str
    numbers: int
    """The tensor with the quantised numbers."""
    scales: int
    second: int | None = None
    """A scale for the whole weight besides."""
    divides: bool = False
    """Whether the second scale is a reciprocal."""
    turned: bool = False
    """Whether the last two dims change places (MXFP4's experts)."""
    pairs: bool = False
    """Whether a byte holds two numbers."""


def dequantize_checkpoint(
    src: Path,
    dst: Path,
    *,
    to: str,
    model: Path | None = None,
    source: str | None = None,
    foreign: Foreign | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CheckpointReport:
    """Convert a checkpoint whose quantised weights become bfloat16 first; ``dst`` is a folder and appears whole.

    ``options`` are those of ``convert_checkpoint``. On the way the dequantised weights lie on disk twice.

    Raises ``BadInputError`` where nothing is quantised, ``RefusedError`` where the method has no formula here, and what
    converting raises.
    """
    if dst.suffix == ".safetensors" and not dst.is_dir():
        message = "dequantising writes a folder, and this is a file's name"
        raise BadInputError(Finding("option", message, where=str(dst), fix="name a folder"))
    check_destination(src, dst, overwrite=overwrite)
    opened = open_checkpoint(src)
    config = model_of(opened, model)
    companions = find_companions(opened, config.data if config is not None else None)
    recipes = find_recipes(opened, companions)
    with staged_folder(dst, overwrite=overwrite) as staged:
        plain, made = staged / "plain", staged / "made"
        _write(opened, companions, recipes, plain)
        try:
            report = convert_checkpoint(
                plain,
                made,
                to=to,
                model=model,
                source=source,
                foreign=foreign,
                progress=progress,
                **options,
            )
        except RegraftError as error:
            raise _told_of(error, plain, src) from error
        shutil.rmtree(plain)
        for path in list(made.iterdir()):
            shutil.move(str(path), str(staged / path.name))
        made.rmdir()
    told = companions.quantization
    title = told.title if told is not None else ""
    report.tensors_in = len(opened.tensors)
    report.casts[f"{title} to BF16"] = len(recipes)
    report.notes.insert(
        0,
        f"{len(recipes)} weights were dequantised ({title} to bfloat16): their numbers are rounded products of the "
        "source's numbers and scales, and the scales are not kept, so there is no way back",
    )
    return report


def _told_of(error: RegraftError, plain: Path, src: Path) -> RegraftError:
    """An error about the dequantised weights on the way, as one about their source."""

    def named(text: str | None) -> str | None:
        return text and text.replace(str(plain), str(src))

    return type(error)(
        replace(
            each, where=named(each.where), message=named(each.message) or "", fix=named(each.fix)
        )
        for each in error.findings
    )


def find_recipes(source: Source, companions: Companions) -> dict[int, Recipe]:
    """How each quantised weight is made, by its id.

    Raises ``BadInputError`` where nothing is quantised, and ``RefusedError`` where there is no formula.
    """
    told = companions.quantization
    if told is None:
        message = "nothing in this checkpoint is quantised by a method that is known"
        fix = "leave out --dequantize; --dtype casts"
        raise BadInputError(Finding("option", message, where=source.where, fix=fix))
    recipes: dict[int, Recipe] = {}
    findings = []
    for owner in companions.weights().tolist():
        name = companions.headers.name(owner)
        recipe = _recipe(name, owner, companions, source, told.method)
        if recipe is not None:
            recipes[owner] = recipe
            continue
        findings.append(
            Finding(
                "packed",
                f"it is quantised with {told.title} ({told.evidence}), for which there is no formula here",
                where=source.where,
                key=name,
                fix="dequantise it with the library that quantised it; FP8, MXFP4 and NVFP4 are done here",
            )
        )
    if findings:
        raise RefusedError(findings)
    _check_scaled(source, companions, recipes)
    return recipes


def _check_scaled(source: Source, companions: Companions, recipes: Mapping[int, Recipe]) -> None:
    """Raises ``BadInputError`` for narrow floats without a scale: as they are they would stand for other numbers."""
    taken = set(companions.rows())
    tensors = source.tensors
    findings = [
        Finding(
            "missing",
            f"it is {tensors.dtypes[row]}, like the weights that have scales, and there is no scale for it",
            where=source.where,
            key=name,
            fix="give the whole checkpoint",
        )
        for row, name in enumerate(tensors.names)
        if tensors.dtypes[row] in _FP8 and row not in taken and row not in recipes
    ]
    if findings:
        raise BadInputError(findings)


def _recipe(
    name: str, owner: int, companions: Companions, source: Source, method: str
) -> Recipe | None:
    parts = {suffix: table[owner] for suffix, table in companions.of.items() if owner in table}
    dtypes = source.tensors.dtypes
    if "_blocks" in parts and "_scales" in parts:
        return Recipe(name, parts["_blocks"], parts["_scales"], turned=True, pairs=True)
    if "_zero_point" in parts or "_g_idx" in parts:
        return None
    scales = parts.get("_scale_inv", parts.get("_scale", parts.get("@scale")))
    if scales is None:
        return None
    if "_packed" in parts:
        return _recipe_of_packed(name, parts, scales, source)
    if owner >= len(source.tensors):
        return None
    if "_scale_2" in parts and dtypes[owner] == "U8":
        return Recipe(name, owner, scales, parts["_scale_2"], pairs=True)
    if dtypes[owner] == "F4" or (dtypes[owner] == "I8" and method == "fp8"):
        return Recipe(name, owner, scales, pairs=True)
    return Recipe(name, owner, scales) if dtypes[owner] in _FP8 else None


def _recipe_of_packed(
    name: str, parts: Mapping[str, int], scales: int, source: Source
) -> Recipe | None:
    """NVFP4 or MXFP4 of compressed-tensors; ``None`` for packed integers, and for floats of 6 bits."""
    tensors, numbers = source.tensors, parts["_packed"]
    if tensors.dtypes[numbers] != "U8":
        return None
    if "_global_scale" in parts:
        return Recipe(name, numbers, scales, parts["_global_scale"], divides=True, pairs=True)
    sizes = tensors.sizes[numbers], tensors.sizes[scales]
    if tensors.dtypes[scales] in _EXPONENTS and sizes[0] == _MX_BYTES * sizes[1]:
        return Recipe(name, numbers, scales, pairs=True)
    return None


class _Reader:
    """The tensors of a source, read in pieces."""

    def __init__(self, source: Source) -> None:
        self.source, self.files = source, [open_source(file) for file in source.files]

    def close(self) -> None:
        for file in self.files:
            file.close()

    def read(self, row: int, first: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """Elements of a tensor, flat."""
        tensors = self.source.tensors
        kind = DTYPES[tensors.dtypes[row]]
        dtype = kind.numpy if kind.per_cell == 1 else np.dtype(np.uint8)
        total = int(tensors.sizes[row]) // dtype.itemsize
        result = np.empty(total - first if count is None else count, dtype)
        at = int(tensors.starts[row]) + first * dtype.itemsize
        read_into(self.files[int(tensors.files[row])], result.view(np.uint8).data, at)
        return result

    def scales(self, row: int) -> Wide:
        """Scales as numbers; whole ones are exponents of two."""
        data = self.read(row).reshape(self.source.tensors.shapes[row])
        if data.dtype == np.uint8:
            made = np.ldexp(np.float32(1), np.minimum(data, 254).astype(np.int32) - 127)
            return np.where(data == 255, np.float32(np.nan), made)
        return data.astype(np.float32)


def pieces(recipe: Recipe, reader: _Reader, block: tuple[int, ...]) -> Iterator[npt.NDArray[Any]]:
    """A weight's numbers as bfloat16, in order, some rows at a time.

    Raises ``BadInputError`` where the scales do not fit the weight.
    """
    shape = reader.source.tensors.shapes[recipe.numbers]
    if 0 in shape:
        return
    scales = reader.scales(recipe.scales)
    second = np.float32(1)
    if recipe.second is not None:
        second = reader.scales(recipe.second).reshape(-1)[0]
    if recipe.turned:
        yield from _turned(recipe, reader, scales, shape)
        return
    *lead, rows, columns = (1,) * (2 - len(shape)) + shape
    if reader.source.tensors.dtypes[recipe.numbers] == "F4":
        columns //= 2
    width = 2 * columns if recipe.pairs else columns
    grid = scales.reshape(-1, *_grid_of(scales.shape, lead, recipe, reader))
    heights = [block_step(rows, grid.shape[1], block[0] if len(block) == 2 else None)]
    widths = [block_step(width, grid.shape[2], block[1] if len(block) == 2 else None)]
    if None in (*heights, *widths):
        raise _unfit(recipe, reader)
    high, wide = int(heights[0] or 1), int(widths[0] or 1)
    step = max(1, _STEP // max(width, 1))
    many = int(np.prod(lead, dtype=np.int64))
    for number in range(many):
        own = grid[number if len(grid) > 1 else 0]
        for first in range(0, rows, step):
            last = min(first + step, rows)
            start = (number * rows + first) * columns
            data = reader.read(recipe.numbers, start, (last - first) * columns)
            values = _PAIRS[data.view(np.uint8)] if recipe.pairs else data.astype(np.float32)
            values = values.reshape(last - first, width)
            spread = np.repeat(own[np.arange(first, last) // high], wide, axis=1)[:, :width]
            with np.errstate(all="ignore"):
                spread = spread / second if recipe.divides else spread * second
                yield (values * spread).astype(ml_dtypes.bfloat16)


def _turned(
    recipe: Recipe, reader: _Reader, scales: Wide, shape: tuple[int, ...]
) -> Iterator[npt.NDArray[Any]]:
    """Experts of MXFP4, which are stored (experts, out, groups, 16) and used as (experts, in, out)."""
    if len(shape) != 4 or scales.shape != shape[:3]:
        raise _unfit(recipe, reader)
    experts, out, groups, bytes_ = shape
    size = out * groups * bytes_
    for expert in range(experts):
        data = reader.read(recipe.numbers, expert * size, size)
        made = np.empty((out, groups * bytes_ * 2), ml_dtypes.bfloat16)
        step = max(1, _STEP // made.shape[1])
        numbers = data.reshape(out, groups, bytes_)
        for first in range(0, out, step):
            rows = slice(first, first + step)
            values = _PAIRS[numbers[rows]].reshape(-1, groups, bytes_ * 2)
            made[rows] = (values * scales[expert, rows, :, None]).reshape(-1, made.shape[1])
        yield np.ascontiguousarray(made.T)


def _grid_of(
    shape: tuple[int, ...], lead: list[int], recipe: Recipe, reader: _Reader
) -> tuple[int, int]:
    """How many scales there are, down and across."""
    own = shape[len(lead) :] if shape[: len(lead)] == tuple(lead) else shape
    if all(size == 1 for size in own):
        return 1, 1
    if len(own) == 2:
        return own[0], own[1]
    if len(own) == 1:
        return own[0], 1
    raise _unfit(recipe, reader)


def _unfit(recipe: Recipe, reader: _Reader) -> BadInputError:
    shapes = reader.source.tensors.shapes
    message = (
        f"its scales have the shape {list(shapes[recipe.scales])}, which does not fit its numbers, "
        f"{list(shapes[recipe.numbers])}"
    )
    fix = "give the whole checkpoint, with its own config.json, whose quantization_config says weight_block_size"
    return BadInputError(
        Finding("shape", message, where=reader.source.where, key=recipe.name, fix=fix)
    )


def _write(
    source: Source, companions: Companions, recipes: Mapping[int, Recipe], folder: Path
) -> None:
    """The checkpoint with bfloat16 weights in place of quantised ones, in the layout that it has."""
    folder.mkdir()
    tensors = source.tensors
    taken = set(companions.rows())
    rows_of: dict[int, list[int]] = {number: [] for number in range(len(source.files))}
    for row in np.lexsort((tensors.starts, tensors.files)).tolist():
        if row not in taken or row in recipes:
            rows_of[int(tensors.files[row])].append(row)
    for owner, recipe in recipes.items():
        if owner >= len(tensors):
            rows_of[int(tensors.files[recipe.numbers])].append(owner)
    places: dict[str, str] = {}
    reader = _Reader(source)
    try:
        for number, file in enumerate(source.files):
            name = file.name
            if source.is_bin or not name.endswith(".safetensors"):
                count = len(source.files)
                name = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE
            target = folder / name
            _write_file(target, rows_of[number], file.metadata, reader, companions, recipes)
            places |= {companions.headers.name(row): name for row in rows_of[number]}
    finally:
        reader.close()
    if len(source.files) > 1 or source.index is not None:
        index = {"metadata": dict(source.index or {}), "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in source.others:
        if path.name != _MODELOPT:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source.root / path, folder / path)
    if source.config is not None:
        config = plain_config(source.config_data)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        shutil.copymode(source.config.path, folder / CONFIG)
    kept = [*source.others, Path(CONFIG)]
    narrow(folder, [file.path for file in source.files], kept=kept)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of quantisation.

    >>> plain_config({"a": 1, "quantization_config": {}, "text_config": {"quantization_config": {}}})
    {'a': 1, 'text_config': {}}
    """
    return {
        key: plain_config(value)
        if isinstance(value, Mapping) and key.endswith("_config")
        else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }


def _write_file(
    path: Path,
    rows: list[int],
    metadata: Mapping[str, str],
    reader: _Reader,
    companions: Companions,
    recipes: Mapping[int, Recipe],
) -> None:
    headers, tensors = companions.headers, reader.source.tensors
    dtypes = {row: "BF16" if row in recipes else tensors.dtypes[row] for row in rows}
    rows = sorted(rows, key=lambda row: -DTYPES[dtypes[row]].bits)
    table, at = [], 0
    for row in rows:
        shape = headers.shapes[row]
        size = (
            2 * int(np.prod(shape, dtype=np.int64)) if row in recipes else int(tensors.sizes[row])
        )
        table.append((headers.name(row), dtypes[row], shape, at, at + size))
        at += size
    with path.open("wb") as out:
        out.write(make_head(iter(table), dict(metadata), str(path)))
        for row in rows:
            if row in recipes:
                for piece in pieces(recipes[row], reader, companions.block):
                    out.write(piece.view(np.uint8).data)
                continue
            item = max(DTYPES[tensors.dtypes[row]].bits // 8, 1)
            total = int(tensors.sizes[row]) // item
            for first in range(0, total, _STEP):
                piece = reader.read(row, first, min(_STEP, total - first))
                out.write(piece.view(np.uint8).data)
