"""The certificate goes another way than the converter: what the converter does wrong, it notices by itself."""

import json
import os
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import book_of, equation_of
from test_golden import adapter_of, base_of, read
from test_verify import converted, spoilt

import regraft
from regraft.adapters import convert as conversion
from regraft.adapters import follow, move
from regraft.adapters.convert import convert_adapter
from regraft.adapters.detect import Known
from regraft.arrays import pieces
from regraft.checking import certificate as verify
from regraft.checking.certificate import compare, verify_adapters
from regraft.cli import main
from regraft.dialects.names import layout_named
from regraft.dialects.peft import writer, writing
from regraft.dialects.peft.source import Source
from regraft.planning import blocks
from regraft.planning.model import ModelConfig
from regraft.storage import safetensors
from regraft.storage.safetensors import write_tensors
from regraft.values import replace

V4, V5 = "transformers-v4", "transformers-v5"


def few_vectors(patch):
    """So few that they stand for the axes of tiny models."""
    patch.setattr(pieces, "VECTORS", 4)
    pieces.vectors.cache_clear()
    patch.setattr(pieces, "vectors", pieces.vectors.__wrapped__)


# -- mutants of the converter


def changed(name, **fields):
    """A converter that takes other blocks than it should."""
    real = blocks._block

    def wrong(entry, copy, written):
        block = real(entry, copy, written)
        return replace(block, **{f: change(getattr(block, f)) for f, change in fields.items()})

    wrong.__name__ = name
    return lambda patch: patch.setattr(blocks, "_block", wrong)


def reversed_along(axis):
    return lambda index: np.flip(index, axis).copy()


def rolled(index):
    return np.roll(index, 1)


def unscaled(patch):
    patch.setattr(move, "rescale", lambda b, ratio: (b, True))


def packed_in_another_order(patch):
    real = writing.pack
    patch.setattr(writing, "pack", lambda a, b, *, swapped: real(a[::-1], b, swapped=swapped))


def another_scale(patch):
    real = writing.ConfigWriter.patterns

    def wrong(self, scales):
        rank, alpha, ranks, alphas = real(self, scales)
        return rank, alpha, ranks, {**alphas, "q_proj": 2 * alpha}

    patch.setattr(writing.ConfigWriter, "patterns", wrong)
    patch.setattr(writer, "check_config", lambda *_: [])


def others_turned(patch):
    real = writer.write_saved
    patch.setattr(
        writer,
        "write_saved",
        lambda items, wrappers: real([replace(o, tensor=o.tensor[::-1]) for o in items], wrappers),
    )


MUTANTS = {
    "rows in the order from last to first": (
        changed("rows", rows_to=reversed_along(1)),
        "mixtral__gud_attn",
    ),
    "rows taken in another order": (
        changed("rows", rows_from=reversed_along(1)),
        "mixtral__gud_attn",
    ),
    "columns in another order": (
        changed("columns", columns_to=reversed_along(1)),
        "mixtral__gud_attn",
    ),
    "experts change places": (changed("experts", target_batch=rolled), "mixtral__gud_attn"),
    "experts change places where they come from": (
        changed("experts", source_slot=rolled),
        "qwen3_moe__gud",
    ),
    "scales are not folded": (unscaled, "mixtral__patterns_projection"),
    "experts are packed in another order": (packed_in_another_order, "mixtral__gud_attn"),
    "a scale in the config is another one": (another_scale, "mixtral__gud_attn"),
    "saved tensors are turned": (others_turned, "mixtral__mts_head"),
}


@pytest.mark.parametrize("budget", [300.0, 0.0], ids=["every entry", "random vectors"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_convert_notices_what_the_converter_does_wrong(mutant, budget, tmp_path, monkeypatch):
    change, name = MUTANTS[mutant]
    few_vectors(monkeypatch)
    adapter = adapter_of(name, tmp_path)
    options = {"to": V5, "model": base_of(name), "verify": True, "verify_budget": budget}
    regraft.convert(adapter, tmp_path / "right", **options)
    change(monkeypatch)
    with pytest.raises(regraft.NotEqualError) as caught:
        regraft.convert(adapter, tmp_path / "out", **options)
    assert {finding.code for finding in caught.value.findings} <= {"differs", "missing", "extra"}
    assert not (tmp_path / "out").exists()


LOHA = {
    "peft_type": "LOHA",
    "r": 2,
    "alpha": 4,
    "target_modules": ["n"],
    "rank_pattern": {},
    "alpha_pattern": {},
}
BOOK = equation_of(
    "m.{l}.n.weight : (a + b) i == m.{l}.z.weight : (b + a) i where a = 4, b = 12, i = 16",
    left_kind="linear",
    right_kind="linear",
)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_family_that_follows_wrongly_is_noticed(wrong, monkeypatch):
    head = 'name = "test"\ntitle = "t"\nleft = "transformers-v4"\nright = "transformers-v5"\n'
    book = book_of(BOOK, head=head + 'model_types = ["test"]\n')
    model = ModelConfig({"model_type": "test"}, "config.json")
    known = Known((book,), {}, model, "test", "it was said so")
    for module in (conversion, verify):
        monkeypatch.setattr(module, "find_books", lambda *_: known)
    random = np.random.default_rng(0)
    names = {"w1_a": (16, 2), "w1_b": (2, 16), "w2_a": (16, 2), "w2_b": (2, 16)}
    source = Source(
        "",
        "test",
        LOHA,
        {
            f"base_model.model.m.0.n.hada_{end}": random.standard_normal(shape).astype(np.float32)
            for end, shape in names.items()
        },
    )
    if wrong:
        monkeypatch.setattr(follow, "_some", lambda index, size: None)
    done = convert_adapter(source, layout_named(V5), model, layout_named(V4))
    assert done.config["peft_type"] == "LOHA"
    made = Source("", "made", done.config, done.tensors, done.metadata)
    assert compare(source, made, model).equal is not wrong


# -- numbers


def spoil_one(change, name="mixtral__gud_attn"):
    def wrong(tensors, config):
        key = next(n for n in tensors if "q_proj.lora_B" in n)
        tensors[key][0, 0] = change(tensors[key])

    return wrong


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_never_equal(number, tmp_path, capsys):
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    spoilt(out, spoil_one(lambda _: number))
    for arguments in ([str(adapter), str(out)], [str(out), str(out)]):
        assert main(["verify", *arguments, "--model", str(base_of(name)), "--json"]) == 4
        told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert not told["equal"]
        assert "no finite numbers" in told["differences"][0]["message"]
        assert told["error"] is None


def low(b, a, alpha=1.0, **config):
    """An adapter of one unchanged module."""
    base = {"peft_type": "LORA", "r": len(a), "lora_alpha": alpha, "target_modules": ["q_proj"]}
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    return Source("", "made", {**base, **config}, tensors)


MIXTRAL = ModelConfig({"model_type": "mixtral", "num_hidden_layers": 1}, "config.json")


def test_one_entry_of_a_large_matrix_is_seen():
    random = np.random.default_rng(0)
    b, a = random.standard_normal((1000, 900)), np.eye(900)
    other = b.copy()
    other[17, 3] += 1e-3
    assert np.linalg.norm(other - b) < 1e-5 * np.linalg.norm(b)
    assert compare(low(b, a), low(b, a), MIXTRAL).equal
    (found,) = compare(low(b, a), low(other, a), MIXTRAL).differences
    assert "an entry" in found.message


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_very_large_and_very_small_numbers_are_compared(size):
    random = np.random.default_rng(0)
    b, a = random.standard_normal((30, 2)), random.standard_normal((2, 40))
    one = low(b * size, a)
    assert compare(one, low(b, a, alpha=size), MIXTRAL).equal
    assert not compare(one, low(b * 1.001 * size, a), MIXTRAL).equal
    assert not compare(one, low(b * 0, a), MIXTRAL).equal
    assert not compare(low(b * 0, a), one, MIXTRAL).equal


def test_a_product_that_overflows_is_not_equal():
    b, a = np.full((4, 1), 1e200), np.full((1, 4), 1e200)
    assert not compare(low(b, a), low(b, a), MIXTRAL).equal


# -- memory and time


def test_factors_are_read_when_they_are_compared_and_not_kept(tmp_path, monkeypatch):
    alive, most = set(), [0]
    real = safetensors.TensorFile.__getitem__

    class Watched(np.ndarray):
        pass

    def counted(self, name):
        array = real(self, name).view(Watched)
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        most[0] = max(most[0], len(alive))
        return array

    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    count = len(read(adapter)[0])
    monkeypatch.setattr(safetensors.TensorFile, "__getitem__", counted)
    assert verify_adapters(adapter, out, base_of(name)).equal
    assert 0 < most[0] < 20 < count


def test_a_file_that_is_cut_during_the_comparison_is_noticed(tmp_path, monkeypatch):
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    real = verify.carried

    def cut(*given, **options):
        file = out / "adapter_model.safetensors"
        os.truncate(file, file.stat().st_size - 1000)
        return real(*given, **options)

    monkeypatch.setattr(verify, "carried", cut)
    with pytest.raises(regraft.BadInputError) as caught:
        verify_adapters(adapter, out, base_of(name))
    assert [f.code for f in caught.value.findings] == ["file-changed"]


def test_the_time_is_looked_at_between_the_slices_of_one_tensor(tmp_path, monkeypatch):
    few_vectors(monkeypatch)
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    monkeypatch.setattr(verify.Budget, "left", lambda _: 1e9)
    whole = verify_adapters(adapter, out, base_of(name))
    assert whole.sampled == []
    for end in (0, 3):
        asked = iter(range(10**6))
        monkeypatch.setattr(verify.Budget, "spent", lambda _, a=asked, e=end: next(a) >= e)
        told = verify_adapters(adapter, out, base_of(name))
        assert told.equal
        assert len(told.targets) == len(whole.targets)
        assert told.sampled


def test_where_time_is_short_the_vectors_come_first(tmp_path, monkeypatch):
    few_vectors(monkeypatch)
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    monkeypatch.setattr(verify, "PACE", 1e-9)
    real, sampled = verify.Comparison._add, []
    monkeypatch.setattr(
        verify.Comparison,
        "_add",
        lambda self, piece, tallies: sampled.append(piece.sampled) or real(self, piece, tallies),
    )
    told = verify_adapters(adapter, out, base_of(name))
    assert told.equal
    assert told.sampled == []
    assert sampled[0]
    assert not sampled[-1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 70),
    st.integers(1, 50),
    st.sampled_from([(), (3,)]),
    st.integers(4, 12),
)
def test_products_in_parts_are_products(height, rank, width, lead, alone):
    random = np.random.default_rng(rank)
    one = random.standard_normal((*lead, height, rank))
    other = random.standard_normal((*lead, rank, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_ALONE", 1 << alone)
        patch.setattr(pieces, "_ROWS", 2)
        patch.setattr(pieces, "_RANK", (1 << alone) // 4)
        assert np.allclose(pieces.multiply(one, other), one @ other)


def test_past_the_budget_random_vectors_are_enough_and_the_report_names_the_targets(
    tmp_path, capsys, monkeypatch
):
    few_vectors(monkeypatch)
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    arguments = ["verify", str(adapter), str(out), "--model", str(base_of(name))]
    assert main([*arguments, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["sampled"] == []
    assert main([*arguments, "--verify-budget", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(told["sampled"]) == sorted(t["key"] for t in told["targets"])
    assert [t["key"] for t in told["targets"]] == [t["key"] for t in whole["targets"]]
    assert main([*arguments, "--verify-budget", "0"]) == 0
    text = capsys.readouterr().out
    assert "random vectors" in text
    assert told["sampled"][0] in " ".join(text.split())


# -- fields of the config that switch targets on and off


def configured(folder, **fields):
    """An adapter with other fields in its config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


OFF = [
    {"exclude_modules": ["q_proj"]},
    {"exclude_modules": r".*self_attn\.q_proj"},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"modules_to_save": ["o_proj"]},
]


@pytest.mark.parametrize("fields", OFF, ids=lambda f: " ".join(f))
def test_factors_that_peft_would_not_load_are_refused(fields, tmp_path, capsys):
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    for folder in (adapter, out):
        configured(folder, **fields)
    field = next(iter(fields))
    for arguments in (
        ["convert", str(adapter), str(tmp_path / "new"), "--to", V5],
        ["convert", str(out), str(tmp_path / "new"), "--to", V5, "--overwrite"],
        ["verify", str(adapter), str(out)],
    ):
        assert main([*arguments, "--model", str(base_of(name)), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)["error"]["findings"]
        assert {f["code"] for f in found} == {"not-targeted"}
        assert all(field in f["message"] for f in found)


SWITCHED = [
    ("layer_replication", [[0, 1], [0, 1]]),
    ("modules_to_save", ["lm_head"]),
    ("trainable_token_indices", [1, 2]),
    ("trainable_token_indices", {"embed_tokens": [1]}),
]


@pytest.mark.parametrize(("field", "value"), SWITCHED)
def test_what_only_a_config_says_is_compared(field, value, tmp_path):
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    assert verify_adapters(adapter, out, base_of(name)).equal
    configured(out, **{field: value})
    if field == "layer_replication":
        (found,) = verify_adapters(adapter, out, base_of(name)).differences
        assert found.key == "adapter_config.json"
        return
    for pair in ((adapter, out), (out, out)):  # PEFT would not load it, so it is wrong in itself
        with pytest.raises(regraft.BadInputError) as caught:
            verify_adapters(*pair, base_of(name))
        assert [f.key for f in caught.value.findings] == [field]


def test_what_is_named_as_saved_is_compared_without_the_base_s_weights(tmp_path):
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    configured(out, modules_to_save=["lm_head"])
    config = tmp_path / "config.json"
    config.write_bytes((base_of(name) / "config.json").read_bytes())
    (found,) = verify_adapters(adapter, out, config).differences
    assert found.key == "adapter_config.json"


def test_other_rows_of_tokens_are_a_difference(tmp_path):
    name = "mixtral__trainable_tokens"
    adapter, out = converted(name, tmp_path)
    rows = read(out)[1]["trainable_token_indices"]
    assert verify_adapters(adapter, out, base_of(name)).equal
    other = (
        [r + 1 for r in rows]
        if isinstance(rows, list)
        else {k: [r + 1 for r in v] for k, v in rows.items()}
    )
    configured(out, trainable_token_indices=other)
    (found,) = verify_adapters(adapter, out, base_of(name)).differences
    assert "other rows" in found.message


def test_experts_of_the_last_layers_number_are_those_of_their_release(tmp_path):
    """PEFT before 0.20 took an expert's number for the layer's; its files have just these factors."""
    name = "mixtral__gud_attn"
    adapter, _ = converted(name, tmp_path)
    tensors = read(adapter)[0]
    made = {
        k: np.array(t) for k, t in tensors.items() if ".experts.1." in k or "layers.1.self" in k
    }
    write_tensors(adapter / "adapter_model.safetensors", made, {"format": "pt"})
    configured(adapter, layers_to_transform=[1], peft_version="0.18.1")
    arguments = ["convert", str(adapter), str(tmp_path / "new"), "--to", V5, "--verify"]
    assert main([*arguments, "--model", str(base_of(name))]) == 0
    configured(adapter, peft_version="0.21.2")
    assert main([*arguments, "--model", str(base_of(name)), "--overwrite"]) == 1


# -- rows and dims


@pytest.mark.parametrize(
    "name", ["mixtral__embedding", "mixtral__mts_head", "mixtral__params_embedding"]
)
def test_rows_beyond_the_vocabulary_are_an_error(name, tmp_path, capsys):
    adapter, out = converted(name, tmp_path)
    for folder in (adapter, out):
        made = {k: np.array(t) for k, t in read(folder)[0].items()}
        for key, tensor in made.items():
            if key.endswith("lora_embedding_A"):
                made[key] = np.concatenate([tensor, tensor[:, :4]], 1)
            elif key.endswith(
                ("lm_head.weight", "embed_tokens.weight", "embed_tokens.lora_B.weight")
            ):
                made[key] = np.concatenate([tensor, tensor[:4]])
        write_tensors(folder / "adapter_model.safetensors", made, {"format": "pt"})
    for arguments in (
        ["convert", str(adapter), str(tmp_path / "new"), "--to", V5],
        ["verify", str(adapter), str(out)],
    ):
        assert main([*arguments, "--model", str(base_of(name)), "--json"]) == 1
        (found, *_) = json.loads(capsys.readouterr().out)["error"]["findings"]
        assert found["code"] == "vocabulary"
        assert "--model" in found["fix"]


@pytest.mark.parametrize("which", ["A", "B", "AB"])
def test_a_factor_with_too_many_dims_is_an_error_on_unchanged_targets(which, tmp_path, capsys):
    name = "mixtral__gud_attn"
    adapter, out = converted(name, tmp_path)
    for folder in (adapter, out):
        made = {k: np.array(t) for k, t in read(folder)[0].items()}
        for letter in which:
            key = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{letter}.weight"
            made[key] = made[key][..., None]
        write_tensors(folder / "adapter_model.safetensors", made, {"format": "pt"})
    for arguments in (
        ["convert", str(adapter), str(tmp_path / "new"), "--to", V5],
        ["convert", str(out), str(tmp_path / "new"), "--to", V5],
        ["verify", str(adapter), str(out)],
    ):
        assert main([*arguments, "--model", str(base_of(name)), "--json"]) == 1
        (found,) = json.loads(capsys.readouterr().out)["error"]["findings"]
        assert found["code"] == "shape"
        assert "dims" in found["message"] or "fit together" in found["message"]


def test_a_packing_that_was_given_is_what_is_certified(tmp_path, monkeypatch):
    packings, real = [], Source.deltas

    def reading(source, known, layout, packing=None):
        packings.append(packing)
        return real(source, known, layout, packing)

    monkeypatch.setattr(Source, "deltas", reading)
    name = "gpt_oss__params_attn"
    options = {"to": V5, "source": "transformers-v4/peft-0.18", "model": base_of(name)}
    regraft.convert(adapter_of(name, tmp_path), tmp_path / "out", verify=True, **options)
    assert packings == ["peft-0.18", None]


def test_factors_without_elements_are_bad_input(tmp_path):
    adapter = adapter_of("qwen3_vl_moe__params", tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = {name: x.copy() for name, x in read(adapter)[0].items()}
    name = next(n for n in tensors if ".experts" in n and n.endswith("lora_B.weight"))
    tensors[name] = tensors[name][:0]
    write_tensors(file, tensors, {"format": "pt"})
    with pytest.raises(regraft.BadInputError, match="do not fit together"):
        regraft.convert(
            adapter, tmp_path / "out", to=V5, model=base_of("qwen3_vl_moe__params"), verify=True
        )
