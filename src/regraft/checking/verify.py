"""Whether two checkpoints or two adapters are equivalent: bit for bit, or in what they add to their bases."""

from __future__ import annotations

import os
from collections.abc import Callable

from regraft.bridges.transformers.files import InstalledTransformers
from regraft.checking.certificate import BUDGET, TOLERANCE, AdapterVerification, verify_adapters
from regraft.checkpoints.verify import Verification
from regraft.checkpoints.verify import verify as verify_checkpoints
from regraft.report import logged
from regraft.rules.book import Rules
from regraft.sources.resolve import resolved


@logged
def verify(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    source: str | None = None,
    tolerance: float = TOLERANCE,
    budget: float = BUDGET,
    architecture: str | None = None,
    rules: Rules = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification | AdapterVerification:
    """Check that two checkpoints, or two adapters, are equivalent; each may be in a layout and a dialect of its own.

    Checkpoints are compared bit for bit. Of adapters, what every target adds to its base is compared in float64,
    entry by entry.

    Args:
        src: what `regraft.convert` takes.
        dst: the same in another layout, or in this one.
        model: the base model's folder or its ``config.json``.
        source: of adapters: the dialect of ``src``, how its experts are packed, or the family of its model.
        tolerance: of adapters: the relative error up to which two deltas are equal.
        budget: of adapters: seconds after which random vectors stand for the rest; the result names it.
        architecture: the class of the model, where its ``config.json`` names none that transformers has.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.
        progress: told how far it is.

    Returns:
        What was compared: ``equal``, and ``differences``.

    Raises:
        BadInputError: one of them is wrong in itself.
        UnmatchedKeysError: keys that no rule matches.
        AmbiguousError: more than one reading fits.
    """
    foreign = InstalledTransformers()
    with resolved(
        src, source=source, model=model, architecture=architecture, rules=rules, beside=[dst]
    ) as found:
        one, (other,), base = found.path, found.beside, found.model
        if not found.is_adapter:
            return verify_checkpoints(one, other, model=base, progress=progress, foreign=foreign)
        return verify_adapters(one, other, base, tolerance, progress, foreign, budget, found.given)
