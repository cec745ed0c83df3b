"""Learning a book from one config at three sizes, of which one is only checked; for converters of state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regraft.bridges.transformers.probing import outline_of
from regraft.learning.learn import learn_pairs
from regraft.learning.shrink import shrink
from regraft.learning.watch import pair_of


def learn_config(
    name: str,
    config: dict[str, Any],
    converter_of: Callable[[dict[str, Any]], Callable[..., Any]],
    tool: str,
    *,
    with_torch: bool,
    source: str,
) -> Any:
    """What is learned of transformers 4's layout and a tool's; ``converter_of`` makes the converter for a config."""
    pairs, kinds = [], {}
    for size in range(3):
        known = outline_of(shrink(config, size), name, "transformers-v4")
        kinds = kinds or known.kinds
        convert = converter_of(known.config)
        where = f"size {size + 1}"
        pairs.append(
            pair_of(convert, known.shapes, known.config, with_torch=with_torch, where=where)
        )
    return learn_pairs(
        pairs,
        layouts=("transformers-v4", tool),
        name=f"{tool}_{name}",
        kind_of=(kinds.get, lambda _: None),
        source=source,
    )
