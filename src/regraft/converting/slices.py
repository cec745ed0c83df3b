"""Slices of a checkpoint in another layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from regraft.bridges.transformers.files import InstalledTransformers
from regraft.checkpoints.prepare import Prepared, prepare
from regraft.checkpoints.slices import Boxes, Slices, cut
from regraft.dialects.names import layout_named, source_named
from regraft.layouts.spelled import LayoutName
from regraft.rules.book import Rules, only_books
from regraft.rules.said import saying
from regraft.sources.places import keep_with, leave, locate, opened, renaming


def slices(
    src: str | Path,
    *,
    to: LayoutName | str,
    names: Iterable[str] | None = None,
    box: Boxes = None,
    model: str | Path | None = None,
    source: LayoutName | str | None = None,
    rules: Rules = (),
) -> Slices:
    """Which bytes of a checkpoint some parts of its tensors in another layout are made of. Reads headers only.

    Args:
        src: the checkpoint, a folder or a file.
        to: the layout, such as ``"transformers-v5"``.
        names: tensors of the result; all of them if left out.
        box: the part that is wanted: for each dim a pair ``(from, to)``, a ``slice``, a list of pairs, or ``None`` for
            all of it. One for all tensors, a mapping from names to such, or a function of a name and a shape. Tensors
            without one are wanted whole.
        model: the model's folder or config, where there is none beside the weights.
        source: the layout that the checkpoint is in, where its names do not tell.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.

    Returns:
        The slices, one for each tensor: ``runs`` are the bytes that they are made of, and ``read()`` reads them.

    Raises:
        BadInputError: a name that the result does not have, or a box that does not fit.
        UnmatchedKeysError, AmbiguousError, RefusedError: as ``convert`` does.

    >>> found = slices("tests/golden/bases/mixtral", to="transformers-v5",
    ...                names=["model.layers.0.mlp.experts.down_proj"], box=[(0, 1)])
    >>> found[0].shape, [run.size for run in found.runs] == [found.bytes]
    ((1, 16, 24), True)
    """
    with renaming():
        before = opened()
        try:
            found = cut(prepare_slices(locate(src), to, model, source, rules), names, box)
        except BaseException:
            leave(before)
            raise
        keep_with(found, before)
        return found


def prepare_slices(
    src: str | Path,
    to: LayoutName | str,
    model: str | Path | None = None,
    source: LayoutName | str | None = None,
    rules: Rules = (),
) -> Prepared:
    """The conversion that slices are cut from."""
    with only_books(rules):
        given = source_named(source, adapter=False)
        with saying(family=given.family):
            return prepare(
                locate(src),
                layout_named(to, adapter=False).name,
                model=None if model is None else locate(model),
                source_layout=given.name,
                foreign=InstalledTransformers(),
            )
