"""Slices and windows of checkpoints, against the file that a conversion writes."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from models import mixtral, write_folder
from slicing import boxes, cut

import regraft
from regraft.bridges.transformers import parallel
from regraft.checkpoints.casting import parse_casts
from regraft.checkpoints.gather import Files
from regraft.checkpoints.prepare import prepare
from regraft.checkpoints.windows import Windows
from regraft.cli import main
from regraft.errors import BadInputError, RefusedError
from regraft.storage.safetensors import open_tensors

BASES = sorted(path for path in (Path(__file__).parents[1] / "golden/bases").iterdir())
V5 = "transformers-v5"


def converted(src, out, **options):
    regraft.convert(src, out, to=V5, **options)
    return {
        k: t for path in sorted(out.glob("*.safetensors")) for k, t in open_tensors(path).items()
    }


def bits(array):
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_vl_moe"])
def test_slices_of_a_checkpoint_are_those_of_the_converted_one(name, tmp_path):
    base = next(path for path in BASES if path.name == name)
    whole = converted(base, tmp_path / "out")
    rng = random.Random(name)
    picked = {key: list(boxes(array.shape, key, 4)) for key, array in whole.items()}
    for _ in range(6):
        wanted = {key: rng.choice(found) for key, found in picked.items()}
        found = regraft.slices(base, to=V5, box=wanted)
        assert {item.target: item.whole for item in found} == {k: t.shape for k, t in whole.items()}
        made = found.read(jobs=2)
        for key, box in wanted.items():
            assert bits(made[key]) == bits(cut(whole[key], box)), (key, box)
        assert found.bytes == sum(array.nbytes for array in made.values())


def test_the_runs_are_the_bytes_and_no_others(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), shards=2)
    whole = converted(src, tmp_path / "out")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    found = regraft.slices(src, to=V5, names=[name], box=[(1, 3), [(0, 2), (6, 8)]])
    (item,) = found
    assert item.shape == (2, 4, 8)
    assert item.bytes == sum(run.size for run in item.runs) == 2 * 4 * 8 * 4
    read = b"".join((src / r.file).read_bytes()[r.at : r.at + r.size] for r in item.runs)
    want = whole[name][1:3][:, [0, 1, 6, 7]]
    assert sorted(np.frombuffer(read, np.float32)) == sorted(want.reshape(-1))
    assert bits(found.read()[name]) == bits(want)
    assert found.to_dict()["slices"][0]["box"] == [[1, 3], [[0, 2], [6, 8]], [0, 8]]


def test_reading_into_what_is_given(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    name = "model.layers.0.mlp.experts.down_proj"
    found = regraft.slices(src, to=V5, names=[name], box=lambda _, shape: [(0, shape[0] // 2)])
    room = np.full(found[0].shape, -1, np.float32)
    assert found.read({name: room})[name] is room
    assert bits(room) == bits(found.read()[name])
    raw = bytearray(found.bytes)
    found.read({name: raw})
    assert raw == bits(room)
    for bad, why in (
        (np.empty((1, 8, 6), np.float32)[:, :, ::2], "side by side"),
        (np.empty(3, np.float32), "12 bytes"),
        (bytes(found.bytes), "read-only"),
        (object(), "no bytes"),
    ):
        with pytest.raises(BadInputError, match=why) as caught:
            found.read({name: bad})
        assert [f.code for f in caught.value.findings] == ["out-buffer"]
    with pytest.raises(BadInputError) as caught:
        found.read({"nothing": room})
    assert [(f.code, f.key) for f in caught.value.findings] == [("no-such-key", "nothing")]


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    box = {
        "lm_head.weight": [(0, 99)],
        "model.norm.weight": [(0, 1), (0, 1)],
        "model.embed_tokens.weight": [slice(0, 4, 2)],
        "model.layers.0.self_attn.q_proj.weight": ["x"],
        "lm_head.wieght": None,
    }
    with pytest.raises(BadInputError) as caught:
        regraft.slices(src, to=V5, box=box)
    codes = [f.code for f in caught.value.findings]
    assert sorted(codes) == ["bad-box"] * 4 + ["no-such-key"]
    assert "lm_head.weight" in next(f.fix for f in caught.value.findings if f.code == "no-such-key")


def test_a_file_that_ends_early_or_changes_is_an_error(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    found = regraft.slices(src, to=V5)
    file = src / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInputError) as caught:
        found.read()
    assert caught.value.findings[0].code == "file-changed"


def test_tensors_beside_weights_are_cut_with_them(tmp_path):
    tensors = mixtral(hidden=256, inner=128, dtype=np.float32)
    for name in [n for n in tensors if ".w1." in n or ".w2." in n or ".w3." in n]:
        rows, columns = (-(-n // 128) for n in tensors[name].shape)
        tensors[name + "_scale_inv"] = np.arange(rows * columns, dtype=np.float32).reshape(
            rows, columns
        )
    config = json.loads((write_folder(tmp_path / "x", mixtral()) / "config.json").read_text())
    config |= {"hidden_size": 256, "intermediate_size": 128}
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    src = write_folder(tmp_path / "src", tensors, config)
    whole = converted(src, tmp_path / "out")
    scales = [name for name in whole if "scale" in name]
    assert scales
    found = regraft.slices(src, to=V5, names=scales, box=lambda _, shape: [(0, 1), (0, 1)])
    for name, array in found.read().items():
        assert bits(array) == bits(whole[name][0:1, 0:1])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_windows_are_the_bytes_of_the_written_files(name, dtype, tmp_path):
    base = next(path for path in BASES if path.name == name)
    out = tmp_path / "out"
    regraft.convert(base, out, to=V5, dtype=dtype)
    ready = prepare(base, V5, casts=parse_casts(dtype))
    windows = Windows(ready.moves, ready.dtypes, ready.source.tensors)
    rng = random.Random(name)
    with Files(ready.source.files) as files:
        for file in ready.layout.files:
            want = (out / file.name).read_bytes()
            assert len(want) == file.size
            edges = [0, file.size, *(rng.randint(0, file.size) for _ in range(40))]
            edges = sorted({*edges, len(file.head), *file.starts.tolist()})
            spans = [*pairwise(edges), (0, file.size)]
            for start, stop in spans:
                assert windows.read(files, file, start, stop).tobytes() == want[start:stop]


def test_a_window_says_what_it_reads(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), shards=2)
    ready = prepare(src, V5)
    windows = Windows(ready.moves, ready.dtypes, ready.source.tensors)
    for file in ready.layout.files:
        middle = (len(file.head) + file.size) // 2 // 4 * 4
        read = [windows.sources(file, *span) for span in ((0, middle), (middle, file.size))]
        assert sum(size for part in read for _, _, size in part) == file.size - len(file.head)


def test_packed_tensors_are_whole_or_not_at_all(tmp_path):
    from regraft.checkpoints.slices import read_region, strips_of
    from regraft.planning.slices import Slicer

    slicer = Slicer([(4, 8)])
    slicer.add_whole(["w"], np.zeros(1, np.int64))
    (strips,) = strips_of(slicer, "w", (4, 8), "F4", read_region(None, (4, 8), "w"))
    assert strips.sizes == (16,)
    with pytest.raises(RefusedError) as caught:
        strips_of(slicer, "w", (4, 8), "F4", read_region([(0, 2)], (4, 8), "w"))
    assert caught.value.findings[0].code == "packed"


# The command


def run(capsys, *args):
    status = main([*map(str, args)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


PLAN = {
    "tp": {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "lm_head": "colwise_gather_output",
        "layers.*.mlp.experts": "moe_tp_experts",
    },
    "ep": {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
    },
}


@pytest.fixture
def src(tmp_path):
    config = json.loads((write_folder(tmp_path / "x", mixtral()) / "config.json").read_text())
    config |= {"num_key_value_heads": 2, "num_local_experts": 4}
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    tensors = mixtral(experts=4)
    for name in [name for name in tensors if "k_proj" in name or "v_proj" in name]:
        tensors[name] = np.concatenate([tensors[name]] * 2)
    return write_folder(tmp_path / "src", tensors, config)


def test_each_element_is_read_by_one_rank_or_by_all(src, tmp_path, capsys):
    whole = converted(src, tmp_path / "out")
    times = {name: np.zeros(array.shape, int) for name, array in whole.items()}
    for rank in range(4):
        status, printed, _ = run(
            capsys, "slices", src, "--to", V5, "--tp", 2, "--ep", 2, "--rank", rank, "--plan",
            tmp_path / "plan.json", "--json",
        )  # fmt: skip
        assert status == 0
        for item in json.loads(printed)["slices"]:
            indices = []
            for part in item["box"]:
                spans = part if part and isinstance(part[0], list) else [part]
                indices.append([i for low, high in spans for i in range(low, high)])
            times[item["target"]][np.ix_(*indices)] += 1
    for name, count in times.items():
        want = (
            1
            if ".experts." in name
            else 2
            if "q_proj" in name or "o_proj" in name or "lm_head" in name
            else 4
        )
        assert (count == want).all(), name


def test_how_much_each_rank_reads(src, tmp_path, capsys):
    plan = ("--plan", tmp_path / "plan.json")
    status, printed, _ = run(capsys, "slices", src, "--to", V5, "--tp", 2, *plan)
    assert status == 0
    ranks = ["rank 0", "rank 1", "whole in each rank"]
    assert [line.partition(":")[0] for line in printed.splitlines() if line[0] != " "] == ranks
    assert "the tp plan has no entry for them\n  model.embed_tokens.weight" in printed
    status, printed, _ = run(capsys, "slices", src, "--to", V5, "--tp", 2, "--rank", 1, *plan)
    assert status == 0
    assert "model.safetensors" in printed


@pytest.mark.parametrize(
    ("options", "change", "code", "word"),
    [
        (["--tp", "4"], {}, "heads", "num_attention_heads"),
        (["--ep", "3"], {}, "uneven", "--ep"),
        (["--tp", "2"], {"pp": {}}, "parallel-plan", "pp"),
        (["--tp", "2"], {"tp": {"lm_head": "diagonal"}}, "parallel-plan", "diagonal"),
        (["--tp", "2"], {"tp": {"lm_haed": "colwise"}}, "parallel-plan", "lm_haed"),
        (["--tp", "2", "--rank", "2"], {}, "option", "rank 2"),
    ],
)
def test_what_does_not_divide_and_what_a_plan_has_not(
    src, tmp_path, capsys, options, change, code, word
):
    (tmp_path / "plan.json").write_text(json.dumps({**PLAN, **change}))
    args = ["slices", src, "--to", V5, *options, "--plan", tmp_path / "plan.json", "--json"]
    if "--rank" not in options:
        args += ["--rank", "0"]
    status, printed, _ = run(capsys, *args)
    assert status == 1
    findings = json.loads(printed)["error"]["findings"]
    assert {f["code"] for f in findings} == {code}
    assert word in str(findings)


@pytest.mark.parametrize(
    ("options", "plan", "said"),
    [
        (["--ep", "2"], {"tp": PLAN["tp"]}, "--ep 2 cuts nothing"),
        (["--tp", "2"], {"ep": PLAN["ep"]}, "--tp 2 cuts nothing"),
        (["--tp", "2", "--ep", "2"], {"tp": PLAN["tp"]}, "--ep 2 cuts nothing"),
        (["--tp", "2"], {"tp": {"model.norm": "sequence_parallel"}}, "--tp 2 cuts nothing"),
    ],
)
def test_ranks_that_would_share_nothing_are_an_error(src, tmp_path, capsys, options, plan, said):
    """As experts of a model without any: each rank would read all of it."""
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    status, _, told = run(
        capsys, "slices", src, "--to", V5, *options, "--plan", tmp_path / "plan.json"
    )
    assert status == 1
    assert said in told


def test_what_transformers_does_not_cut_is_named(capsys):
    """It has a plan of experts for GPT-OSS, and one of layers for its head alone."""
    pytest.importorskip("transformers", minversion="5.0")
    base = next(path for path in BASES if path.name == "gpt_oss")
    status, printed, _ = run(capsys, "slices", base, "--to", V5, "--tp", 2)
    assert status == 0
    assert "the tp plan has no entry for them\n  model.layers.{0,1}.mlp.experts" in printed
    assert "lm_head" not in printed
    assert "those of the installed transformers" in printed


def test_the_installed_transformers_knows_how_a_model_is_cut(src, capsys):
    pytest.importorskip("transformers", minversion="5.0")
    status, printed, _ = run(
        capsys, "slices", src, "--to", V5, "--tp", 2, "--ep", 2, "--rank", 3, "--json"
    )
    assert status == 0
    boxes = {item["target"]: item["box"] for item in json.loads(printed)["slices"]}
    assert boxes["model.layers.0.self_attn.q_proj.weight"] == [[4, 8], [0, 8]]
    assert boxes["model.layers.0.mlp.experts.gate_up_proj"][0] == [2, 4]
    assert boxes["model.norm.weight"] == [[0, 8]]


def test_a_model_of_which_no_plan_is_known(src, capsys, monkeypatch):
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    status, printed, _ = run(capsys, "slices", src, "--to", V5, "--tp", 2, "--rank", 0, "--json")
    assert status == 1
    (finding,) = json.loads(printed)["error"]["findings"]
    assert finding["code"] == "parallel-plan"
    assert "--plan" in finding["fix"]
