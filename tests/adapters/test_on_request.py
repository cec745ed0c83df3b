"""What is done only by name: deltas of full rank, approximations, fewer components, one rank for all."""

import json

import numpy as np
import pytest
from dialects.test_tools import ATTENTION, make_adapter, make_base
from hypothesis import given
from hypothesis import strategies as st
from making import headers_of
from test_golden import GOLDEN, INDEX, adapter_of, base_of, outputs, read

import regraft
from regraft.adapters.form import Images, Lora, delta
from regraft.adapters.ranks import Options, compact, cut, make_uniform
from regraft.adapters.scale import Scale
from regraft.checking.certificate import verify_adapters
from regraft.cli import main
from regraft.storage.safetensors import open_tensors, write_tensors

V4, V5 = "transformers-v4", "transformers-v5"


def lora_of(rank, out=9, into=11, experts=0, seed=0, scale=2):
    random = np.random.default_rng(seed)
    head = (experts,) if experts else ()
    a = random.standard_normal((*head, rank, into))
    b = random.standard_normal((*head, out, rank))
    return Lora(a, b, Scale(rank, rank * scale))


def images_of(*loras):
    keys = headers_of({f"m.{i}.weight": (1, 1) for i in range(len(loras))}).groups[0]
    return [Images(keys, "linear", list(loras))]


@given(st.integers(1, 12), st.sampled_from([0, 3]))
def test_the_error_that_svd_reports_is_the_error(rank, experts):
    lora = lora_of(8, experts=experts)
    want = delta(lora)
    told = cut(lora, str(rank))
    got = delta(lora)
    assert lora.a.shape[-2] == min(rank, 8)
    assert told == pytest.approx(np.linalg.norm(want - got) / np.linalg.norm(want), abs=1e-9)
    best = [np.linalg.svd(m)[1] for m in (want if experts else want[None])]
    lost = sum((s[lora.a.shape[-2] :] ** 2).sum() for s in best)
    assert np.linalg.norm(want - got) == pytest.approx(np.sqrt(lost), abs=1e-9)


@pytest.mark.parametrize("tolerance", ["0.5", "1e-1", "1e-3"])
def test_a_tolerance_is_kept_by_the_lowest_rank(tolerance):
    lora = lora_of(8)
    want = delta(lora)
    assert cut(lora, tolerance) <= float(tolerance)
    values = np.linalg.svd(want)[1]
    rank = lora.a.shape[0]
    assert np.linalg.norm(values[rank - 1 :]) > float(tolerance) * np.linalg.norm(values)


def test_compaction_finds_the_numerical_rank():
    lora = lora_of(3, experts=2)
    a = np.concatenate([lora.a, lora.a[:, :1] * 2], axis=1)
    b = np.concatenate([lora.b, lora.b[:, :, 1:2]], axis=2)
    wide = Lora(a, b, Scale(4, 8))
    want = delta(wide)
    assert compact(images_of(wide)) == [(4, 3)]
    assert wide.scale == Scale(3, 6)
    np.testing.assert_allclose(delta(wide), want, atol=1e-10)
    assert compact(images_of(lora_of(3), None)) == []


def test_one_rank_for_all_changes_no_delta():
    loras = [lora_of(2), lora_of(5, experts=3), lora_of(1, scale=3)]
    want = [delta(lora) for lora in loras]
    assert make_uniform(images_of(*loras)) == 5
    for lora, before in zip(loras, want, strict=True):
        assert lora.a.shape[-2] == lora.b.shape[-1] == lora.scale.rank == 5
        np.testing.assert_allclose(delta(lora), before, atol=1e-12)


def test_one_rank_for_all_needs_no_pattern(tmp_path):
    name = "mixtral__patterns_layer"
    adapter = adapter_of(name, tmp_path)
    regraft.convert(
        adapter, tmp_path / "out", to=V5, model=base_of(name), uniform_rank=True, verify=True
    )
    assert not read(tmp_path / "out")[1]["rank_pattern"]
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4, model=base_of(name))
    assert verify_adapters(adapter, tmp_path / "back", base_of(name)).equal


def test_compact_is_told(tmp_path):
    name = "mixtral__gud_attn"
    adapter = adapter_of(name, tmp_path)
    report = regraft.convert(
        adapter, tmp_path / "out", to=V5, model=base_of(name), compact=True, verify=True
    )
    assert any("--compact" in note for note in report.notes)


@pytest.mark.parametrize("name", ["mixtral__dora"])
def test_full_rank_on_request_gives_the_outputs(name, tmp_path):
    torch, transformers, peft = (pytest.importorskip(m) for m in ("torch", "transformers", "peft"))
    adapter, base = adapter_of(name, tmp_path), base_of(name)
    report = regraft.convert(adapter, tmp_path / "out", to=V5, model=base, via="dense", verify=True)
    assert {target.rung for target in report.targets} == {"dense"}
    tensors = open_tensors(GOLDEN / "cases" / name / "reference.safetensors")
    inputs = {k[6:]: torch.tensor(v) for k, v in tensors.items() if k.startswith("input.")}
    cls = getattr(transformers, INDEX[name]["model_class"])
    model = cls.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    want = torch.tensor(tensors["ref"])
    assert (outputs(model, inputs) - want).abs().max() < 1e-4
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4, model=base)
    before, after = read(adapter), read(tmp_path / "back")
    assert before[0].keys() == after[0].keys()
    assert all((before[0][k] == after[0][k]).all() for k in before[0])
    assert before[1] == after[1]


def test_a_changed_stand_in_goes_back_as_lora(tmp_path):
    """What was trained on is not thrown away for what was kept aside."""
    name = "mixtral__dora"
    adapter, base, out = adapter_of(name, tmp_path), base_of(name), tmp_path / "out"
    regraft.convert(adapter, out, to=V5, model=base, via="dense")
    config = json.loads((out / "adapter_config.json").read_text())
    config["lora_alpha"] += 1
    (out / "adapter_config.json").write_text(json.dumps(config))
    regraft.convert(out, tmp_path / "back", to=V4, model=base)
    assert verify_adapters(out, tmp_path / "back", base).equal
    assert not read(tmp_path / "back")[1].get("use_dora")


def test_svd_tells_its_error(tmp_path, capsys):
    name = "mixtral__dora"
    adapter, base = adapter_of(name, tmp_path), base_of(name)
    arguments = ["convert", str(adapter), str(tmp_path / "out"), "--to", V5, "--model", str(base)]
    assert main([*arguments, "--via", "svd:2", "--json"]) == 0
    targets = json.loads(capsys.readouterr().out)["adapters"][0]["targets"]
    assert {t["rung"] for t in targets} == {"svd"}
    assert {t["rank"] for t in targets} == {2}
    done = verify_adapters(adapter, tmp_path / "out", base)
    assert not done.equal
    assert max(t["error"] for t in targets) == pytest.approx(done.error, rel=0.5)


def test_an_approximation_has_a_bound_and_is_warned_of(tmp_path, capsys, caplog):
    name, out = "mixtral__gud_attn", tmp_path / "out"
    adapter, base = adapter_of(name, tmp_path), base_of(name)
    given = {"to": V5, "model": base, "via": "svd:1"}
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.convert(adapter, out, **given, max_error=1e-9)
    assert {finding.code for finding in caught.value.findings} == {"max-error"}
    assert len(caught.value.findings) > 1
    assert not out.exists()
    report = regraft.convert(adapter, out, **given, max_error=1.0)
    worst = max(report.targets, key=lambda target: target.error)
    (warned,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert worst.key in warned.getMessage()
    assert f"{worst.error:.3g}" in warned.getMessage()
    command = ["convert", str(adapter), str(out), "--overwrite", "--to", V5, "--model", str(base)]
    assert main([*command, "--via", "svd:1"]) == 0
    assert f"WARNING: {adapter}: " in capsys.readouterr().err
    assert main([*command, "-v", "--json"]) == 0
    assert f"INFO: {adapter}: transformers-v4 -> transformers-v5" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["exact", "svd", "svd:", "svd:0", "svd:-1", "dense:4"])
def test_there_is_no_other_way(way, tmp_path, capsys):
    with pytest.raises(regraft.BadInputError):
        Options(way)
    assert main(["convert", str(tmp_path), str(tmp_path / "o"), "--to", V5, "--via", way]) == 2
    assert "--via" in capsys.readouterr().err


def test_svd_of_a_plain_lora(tmp_path):
    name = "mixtral__gud_attn"
    adapter, base = adapter_of(name, tmp_path), base_of(name)
    report = regraft.convert(adapter, tmp_path / "out", to=V5, model=base, via="svd:1", verify=True)
    assert {(t.rank, t.rung) for t in report.targets} == {(1, "svd")}
    assert 0 < max(t.error for t in report.targets) < 1
    assert report.adapters[0].error == pytest.approx(max(t.error for t in report.targets), rel=0.5)


def test_what_is_asked_for_is_done_where_the_layout_is_there_already(tmp_path):
    name = "mixtral__gud_attn"
    adapter, base = adapter_of(name, tmp_path), base_of(name)
    report = regraft.convert(adapter, tmp_path / "out", to=V4, model=base, via="svd:1")
    assert not report.adapters[0].copied
    assert {t.rank for t in report.targets} == {1}
    assert regraft.convert(adapter, tmp_path / "same", to=V4, model=base).adapters[0].copied


@pytest.mark.parametrize("asked", [{"via": "svd:2"}, {"compact": True}])
def test_factors_of_a_decomposition_are_not_said_to_be_of_unequal_scale(tmp_path, asked):
    """A LoRA with one rank and one alpha has no ratio to fold in; the numbers are new for another reason."""
    base = make_base(tmp_path / "base", "llama")
    src = make_adapter(tmp_path / "lora", ATTENTION)
    if "compact" in asked:
        file = src / "adapter_model.safetensors"
        tensors = {name: np.array(x) for name, x in open_tensors(file).items()}
        for name, tensor in tensors.items():
            if name.endswith("lora_B.weight"):
                tensor[:, -1] = 0
        write_tensors(file, tensors, {"format": "pt"})
    report = regraft.convert(src, tmp_path / "out", to="transformers-v5", model=base, **asked)
    assert not [note for note in report.adapters[0].notes if "unequal scale" in note]
    assert not any(target.exact for target in report.targets)
