"""Which tensors of a model are one, by its class and its config.

Source: ``PreTrainedModel.get_expanded_tied_weights_keys`` of transformers 5.23.0, which reads what each model in a
model declares; ``tie_embeddings_and_encoder_decoder`` of 4.57.6, which goes by the text model's config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from regraft.checkpoints.ties import FIELD


@dataclass(frozen=True, slots=True)
class Ties:
    """The tied tensors of a model, under its own names."""

    owners: dict[str, str]
    """For each tied tensor the one whose values it has."""
    heads: frozenset[str]
    """The weights of output embeddings."""

    def below(self, path: str) -> Ties:
        """The same in a model that has this one at a path."""
        owners = {f"{path}.{one}": f"{path}.{other}" for one, other in self.owners.items()}
        return Ties(owners, frozenset(f"{path}.{name}" for name in self.heads))


def ties_of(built: Any, config: Any) -> Ties:
    """The ties of a model that was built from a config, as the text model's part of the config has it.

    Two releases read two fields: the text model's is what transformers 4 goes by, and where transformers 5 reads
    another value for the whole model, it does not tie what differs.
    """
    tied = getattr(config.get_text_config(decoder=True), FIELD, None)
    before = getattr(config, FIELD, None)
    if not isinstance(tied, bool) or before == tied:
        owners = built.get_expanded_tied_weights_keys(all_submodels=True)
    else:
        setattr(config, FIELD, tied)
        try:
            owners = built.get_expanded_tied_weights_keys(all_submodels=True)
        finally:
            setattr(config, FIELD, before)
    return Ties({name: _end(owners, name) for name in owners}, frozenset(_heads(built)))


def _end(owners: dict[str, str], name: str) -> str:
    """The last of a chain of owners: a head may follow an embedding that follows another one."""
    seen = {name}
    while (owner := owners.get(name)) is not None and owner not in seen:
        seen.add(owner)
        name = owner
    return name


def _heads(built: Any) -> Iterator[str]:
    outputs = {id(part): part for part in map(_output_of, built.modules()) if part is not None}
    for path, part in built.named_modules(remove_duplicate=False):
        if id(part) in outputs:
            yield f"{path}.weight"


def _output_of(part: Any) -> Any:
    """The output embeddings of one model in a model; ``None`` where it has none, or does not say."""
    ask = getattr(part, "get_output_embeddings", None)
    try:
        return ask() if ask is not None else None
    except (AttributeError, NotImplementedError):
        return None
