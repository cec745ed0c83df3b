"""Conformance: whether a dialect or a rule book keeps the law of the house. For authors of both, in their own tests.

from regraft.testing import check_dialect
def test_mine(tmp_path):
check_dialect(MyDialect(), tmp_path)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from regraft.adapters.detect import Known
from regraft.adapters.families.base import Family, NoImageError, Part
from regraft.adapters.families.table import also
from regraft.adapters.form import Array, Lora, delta
from regraft.adapters.protocol import Opened
from regraft.adapters.scale import Scale
from regraft.dialects.base import Capabilities, Dialect, PlainFile
from regraft.dialects.registry import registered as also_dialect
from regraft.layouts.graph import edges_to
from regraft.layouts.names import Layout
from regraft.planning.side import Side
from regraft.rules.book import Book

_MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.up_proj",
)


def check_dialect(dialect: Dialect, scratch: Path, seed: int = 0) -> None:
    """Write random adapters in a dialect, read them back, and compare what they add, in float64.

    ``scratch`` is an empty folder. Covers unequal ranks and scales, alphas that are not whole, 16-bit factors and,
    where the dialect's capabilities allow them, saved tensors.

    Raises ``AssertionError`` with what differs.
    """
    random = np.random.default_rng(seed)
    for number, (ranks, alphas, dtype) in enumerate(
        (
            ((4, 4, 4), (8, 8, 8), np.float32),
            ((4, 2, 8), (8, 3, 1), np.float32),
            ((1, 1, 1), (1, 2, 4), np.float16),
            ((3, 5, 2), (0.5, 7, 2), np.float64),
        )
    ):
        source = _adapter(random, ranks, alphas, dtype, dialect.capabilities)
        folder = scratch / f"{dialect.name}-{number}"
        back = write_and_open(dialect, source, folder)
        _compare(
            dialect.name, deltas_of(source), deltas_of(back), scales=dialect.capabilities.scales
        )


def write_and_open(dialect: Dialect, source: Opened, folder: Path) -> Opened:
    """Write an adapter in a dialect into a new folder, and open what was written."""
    known = Known((), {}, None, None, "made for a test")
    to = Layout("transformers-v5")
    writer = dialect.writer(source, known, to)
    from regraft.adapters.ladder import unmoved_images

    factors = source.read(Side((), to.name, {})).adapter.factors
    assert factors is not None, "a plain LoRA was expected"
    blob = writer.write_lora(unmoved_images(factors), [], [], {}, ())
    from regraft.adapters.convert import Converted
    from regraft.report import AdapterReport

    report = AdapterReport(source.name, "LORA", to.name, to.name, [])
    folder.mkdir(parents=True)
    dialect.save(folder, source, Converted(blob.config, blob.tensors, blob.metadata, report))
    told = dialect.sniff(folder)
    assert told is not None, f"{dialect.name} does not recognise what it wrote"
    found = dialect.find(folder)
    assert len(found.folders) == 1, f"{dialect.name} finds {len(found.folders)} adapters in one"
    return dialect.open(found.folders[0], found.root, found.weights)


def deltas_of(opened: Opened) -> dict[str, Array]:
    """What an adapter of plain LoRAs adds, in float64 (out, in), by the key of the base tensor."""
    factors = opened.read(Side((), "transformers-v5", {})).adapter.factors
    assert factors is not None, "a plain LoRA was expected"
    found = {}
    for keys, _ in factors.kinds:
        for key, i in zip(keys.names(), keys.ids.tolist(), strict=True):
            found[key] = delta(Lora(factors.a[i], factors.b[i], factors.scales[i]))
    return found


@contextmanager
def registered(what: Dialect | type[Family]) -> Iterator[None]:
    """Let there be a dialect or a family more, in this thread, as long as this lasts."""
    added = also(what) if isinstance(what, type) else also_dialect(what)
    with added:
        yield


def check_family(family: Family, parts: Sequence[Part]) -> list[str]:
    """Compare what a family makes of rows, columns, transposes and joints with the same done to its deltas, in float64.

    ``parts`` are two modules of one size. A family may have no image (`NoImageError`); what it has must be exact.

    Returns the names of the operations that it follows. Raises ``AssertionError`` where one is wrong.
    """
    one, other = parts
    deltas = [family.delta(part, None) for part in parts]
    rows, columns = np.arange(one.out)[::-2], np.arange(one.into)[1::2]
    operations: dict[str, tuple[Callable[[], Part], npt.NDArray[np.float64]]] = {
        "take": (lambda: family.take(one, rows, columns), deltas[0][np.ix_(rows, columns)]),
        "turn": (lambda: family.turn(one), deltas[0].T),
        "join out": (
            lambda: family.join_out([one, other], [one.out, other.out]),
            np.concatenate(deltas),
        ),
        "join in": (
            lambda: family.join_in([one, other], [one.into, other.into]),
            np.concatenate(deltas, axis=1),
        ),
    }
    follows = []
    for name, (operate, want) in operations.items():
        try:
            made = operate()
        except NoImageError:
            continue
        got = family.delta(made, None)
        assert got.shape == want.shape == (made.out, made.into), f"{name}: {got.shape}"
        assert np.allclose(got, want, rtol=1e-5, atol=1e-6), f"{name}: another delta"
        assert dict(family.read(family.write(made))).keys() == made.tensors.keys(), name
        follows.append(name)
    return follows


def check_book(
    book: Book, shapes: dict[str, tuple[int, ...]], sizes: dict[str, object] | None = None
) -> None:
    """Carry labelled elements through a book and back: every element arrives once, and comes back.

    ``shapes`` are tensors of its left layout by key; ``sizes`` is the model's config where the book asks for it.

    Raises ``AssertionError``, or what planning raises where a key is not explained.
    """
    from regraft.arrays.apply import apply_plan
    from regraft.names.keys import group_names
    from regraft.planning.build import build_plan
    from regraft.planning.model import Scope
    from regraft.planning.plan import Headers

    scopes = {book.name: Scope(sizes or {})}
    names = list(shapes)
    counts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes.values())])
    tensors = [
        np.arange(first, first + int(np.prod(shape)), dtype=np.int64).reshape(shape)
        for first, shape in zip(counts.tolist(), shapes.values(), strict=False)
    ]

    def carry(names: Sequence[str], arrays: Sequence[Array], target: str) -> dict[str, Array]:
        headers = Headers(
            group_names(list(names)), [a.shape for a in arrays], [a.dtype.name for a in arrays]
        )
        plan = build_plan(headers, edges_to([book], target), scopes=scopes)
        return apply_plan(plan, list(arrays))

    there = carry(names, tensors, book.right)
    labels = np.sort(np.concatenate([x.reshape(-1) for x in there.values()]))
    assert np.array_equal(labels, np.arange(counts[-1])), "an element is lost, or stands twice"
    back = carry(list(there), list(there.values()), book.left)
    assert back.keys() == shapes.keys(), (
        f"other keys come back: {sorted(back.keys() ^ shapes.keys())}"
    )
    for name, tensor in zip(names, tensors, strict=True):
        assert np.array_equal(back[name], tensor), f"{name} does not come back"


def _adapter(
    random: np.random.Generator,
    ranks: Sequence[int],
    alphas: Sequence[float],
    dtype: npt.DTypeLike,
    can: Capabilities,
) -> PlainFile:
    loras = {}
    for number, (module, rank, alpha) in enumerate(zip(_MODULES, ranks, alphas, strict=True)):
        out, into = 8 + 2 * number, 12 + 3 * number
        a = random.standard_normal((rank, into)).astype(dtype)
        b = random.standard_normal((out, rank)).astype(dtype)
        loras[module + ".weight"] = Lora(a, b, Scale(rank, alpha))
    tensors = {}
    for key, lora in loras.items():
        tensors[key + ".a"], tensors[key + ".b"] = lora.a, lora.b
    return PlainFile("", "a random adapter", {}, tensors, loras)


def _compare(name: str, want: dict[str, Array], got: dict[str, Array], *, scales: bool) -> None:
    assert want.keys() == got.keys(), (
        f"{name}: other modules come back: {sorted(want.keys() ^ got.keys())}"
    )
    for key, wanted in want.items():
        assert wanted.shape == got[key].shape, f"{name}: {key} comes back as {got[key].shape}"
        most = float(np.abs(wanted).max())
        # A ratio that was folded is rounded to float32 once.
        limit = (1e-12 if scales else 1e-6) * max(most, 1e-30)
        off = float(np.abs(wanted - got[key]).max())
        assert off <= limit, f"{name}: {key} is off by {off:.3g}, its largest entry is {most:.3g}"


__all__ = [
    "check_book",
    "check_dialect",
    "check_family",
    "deltas_of",
    "registered",
    "write_and_open",
]
