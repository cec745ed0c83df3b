"""Whole checkpoints converted file to file, against the arrays reader and against the golden files."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints.models import MIXTRAL, beside, mixtral, snapshot, write_folder
from making import book_of, equation_of, quick_cases

import regraft
from regraft.arrays.apply import apply_plan
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.checkpoints.prepare import prepare
from regraft.checkpoints.source import open_checkpoint
from regraft.checkpoints.verify import verify
from regraft.errors import AmbiguousError, BadInputError, RefusedError, UnmatchedKeysError
from regraft.report import Report
from regraft.rules.book import only_books
from regraft.storage.safetensors import open_tensors, read_header, write_tensors

V4, V5 = "transformers-v4", "transformers-v5"
BASES = sorted((Path(__file__).parents[1] / "golden" / "bases").iterdir())


def tensors_of(folder):
    result = {}
    for file in sorted(folder.glob("*.safetensors")):
        result |= open_tensors(file)
    return result


def same(one, other):
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and np.ascontiguousarray(one[name]).tobytes() == np.ascontiguousarray(other[name]).tobytes()
        for name in one
    )


def without_nulls(data):
    if not isinstance(data, dict):
        return data
    return {name: without_nulls(value) for name, value in data.items() if value is not None}


def convert(src, dst, to=V5, **options) -> Report:
    return regraft.convert(src, dst, to=to, **options)


@pytest.mark.parametrize("base", quick_cases(BASES), ids=lambda path: path.name)
def test_real_models_there_and_back(base, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    report = convert(base, there)
    foreign = InstalledTransformers()
    ready = prepare(base, V5, foreign=foreign)
    if ready.plan is not None:
        source = list(tensors_of(base).values())
        assert same(apply_plan(ready.plan, source), tensors_of(there))
    assert verify(base, there, foreign=foreign).equal
    convert(there, back, V4)
    assert same(tensors_of(base), tensors_of(back))
    assert verify(there, back, foreign=foreign).equal
    assert verify(base, back, foreign=foreign).equal
    before, after = (json.loads((p / "config.json").read_text()) for p in (base, back))
    assert without_nulls(after) == without_nulls(before)
    assert report.checkpoint.tensors_in == len(tensors_of(base))
    assert beside(there) == ["back", "there"]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("jobs", [1, 3])
def test_shards_workers_and_sizes_do_not_change_a_number(tmp_path, shards, jobs):
    tensors = mixtral()
    src = write_folder(tmp_path / "src", tensors, shards=shards)
    convert(src, tmp_path / "plain", jobs=jobs)
    convert(src, tmp_path / "cut", jobs=jobs, shard_size="500B")
    plain, cut = (tensors_of(tmp_path / name) for name in ("plain", "cut"))
    assert same(plain, cut)
    for layer in range(2):
        made = plain[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        old = f"model.layers.{layer}.block_sparse_moe.experts."
        for expert in range(3):
            both = [tensors[f"{old}{expert}.{w}.weight"] for w in ("w1", "w3")]
            assert np.array_equal(made[expert], np.concatenate(both))
    files = sorted(path.name for path in (tmp_path / "plain").glob("*.safetensors"))
    assert files == sorted(path.name for path in src.glob("*.safetensors"))


def test_by_size(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), shards=2)
    convert(src, tmp_path / "out", shard_size=1000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        header = read_header(file)
        sizes = [info.end - info.start for info in header.tensors.values()]
        assert sum(sizes) <= 1000 or len(sizes) == 1
        assert header.metadata == {"format": "pt"}
        assert {index["weight_map"][name] for name in header.tensors} == {file.name}
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    convert(src, tmp_path / "one", shard_size="1GB")
    assert [p.name for p in sorted((tmp_path / "one").iterdir())] == [
        "config.json",
        "model.safetensors",
    ]


def test_one_file_without_an_index_stays_one(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    report = convert(src / "model.safetensors", tmp_path / "out")
    assert report.checkpoint.files == ["model.safetensors"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_without_a_config(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    config = (src / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(AmbiguousError, match="mixtral, phimoe"):
        convert(src, tmp_path / "out")
    convert(src, tmp_path / "out", model=config)
    assert verify(src, tmp_path / "out", model=config).equal
    base = next(base for base in BASES if base.name == "jamba") / "model.safetensors"
    alone = tmp_path / "jamba.safetensors"
    alone.write_bytes(base.read_bytes())
    alone.parent.joinpath("config.json").unlink()
    convert(alone, tmp_path / "jamba")
    convert(base, tmp_path / "told")
    assert same(tensors_of(tmp_path / "jamba"), tensors_of(tmp_path / "told"))


def test_other_files_are_carried_over(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    (src / "tokenizer.json").write_text("{}")
    (src / "sub").mkdir()
    (src / "sub" / "notes.txt").write_text("x")
    (src / "pytorch_model.bin").write_bytes(b"old")
    report = convert(src, tmp_path / "out")
    assert set(snapshot(tmp_path / "out")) == {
        "config.json",
        "model.safetensors",
        "sub/notes.txt",
        "tokenizer.json",
    }
    assert "pytorch_model.bin" in report.notes[0]
    assert set(report.files) == {"sub/notes.txt", "tokenizer.json"}


def test_in_its_layout_already_is_a_copy(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), shards=2)
    convert(src, tmp_path / "out", V4)
    before, after = snapshot(src), snapshot(tmp_path / "out")
    before.pop("model.safetensors.index.json")
    index = json.loads(after.pop("model.safetensors.index.json"))
    assert after == before
    assert len(index["weight_map"]) == len(mixtral())


def test_dtypes_are_kept_and_cast_by_name(tmp_path):
    tensors = mixtral(dtype=ml_dtypes.bfloat16)
    tensors["model.norm.weight"] = np.ones(8, np.float32)
    src = write_folder(tmp_path / "src", tensors)
    convert(src, tmp_path / "kept")
    kept = tensors_of(tmp_path / "kept")
    assert kept["model.norm.weight"].dtype == np.float32
    assert kept["lm_head.weight"].dtype == ml_dtypes.bfloat16
    report = convert(src, tmp_path / "cast", dtype=["float32", "*.gate_up_proj=float16"])
    cast = tensors_of(tmp_path / "cast")
    assert cast["lm_head.weight"].dtype == np.float32
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert np.array_equal(cast[fused], kept[fused].astype(np.float16))
    assert cast[fused].dtype == np.float16
    assert report.checkpoint.casts == {"BF16 -> F32": 16, "BF16 -> F16": 2}
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == "float32"


def test_a_pattern_that_fits_nothing(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    with pytest.raises(BadInputError, match=r"fits \*\.w1\.weight"):
        convert(src, tmp_path / "out", dtype=["float16", "*.w1.weight=float32"])
    assert beside(src) == ["src"]


def test_two_types_in_one_target_are_refused(tmp_path):
    tensors = mixtral()
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors[name] = tensors[name].astype(np.float16)
    src = write_folder(tmp_path / "src", tensors)
    with pytest.raises(RefusedError, match=r"F16|F32"):
        convert(src, tmp_path / "out")
    assert beside(src) == ["src"]


@pytest.mark.parametrize(("dtype", "row"), [("F4", 4), ("F6_E2M3", 6)])
def test_elements_below_a_byte_are_not_cut_or_joined(tmp_path, dtype, row):
    """Counted in whole bytes they would have the size zero, and zeros would be written in their place."""
    tensors = mixtral(inner=8)
    experts = [name for name in tensors if ".experts." in name]
    tensors |= {name: np.arange(8 * row, dtype=np.uint8).reshape(8, row) for name in experts}
    src = write_folder(tmp_path / "src", tensors, {**MIXTRAL, "intermediate_size": 8})
    file = src / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:end])
    for name in experts:
        head[name] |= {"dtype": dtype, "shape": [8, 8]}
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(RefusedError) as caught:
        convert(src, tmp_path / "out")
    assert {f.code for f in caught.value.findings} == {"packed"}
    assert beside(src) == ["src"]
    assert convert(src, tmp_path / "same", V4).written
    same = (tmp_path / "same" / "model.safetensors").read_bytes()
    assert same.endswith(data[end:])


@pytest.mark.parametrize("empty", ["hidden", "inner"])
def test_tensors_without_elements_are_moved_like_others(tmp_path, empty):
    tensors = mixtral(**{empty: 0})
    field = {"hidden": "hidden_size", "inner": "intermediate_size"}[empty]
    src = write_folder(tmp_path / "src", tensors, {**MIXTRAL, field: 0})
    convert(src, tmp_path / "out")
    new = tensors_of(tmp_path / "out")
    inner, hidden = (0, 8) if empty == "inner" else (6, 0)
    assert new["model.layers.1.mlp.experts.gate_up_proj"].shape == (3, 2 * inner, hidden)
    assert new["model.layers.1.mlp.experts.down_proj"].shape == (3, hidden, inner)
    convert(tmp_path / "out", tmp_path / "back", V4)
    back = tensors_of(tmp_path / "back")
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in tensors.items()}
    assert all(np.array_equal(back[n], t) for n, t in tensors.items())


def test_rows_that_are_long_and_none_at_all(tmp_path):
    """Long runs are cut by rows, of which there are none here."""
    book = book_of(
        equation_of(
            "x.{l}.w : o (a + b) == y.{l}.w : o a, z.{l}.w : o b where a = config.half", "halves"
        )
    )
    tensors = {"x.0.w": np.zeros((0, 1 << 16), np.float32), "x.1.w": np.ones((2, 1 << 16), "f4")}
    src = write_folder(tmp_path / "src", tensors, {"model_type": "test", "half": 1 << 15})
    with only_books([book]):
        convert(src, tmp_path / "out", "new")
    new = tensors_of(tmp_path / "out")
    assert {n: t.shape[0] for n, t in new.items()} == {
        "y.0.w": 0,
        "z.0.w": 0,
        "y.1.w": 2,
        "z.1.w": 2,
    }
    assert new["z.1.w"].all()


def test_unaligned_sources_are_laid_out_aligned(tmp_path):
    tensors = mixtral()
    tensors["model.layers.0.self_attn.k_scale"] = np.array([True, False, True])
    src = write_folder(tmp_path / "src", tensors)
    convert(src, tmp_path / "out")
    header = read_header(tmp_path / "out" / "model.safetensors")
    for name, info in header.tensors.items():
        assert (header.data_start + info.start) % (1 if "k_scale" in name else 4) == 0
    assert verify(src, tmp_path / "out").equal


def test_dry_run_writes_nothing(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    report = convert(src, tmp_path / "out", dry_run=True)
    assert not report.written and report.checkpoint.tensors_out == 19
    assert beside(src) == ["src"]


def test_missing_expert(tmp_path):
    tensors = mixtral()
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    src = write_folder(tmp_path / "src", tensors)
    with pytest.raises(BadInputError, match=r"experts\.2\.w3"):
        convert(src, tmp_path / "out")


def test_mixed_and_unknown_names(tmp_path):
    tensors = mixtral()
    tensors["model.layers.0.mlp.experts.down_proj"] = np.zeros((3, 8, 6), np.float32)
    src = write_folder(tmp_path / "src", tensors)
    with pytest.raises(BadInputError, match="old and new keys stand together"):
        convert(src, tmp_path / "out")
    tensors = mixtral()
    tensors["model.surprise"] = np.zeros(1, np.float32)
    with pytest.raises(UnmatchedKeysError, match="surprise"):
        convert(write_folder(tmp_path / "two", tensors), tmp_path / "out")
    config = {**MIXTRAL, "model_type": "novel"}
    with pytest.raises(UnmatchedKeysError, match="novel"):
        convert(write_folder(tmp_path / "three", mixtral(), config), tmp_path / "out")


def test_one_name_two_shapes_is_told_by_the_shape(tmp_path):
    base = next(base for base in BASES if base.name == "qwen3_vl_moe")
    convert(base, tmp_path / "v5")
    for path, layout in ((base, V4), (tmp_path / "v5", V5)):
        assert prepare(path, V5).report.source_layout == layout


def test_options_of_checkpoints_are_refused_for_adapters(tmp_path):
    with pytest.raises(BadInputError, match="jobs: only for checkpoints"):
        convert(tmp_path, tmp_path / "out", jobs=2)


def test_no_tensors(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {}, {})
    with pytest.raises(BadInputError, match="no tensors"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_the_safetensors_library_opens_the_result(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    src = write_folder(tmp_path / "src", mixtral(), shards=3)
    convert(src, tmp_path / "out", shard_size="700B")
    ours = tensors_of(tmp_path / "out")
    seen = set()
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safetensors.safe_open(file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                assert np.array_equal(opened.get_tensor(name), ours[name])
                seen.add(name)
    assert seen == ours.keys()


def test_the_bias_of_minimax_routers_follows(tmp_path):
    tensors = mixtral()
    for layer in range(2):
        at = f"model.layers.{layer}.block_sparse_moe."
        tensors[at + "e_score_correction_bias"] = np.arange(3, dtype=np.float32)
    src = write_folder(tmp_path / "src", tensors, {**MIXTRAL, "model_type": "minimax_m2"})
    regraft.convert(src, tmp_path / "out", to="transformers-v5")
    out = open_tensors(tmp_path / "out" / "model.safetensors")
    assert out["model.layers.1.mlp.e_score_correction_bias"].tolist() == [0, 1, 2]
