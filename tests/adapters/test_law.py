"""The law: convert(W + dW) == convert(W) + delta(convert(adapter))."""

import numpy as np
import pytest
from generated import as_stored, factors_on, kind_equations, shapes_and_kinds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from making import headers_of, plan_of, rule_book, same_bits

from regraft.adapters.components import Record
from regraft.adapters.form import Factors, delta
from regraft.adapters.move import images
from regraft.adapters.provenance import (
    KEY,
    KeptTable,
    Origin,
    read_remembered,
    write_remembered,
)
from regraft.adapters.scale import Scale
from regraft.arrays.apply import apply_plan
from regraft.errors import RefusedError
from regraft.planning.blocks import landings_of


def book_for(made):
    kinds = {
        f"{name}_kind": [t.kind for t in side]
        for name, side in (("left", made.left), ("right", made.right))
    }
    return rule_book(made.text, **kinds)


def factors_by_id(low, shapes):
    """The factors with headers of their base tensors."""
    present = {key: shapes[key][0] for key in low.a}
    return present, Factors(
        headers_of(present),
        [low.a[k] for k in present],
        [low.b[k] for k in present],
        [low.scales[k] for k in present],
    )


def convert(made, low, reverse=False, fast=True, record=None):
    """The converted LoRAs by key; absent keys have none."""
    present, factors = factors_by_id(low, shapes_and_kinds(made, made.sides(reverse)[0]))
    plan = plan_of(book_for(made), present, "old" if reverse else "new", partial=True)
    record = Record() if record is None else record
    result = {}
    for landed in landings_of(plan):
        for image in images(landed, factors, factors.headers.names(), record, fast=fast):
            assert len(image.loras) == len(image.keys)
            for key, lora in zip(image.keys.names(), image.loras, strict=True):
                assert key not in result
                if lora is not None:
                    result[key] = lora
    return result


def dense(made, low, reverse=False):
    """dW of the side that is read: zero where there is no adapter."""
    shapes = shapes_and_kinds(made, made.sides(reverse)[0])
    return {
        k: low.delta(k, kind) if k in low.a else np.zeros(shape)
        for k, (shape, kind) in shapes.items()
    }


def deltas(made, loras, reverse=False):
    """dW of the side that is written, from the converted factors."""
    shapes = shapes_and_kinds(made, made.sides(reverse)[1])
    result = {}
    for key, (shape, kind) in shapes.items():
        result[key] = as_stored(kind, delta(loras[key])) if key in loras else np.zeros(shape)
        assert result[key].shape == shape
    return result


def check_law(made, low, loras, reverse, exact):
    added = dense(made, low, reverse)
    weights = {
        k: np.random.default_rng(7).integers(-9, 9, v.shape).astype(np.float64)
        for k, v in added.items()
    }
    merged = made.moved({k: weights[k] + added[k] for k in added}, reverse)
    base, change = made.moved(weights, reverse), deltas(made, loras, reverse)
    for key, want in merged.items():
        got = base[key] + change[key]
        if exact:
            assert (got == want).all(), key
        else:
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def reread(record):
    """A record as it comes back from a file's metadata."""
    text = write_remembered("new", Origin("old"), {}, {}, record, KeptTable())
    return read_remembered({KEY: text}).record(rslora=False)


def equal_scales(factor):
    return lambda rank: Scale(rank, rank * factor)


@st.composite
def cases(draw, scale_of, **options):
    made = draw(kind_equations(**options))
    reverse = draw(st.booleans())
    return made, draw(factors_on(made, scale_of, reverse=reverse)), reverse


@st.composite
def uneven(draw):
    made = draw(kind_equations())
    reverse, rslora = draw(st.booleans()), draw(st.booleans())
    alphas = st.sampled_from([0, 1, 2, 3, 8, 16, 0.5, 7.25])
    low = draw(factors_on(made, lambda rank: None, reverse=reverse))
    low.scales = {k: Scale(a.shape[-2], draw(alphas), rslora) for k, a in low.a.items()}
    return made, low, reverse


@pytest.mark.slow
@settings(max_examples=100)
@given(cases(equal_scales(3)))
def test_the_law_holds_exactly_where_scales_are_equal(case):
    made, low, reverse = case
    loras = convert(made, low, reverse)
    assert all(lora.exact for lora in loras.values())
    check_law(made, low, loras, reverse, exact=True)


@pytest.mark.slow
@settings(max_examples=60)
@given(uneven())
def test_the_law_holds_to_rounding_where_scales_differ(case):
    made, low, reverse = case
    check_law(made, low, convert(made, low, reverse), reverse, exact=False)


@settings(max_examples=60)
@given(cases(equal_scales(1)))
def test_the_dense_delta_moved_by_the_arrays_reader_is_the_oracle_too(case):
    made, low, reverse = case
    added = dense(made, low, reverse)
    plan = plan_of(book_for(made), added, "old" if reverse else "new")
    moved = apply_plan(plan, list(added.values()))
    change = deltas(made, convert(made, low, reverse), reverse)
    assert moved.keys() == change.keys()
    assert all((moved[key] == change[key]).all() for key in moved)


@settings(max_examples=100)
@given(st.data())
def test_an_equation_that_takes_a_part_of_out_to_in_is_refused(data):
    made = data.draw(kind_equations(mixes=True))
    reverse = data.draw(st.booleans())
    low = data.draw(factors_on(made, equal_scales(1), everywhere=True, reverse=reverse))
    with pytest.raises(RefusedError, match="no exact equivalent") as caught:
        convert(made, low, reverse)
    assert caught.value.findings[0].rule.startswith("test/rule 0 (test.toml:")
    assert caught.value.findings[0].fix


@st.composite
def whole_stacks(draw):
    """Experts that are fused along out or in and stacked: mostly even, small numbers so that parts may share."""
    experts, count = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    along_out, transposed = draw(st.booleans()), draw(st.booleans())
    width, sizes = draw(st.integers(1, 3)), [draw(st.integers(1, 3)) for _ in range(count)]
    axes = [f"p{j}" for j in range(count)]
    parts = "(" + " + ".join(axes) + ")"
    text = "\n".join(
        f"x.{{e}}.{'abc'[j]} : {f'{a} i' if along_out else f'i {a}'}" for j, a in enumerate(axes)
    )
    text += f"\n== y : e {f'{parts} i' if along_out != transposed else f'i {parts}'}\nwhere e = {experts}, i = {width}"
    text += "".join(f", {a} = {n}" for a, n in zip(axes, sizes, strict=True))
    kinds = {"left_kind": "linear", "right_kind": "experts-transposed" if transposed else "experts"}
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks = [draw(st.integers(1, 3)) for _ in range(count)]
    most = draw(st.sampled_from([2, 50, 1000, 1000]))
    one_scale = draw(st.booleans())
    shapes, a, b, scales = {}, [], [], []
    for e in range(experts):
        for j, size in enumerate(sizes):
            if e and draw(st.integers(0, 19)) == 0:
                continue
            rank = ranks[j] if draw(st.integers(0, 19)) else 4
            out, into = (size, width) if along_out else (width, size)
            shapes[f"x.{e}.{'abc'[j]}"] = (out, into)
            a.append(random.integers(0, most, (rank, into)).astype(np.float32))
            b.append(random.integers(0, most, (out, rank)).astype(np.float32))
            scales.append(Scale(rank, 2 * rank if one_scale else 8))
    return text, kinds, shapes, a, b, scales


@settings(max_examples=100)
@given(whole_stacks())
def test_the_fast_path_is_the_general_path_bit_for_bit(case):
    text, kinds, shapes, a, b, scales = case
    plan = plan_of(rule_book(text, **kinds), shapes, partial=True)
    results = []
    for fast in (True, False):
        record = Record()
        (landed,) = landings_of(plan)
        factors = Factors(headers_of(shapes), a, b, scales)
        (image,) = images(landed, factors, factors.headers.names(), record, fast=fast)
        (lora,) = image.loras
        told = reread(record)
        results.append((lora, image.keys.names(), {key: told.part(key, 1000) for key in shapes}))
    (one, names, noted), (other, same_names, same_noted) = results
    assert names == same_names
    assert same_bits(one.a, other.a)
    assert same_bits(one.b, other.b)
    assert (one.scale, one.exact) == (other.scale, other.exact)
    assert noted == same_noted


@pytest.mark.slow
@settings(max_examples=80)
@given(cases(equal_scales(1)))
def test_there_and_back_without_a_record_gives_the_same_deltas(case):
    made, low, reverse = case
    there = convert(made, low, reverse)
    middle = type(low)(
        {k: x.a for k, x in there.items()},
        {k: x.b for k, x in there.items()},
        {k: x.scale for k, x in there.items()},
    )
    back = convert(made, middle, not reverse)
    for key, want in dense(made, low, reverse).items():
        kind = shapes_and_kinds(made, made.sides(reverse)[0])[key][1]
        got = as_stored(kind, delta(back[key])) if key in back else np.zeros_like(want)
        assert (got == want).all()


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_with_the_record_the_way_back_gives_the_same_bits(data):
    made = data.draw(kind_equations(gathers=True))
    assume(made.left[0].kind in ("linear", "conv1d"))
    low = data.draw(factors_on(made, equal_scales(2)))
    record = Record()
    there = convert(made, low, record=record)
    middle = type(low)(
        {k: x.a for k, x in there.items()},
        {k: x.b for k, x in there.items()},
        {k: x.scale for k, x in there.items()},
    )
    back = convert(made, middle, reverse=True, record=reread(record))
    for key in low.a:
        assert same_bits(back[key].a, low.a[key]), key
        assert same_bits(back[key].b, low.b[key]), key
        assert back[key].scale == low.scales[key]
    assert all(not delta(back[key]).any() for key in back.keys() - low.a.keys())
