"""What a probe is made for: a config, a class of transformers, or a checkpoint whose headers are made small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import combinations
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import BadInputError, Finding
from regraft.errors.extras import install_line
from regraft.learning.probe import MOST
from regraft.learning.relate import Names, isolated
from regraft.learning.shrink import shrink
from regraft.storage.json_files import load_json

if TYPE_CHECKING:
    from regraft.bridges.transformers.probing import Outline


def outlines(
    model: str, count: int, layout: str | None, fixed: Mapping[str, Any] | None = None
) -> list[Outline]:
    """Models of so many sizes with the names of a model: its config.json, its folder, or a class of transformers.

    ``layout`` is that of the names, ``fixed`` are fields of the config that are not made small.

    Raises ``BadInputError``.
    """
    path = Path(model)
    if not path.exists():
        if find_spec("transformers") is None:
            message = "no such file or folder, and no transformers to ask for a model of this type"
            fix = install_line("transformers")
            raise BadInputError(Finding("not-found", message, where=model, fix=fix))
        from regraft.bridges.transformers.probing import default_config

        return _built(default_config(model), model, count, layout, fixed)
    file = (
        path if path.suffix == ".json" else (path if path.is_dir() else path.parent) / "config.json"
    )
    data = load_json(file) if file.is_file() else {}
    if data and find_spec("transformers") is not None:
        try:
            return _built(data, str(file), count, layout, fixed)
        except BadInputError:
            if path == file:
                raise
    if path == file:
        message = "a config alone needs transformers, which is not installed"
        fix = f"{install_line('transformers')}, or give the model's folder with its weights"
        raise BadInputError(Finding("probe", message, where=str(file), fix=fix))
    return _from_headers(path, data, count, fixed)


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
    """The names of a checkpoint with small shapes, where its config says what its sizes are."""
    from regraft.bridges.transformers.probing import Outline
    from regraft.learning.content import open_content

    shapes = {name: t.shape for name, t in open_content(path).tensors.items()}
    made = []
    for size in range(count):
        small = shrink(config, size, fixed)
        made.append(Outline(_small(shapes, config, small), {}, small))
    total = max(sum(map(prod, each.shapes.values())) for each in made)
    if total > MOST:
        message = f"its config does not say what its sizes are: with those that it says, {total} elements are left"
        raise BadInputError(
            Finding("probe", message, where=str(path), fix="give a checkpoint of a small model")
        )
    if len(made) > 1 and made[0].shapes == made[1].shapes:
        return made[:1]
    return made


def _small(
    shapes: Mapping[str, tuple[int, ...]], old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    sizes = _sizes(old, new)
    layers = {
        old[name]: new[name]
        for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        if isinstance(old.get(name), int)
    }
    names = Names(shapes)
    result = {}
    for name, shape in shapes.items():
        template, numbers = names[name]
        alone = isolated(template)
        if any(
            n >= most
            for n, single in zip(numbers, alone, strict=True)
            if single
            for total, most in layers.items()
            if n < total
        ):
            continue
        result[name] = tuple(sizes.get(n, n) for n in shape)
    return result


def _sizes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[int, int]:
    """For sizes that the config's fields and their products say what they are in the small model."""
    fields = [k for k, v in old.items() if isinstance(v, int) and not isinstance(v, bool) and v > 1]
    changed: Sequence[str] = [k for k in fields if old[k] != new[k]]
    table: dict[int, int] = {}
    for one in changed:
        table.setdefault(old[one], new[one])
    for one, other in combinations(changed, 2):
        table.setdefault(old[one] * old[other], new[one] * new[other])
    return table
