"""Numbers and shapes in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from regraft.report import Target, count_in_words

LOSSLESS = "lossless: all values copied bit for bit"
"""What is said where `what_changed` has nothing to say."""


def shape_in_words(shape: Iterable[int]) -> str:
    """A shape as people write it.

    >>> shape_in_words((2, 3)), shape_in_words(())
    ('2 x 3', 'scalar')
    """
    return " x ".join(map(str, shape)) or "scalar"


def what_changed(targets: Sequence[Target], casts: Mapping[str, int] | None = None) -> list[str]:
    """What of a result is not bit for bit its source, in words; empty where all of it is.

    ``casts`` has the number of tensors of each change of dtype (``F32 to BF16``).

    >>> from regraft.values import replace
    >>> one = Target("a", 4, 4, 1.0, "rule", exact=True)
    >>> what_changed([one]), what_changed([one, replace(one, exact=False)])
    ([], ['1 of 2 targets rescaled'])
    """
    near = [target.error for target in targets if target.rung == "svd"]
    stands_in = sum(target.rung not in ("family", "svd", "merged") for target in targets)
    rescaled = sum(target.rung == "family" and not target.exact for target in targets)
    merged = {target.key for target in targets if target.rung == "merged"}
    told = []
    if near:
        count = count_in_words(len(near), "target")
        told.append(f"{count} approximated, off by {max(near):.2g} at most")
    if stands_in:
        told.append(f"{count_in_words(stands_in, 'target')} kept exactly as LoRA")
    if rescaled:
        told.append(f"{rescaled} of {len(targets)} targets rescaled")
    if merged:
        told.append(f"{count_in_words(len(merged), 'tensor')} merged, each rounded once")
    told += [f"cast: {count} from {what}" for what, count in (casts or {}).items()]
    return told
