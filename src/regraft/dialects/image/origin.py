"""What a file was before it was converted, in one entry of the header: with it the way back is bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from regraft.adapters.form import Array, rescale
from regraft.adapters.provenance import digest_all
from regraft.adapters.scale import Number, Scale
from regraft.dialects.image.delta import LORA, Delta
from regraft.errors import RefusedError
from regraft.storage.json_files import told_in_json

KEY = "regraft.origin"
"""Our entry of the header."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A file as it was."""

    names: tuple[str, ...] = ()
    """The dialects that its names and its header are of."""
    layouts: tuple[str, ...] = ()
    """The layouts that its denoiser's modules are named in."""
    families: tuple[str, ...] = ()
    """The families that it was for; where there are several, the file is the same for all of them."""
    added: tuple[str, ...] = ()
    """Keys of weights whose LoRA of zeros the dialect asks for."""
    header: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    """The dtype of most of its alphas."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Of those that have another one, by key."""
    bare: tuple[str, ...] = ()
    """Modules that had no alpha of their own; ``*`` for all of them."""
    alphas: Mapping[str, Number] = field(default_factory=dict)
    """Alphas that the file could not keep, by module."""
    digest: str = ""
    """Of its tensors."""

    def alpha_dtype(self, key: str) -> str | None:
        """The dtype that an alpha had."""
        return self.dtypes.get(key, self.dtype)

    def had_no_alpha(self, stem: str) -> bool:
        """Whether a module had no alpha of its own."""
        return "*" in self.bare or stem in self.bare


def read_origin(metadata: Mapping[str, str]) -> Origin | None:
    """What we noted when we made a file; ``None`` where we did not."""
    data = told_in_json(metadata.get(KEY, ""))
    if not isinstance(data, dict):
        return None
    tables = {k: v for k in ("header", "dtypes", "alphas") if isinstance(v := data.get(k), dict)}
    lists = {
        k: tuple(map(str, v))
        for k in ("names", "layouts", "families", "added", "bare")
        if isinstance(v := data.get(k), list)
    }
    texts = {k: v for k in ("dtype", "digest") if isinstance(v := data.get(k), str)}
    found: dict[str, Any] = {**tables, **lists, **texts}
    return Origin(**found)


def write_origin(
    names: tuple[str, ...],
    layouts: tuple[str, ...],
    families: tuple[str, ...],
    added: tuple[str, ...],
    header: Mapping[str, str],
    tensors: Mapping[str, Array],
    alphas: Mapping[str, Number],
    bare: Sequence[str],
) -> str:
    """The entry for a file that is made of another one."""
    dtypes = {k: t.dtype.name for k, t in tensors.items() if k.endswith(".alpha")}
    usual = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else None
    data: dict[str, Any] = {
        "names": list(names),
        "layouts": list(layouts),
        "families": list(families),
        "added": list(added),
        "header": dict(header),
        "digest": digest_all(tensors),
    }
    if usual is not None:
        data["dtype"] = usual
        data["dtypes"] = {k: v for k, v in dtypes.items() if v != usual}
    if bare:
        data["bare"] = list(bare) if usual is not None else ["*"]
    if alphas:
        data["alphas"] = dict(alphas)
    return json.dumps({k: v for k, v in data.items() if v})


def unfolded(delta: Delta, alpha: Number | None) -> Delta:
    """A LoRA at the alpha that it had, where its up stays exact; as it is otherwise."""
    if delta.algebra != LORA or not isinstance(alpha, (int, float)) or not alpha:
        return delta
    try:
        ratio = delta.scale.ratio_to(Scale(delta.rank, alpha))
        if ratio == 1.0:
            return delta
        up, exact = rescale(delta.tensors["up"], ratio)
    except RefusedError:
        return delta
    if not exact:
        return delta
    return replace(delta, tensors={**delta.tensors, "up": up}, alpha=alpha, rslora=False)
