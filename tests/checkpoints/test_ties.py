"""Tied weights that are stored as two tensors with other values: one model in one release, another in the other."""

import json

import numpy as np
import pytest
from models import MIXTRAL, mixtral, write_folder

import regraft
from regraft.checkpoints import ties
from regraft.checkpoints.source import open_checkpoint
from regraft.checkpoints.verify import verify
from regraft.cli import main
from regraft.errors import BadInputError
from regraft.planning.model import ModelConfig
from regraft.rules.book import library
from regraft.storage.safetensors import open_tensors

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {**MIXTRAL, "tie_word_embeddings": True}
NEW = "transformers-v5"


def tied(equal=True):
    tensors = mixtral()
    if equal:
        tensors[HEAD] = tensors[EMBEDDINGS].copy()
    return tensors


def result(path):
    config = json.loads((path / "config.json").read_text())
    return config, open_tensors(path / "model.safetensors")


def test_unequal_tied_weights_are_an_error_that_names_both_and_the_ways_out(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), TIED)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=NEW)
    (finding,) = caught.value.findings
    assert (finding.code, finding.key) == ("two-values", HEAD)
    assert EMBEDDINGS in finding.message
    assert "--untie" in finding.fix and f"--drop {HEAD}" in finding.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", [True, False, None])
def test_equal_ones_and_those_that_are_not_tied_convert_as_ever(tmp_path, field):
    config = MIXTRAL if field is None else {**MIXTRAL, "tie_word_embeddings": field}
    tensors = tied(equal=field is True)
    src = write_folder(tmp_path / "src", tensors, config)
    regraft.convert(src, tmp_path / "out", to=NEW)
    _, made = result(tmp_path / "out")
    assert all(np.array_equal(made[k], tensors[k]) for k in (HEAD, EMBEDDINGS))


def test_untie_keeps_both_and_says_so_in_the_config(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), TIED)
    report = regraft.convert(src, tmp_path / "out", to=NEW, untie=True)
    config, made = result(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert all(np.array_equal(made[k], mixtral()[k]) for k in (HEAD, EMBEDDINGS))
    assert any(HEAD in note and EMBEDDINGS in note for note in report.checkpoint.notes)
    assert verify(src, tmp_path / "out").equal


def test_dropping_the_head_keeps_the_embeddings(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), TIED)
    report = regraft.convert(src, tmp_path / "out", to=NEW, drop=[HEAD])
    config, made = result(tmp_path / "out")
    assert HEAD not in made and config["tie_word_embeddings"] is True
    assert np.array_equal(made[EMBEDDINGS], mixtral()[EMBEDDINGS])
    assert any(f"dropped {HEAD}" in note for note in report.checkpoint.notes)
    assert verify(src, tmp_path / "out").equal


def test_dropping_the_embeddings_puts_the_heads_values_in_their_place(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), TIED)
    report = regraft.convert(src, tmp_path / "out", to=NEW, drop=[EMBEDDINGS])
    _, made = result(tmp_path / "out")
    assert HEAD not in made
    assert np.array_equal(made[EMBEDDINGS], mixtral()[HEAD])
    assert any("have its name now" in note for note in report.checkpoint.notes)


@pytest.mark.parametrize("options", [{"untie": True}, {"drop": ["no.such"]}])
def test_what_is_not_tied_is_not_untied_and_what_is_not_there_not_dropped(tmp_path, options):
    src = write_folder(tmp_path / "src", tied(), TIED)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=NEW, **options)
    assert caught.value.findings[0].code == "option"


def test_the_way_back_and_the_command(tmp_path, capsys):
    src = write_folder(tmp_path / "src", mixtral(), MIXTRAL)
    regraft.convert(src, tmp_path / "new", to=NEW)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "new" / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": True})
    )
    words = ["convert", str(tmp_path / "new"), str(tmp_path / "old"), "--to", "transformers-v4"]
    assert main(words) == 1
    assert "--untie" in capsys.readouterr().err
    assert main([*words, "--drop", HEAD]) == 0
    # In its own layout nothing changes, so nothing is asked.
    same = [*words[:2], str(tmp_path / "same"), "--to", NEW]
    assert main(same) == 0
    assert "both stay as they are" in capsys.readouterr().out


def test_the_installed_transformers_tells_the_ties_of_other_models(tmp_path):
    pytest.importorskip("transformers")
    config = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
    }
    import transformers

    model = transformers.BertForMaskedLM(transformers.BertConfig(**config))
    tensors = {k: t.detach().numpy().copy() for k, t in model.state_dict().items()}
    decoder, words = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): t for k, t in tensors.items()}
    same = write_folder(tmp_path / "same", old, config)
    regraft.convert(same, tmp_path / "fine", to=NEW)
    old[decoder] = old[decoder] + 1
    src = write_folder(tmp_path / "src", old, config)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=NEW)
    (finding,) = caught.value.findings
    assert finding.key == decoder and words in finding.message
    regraft.convert(src, tmp_path / "out", to=NEW, untie=True)
    made, _ = result(tmp_path / "out")
    assert made["tie_word_embeddings"] is False


def t5_of(tmp_path, **changed):
    """A T5 whose file has all four of its tied tensors, some of them changed."""
    import transformers

    config = transformers.T5Config(
        d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20
    )
    model = transformers.T5ForConditionalGeneration(config)
    tensors = {k: t.detach().numpy().copy() for k, t in model.state_dict().items()}
    tensors |= {k: tensors[k] + number for k, number in changed.items()}
    fields = {**config.to_diff_dict(), "architectures": ["T5ForConditionalGeneration"]}
    return write_folder(tmp_path, tensors, fields)


SHARED, ENCODER = "shared.weight", "encoder.embed_tokens.weight"


def test_every_tied_tensor_of_a_class_is_compared(tmp_path):
    pytest.importorskip("transformers")
    same = t5_of(tmp_path / "same")
    regraft.convert(same, tmp_path / "fine", to=NEW)
    src = t5_of(tmp_path / "src", **{ENCODER: 1, HEAD: 2})
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=NEW)
    findings = {finding.key: finding for finding in caught.value.findings}
    assert set(findings) == {ENCODER, HEAD}
    assert all(SHARED in finding.message for finding in findings.values())
    # What follows the tensor that is left out may still have two values.
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=NEW, drop=[SHARED])
    assert {f.code for f in caught.value.findings} == {"two-values"}
    regraft.convert(src, tmp_path / "dropped", to=NEW, drop=[ENCODER, HEAD])
    _, made = result(tmp_path / "dropped")
    assert not {ENCODER, HEAD} & set(made)


def test_transformers_4_unties_nothing_but_the_output(tmp_path):
    pytest.importorskip("transformers")
    src = t5_of(tmp_path / "src", **{ENCODER: 1})
    regraft.convert(src, tmp_path / "new", to=NEW, untie=True)
    config = json.loads((src / "config.json").read_text())
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "old", to="transformers-v4", untie=True)
    assert [finding.key for finding in caught.value.findings] == [ENCODER]
    (src / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    regraft.convert(src, tmp_path / "untied", to=NEW)


@pytest.mark.parametrize(
    ("model_type", "fields", "keys"),
    [
        (
            "rt_detr_v2",
            {"decoder_layers": 2, "encoder_layers": 1, "d_model": 8, "decoder_attention_heads": 2},
            ("model.decoder.bbox_embed.1.layers.2.bias", "bbox_embed.1.layers.2.bias"),
        ),
        (
            "zamba",
            {
                "num_hidden_layers": 6,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "hidden_size": 16,
                "attention_hidden_size": 32,
                "num_attention_heads": 2,
                "n_mamba_heads": 2,
            },
            (
                "model.layers.2.shared_transf.self_attn.q_proj.weight",
                "model.layers.4.shared_transf.self_attn.q_proj.weight",
            ),
        ),
    ],
)
def test_a_class_tells_ties_of_heads_and_blocks(model_type, fields, keys):
    pytest.importorskip("transformers")
    from regraft.bridges.transformers.files import InstalledTransformers
    from regraft.planning.model import ModelConfig

    names = {"rt_detr_v2": "RTDetrV2ForObjectDetection", "zamba": "ZambaForCausalLM"}
    model = ModelConfig({"model_type": model_type, **fields}, "config.json")
    asked = [*keys, "model.layers.0.input_layernorm.weight"]
    (group,) = InstalledTransformers().tied(model, asked, [names[model_type]])
    assert set(group.names) == set(keys) and not group.heads
    untied = ModelConfig({**model.data, "tie_word_embeddings": False}, "config.json")
    assert InstalledTransformers().tied(untied, asked, [names[model_type]]) == []


def test_types_that_tie_unsaid_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    known = {t for b in library() if b.tells == "both" for t in b.model_types}
    tied = set()
    for model_type in sorted(known & set(transformers.CONFIG_MAPPING) - {"glm4v_moe_text"}):
        config = transformers.CONFIG_MAPPING[model_type]()
        if getattr(config, ties.FIELD, False):
            tied.add(model_type)
    # Version 4 does not tie these, and writes for all of them what it does.
    assert tied - {"qwen3_vl_moe_text"} == ties.tied_types() & known


BART = {
    "model.shared.weight": (9, 4),
    "model.encoder.embed_tokens.weight": (9, 4),
    "model.decoder.embed_tokens.weight": (9, 4),
    "lm_head.weight": (9, 4),
    "model.encoder.layers.0.fc1.weight": (6, 4),
}


def of_shapes(shapes):
    noise = np.random.default_rng(3)
    return {name: noise.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"model_type": "bart"}, 3),  # by the defaults of transformers 4
        ({"model_type": "bart", "tie_word_embeddings": False}, 0),
        ({"model_type": "mine", "tie_word_embeddings": True}, 3),
        ({"model_type": "mine", "text_config": {"model_type": "gemma2"}}, 3),
        ({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, 0),
        ({"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}, 0),
    ],
)
def test_without_a_class_the_config_tells_or_the_type(tmp_path, config, count):
    config = {"vocab_size": 9, **config}
    source = open_checkpoint(write_folder(tmp_path / "src", of_shapes(BART), config))
    found = ties.unequal_ties(source, ModelConfig(config, "config.json"), None)
    assert len(found.unequal) == count


@pytest.mark.parametrize("config", [{"model_type": "mine", "architectures": ["Mine"]}, None])
def test_where_nothing_tells_it_is_said(tmp_path, config):
    """Neither is picked: both are kept, and what that means is said."""
    tensors = mixtral()
    src = write_folder(tmp_path / "src", tensors, config or MIXTRAL)
    if config is None:
        (src / "config.json").unlink()
    model = None if config is None else ModelConfig({**MIXTRAL, **config}, "config.json")
    found = ties.unequal_ties(open_checkpoint(src), model, None)
    assert not found.unequal
    (tie,) = found.undecided
    note = ties.undecided_note(tie, model)
    assert EMBEDDINGS in note and HEAD in note and "both are kept" in note
    same = {**tensors, HEAD: tensors[EMBEDDINGS]}
    src = write_folder(tmp_path / "same", same, MIXTRAL)
    assert not ties.unequal_ties(open_checkpoint(src), model, None).undecided


def test_a_file_without_a_config_says_it_in_its_report(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), MIXTRAL)
    file = src / "model.safetensors"
    file.rename(tmp_path / "alone.safetensors")
    src, out = tmp_path / "alone.safetensors", tmp_path / "out.safetensors"
    report = regraft.convert(src, out, to=NEW, source="mixtral")
    assert [note for note in report.notes if "nothing says whether" in note]


def test_a_shared_embedding_is_what_others_follow_by_their_names():
    names = ["lm_head.weight", "decoder.embed_tokens.weight", "shared.weight"]
    found = ties._by_roles(names)
    assert found.names == ("shared.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    # Of several without a shared one, the outermost: those of layers for further tokens are their own.
    found = ties._by_roles(["model.layers.61.embed_tokens.weight", EMBEDDINGS, HEAD])
    assert found.names == (EMBEDDINGS, HEAD)


def test_comparing_stops_at_the_first_difference(tmp_path, monkeypatch):
    tensors = mixtral(hidden=64)
    src = write_folder(tmp_path / "src", tensors, TIED)
    read = []
    monkeypatch.setattr(ties, "_BUFFER", 256)
    genuine = ties.read_into

    def counted(file, view, at):
        read.append(len(view))
        genuine(file, view, at)

    monkeypatch.setattr(ties, "read_into", counted)
    with pytest.raises(BadInputError):
        regraft.convert(src, tmp_path / "out", to=NEW)
    assert sum(read) == 2 * 256


def test_the_text_models_field_decides_and_reaches_the_result():
    from regraft.checkpoints.config import convert_config

    old = {
        "model_type": "x",
        "tie_word_embeddings": False,
        "transformers_version": "4.57.6",
    }
    old["text_config"] = {"model_type": "y", "tie_word_embeddings": True}
    new, changes = convert_config(old, NEW)
    assert new["tie_word_embeddings"] is True and changes
