"""Adapters of language models added to their base: in whatever layout, several at once, and tied heads."""

import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import regraft
from regraft.cli import main
from regraft.storage.safetensors import open_tensors, write_tensors

sys.path.insert(0, str(Path(__file__).parent.parent / "adapters"))
from test_golden import GOLDEN, INDEX, adapter_of, base_of, outputs

V5 = "transformers-v5"
BASE = "mixtral__gud_attn"


def read(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: x.copy() for file in files for name, x in open_tensors(file).items()}


def different(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if one[name].tobytes() != other[name].tobytes()]


def llama(folder, tied=True, dtype=np.float32, classes=("LlamaForCausalLM",)):
    """A tiny Llama of whole numbers, with tied embeddings or without."""
    random = np.random.default_rng(0)
    state = {
        "model.embed_tokens.weight": (12, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.norm.weight": (8,),
    } | ({} if tied else {"lm_head.weight": (12, 8)})
    tensors = {n: random.integers(-9, 9, s).astype(dtype) for n, s in state.items()}
    folder.mkdir()
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": list(classes),
        "tie_word_embeddings": tied,
        "vocab_size": 12,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peft(folder, tensors, **config):
    """An adapter as PEFT writes it."""
    folder.mkdir()
    tensors = {f"base_model.model.{n}": np.asarray(x, np.float32) for n, x in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factors(module, into, out, seed=0):
    random = np.random.default_rng(seed)
    a, b = random.integers(-3, 4, (2, into)), random.integers(-3, 4, (out, 2))
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, b @ a * 2.0


def test_progress_is_told_in_bytes(tmp_path):
    told = []
    base = llama(tmp_path / "base")
    tensors, _ = factors("model.layers.0.self_attn.q_proj", 8, 8)
    src = peft(tmp_path / "a", tensors, target_modules=["q_proj"])
    regraft.merge(base, [src], tmp_path / "out", progress=lambda *each: told.append(each))
    added = [each[1:] for each in told if each[0].startswith("adding ")]
    assert added == [(8 * 8 * 4, 8 * 8 * 4)]


@pytest.mark.parametrize("name", ["mixtral__trainable_tokens", "mixtral__mts_head"])
def test_the_merged_base_gives_the_outputs(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    regraft.merge(base_of(name), [adapter_of(name, tmp_path)], tmp_path / "out")
    tensors = open_tensors(GOLDEN / "cases" / name / "reference.safetensors")
    inputs = {k[6:]: torch.tensor(v) for k, v in tensors.items() if k.startswith("input.")}
    cls = getattr(transformers, INDEX[name]["model_class"])
    model = cls.from_pretrained(tmp_path / "out", attn_implementation="eager", dtype=torch.float32)
    want, without = torch.tensor(tensors["ref"]), torch.tensor(tensors["ref_base"])
    effect = (want - without).abs().max()
    assert (outputs(model, inputs) - want).abs().max() < max(1e-4, 1e-3 * effect)


def test_it_follows_the_base_whatever_the_layout_of_the_adapters(tmp_path):
    """Two adapters in two layouts, into a base in either: the same numbers, by the law."""
    base = base_of(BASE)
    one = adapter_of(BASE, tmp_path)
    shutil.move(one, tmp_path / "v4")
    one = tmp_path / "v4"
    regraft.convert(one, tmp_path / "v5", to=V5, model=base)
    regraft.convert(base, tmp_path / "base5", to=V5)
    regraft.merge(base, [(one, 0.5), (tmp_path / "v5", 0.25)], tmp_path / "out")
    regraft.convert(tmp_path / "out", tmp_path / "want", to=V5)
    regraft.merge(tmp_path / "base5", [(one, 0.5), (tmp_path / "v5", 0.25)], tmp_path / "out5")
    assert different(read(tmp_path / "out5"), read(tmp_path / "want")) == []
    regraft.merge(base, [(one, 0.75)], tmp_path / "once")
    got, want = read(tmp_path / "out"), read(tmp_path / "once")
    assert all(np.allclose(got[n], want[n], rtol=1e-6, atol=1e-7) for n in want)


def test_sums_are_numpy_s_rounded_once(tmp_path):
    base = llama(tmp_path / "base", dtype=ml_dtypes.bfloat16)
    q = "model.layers.0.self_attn.q_proj"
    one, delta = factors(q, 8, 8)
    two, other = factors(q, 8, 8, seed=1)
    adapters = [
        (peft(tmp_path / "one", one, target_modules=["q_proj"]), 0.1),
        (peft(tmp_path / "two", two, target_modules=["q_proj"]), -0.7),
    ]
    regraft.merge(base, adapters, tmp_path / "out")
    before, after = read(base), read(tmp_path / "out")
    want = before[f"{q}.weight"].astype(float) + (delta * 0.1 + other * -0.7)
    assert after[f"{q}.weight"].tobytes() == want.astype(ml_dtypes.bfloat16).tobytes()
    assert different(before, after) == [f"{q}.weight"]
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_tied_head_gets_a_tensor_of_its_own(tmp_path):
    base = llama(tmp_path / "base")
    tensors, delta = factors("lm_head", 8, 12)
    adapter = peft(tmp_path / "head", tensors, target_modules=["lm_head"])
    report = regraft.merge(base, [adapter], tmp_path / "out")
    before, after = read(base), read(tmp_path / "out")
    embed = before["model.embed_tokens.weight"]
    assert (after.pop("lm_head.weight") == embed + delta).all()
    assert different(before, after) == []
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    assert any("tied" in note for note in report.notes)


def embedding(folder, **config):
    random = np.random.default_rng(5)
    a, b = random.integers(-3, 4, (2, 12)), random.integers(-3, 4, (8, 2))
    tensors = {
        "model.embed_tokens.lora_embedding_A": a,
        "model.embed_tokens.lora_embedding_B": b,
    }
    return peft(folder, tensors, target_modules=["embed_tokens"], **config), (b @ a * 2.0).T


def test_an_adapted_embedding_leaves_the_head_that_was_tied_to_it(tmp_path):
    base = llama(tmp_path / "base")
    adapter, delta = embedding(tmp_path / "embed")
    regraft.merge(base, [adapter], tmp_path / "out")
    embed, after = read(base)["model.embed_tokens.weight"], read(tmp_path / "out")
    assert (after["lm_head.weight"] == embed).all()
    assert (after["model.embed_tokens.weight"] == embed + delta).all()
    regraft.merge(
        llama(tmp_path / "bare", classes=["LlamaModel"]), [adapter], tmp_path / "bare_out"
    )
    assert "lm_head.weight" not in read(tmp_path / "bare_out")
    tied, _ = embedding(tmp_path / "tied", ensure_weight_tying=True)
    regraft.merge(base, [tied], tmp_path / "tied_out")
    assert "lm_head.weight" not in read(tmp_path / "tied_out")
    with pytest.raises(regraft.RefusedError, match="ensure_weight_tying"):
        regraft.merge(base, [adapter, tied], tmp_path / "both")


def test_trained_rows_take_the_place_of_rows(tmp_path):
    base = llama(tmp_path / "base")
    rows = np.arange(16).reshape(2, 8)
    name = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    q, delta = factors("model.layers.0.self_attn.q_proj", 8, 8)
    adapter = peft(
        tmp_path / "rows",
        {name: rows, **q},
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 7]},
    )
    regraft.merge(base, [adapter], tmp_path / "out")
    before, after = read(base), read(tmp_path / "out")
    want = before["model.embed_tokens.weight"]
    want[[3, 7]] = rows
    assert (after["model.embed_tokens.weight"] == want).all()
    assert "lm_head.weight" not in after
    key = "model.layers.0.self_attn.q_proj.weight"
    assert (after[key] == before[key] + delta).all()
    half = read(base)["model.embed_tokens.weight"]
    regraft.merge(base, [(adapter, 0.5)], tmp_path / "half")
    half[[3, 7]] = half[[3, 7]] + (rows - half[[3, 7]]) / 2
    assert (read(tmp_path / "half")["model.embed_tokens.weight"] == half).all()


def test_shards_and_files_stay_as_the_base_has_them(tmp_path):
    base = tmp_path / "base"
    regraft.convert(base_of(BASE), base, to="transformers-v4", shard_size="20kB")
    (base / "tokenizer.json").write_text("{}")
    regraft.merge(base, [adapter_of(BASE, tmp_path)], tmp_path / "out")
    names = {file.name for file in base.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert sum(name.endswith(".safetensors") for name in names) > 2
    index = "model.safetensors.index.json"
    maps = [json.loads((f / index).read_text())["weight_map"] for f in (base, tmp_path / "out")]
    assert maps[0] == maps[1]


def test_what_is_wrong_with_several_adapters_is_said_together(tmp_path):
    base = llama(tmp_path / "base")
    wide, _ = factors("model.layers.0.self_attn.q_proj", 8, 16)
    far, _ = factors("model.layers.7.self_attn.q_proj", 8, 8)
    adapters = [
        peft(tmp_path / "wide", wide, target_modules=["q_proj"]),
        peft(tmp_path / "far", far, target_modules=["q_proj"]),
    ]
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.merge(base, adapters, tmp_path / "out")
    assert {Path(f.where).name for f in caught.value.findings} == {"wide", "far"}
    assert not (tmp_path / "out").exists()


def test_what_leaves_the_range_of_a_type_is_refused_and_nothing_is_left(tmp_path):
    base = llama(tmp_path / "base", dtype=np.float16)
    tensors, _ = factors("model.layers.0.self_attn.q_proj", 8, 8)
    adapter = peft(tmp_path / "lora", tensors, target_modules=["q_proj"])
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.merge(base, [(adapter, 1e6)], tmp_path / "out")
    assert caught.value.findings[0].key == "model.layers.0.self_attn.q_proj.weight"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


def test_the_command(tmp_path, capsys):
    base = llama(tmp_path / "base", tied=False)
    tensors, delta = factors("model.layers.0.self_attn.q_proj", 8, 8)
    adapter = peft(tmp_path / "lora", tensors, target_modules=["q_proj"])
    out = tmp_path / "out"
    assert main(["merge", str(base), f"{adapter}=0.5", "-o", str(out)]) == 0
    words = capsys.readouterr().out
    assert "lora: added to 1 tensor, times 0.5" in words
    key = "model.layers.0.self_attn.q_proj.weight"
    assert (read(out)[key] == read(base)[key] + delta / 2).all()
    arguments = ["merge", str(base), str(adapter), "-o", str(out), "--json"]
    assert main(arguments) == 1
    assert (
        json.loads(capsys.readouterr().out)["error"]["findings"][0]["code"] == "destination-exists"
    )
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["targets"][0]["key"] == key
    assert main(["merge", str(base), str(base), "-o", str(tmp_path / "no"), "--json"]) == 1
    assert main(["merge", str(adapter), str(base), "-o", str(tmp_path / "no"), "--json"]) == 1
    assert main(["merge", str(base), f"{adapter}=x", "-o", str(out)]) == 2
    assert main(["merge", str(base), str(adapter), "-o", str(out), "--clip-weight", "1"]) == 1
