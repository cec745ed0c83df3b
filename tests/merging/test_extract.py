"""What tuning changed, as an adapter: the delta comes back at its rank, and everything else is told."""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_samples import flux_file, kohya_flux, read, write
from test_merge_language import BASE, different, factors, llama, peft
from test_merge_language import read as weights

import regraft
from regraft.cli import main
from regraft.merging import low_rank
from regraft.merging.low_rank import spectrum, spectrum_within
from regraft.merging.matrix import Matrix
from regraft.storage.waiting import Waiting, forget

sys.path.insert(0, str(Path(__file__).parent.parent / "adapters"))
from test_golden import adapter_of, base_of

Q = "model.layers.0.self_attn.q_proj"


def tune(base, folder, **changed):
    """The same model with other tensors."""
    state = weights(base)
    state.update({name.replace("__", "."): x for name, x in changed.items()})
    folder.mkdir()
    write(folder / "model.safetensors", state)
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


@pytest.mark.parametrize("name", ["mixtral__gud_attn", "gpt_oss__params_attn"])
def test_what_was_merged_comes_back_at_its_rank(name, tmp_path):
    """Experts, fused or by themselves: extracted and merged again, it is the tuned model to rounding."""
    base, lora = base_of(name), adapter_of(name, tmp_path)
    regraft.merge(base, [lora], tmp_path / "tuned")
    report = regraft.extract(base, tmp_path / "tuned", tmp_path / "out", error=1e-4)
    assert report.error < 1e-4
    assert {t.rank for t in report.targets} <= {*range(1, 17)}
    assert all(t.mass > 0.999 for t in report.targets)
    regraft.merge(base, [tmp_path / "out"], tmp_path / "again")
    want, got = weights(tmp_path / "tuned"), weights(tmp_path / "again")
    assert want.keys() == got.keys()
    assert all(np.allclose(got[n], want[n], rtol=1e-4, atol=1e-5) for n in want)
    assert report.unchanged == len(want) - len(report.targets)


@pytest.mark.slow
def test_stock_peft_loads_what_was_extracted(tmp_path):
    torch, pefts = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base, lora = base_of(BASE), adapter_of(BASE, tmp_path)
    regraft.convert(base, tmp_path / "base5", to="transformers-v5")
    regraft.merge(tmp_path / "base5", [lora], tmp_path / "tuned")
    regraft.extract(tmp_path / "base5", tmp_path / "tuned", tmp_path / "out", rank=16)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = pefts.PeftModel.from_pretrained(load(tmp_path / "base5"), tmp_path / "out")
    ids = torch.arange(8)[None]
    want = load(tmp_path / "tuned")(ids).logits
    assert torch.allclose(model(ids).logits, want, atol=1e-4)


def test_images_linears_and_text_encoders(tmp_path):
    base = flux_file(tmp_path / "flux.safetensors")
    lora, added = kohya_flux(tmp_path / "lora.safetensors")
    regraft.merge(base, [lora], tmp_path / "tuned.safetensors")
    for to in ("diffusers", "kohya", "comfyui"):
        out = tmp_path / f"{to}.safetensors"
        report = regraft.extract(base, tmp_path / "tuned.safetensors", out, rank=2, to=to)
        assert report.to == to
        assert len(report.targets) == len(added)
        assert report.error < 1e-6
        regraft.merge(base, [out], tmp_path / "again.safetensors", overwrite=True)
        want, got = read(tmp_path / "tuned.safetensors"), read(tmp_path / "again.safetensors")
        assert all(np.allclose(got[n], want[n], rtol=1e-5, atol=1e-5) for n in want)
    assert report.unchanged == len(want) - len(added)


def test_convolutions_of_a_unet(tmp_path):
    from image_models import both
    from merge_samples import numbers

    native, _ = both("sd15")
    state = numbers({"model.diffusion_model." + n: x for n, x in native.items()})
    base = write(tmp_path / "sd15.safetensors", state)
    key = next(n for n, x in state.items() if n.endswith("in_layers.2.weight") and x.ndim == 4)
    out, into, *kernel = state[key].shape
    random = np.random.default_rng(1)
    delta = random.standard_normal((out, 3)) @ random.standard_normal((3, into * 9))
    state[key] = (state[key] + delta.reshape(out, into, *kernel)).astype(np.float32)
    tuned = write(tmp_path / "tuned.safetensors", state)
    report = regraft.extract(base, tuned, tmp_path / "lora.safetensors", error=1e-3, to="kohya")
    (target,) = report.targets
    assert (target.key, target.rank) == (key, 3)
    down = next(x for n, x in read(tmp_path / "lora.safetensors").items() if "lora_down" in n)
    assert down.shape == (3, into, *kernel)
    regraft.merge(base, [tmp_path / "lora.safetensors"], tmp_path / "again.safetensors")
    assert np.allclose(read(tmp_path / "again.safetensors")[key], state[key], atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_factors_are_the_best_of_their_rank(out, into, rank, seed):
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((out, into))
    rank = min(rank, out, into)
    found = spectrum(matrix, rank)
    b, a = found.factors(rank)
    values = np.linalg.svd(matrix, compute_uv=False)
    error = np.linalg.norm(matrix - b @ a)
    assert np.isclose(error, np.sqrt((values[rank:] ** 2).sum()), atol=1e-9)
    low = random.standard_normal((out, rank)) @ random.standard_normal((rank, into))
    assert spectrum(low, rank).rank_within(1e-9) <= rank
    b, a = spectrum(low, rank).factors(rank)
    assert np.allclose(b @ a, low, atol=1e-9)


def test_a_large_matrix_of_low_rank_comes_back():
    random = np.random.default_rng(0)
    low = random.standard_normal((600, 8)) @ random.standard_normal((8, 520))
    for matrix in (low, low.T, low.astype(np.float32)):
        found = spectrum(matrix, 8)
        b, a = found.factors(8)
        assert np.linalg.norm(matrix - b @ a) < 1e-6 * found.norm
        assert spectrum_within(matrix, 1e-5)[1] == 8
        assert np.isclose(found.lost(b, a), np.linalg.norm(matrix - b @ a) ** 2, atol=1e-6)
        assert np.allclose(found.values, np.linalg.svd(matrix, compute_uv=False)[:8])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(400, 300), (250, 2000)])
def test_few_factors_of_a_large_matrix_are_as_good_as_the_best(shape, power):
    """Singular values that fall slowly, or not at all: the error of the best factors of each rank to 1e-4."""
    random = np.random.default_rng(0)
    u, v = (np.linalg.qr(random.standard_normal((n, min(shape))))[0] for n in shape)
    values = np.arange(1, min(shape) + 1) ** -power * (1 + random.random(min(shape)))
    matrix = (u * values) @ v.T
    best = np.sqrt(np.cumsum(np.sort(values**2)))[::-1]
    for rank in (1, 8, 32):
        found = spectrum(matrix, rank)
        b, a = found.factors(rank)
        assert np.linalg.norm(matrix - b @ a) <= best[rank] * (1 + 1e-4)
    for error in (0.9, 0.5, 1e-3):
        found, rank = spectrum_within(matrix, error)
        b, a = found.factors(rank)
        assert np.linalg.norm(matrix - b @ a) <= error * found.norm * (1 + 1e-9)
        least = int((best > error * found.norm).sum())
        assert least <= rank <= least * 1.02 + 1


@pytest.mark.parametrize("shape", [(500, 220), (220, 500), (300, 300)])
@pytest.mark.parametrize(
    ("rank", "few", "held"), [(20, True, False), (100, False, True), (100, False, False)]
)
def test_with_less_room_it_is_read_again_and_as_good(shape, rank, few, held, monkeypatch):
    """Blocks of vectors or all products, of a matrix in memory or read for each product."""
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    reads = []

    def read(first, last):
        reads.append((first, last))
        return matrix[first:last].astype(float)

    given = Matrix(shape, matrix.dtype, read)
    way = next(w for w in low_rank.WAYS if (w.few, w.held) == (few, held))
    room = low_rank.needed(given, rank, way)
    monkeypatch.setattr(low_rank, "WAYS", (way,))
    found = spectrum(given, rank, room)
    b, a = found.factors(rank, np.dtype(np.float32))
    values = np.linalg.svd(matrix.astype(float), compute_uv=False)
    best = (values[rank:] ** 2).sum()
    assert np.linalg.norm(matrix - b.astype(float) @ a) ** 2 <= best * (1 + (1e-4 if few else 1e-6))
    assert np.isclose(found.lost(b, a), best, rtol=2e-4)
    assert (reads.count((0, shape[0])) == 1) == held
    with pytest.raises(low_rank.NoRoomError) as caught:
        spectrum(given, rank, room - 1)
    assert caught.value.needed == room


def test_what_takes_too_much_memory_is_refused_by_name(tmp_path, capsys):
    base = llama(tmp_path / "base")
    _, delta = factors(Q, 8, 8)
    weight = (weights(base)[f"{Q}.weight"] + delta).astype(np.float32)
    tuned = tune(base, tmp_path / "tuned", **{f"{Q}.weight": weight})
    asked = ["extract", str(base), str(tuned), "-o", str(tmp_path / "out"), "--rank", "2"]
    assert main([*asked, "--memory", "10MB"]) == 3
    told = capsys.readouterr().err
    assert f"{Q}.weight" in told
    assert "--memory 17MB" in " ".join(told.split())
    assert not (tmp_path / "out").exists()
    assert main([*asked, "--memory", "17MB"]) == 0


def test_arrays_that_wait_in_a_file_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("regraft.storage.waiting._SEGMENT", 1 << 16)
    arrays = [np.arange(n, dtype=d) for n in (1, 9, 5000, 40000) for d in ("f4", "f8", "f2")]
    waiting = Waiting(tmp_path / "not" / "there")
    kept = [waiting.put(array.reshape(1, -1)) for array in arrays]
    forget(kept[-1])
    assert all((x[0] == y).all() and x.dtype == y.dtype for x, y in zip(kept, arrays, strict=True))
    assert not list(tmp_path.iterdir())


def test_what_waited_is_written_as_it_was(tmp_path):
    base = llama(tmp_path / "base")
    _, delta = factors(Q, 8, 8)
    weight = (weights(base)[f"{Q}.weight"] + delta).astype(np.float32)
    tuned = tune(base, tmp_path / "tuned", **{f"{Q}.weight": weight})
    regraft.extract(base, tuned, tmp_path / "out", rank=2)
    regraft.merge(base, [tmp_path / "out"], tmp_path / "again")
    again = weights(tmp_path / "again")[f"{Q}.weight"]
    assert np.allclose(again, weights(tuned)[f"{Q}.weight"], atol=1e-4)
    assert {x.name for x in tmp_path.iterdir()} == {"base", "tuned", "out", "again"}


def test_a_norm_that_changed_is_refused_kept_or_left_out_by_name(tmp_path):
    base = llama(tmp_path / "base")
    _, delta = factors(Q, 8, 8)
    before = weights(base)
    name = "model.norm.weight"
    changed = {f"{Q}.weight": before[f"{Q}.weight"] + delta, name: before[name] + 1}
    tuned = tune(base, tmp_path / "tuned")
    write(
        tuned / "model.safetensors",
        {**before, **{n: x.astype(np.float32) for n, x in changed.items()}},
    )
    with pytest.raises(regraft.RefusedError, match="--full") as caught:
        regraft.extract(base, tuned, tmp_path / "out", rank=2)
    assert [finding.key for finding in caught.value.findings] == [name]
    assert not (tmp_path / "out").exists()
    report = regraft.extract(base, tuned, tmp_path / "out", rank=2, full=True)
    assert report.whole == [name]
    regraft.merge(base, [tmp_path / "out"], tmp_path / "again")
    again, want = weights(tmp_path / "again"), weights(tuned)
    assert (again[name] == want[name]).all()
    assert np.allclose(again[f"{Q}.weight"], want[f"{Q}.weight"], atol=1e-4)
    report = regraft.extract(base, tuned, tmp_path / "less", rank=2, skip=["*.norm.weight"])
    assert report.skipped == [name]


def test_another_layout_or_size_is_refused_and_said(tmp_path):
    base = base_of(BASE)
    regraft.convert(base, tmp_path / "v5", to="transformers-v5")
    with pytest.raises(regraft.BadInputError, match=r"transformers-v5.*transformers-v4"):
        regraft.extract(base, tmp_path / "v5", tmp_path / "out", rank=2)
    one = llama(tmp_path / "one")
    state = weights(one)
    state["model.norm.weight"] = np.ones(9, np.float32)
    state["more.weight"] = np.ones(2, np.float32)
    del state["model.layers.0.input_layernorm.weight"]
    other = tune(one, tmp_path / "other")
    write(other / "model.safetensors", state)
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.extract(one, other, tmp_path / "out", rank=2)
    keys = {finding.key for finding in caught.value.findings}
    assert keys == {"model.norm.weight", "more.weight", "model.layers.0.input_layernorm.weight"}
    with pytest.raises(regraft.BadInputError, match="the same"):
        regraft.extract(one, one, tmp_path / "out", rank=2)


def test_a_head_that_was_untied_is_compared_with_what_it_was_tied_to(tmp_path):
    base = llama(tmp_path / "base")
    tensors, delta = factors("lm_head", 8, 12)
    lora = peft(tmp_path / "head", tensors, target_modules=["lm_head"])
    regraft.merge(base, [lora], tmp_path / "tuned")
    report = regraft.extract(base, tmp_path / "tuned", tmp_path / "out", rank=2)
    assert [t.key for t in report.targets] == ["lm_head.weight"]
    regraft.merge(base, [tmp_path / "out"], tmp_path / "again")
    head = weights(tmp_path / "again")["lm_head.weight"]
    assert np.allclose(head, weights(base)["model.embed_tokens.weight"] + delta, atol=1e-4)


def test_embeddings_and_types(tmp_path):
    base = llama(tmp_path / "base", tied=False, dtype=ml_dtypes.bfloat16)
    before = weights(base)["model.embed_tokens.weight"]
    random = np.random.default_rng(2)
    delta = random.integers(-2, 3, (12, 1)) * random.integers(-2, 3, (1, 8))
    after = (before.astype(float) + delta).astype(ml_dtypes.bfloat16)
    tuned = tune(base, tmp_path / "tuned", model__embed_tokens__weight=after)
    regraft.extract(base, tuned, tmp_path / "out", rank=1, dtype="float16")
    made = read(tmp_path / "out" / "adapter_model.safetensors")
    assert {x.dtype.name for x in made.values()} == {"float16"}
    assert any("lora_embedding_A" in n for n in made)
    regraft.merge(base, [tmp_path / "out"], tmp_path / "again")
    again = weights(tmp_path / "again")
    got = again.pop("model.embed_tokens.weight").astype(float)
    assert np.allclose(got, after.astype(float), atol=1e-2)
    want = weights(tuned)
    del want["model.embed_tokens.weight"]
    assert different(again, want) == []


def test_the_command(tmp_path, capsys):
    base = llama(tmp_path / "base")
    _, delta = factors(Q, 8, 8)
    q = (weights(base)[f"{Q}.weight"] + delta).astype(np.float32)
    tuned = tune(base, tmp_path / "tuned", **{f"{Q}.weight".replace(".", "__"): q})
    arguments = ["extract", str(base), str(tuned), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--rank", "1"]) == 0
    words = capsys.readouterr().out
    assert f"{Q}.weight" in words
    assert "3 tensors did not change" in words
    assert main([*arguments, "--error", "0.5", "--json", "--overwrite"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["targets"][0]["rank"] == 1
    assert main(arguments) == 2
    assert main([*arguments, "--rank", "1", "--error", "0.5"]) == 2
