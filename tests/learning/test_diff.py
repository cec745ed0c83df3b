"""Two files are compared by content, and the rule book that is proposed leads from one to the other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints.models import mixtral, write_folder
from checkpoints.quantised_samples import SAMPLES, quantised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import Text

import regraft
from regraft.cli import main
from regraft.errors import BadInputError
from regraft.explaining.diff import diff
from regraft.learning import content
from regraft.learning.content import content_of
from regraft.learning.propose import check, propose
from regraft.rules.book import library, load_book
from regraft.rules.lint.book import lint_book
from regraft.rules.write import write_book
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = GOLDEN / "bases/mixtral"
MOVING = ["mixtral", "phimoe", "deepseek_v3", "ernie4_5_moe", "granitemoe", "jamba", "qwen3_vl_moe"]


def numbers(*shape, seed=[0]):  # noqa: B006 - every call gives other numbers
    seed[0] += 1
    return np.random.default_rng(seed[0]).standard_normal(shape).astype(np.float32)


def proposed(left, right):
    """The proposal for two dicts of arrays, loaded anew from its text."""
    one, other = content_of(left, "left"), content_of(right, "right")
    found = propose(one, other, name="p", layouts=("l", "r"))
    assert found is not None
    book = load_book(Text(found.text), "p.toml")
    assert found.verified == check(book, one, other, found.explained, found.makes)
    assert not [fault for fault in lint_book(book) if fault.severity == "error"]
    return found, [" ".join(rule.equation.text.split()) for rule in book.rules]


LAYERS = range(3)
ROWS, MORE = {n: numbers(8, 6) for n in LAYERS}, {n: numbers(8, 6) for n in LAYERS}
FEW = {n: numbers(4, 6) for n in LAYERS}
EXPERTS = {(n, e): numbers(5, 7) for n in LAYERS for e in range(4)}
OTHERS = {(n, e): numbers(5, 7) for n in LAYERS for e in range(4)}

SHAPES = {
    "rename": (
        {f"a.{n}.w": ROWS[n] for n in LAYERS},
        {f"b.layer.{n}.weight": ROWS[n] for n in LAYERS},
        ["a.{l}.w : ... == b.layer.{l}.weight : ..."],
    ),
    "stack": (
        {f"a.{n}.e.{e}.w": x for (n, e), x in EXPERTS.items()},
        {f"a.{n}.w": np.stack([EXPERTS[n, e] for e in range(4)]) for n in LAYERS},
        ["a.{l}.e.{e}.w : a i == a.{l}.w : e a i"],
    ),
    "unstack": (
        {f"a.{n}.w": np.stack([EXPERTS[n, e] for e in range(4)]) for n in LAYERS},
        {f"a.{n}.e.{e}.w": x for (n, e), x in EXPERTS.items()},
        ["a.{l}.w : e a i == a.{l}.e.{e}.w : a i"],
    ),
    "transpose": (
        {f"a.{n}": ROWS[n] for n in LAYERS},
        {f"b.{n}": ROWS[n].T for n in LAYERS},
        ["a.{l} : a b == b.{l} : b a"],
    ),
    "concatenate": (
        {f"a.{n}.{k}": x[n] for n in LAYERS for k, x in (("q", ROWS), ("k", FEW))},
        {f"a.{n}.qk": np.concatenate([ROWS[n], FEW[n]]) for n in LAYERS},
        ["a.{l}.q : a i a.{l}.k : b i == a.{l}.qk : (a + b) i where b = 4"],
    ),
    "chunk": (
        {f"a.{n}.qk": np.concatenate([ROWS[n], MORE[n]]) for n in LAYERS},
        {f"a.{n}.{k}": x[n] for n in LAYERS for k, x in (("q", ROWS), ("k", MORE))},
        ["a.{l}.qk : (a + b) i == a.{l}.q : a i a.{l}.k : b i where b = a"],
    ),
    "stack, fused and turned": (
        {f"a.{n}.{e}.{k}": x[n, e] for k, x in (("g", EXPERTS), ("u", OTHERS)) for n, e in x},
        {
            f"a.{n}.gu": np.stack(
                [np.concatenate([EXPERTS[n, e].T, OTHERS[n, e].T], axis=1) for e in range(4)]
            )
            for n in LAYERS
        },
        ["a.{l}.{e}.g : a i a.{l}.{e}.u : b i == a.{l}.gu : e i (a + b) where b = a"],
    ),
    "shards": (
        {f"s.{i}.w": ROWS[0][2 * i : 2 * i + 2] for i in range(4)},
        {"w": ROWS[0]},
        ["s.{s}.w : a i == w : (s a) i where s = 4"],
    ),
    "flatten": (
        {"c": numbers(4, 3, 2, 2)},
        {},
        ["c : a b c d == p : a (b c d) where b = 3, c = 2, d = 2"],
    ),
    "biases": (
        {f"a.{n}.{k}": x[n][0] for n in LAYERS for k, x in (("q", ROWS), ("k", MORE))},
        {f"a.{n}.qk": np.concatenate([ROWS[n][0], MORE[n][0]]) for n in LAYERS},
        ["a.{l}.q : a a.{l}.k : b == a.{l}.qk : (a + b) where b = a"],
    ),
    "numbers that do not go together": (
        {f"a.{n}.w": ROWS[n] for n in LAYERS},
        {f"a.{(n + 2) % 5}.w": ROWS[n] for n in LAYERS},
        ["a.0.w : ... == a.2.w : ...", "a.1.w : ... == a.3.w : ...", "a.2.w : ... == a.4.w : ..."],
    ),
    "a prefix": (
        {f"a.{n}.{k}": x[n] for n in LAYERS for k, x in (("q", ROWS), ("k", MORE))},
        {f"m.a.{n}.{k}": x[n] for n in LAYERS for k, x in (("q", ROWS), ("k", MORE))},
        ["{*p} : ... == m.{*p} : ..."],
    ),
}
SHAPES["flatten"][1]["p"] = SHAPES["flatten"][0]["c"].reshape(4, -1)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_proposed(name):
    left, right, expected = SHAPES[name]
    found, texts = proposed(left, right)
    assert texts == expected
    assert found.verified
    assert found.explained == set(left)
    assert found.makes == set(right)


def test_equal_tensors_are_told_apart_by_name():
    ones = np.ones(4, np.float32)
    left = {f"m.{n}.{k}.weight": ones for n in range(4) for k in ("norm", "post")}
    right = {f"x.{n}.{k}.weight": ones for n in range(4) for k in ("norm", "post")}
    found, texts = proposed(left, right)
    assert texts == ["m.{*p} : ... == x.{*p} : ..."]
    assert found.ambiguous == 8


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_random_moves(data):
    """Whatever is stacked, joined, turned and renamed: the proposal is verified, or says that it is not."""
    layers = range(data.draw(st.integers(1, 3)))
    left, right = {}, {}
    for part in range(data.draw(st.integers(1, 3))):
        count = data.draw(st.integers(1, 3))
        pieces = [[numbers(3, 5) for _ in range(count)] for _ in layers]
        way = data.draw(st.sampled_from(["keep", "stack", "join", "turn", "columns"]))
        for n in layers:
            left |= {f"h.{n}.p{part}.{e}.w": x for e, x in enumerate(pieces[n])}
            turned = [x.T for x in pieces[n]]
            right |= {
                "keep": {f"h.{n}.p{part}.{e}.w": x for e, x in enumerate(pieces[n])},
                "stack": {f"t.{n}.q{part}": np.stack(pieces[n])},
                "join": {f"t.{n}.q{part}": np.concatenate(pieces[n])},
                "turn": {f"t.{n}.q{part}.{e}": x for e, x in enumerate(turned)},
                "columns": {f"t.{n}.q{part}": np.concatenate(turned, axis=1)},
            }[way]
    one, other = content_of(left, "left"), content_of(right, "right")
    found = propose(one, other, name="p", layouts=("l", "r"))
    if left.keys() == right.keys():
        assert found is None
        return
    assert found is not None
    assert check(load_book(Text(found.text), "p"), one, other, found.explained, found.makes)
    assert found.verified
    assert found.explained == set(left)
    assert found.makes == set(right)


@pytest.mark.parametrize("name", MOVING)
def test_genuine_layouts(name, tmp_path, capsys):
    """The book found from two files alone converts the one to the other, as the library does."""
    base, v5, mine = GOLDEN / "bases" / name, tmp_path / "v5", tmp_path / "mine"
    regraft.convert(base, v5, to="transformers-v5")
    known = diff(base, v5)
    assert known.equal
    assert known.book is None
    assert known.moved
    book = tmp_path / "book.toml"
    assert main(["diff", str(base), str(v5), "-o", str(book)]) == 0
    assert "gives the other file bit for bit" in capsys.readouterr().out
    command = ["convert", str(base), str(mine), "--to", "transformers-v5", "--rules", str(book)]
    assert main(command) == 0
    one, other = (open_tensors(folder / "model.safetensors") for folder in (v5, mine))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
    assert main(["verify", str(base), str(mine), "--rules", str(book)]) == 0


def changed(folder, source, change):
    shutil.copytree(source, folder)
    tensors = {n: t.copy() for n, t in open_tensors(folder / "model.safetensors").items()}
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors, {})
    return folder


def test_what_differs_is_named(tmp_path, capsys):
    def change(tensors):
        tensors["model.norm.weight"][0] += 1
        tensors["new"] = tensors.pop("lm_head.weight")
        tensors["more"] = np.arange(5, dtype=np.float32)
        del tensors["model.layers.0.self_attn.q_proj.weight"]

    other = changed(tmp_path / "other", BASE, change)
    found = diff(BASE, other)
    assert not found.equal
    assert [(each.some.pattern, each.why) for each in found.differ] == [
        ("model.norm.weight", "other numbers")
    ]
    assert [some.pattern for some in found.only_a] == ["model.layers.0.self_attn.q_proj.weight"]
    assert [some.pattern for some in found.only_b] == ["more"]
    assert [moved.equation for moved in found.moved] == ["lm_head.weight : ...\n    == new : ..."]
    assert main(["diff", str(BASE), str(other), "--json"]) == 4
    data = json.loads(capsys.readouterr().out)
    assert data["equal"] is False
    assert data["only_b"] == [{"pattern": "more", "count": 1}]


def test_a_wrong_number_in_another_layout(tmp_path):
    regraft.convert(BASE, tmp_path / "v5", to="transformers-v5")

    def change(tensors):
        tensors["model.layers.1.mlp.experts.down_proj"][2, 0, 0] += 1
        tensors["model.embed_tokens.weight"][0] += 1

    found = diff(BASE, changed(tmp_path / "other", tmp_path / "v5", change))
    assert not found.equal
    wrong = [(moved.rule.partition(" (")[0], moved.differ) for moved in found.moved if moved.differ]
    assert [(rule, some[0].pattern) for rule, some in wrong] == [
        ("mixtral/experts down", "model.layers.1.mlp.experts.down_proj")
    ]
    assert [each.some.pattern for each in found.differ] == ["model.embed_tokens.weight"]


def test_the_same_file(capsys):
    assert main(["diff", str(BASE), str(BASE)]) == 0
    assert "Equal: they hold the same, bit for bit" in capsys.readouterr().out


def test_adapters_of_two_layouts(tmp_path):
    adapter = GOLDEN / "cases/mixtral__gud_attn"
    regraft.convert(adapter, tmp_path / "v5", to="transformers-v5")
    found = diff(adapter, tmp_path / "v5")
    assert found.equal
    assert found.layouts == ("transformers-v4", "transformers-v5")
    assert found.kind == "adapter"


def test_a_book_is_not_overwritten(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text("mine")
    assert main(["diff", str(BASE), str(BASE), "-o", str(file)]) == 1
    assert file.read_text() == "mine"


def test_adapters_move_between_layouts_of_ones_own(tmp_path):
    file = tmp_path / "mine.toml"
    book = next(b for b in library() if b.name == "mixtral")
    file.write_text(write_book(replace(book, left="here", right="there")))
    adapter = GOLDEN / "cases/mixtral__gud_attn"
    command = ["convert", str(adapter), str(tmp_path / "o"), "--to", "there", "--rules", str(file)]
    assert main(command) == 0
    usual = ["convert", str(adapter), str(tmp_path / "u"), "--to", "transformers-v5"]
    assert main(usual) == 0
    made, wanted = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ou")
    assert len(made) > 1000 and made[-1000:] == wanted[-1000:]


def test_a_large_file_is_hashed_in_parts_and_may_not_become_shorter(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_LARGEST", 16)
    monkeypatch.setattr(content, "_PART", 24)
    tensors = {"w": np.arange(30, dtype=np.float32).reshape(5, 6), "b": np.ones(3, np.float16)}
    file = tmp_path / "model.safetensors"
    write_tensors(file, tensors, {})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = content.open_content(tmp_path).tensors
    assert {name: each.digest for name, each in found.items()} == {
        name: content.digest(array) for name, array in tensors.items()
    }
    again = content.open_content(tmp_path).tensors
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 40)
    with pytest.raises(BadInputError) as caught:
        assert [each.digest for each in again.values()]
    assert caught.value.findings[0].code == "file-changed"


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Two checkpoints too large to be read whole: one's matrices are stacked and turned in the other."""
    monkeypatch.setattr(content, "_LARGEST", 16)
    monkeypatch.setattr(content, "_KEPT", 200)
    old = {f"a.{n}.w": numbers(5, 7) for n in range(3)} | {"b": numbers(4, 6), "c": numbers(3)}
    new = {"s.w": np.stack([old[f"a.{n}.w"] for n in range(3)]), "b.t": old["b"].T, "c": old["c"]}
    for name, tensors in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name / "model.safetensors", tensors, {})
        (tmp_path / name / "config.json").write_text('{"model_type": "mine"}')
    return tmp_path


def test_large_files_are_compared_as_small_ones(large, monkeypatch):
    found = diff(large / "old", large / "new")
    assert found.equal
    assert found.verified
    monkeypatch.setattr(content, "_LARGEST", 1 << 20)
    assert diff(large / "old", large / "new") == found


def test_a_file_that_becomes_shorter_during_a_search_is_an_error(large, monkeypatch):
    """It would end the process, were it mapped."""
    file = large / "new/model.safetensors"
    search = content.Tensor.bits.fget

    def shorter(tensor):
        if file.stat().st_size > 200:
            with file.open("r+b") as opened:
                opened.truncate(200)
        return search(tensor)

    monkeypatch.setattr(content.Tensor, "bits", property(shorter))
    with pytest.raises(BadInputError) as caught:
        diff(large / "old", large / "new")
    assert [finding.code for finding in caught.value.findings] == ["file-changed"]


@pytest.mark.parametrize("small", [True, False])
def test_the_same_bits_of_another_type_are_not_the_same(large, monkeypatch, small):
    monkeypatch.setattr(content, "_LARGEST", (1 << 20) * small)
    bits = np.arange(12, dtype=np.uint16).reshape(3, 4)
    for name, key, dtype in (("old", "a.w", np.float16), ("new", "b.w", ml_dtypes.bfloat16)):
        write_tensors(large / name / "model.safetensors", {key: bits.view(dtype)}, {})
    assert not diff(large / "old", large / "new").equal


@pytest.mark.parametrize("name", ["AWQ", "compressed-tensors, MXFP4"])
@pytest.mark.parametrize("attention", [False, True])
def test_weights_in_several_quantised_tensors_are_compared_by_contents(tmp_path, name, attention):
    make, config = SAMPLES[name]
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    one = write_folder(tmp_path / "one", quantised(make, attention=attention), config)
    old = write_folder(tmp_path / "old", mixtral(32, 32), plain)
    regraft.convert(old, tmp_path / "new", to="transformers-v5")
    told = diff(one, tmp_path / "new")
    assert any("several quantised tensors" in note for note in told.notes)
