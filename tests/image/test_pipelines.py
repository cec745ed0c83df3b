"""Whole pipelines of image models: single files to folders of diffusers, and back, with what stands beside the weights.

Which tensor becomes which is compared with diffusers itself by `scripts/consumers/diffusers_pipelines.py`.
"""

import json
import shutil

import numpy as np
import pytest
from image_models import both, cases, labelled

import regraft
from regraft.checkpoints.inspect import inspect_checkpoint
from regraft.checkpoints.part_configs import known_config, seen_config
from regraft.checkpoints.pipelines import PIPELINES
from regraft.checkpoints.verify import verify
from regraft.storage.safetensors import open_tensors, write_tensors

CLIP = {
    "text_model.embeddings.token_embedding.weight": (20, 12),
    "text_model.embeddings.position_embedding.weight": (7, 12),
    "text_model.encoder.layers.0.mlp.fc1.weight": (24, 12),
    "text_model.final_layer_norm.weight": (12,),
}
T5 = {
    "shared.weight": (20, 10),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 10),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2),
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": (10, 14),
}
FLUX = {
    "model.diffusion_model.": ("transformer", "flux"),
    "vae.": ("vae", "autoencoder-kl"),
    "text_encoders.clip_l.transformer.": ("text_encoder", CLIP),
    "text_encoders.t5xxl.transformer.": ("text_encoder_2", T5),
}
SDXL = {
    "model.diffusion_model.": ("unet", "sdxl"),
    "first_stage_model.": ("vae", "autoencoder-kl"),
    "conditioner.embedders.0.transformer.": ("text_encoder", CLIP),
    "conditioner.embedders.1.model.": ("text_encoder_2", "open-clip"),
}


def states(parts):
    """A pipeline as one file, and as its parts."""
    single, folders = {}, {}
    for prefix, (part, family) in parts.items():
        number = 1 if family == "sdxl" else 0
        native, new = both(family, number) if isinstance(family, str) else [labelled(family)] * 2
        single.update({prefix + name: tensor for name, tensor in native.items()})
        folders[part] = new
    return single, folders


def write(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in state.items()}
    write_tensors(path, tensors, {"modelspec.title": "tiny"})
    return path


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """FLUX.1 as one file, and its parts."""
    single, folders = states(FLUX)
    return write(tmp_path_factory.mktemp("flux") / "flux.safetensors", single), folders


@pytest.fixture(scope="module")
def converted(flux, tmp_path_factory):
    """FLUX.1 as a folder, which no test changes."""
    folder = tmp_path_factory.mktemp("converted") / "folder"
    regraft.convert(flux[0], folder, to="diffusers")
    return folder


@pytest.fixture
def folder(converted, tmp_path):
    """FLUX.1 as a folder."""
    return shutil.copytree(converted, tmp_path / "folder")


def read(path):
    return {name: tensor.copy() for name, tensor in open_tensors(path).items()}


def weights(folder):
    return {file.parent.name: read(file) for file in folder.rglob("*.safetensors")}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[n].shape == other[n].shape and (one[n] == other[n]).all() for n in one
    )


@pytest.mark.slow
@pytest.mark.parametrize("parts", [FLUX, SDXL], ids=["flux", "sdxl"])
def test_a_single_file_becomes_a_folder_and_comes_back(parts, tmp_path):
    single, folders = states(parts)
    src = write(tmp_path / "model.safetensors", single)
    report = regraft.convert(src, tmp_path / "folder", to="diffusers")
    made = weights(tmp_path / "folder")
    assert made.keys() == folders.keys()
    assert all(same(made[part], folders[part]) for part in folders)
    assert report.checkpoint.tensors_out == sum(map(len, folders.values()))
    native = report.checkpoint.source_layout
    regraft.convert(tmp_path / "folder", tmp_path / "back.safetensors", to=native)
    assert same(read(tmp_path / "back.safetensors"), single)
    assert verify(src, tmp_path / "folder").equal
    assert verify(tmp_path / "folder", src).equal


def test_the_way_back_is_bit_for_bit(flux, converted, tmp_path):
    assert all(same(state, flux[1][part]) for part, state in weights(converted).items())
    regraft.convert(converted, tmp_path / "back.safetensors", to="bfl")
    assert same(read(tmp_path / "back.safetensors"), read(flux[0]))


def test_files_are_called_as_diffusers_and_transformers_call_them(folder):
    names = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert names == {
        "model_index.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
    }
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert index["text_encoder_2"] == ["transformers", "T5EncoderModel"]


def test_inspecting_says_which_pipeline_it_is(flux, converted):
    assert inspect_checkpoint(flux[0]).layout == "bfl"
    found = inspect_checkpoint(converted)
    assert (found.layout, found.model_types) == ("diffusers", ["flux"])


def test_shards_of_a_part_have_their_own_index(flux, tmp_path):
    report = regraft.convert(flux[0], tmp_path / "out", to="diffusers", shard_size=8000)
    part = tmp_path / "out" / "transformer"
    index = json.loads((part / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in part.glob("*.safetensors"))
    assert len(shards) > 1 and set(index["weight_map"].values()) == set(shards)
    assert len(report.checkpoint.files) > 4
    regraft.convert(tmp_path / "out", tmp_path / "back.safetensors", to="bfl")
    assert same(read(tmp_path / "back.safetensors"), read(flux[0]))


def test_configs_and_tokenizers_come_from_a_folder(flux, folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder, model, ignore=shutil.ignore_patterns("*.safetensors"))
    for path, text in (
        ("transformer/config.json", '{"num_layers": 2, "num_single_layers": 11}'),
        ("vae/config.json", '{"latent_channels": 4}'),
        ("scheduler/scheduler_config.json", "{}"),
        ("tokenizer/vocab.json", "{}"),
    ):
        (model / path).parent.mkdir(exist_ok=True)
        (model / path).write_text(text)
    report = regraft.convert(flux[0], tmp_path / "out", to="diffusers", model=model)
    assert (tmp_path / "out/tokenizer/vocab.json").is_file()
    assert (tmp_path / "out/transformer/config.json").read_text() == (
        model / "transformer/config.json"
    ).read_text()
    notes = " ".join(report.notes)
    assert "no config.json for text_encoder, text_encoder_2" in notes
    (model / "transformer/config.json").write_text('{"num_layers": 19}')
    with pytest.raises(regraft.BadInputError, match="it is 19, and the tensors say 2"):
        regraft.convert(flux[0], tmp_path / "other", to="diffusers", model=model)
    assert not (tmp_path / "other").exists()


def test_what_is_not_known_is_said(flux, tmp_path):
    report = regraft.convert(flux[0], tmp_path / "out", to="diffusers", dry_run=True)
    notes = " ".join(report.notes)
    assert "no config.json for transformer, vae, text_encoder, text_encoder_2" in notes
    assert "not in a single file, and not made: tokenizer, tokenizer_2, scheduler" in notes


def test_what_a_folder_has_no_use_for_is_dropped_and_said(flux, tmp_path):
    single = read(flux[0])
    single["alphas_cumprod"] = single["model_ema.decay"] = np.zeros(3, np.float32)
    src = write(tmp_path / "model.safetensors", single)
    report = regraft.convert(src, tmp_path / "out", to="diffusers")
    notes = " ".join(report.notes)
    assert "alphas_cumprod: the scheduler computes it" in notes
    assert "model_ema.decay: the moving average" in notes
    single["odd.weight"] = np.zeros(3, np.float32)
    src = write(tmp_path / "odd.safetensors", single)
    with pytest.raises(
        regraft.UnmatchedKeysError, match=r"odd.weight: it belongs to no known part"
    ):
        regraft.convert(src, tmp_path / "odd", to="diffusers")
    report = regraft.convert(src, tmp_path / "odd", to="diffusers", drop=["odd.*"])
    assert report.checkpoint.dropped == ["odd.weight"]


@pytest.mark.parametrize(
    ("to", "name", "words"),
    [
        ("diffusers", "out.safetensors", "diffusers keeps the parts"),
        ("bfl", "out", "it is in the layout bfl already"),
        ("ldm", "out", "ldm is not one of theirs"),
    ],
)
def test_what_cannot_be_written_is_refused(flux, tmp_path, to, name, words):
    with pytest.raises(regraft.BadInputError, match=words):
        regraft.convert(flux[0], tmp_path / name, to=to)
    assert list(tmp_path.iterdir()) == []


def test_text_encoders_that_transformers_5_saved_get_their_old_names(folder, tmp_path, flux):
    file = folder / "text_encoder/model.safetensors"
    write(file, {name.removeprefix("text_model."): t for name, t in read(file).items()})
    regraft.convert(folder, tmp_path / "back.safetensors", to="bfl")
    assert same(read(tmp_path / "back.safetensors"), read(flux[0]))


def test_a_vae_that_an_older_diffusers_saved_is_read(folder, tmp_path, flux):
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    state = read(file)
    for old, new in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
    ):
        state = {name.replace(f".{new}.", f".{old}."): t for name, t in state.items()}
    assert any(".proj_attn." in name for name in state)
    write(file, state)
    regraft.convert(folder, tmp_path / "back.safetensors", to="bfl")
    assert same(read(tmp_path / "back.safetensors"), read(flux[0]))


def test_parts_that_no_single_file_holds_are_left_out_and_said(folder, tmp_path):
    write(folder / "image_encoder/model.safetensors", {"a": np.zeros(2, np.float32)})
    report = regraft.convert(folder, tmp_path / "back.safetensors", to="bfl")
    assert any("no single file holds them: image_encoder" in note for note in report.notes)


def test_a_denoiser_by_itself(flux, tmp_path):
    """Names with a prefix lose it; names without one are those of the denoiser's own file."""
    whole = read(flux[0])
    before = "model.diffusion_model."
    some = {name: tensor for name, tensor in whole.items() if name.startswith(before)}
    src = write(tmp_path / "prefixed.safetensors", some)
    regraft.convert(src, tmp_path / "out.safetensors", to="diffusers")
    assert same(read(tmp_path / "out.safetensors"), flux[1]["transformer"])
    bare = write(
        tmp_path / "bare" / "flux.safetensors", {n[len(before) :]: t for n, t in some.items()}
    )
    report = regraft.convert(bare, tmp_path / "folder", to="diffusers")
    made = read(tmp_path / "folder/diffusion_pytorch_model.safetensors")
    assert same(made, flux[1]["transformer"])
    assert any("no config.json" in note for note in report.notes)
    config = tmp_path / "config.json"
    config.write_text('{"_class_name": "FluxTransformer2DModel", "num_layers": 2}')
    regraft.convert(bare, tmp_path / "with", to="diffusers", model=config)
    assert (tmp_path / "with/config.json").read_text() == config.read_text()
    regraft.convert(tmp_path / "with", tmp_path / "again", to="bfl")
    assert same(weights(tmp_path / "again")["again"], read(bare))


def test_no_family_fits(tmp_path):
    src = write(tmp_path / "x.safetensors", {"model.diffusion_model.odd.weight": np.zeros((2, 2))})
    with pytest.raises(regraft.UnmatchedKeysError, match="no family that is known"):
        regraft.convert(src, tmp_path / "out", to="diffusers")
    with pytest.raises(regraft.UnmatchedKeysError, match=r"odd\.weight: no rule"):
        regraft.convert(src, tmp_path / "out", to="diffusers", source="sdxl")


def test_a_folder_without_weights_is_none(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model_index.json").write_text("{}")
    with pytest.raises(regraft.BadInputError, match=r"beside model_index\.json"):
        regraft.convert(tmp_path / "folder", tmp_path / "out.safetensors", to="bfl")
    write(tmp_path / "folder/vae/diffusion_pytorch_model.safetensors", both("autoencoder-kl")[1])
    with pytest.raises(regraft.BadInputError, match="neither a unet nor a transformer"):
        regraft.convert(tmp_path / "folder", tmp_path / "out.safetensors", to="bfl")


def test_configs_of_published_models_are_made_from_their_shapes():
    clip = next(part for part in PIPELINES[0].parts if part.name == "text_encoder")
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        **{f"text_model.encoder.layers.{n}.mlp.fc1.weight": (3072, 768) for n in range(12)},
    }
    config = known_config("sd15", clip, shapes)
    assert config is not None
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (12, 12)
    assert config["hidden_act"] == "quick_gelu"
    shapes["text_model.embeddings.token_embedding.weight"] = (20, 768)
    assert known_config("sd15", clip, shapes) is None
    assert seen_config(clip.cls, {}) == {}


def test_a_family_answers_where_its_layout_has_the_same_name(tmp_path):
    native, new = both("wan")
    src = write(tmp_path / "wan.safetensors", new)
    regraft.convert(src, tmp_path / "out.safetensors", to="wan", source="wan")
    assert same(read(tmp_path / "out.safetensors"), native)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in native.items()}
    src = write(tmp_path / "prefixed.safetensors", prefixed)
    regraft.convert(src, tmp_path / "new.safetensors", to="diffusers", source="wan")
    assert same(read(tmp_path / "new.safetensors"), new)


@pytest.mark.parametrize(
    ("family", "depth"), [("sd15", 1), ("sdxl_refiner", 2), ("sdxl", [1, 2, 3])]
)
def test_how_deep_attention_is_in_each_level_of_a_unet(family, depth):
    shapes = {name: tuple(shape) for name, shape in cases(family)[1]["diffusers"].items()}
    assert seen_config("UNet2DConditionModel", shapes)["transformer_layers_per_block"] == depth


def test_a_broken_config_beside_a_file_fails_nothing(flux, tmp_path):
    """Names tell which pipeline it is, so no config is needed."""
    src = tmp_path / "src" / "flux.safetensors"
    src.parent.mkdir()
    shutil.copy(flux[0], src)
    (src.parent / "config.json").write_text("{")
    assert regraft.convert(src, tmp_path / "out", to="diffusers", dry_run=True).checkpoint.files


@pytest.mark.parametrize("back", [False, True])
def test_slices_are_those_of_the_result(flux, folder, tmp_path, back):
    src, to, out = (folder, "bfl", "out.safetensors") if back else (flux[0], "diffusers", "out")
    regraft.convert(src, tmp_path / out, to=to)
    made = (
        read(tmp_path / out)
        if back
        else {f"{p}/{n}": x for p, part in weights(tmp_path / out).items() for n, x in part.items()}
    )
    assert same(regraft.slices(src, to=to).read(), made)
