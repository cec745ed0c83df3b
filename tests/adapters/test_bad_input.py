"""Bad input, one test each: the error's class, that its message says what, where and what to do, and that nothing is
written."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from dialects.test_tools import make_base

import regraft
from regraft.storage.safetensors import open_tensors, read_header, write_tensors

GOLDEN = Path(__file__).parent.parent / "golden"
BASE = GOLDEN / "bases/mixtral"
PREFIX = "base_model.model."
EXPERT = PREFIX + "model.layers.1.block_sparse_moe.experts.{}.{}.lora_{}.weight"
QUERY = PREFIX + "model.layers.0.self_attn.q_proj.lora_{}.weight"


class Adapter:
    """A golden adapter that can be spoilt."""

    def __init__(self, folder, case):
        self.folder = folder / "adapter"
        self.folder.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(GOLDEN / "cases" / case / name, self.folder / name)
        self.config_file = self.folder / "adapter_config.json"
        self.weights_file = self.folder / "adapter_model.safetensors"
        self.new = folder / "new"

    def config(self, **fields):
        data = {**json.loads(self.config_file.read_text()), **fields}
        self.config_file.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

    def weights(self, change):
        """Write the tensors again as ``change`` leaves or returns them."""
        tensors = {
            k: v.copy()
            for k, v in open_tensors(self.weights_file, read_header(self.weights_file)).items()
        }
        write_tensors(self.weights_file, change(tensors) or tensors, {"format": "pt"})

    def rename(self, new_name):
        self.weights(lambda tensors: {new_name(name): tensor for name, tensor in tensors.items()})

    def convert(self, **options):
        options = {"to": "transformers-v5", "model": BASE, **options}
        return regraft.convert(self.folder, self.new, **options)

    def fails(self, *parts, code=None, kind=regraft.BadInputError, **options):
        """Converting fails, with all of these in one finding; nothing is written."""
        before = sorted(self.folder.parent.rglob("*"))
        with pytest.raises(kind) as caught:
            self.convert(**options)
        assert type(caught.value) is kind
        assert sorted(self.folder.parent.rglob("*")) == before
        text = str(caught.value)
        assert str(self.folder) in text
        fitting = [f for f in caught.value.findings if all(str(part) in str(f) for part in parts)]
        assert fitting, text
        if code:
            assert code in [f.code for f in fitting]
        assert all(f.fix for f in fitting), "it does not say what to do"
        return caught.value


@pytest.fixture
def adapter(tmp_path):
    return Adapter(tmp_path, "mixtral__gud_attn")


def test_it_converts_as_it_is(adapter):
    assert adapter.convert().written
    assert (adapter.new / "adapter_model.safetensors").exists()


# Files


@pytest.mark.parametrize("size", [0, 5, 8, 300, -1, -64])
def test_truncated_weights(adapter, size):
    data = adapter.weights_file.read_bytes()
    adapter.weights_file.write_bytes(data[:size])
    adapter.fails(adapter.weights_file, "download or save the file again")


def test_a_header_longer_than_the_file(adapter):
    data = adapter.weights_file.read_bytes()
    adapter.weights_file.write_bytes(struct.pack("<Q", len(data) * 2) + data[8:])
    adapter.fails(adapter.weights_file, str(len(data) * 2))


def test_a_header_longer_than_the_format_allows(adapter):
    data = adapter.weights_file.read_bytes()
    adapter.weights_file.write_bytes(struct.pack("<Q", 1 << 40) + data[8:])
    adapter.fails(adapter.weights_file, str(1 << 40))


def test_a_header_that_is_no_json(adapter):
    data = bytearray(adapter.weights_file.read_bytes())
    data[9:12] = b"!!!"
    adapter.weights_file.write_bytes(data)
    adapter.fails(adapter.weights_file, "not JSON", code="header-not-json")


def test_bytes_after_the_last_tensor(adapter):
    with adapter.weights_file.open("ab") as file:
        file.write(b"1234")
    adapter.fails(adapter.weights_file, "4 bytes follow", code="trailing-bytes")


def test_missing_weights_file(adapter):
    adapter.weights_file.unlink()
    adapter.fails(adapter.folder, "adapter_model.safetensors", "missing", code="no-weights")


def test_missing_config(adapter):
    adapter.config_file.unlink()
    adapter.fails(adapter.folder, "adapter_config.json", code="no-config")


def test_a_config_that_is_no_json(adapter):
    adapter.config_file.write_text('{"r": 4,')
    adapter.fails(adapter.config_file, "not JSON", code="not-json")


def test_duplicate_keys_in_the_config(adapter):
    adapter.config_file.write_text('{"r": 4, "r": 8, ' + adapter.config_file.read_text()[1:])
    adapter.fails(adapter.config_file, "r: ", "times", code="duplicate-key")


def test_duplicate_keys_in_the_header(adapter):
    data = adapter.weights_file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip()
    doubled = header[:-1] + b',"again":1,"again":2}'
    adapter.weights_file.write_bytes(struct.pack("<Q", len(doubled)) + doubled + data[8 + length :])
    adapter.fails(adapter.weights_file, "again", code="duplicate-key")


def test_both_files_are_wrong_and_both_are_reported(adapter):
    adapter.config_file.write_text("[")
    adapter.weights_file.write_bytes(b"x")
    error = adapter.fails(adapter.config_file)
    assert str(adapter.weights_file) in str(error)


def test_no_such_source(adapter):
    shutil.rmtree(adapter.folder)
    with pytest.raises(regraft.BadInputError, match="no such file or folder") as caught:
        adapter.convert()
    assert str(adapter.folder) in str(caught.value)
    assert not adapter.new.exists()


# Config


@pytest.mark.parametrize("peft_type", ["LORAA", "lora", 3, None, ...])
def test_unknown_peft_type(adapter, peft_type):
    adapter.config(peft_type=peft_type)
    shown = None if peft_type is ... else peft_type
    adapter.fails(adapter.config_file, "peft_type", repr(shown), "LORA", code="peft-type")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", "4"),
        ("r", True),
        ("lora_alpha", None),
        ("rank_pattern", [1]),
        ("target_modules", [1]),
    ],
)
def test_fields_of_the_wrong_type(adapter, field, value):
    adapter.config(**{field: value})
    with pytest.raises(regraft.BadInputError) as caught:
        adapter.convert()
    assert any(f.key == field and repr(value) in f.message for f in caught.value.findings)
    assert str(adapter.config_file) in str(caught.value)
    assert not adapter.new.exists()


@pytest.mark.parametrize("entry", [{"q_proj": "4"}, {"q_proj": 0}, {"q(": 4}], ids=str)
def test_a_rank_pattern_that_makes_no_sense(adapter, entry):
    adapter.config(rank_pattern=entry)
    with pytest.raises(regraft.BadInputError) as caught:
        adapter.convert()
    assert next(iter(entry)) in str(caught.value)
    assert not adapter.new.exists()


def test_a_regular_expression_that_is_none(adapter):
    adapter.config(target_modules="(q_proj")
    with pytest.raises(regraft.BadInputError, match="target_modules"):
        adapter.convert()
    assert not adapter.new.exists()


def test_a_config_that_targets_nothing_in_the_file(adapter):
    adapter.config(target_modules=["query", "value"])
    adapter.fails(
        adapter.folder, "adapter_config.json", "query", "target_modules", code="targets-nothing"
    )


def test_factors_that_the_config_does_not_target(adapter):
    adapter.config(target_modules=["w1", "w2", "w3", "q_proj", "k_proj", "v_proj"])
    adapter.fails(adapter.folder, "o_proj", "target_modules", code="not-targeted")


def test_a_rank_that_contradicts_the_config(adapter):
    adapter.config(r=8)
    adapter.fails(adapter.folder, "lora_A.weight", "8", "4", code="shape")


def test_a_rank_pattern_that_contradicts_the_factors(adapter):
    adapter.config(rank_pattern={"layers.1.self_attn.k_proj": 2})
    adapter.fails(adapter.folder, "layers.1.self_attn.k_proj.lora_A", "2", "4", code="shape")


# Tensors


def test_empty_adapter(adapter):
    adapter.weights(lambda tensors: tensors.clear())
    adapter.fails(adapter.weights_file, "empty", code="empty")


def test_missing_expert(adapter):
    def lose(tensors):
        for letter in "AB":
            del tensors[EXPERT.format(2, "w1", letter)]

    adapter.weights(lose)
    adapter.fails(adapter.folder, "layers.1.block_sparse_moe.experts.2.w1", code="missing")


def test_missing_last_expert(adapter):
    def lose(tensors):
        for letter in "AB":
            for part in ("w1", "w2", "w3"):
                del tensors[EXPERT.format(3, part, letter)]

    adapter.weights(lose)
    adapter.fails(adapter.folder, "layers.1.block_sparse_moe.experts.3.w", code="missing")


def test_extra_expert(adapter):
    def add(tensors):
        for letter in "AB":
            tensors[EXPERT.format(4, "w1", letter)] = tensors[EXPERT.format(0, "w1", letter)]

    adapter.weights(add)
    adapter.fails(adapter.folder, "layers.1.block_sparse_moe.experts.4.w1", "4", code="extra")


def test_experts_renumbered_from_one(adapter):
    adapter.rename(
        lambda name: name.replace("experts.0.", "experts.4.") if "layers.1" in name else name
    )
    adapter.fails(adapter.folder, "layers.1.block_sparse_moe.experts.4.w", code="extra")


def test_a_lora_a_without_lora_b(adapter):
    adapter.weights(lambda t: {k: v for k, v in t.items() if k != QUERY.format("B")})
    adapter.fails(adapter.folder, QUERY.format("A"), "lora_B", code="half")


def test_a_lora_b_without_lora_a(adapter):
    adapter.weights(lambda t: {k: v for k, v in t.items() if k != EXPERT.format(1, "w2", "A")})
    adapter.fails(adapter.folder, EXPERT.format(1, "w2", "B"), "lora_A", code="half")


def test_factors_whose_ranks_differ(adapter):
    adapter.weights(lambda t: t.update({QUERY.format("B"): t[QUERY.format("B")][:, :3].copy()}))
    adapter.fails(adapter.folder, QUERY.format("A"), "ranks", code="shape")


def test_a_wrong_shape_beside_its_siblings(adapter):
    adapter.weights(
        lambda t: t.update({EXPERT.format(1, "w1", "A"): np.zeros((4, 15), np.float32)})
    )
    adapter.fails(adapter.folder, "layers.1.block_sparse_moe.experts.1.w1", "15", "16")


def test_a_factor_with_one_dim(adapter):
    adapter.weights(lambda t: t.update({QUERY.format("A"): np.zeros(4, np.float32)}))
    adapter.fails(adapter.folder, QUERY.format("A"), "[4]", code="shape")


def test_int8_factors(adapter):
    adapter.weights(lambda t: t.update({QUERY.format("A"): t[QUERY.format("A")].astype(np.int8)}))
    adapter.fails(adapter.folder, QUERY.format("A"), "int8", "floating-point", code="dtype")


def test_nan_is_reported_and_kept(adapter):
    def spoil(tensors):
        tensors[QUERY.format("A")][0, :3] = np.nan, np.inf, 1

    adapter.weights(spoil)
    report = adapter.convert()
    (note,) = [note for note in report.notes if "NaN" in note]
    assert QUERY.format("A") in note
    assert "2 values" in note
    file = adapter.new / "adapter_model.safetensors"
    got = open_tensors(file, read_header(file))[QUERY.format("A")]
    assert np.isnan(got[0, 0])
    assert np.isinf(got[0, 1])


def test_nan_in_an_expert_is_kept_bit_for_bit(adapter):
    payload = np.uint32(0x7FC12345)

    def spoil(tensors):
        tensors[EXPERT.format(1, "w2", "A")].view(np.uint32)[0, 0] = payload

    adapter.weights(spoil)
    report = adapter.convert()
    assert any(EXPERT.format(1, "w2", "A") in note for note in report.notes)
    file = adapter.new / "adapter_model.safetensors"
    words = np.concatenate(
        [np.ravel(t).view(np.uint32) for t in open_tensors(file, read_header(file)).values()]
    )
    assert (words == payload).sum() == 1


# Names


def test_old_and_new_keys_together(adapter):
    def add(tensors):
        for letter, shape in (("A", (16, 16)), ("B", (48, 16))):
            tensors[PREFIX + f"model.layers.0.mlp.experts.lora_{letter}.weight"] = np.zeros(
                shape, np.float32
            )

    adapter.weights(add)
    adapter.fails(adapter.folder, "mlp.experts", "block_sparse_moe", code="mixed-layouts")


@pytest.mark.parametrize("wrapper", ["model.", "base_model.model."])
def test_a_doubled_prefix(adapter, wrapper):
    adapter.rename(lambda name: name.replace(PREFIX, PREFIX + wrapper))
    adapter.fails(adapter.folder, PREFIX + wrapper, code="prefix", model=None)
    assert any("twice" in n or "taken off" in n for n in adapter.convert().notes)


def test_no_prefix_is_another_tools_file(adapter):
    """PEFT would load nothing of it; Megatron-Bridge exports keys like these, and its reader takes them."""
    adapter.convert()
    want = dict(open_tensors(adapter.new / "adapter_model.safetensors"))
    adapter.rename(lambda name: name.removeprefix(PREFIX))
    report = adapter.convert(overwrite=True)
    made = dict(open_tensors(adapter.new / "adapter_model.safetensors"))
    assert {n: x.tobytes() for n, x in made.items()} == {n: x.tobytes() for n, x in want.items()}
    assert report.written
    shutil.rmtree(adapter.new)
    adapter.fails(repr(PREFIX), code="prefix", source="peft", model=None)


def test_two_adapters_in_one_file(adapter):
    """One name would be taken out of the keys."""

    def double(tensors):
        return {
            name.replace(".weight", f".{each}.weight"): tensor
            for name, tensor in tensors.items()
            for each in ("first", "second")
        }

    adapter.weights(double)
    adapter.fails(adapter.folder, "'first'", ".first.weight", code="adapter-name")


def test_a_key_that_nothing_explains(adapter):
    adapter.weights(
        lambda t: t.update({PREFIX + "model.layers.0.oddity.weight": np.zeros(3, np.float32)})
    )
    adapter.fails("model.layers.0.oddity.weight", kind=regraft.UnmatchedKeysError, code="unmatched")


def test_a_module_that_the_model_does_not_have(adapter):
    adapter.rename(lambda name: name.replace("self_attn.q_proj", "attention.q_proj"))
    adapter.fails("layers.0.attention.q_proj", kind=regraft.UnmatchedKeysError, code="unmatched")


# The wrong base


@pytest.mark.parametrize(
    ("field", "value", "key"),
    [
        ("hidden_size", 32, "layers."),
        ("num_hidden_layers", 1, "layers.1."),
        ("num_local_experts", 2, "experts.2."),
        ("num_local_experts", 8, "experts.4."),
    ],
)
def test_the_wrong_base(adapter, tmp_path, field, value, key):
    config = json.loads((BASE / "config.json").read_text())
    base = tmp_path / "config.json"
    base.write_text(json.dumps({**config, field: value}))
    error = adapter.fails(key, model=base)
    assert any(str(value) in f.message or key in str(f) for f in error.findings)
    assert any("base" in f"{f.message} {f.fix}" or f.code == "missing" for f in error.findings)


def test_a_base_of_another_family(adapter):
    with pytest.raises(regraft.BadInputError, match=r"its base is mixtral.*qwen3_moe"):
        adapter.convert(model=GOLDEN / "bases/qwen3_moe")
    assert not adapter.new.exists()


def test_a_base_that_no_rule_book_knows(adapter, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(regraft.BadInputError, match=r"its base is mixtral.*unheard_of"):
        adapter.convert(model=tmp_path / "config.json")
    assert not adapter.new.exists()


@pytest.mark.parametrize("text", [None, "{}", "[1]", "{", '{"model_type": 3}'])
def test_a_base_without_a_sound_config(adapter, tmp_path, text):
    base = tmp_path / "base"
    base.mkdir()
    if text is not None:
        (base / "config.json").write_text(text)
    with pytest.raises(regraft.BadInputError) as caught:
        adapter.convert(model=base)
    assert str(base) in str(caught.value)
    assert not adapter.new.exists()


# What is asked for


@pytest.mark.parametrize("option", ["to", "source"])
def test_an_unknown_layout_lists_the_known_ones(adapter, option):
    with pytest.raises(regraft.BadInputError, match=r"'transformers-v6'.*mean 'transformers-v5'"):
        adapter.convert(**{option: "transformers-v6"})
    with pytest.raises(regraft.BadInputError, match=r"(?=.*transformers-v4)(?=.*transformers-v5)"):
        adapter.convert(**{option: "nothing like any"})
    assert not adapter.new.exists()


def test_a_source_layout_that_the_keys_contradict(adapter):
    adapter.fails(
        adapter.folder,
        "transformers-v5",
        "block_sparse_moe",
        source="transformers-v5",
        code="layout",
    )


def test_a_destination_that_exists(adapter):
    adapter.new.mkdir()
    (adapter.new / "mine.txt").write_text("keep me")
    with pytest.raises(regraft.BadInputError, match=r"exists already.*overwrite") as caught:
        adapter.convert()
    assert str(adapter.new) in str(caught.value)
    assert [p.name for p in adapter.new.iterdir()] == ["mine.txt"]
    assert adapter.convert(overwrite=True).written
    assert (adapter.new / "adapter_config.json").exists()


def test_a_failure_leaves_what_was_to_be_overwritten(adapter):
    adapter.new.mkdir()
    (adapter.new / "mine.txt").write_text("keep me")
    adapter.config(r=8)
    with pytest.raises(regraft.BadInputError):
        adapter.convert(overwrite=True)
    assert (adapter.new / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("inside", ["", "new", "deep/er"])
def test_a_destination_that_is_the_source_or_in_it(adapter, inside):
    adapter.new = adapter.folder / inside
    before = {p: p.read_bytes() for p in adapter.folder.iterdir()}
    with pytest.raises(regraft.BadInputError, match="choose another folder") as caught:
        adapter.convert(overwrite=True)
    assert str(adapter.new) in str(caught.value)
    assert {p: p.read_bytes() for p in adapter.folder.iterdir()} == before


def test_a_destination_that_is_a_file(adapter):
    adapter.new.write_text("a file")
    with pytest.raises(regraft.BadInputError, match="this is a file"):
        adapter.convert(overwrite=True)
    assert adapter.new.read_text() == "a file"


def test_several_problems_are_reported_together(adapter):
    adapter.config(r=8, rank_pattern={"k_proj": 2})
    adapter.weights(lambda t: t.update({QUERY.format("A"): t[QUERY.format("A")].astype(np.int8)}))
    error = adapter.fails(QUERY.format("A"), "int8")
    assert {"dtype", "shape"} <= {f.code for f in error.findings}
    assert any("k_proj" in str(f) for f in error.findings)


def test_a_refusal_of_one_of_several_adapters_writes_none_of_them(tmp_path):
    source = tmp_path / "all"
    for name in ("mixtral__gud_attn", "mixtral__dora"):
        shutil.copytree(
            GOLDEN / "cases" / name, source / name, ignore=shutil.ignore_patterns("reference*")
        )
    with pytest.raises(regraft.RefusedError, match="mixtral__dora"):
        regraft.convert(source, tmp_path / "new", to="transformers-v5", model=BASE)
    assert [p.name for p in tmp_path.iterdir()] == ["all"]


def test_torchs_own_attention_needs_its_base(tmp_path):
    start = "base_model.model.head.attention"
    tensors = {
        f"{start}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{start}.lora_B.weight": np.ones((24, 2), np.float32),
        f"{start}.base_layer.out_proj.lora_A.weight": np.ones((2, 8), np.float32),
        f"{start}.base_layer.out_proj.lora_B.weight": np.ones((8, 2), np.float32),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["attention"]}
    lora = tmp_path / "lora"
    lora.mkdir()
    write_tensors(lora / "adapter_model.safetensors", tensors, {"format": "pt"})
    (lora / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(regraft.UnmatchedKeysError, match="--model"):
        regraft.convert(lora, tmp_path / "out", to="transformers-v5")
    assert not (tmp_path / "out").exists()


def test_a_parameters_factors_where_the_config_says_an_embedding(tmp_path):
    """PEFT would look for lora_embedding_A, find nothing, and say nothing."""
    golden = Path(__file__).parents[1] / "golden"
    src = tmp_path / "lora"
    shutil.copytree(golden / "cases/mixtral__params_embedding", src)
    config = json.loads((src / "adapter_config.json").read_text())
    (src / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ".*"}))
    for to in ("transformers-v5", "transformers-v4", "vllm"):
        with pytest.raises(regraft.BadInputError, match="lora_embedding_A") as told:
            regraft.convert(src, tmp_path / "out", to=to, model=golden / "bases/mixtral")
        assert told.value.findings[0].key.endswith("embed_tokens.lora_A.weight")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("named", "advice"),
    [
        ("the folder", "{base} (mixtral); the one given is llama"),
        ("org/elsewhere", "trained on (it names org/elsewhere); the one given is llama"),
        (None, "trained on; the one given is llama, and the names are those of mixtral"),
    ],
)
def test_a_base_of_another_type_is_told_by_what_the_adapter_says(tmp_path, named, advice):
    """PEFT names no class where a task is set; then the base that it names, or the names, tell the family."""
    case, base = GOLDEN / "cases/mixtral__gud_attn", GOLDEN / "bases/mixtral"
    src = tmp_path / "src"
    shutil.copytree(case, src)
    config = json.loads((src / "adapter_config.json").read_text()) | {"auto_mapping": None}
    config["base_model_name_or_path"] = str(base) if named == "the folder" else named
    (src / "adapter_config.json").write_text(json.dumps(config))
    llama = make_base(tmp_path / "llama", "llama")
    with pytest.raises(regraft.UnmatchedKeysError) as caught:
        regraft.convert(src, tmp_path / "out", to="transformers-v5", model=llama)
    (advised,) = {finding.fix for finding in caught.value.findings}
    assert advice.format(base=base) in advised


def test_a_file_that_is_cut_off_is_told_so_without_its_config(tmp_path):
    """No config mends it."""
    whole = (GOLDEN / "cases/mixtral__gud_attn/adapter_model.safetensors").read_bytes()
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(alone, tmp_path / "out", to="transformers-v5")
    assert caught.value.findings[0].code == "file-truncated"
    alone.write_bytes(whole)
    with pytest.raises(regraft.BadInputError, match="which says rank and alpha") as caught:
        regraft.convert(alone, tmp_path / "out", to="transformers-v5")
    assert caught.value.findings[0].code == "no-config"
