"""What a probe is made for: a config, a class of transformers, or a checkpoint whose headers are made small."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from math import prod
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import BadInputError, Finding, RegraftError
from regraft.errors.extras import install_line
from regraft.learning.content import open_content
from regraft.learning.headers import resized
from regraft.learning.probe import MOST
from regraft.learning.relate import Names
from regraft.learning.shrink import shrink
from regraft.storage.json_files import load_json

if TYPE_CHECKING:
    from regraft.bridges.transformers.probing import Outline


def outlines(
    model: str,
    count: int,
    layout: str | None,
    fixed: Mapping[str, Any] | None = None,
    headers: str | PathLike[str] | None = None,
) -> list[Outline]:
    """Models of so many sizes with the names of a model: its config.json, its folder, or a class of transformers.

    ``layout`` is that of the names, ``fixed`` are fields of the config that are not made small. Where ``headers`` names
    a checkpoint, or transformers does not know the model, or most of the folder's weights have other names, the names
    are those of the weights, and the last size is their own.

    Raises ``BadInputError``.
    """
    path = Path(model)
    if not path.exists():
        if find_spec("transformers") is None:
            message = "no such file or folder, and no transformers to ask for a model of this type"
            fix = install_line("transformers")
            raise BadInputError(Finding("not-found", message, where=model, fix=fix))
        from regraft.bridges.transformers.probing import default_config

        data = default_config(model)
        if headers is not None:
            return _from_headers(Path(headers), data, count, fixed)
        return _built(data, model, count, layout, fixed)
    file = (
        path if path.suffix == ".json" else (path if path.is_dir() else path.parent) / "config.json"
    )
    data = load_json(file) if file.is_file() else {}
    if headers is not None:
        return _from_headers(Path(headers), data, count, fixed)
    beside = file.parent if path == file else path
    weights = _headers_of(beside)
    if data and find_spec("transformers") is not None:
        try:
            built = _built(data, str(file), count, layout, fixed)
        except BadInputError:
            if weights is None:
                raise
        else:
            if weights is None or _are_named(weights, built[0].shapes):
                return built
    if weights is None and path == file:
        message = "a config alone needs transformers, which is not installed"
        fix = (
            f"{install_line('transformers')}, or give a checkpoint of it, too: --headers CHECKPOINT"
        )
        raise BadInputError(Finding("probe", message, where=str(file), fix=fix))
    return _from_headers(beside, data, count, fixed)


def _headers_of(path: Path) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of a checkpoint; ``None`` where there is none that can be read."""
    try:
        return {name: t.shape for name, t in open_content(path).tensors.items()} or None
    except RegraftError:
        return None


def _are_named(weights: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """Whether at least some of a checkpoint's tensors are called as those of a model are."""
    known = {template for template, _ in Names(names).split.values()}
    mine = {template for template, _ in Names(weights).split.values()}
    return 2 * len(mine & known) >= len(mine) or not mine


def _built(
    data: Mapping[str, Any],
    where: str,
    count: int,
    layout: str | None,
    fixed: Mapping[str, Any] | None,
) -> list[Outline]:
    from regraft.bridges.transformers.probing import outline_of

    return [outline_of(shrink(data, size, fixed), where, layout) for size in range(count)]


def _from_headers(
    path: Path, config: Mapping[str, Any], count: int, fixed: Mapping[str, Any] | None
) -> list[Outline]:
    """A checkpoint's names with other shapes, as far as its config says what its sizes are; last those that it has."""
    from regraft.bridges.transformers.probing import Outline

    shapes = {name: t.shape for name, t in open_content(path).tensors.items()}
    every = []
    for size in range(count):
        small_shapes, small = resized(shapes, config, size, fixed)
        every.append(Outline(small_shapes, {}, small, from_headers=True))
    made = [each for each in every if _elements(each) <= MOST and each.shapes != shapes]
    own = Outline(shapes, {}, dict(config), from_headers=True)
    if _elements(own) <= MOST and all(config.get(k) == v for k, v in (fixed or {}).items()):
        made = [*made[: count - 1], own]
    if not made:
        left = min(map(_elements, every))
        message = f"its config does not say what its sizes are: with those that it says, {left} elements are left"
        fix = "give a checkpoint of a small model"
        raise BadInputError(Finding("probe", message, where=str(path), fix=fix))
    return made


def _elements(outline: Outline) -> int:
    return sum(map(prod, outline.shapes.values()))
