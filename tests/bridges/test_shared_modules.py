"""A module that stood in two places in transformers 4: its adapter lands once, in files and in memory."""

import copy
import json

import numpy as np
import pytest
from checkpoints.models import write_folder

import regraft
from regraft.errors import BadInputError
from regraft.storage.safetensors import open_tensors, write_tensors

PREFIX = "base_model.model."
HEADS = ("bbox_embed.0.layers.0", "class_embed.1")


@pytest.fixture(scope="module")
def model():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    stages = {"out_features": ["stage2", "stage3", "stage4"], "depths": [1] * 4}
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, layer_type="basic", **stages
    )
    torch.manual_seed(0)
    return transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(
            backbone_config=backbone,
            d_model=8,
            encoder_hidden_dim=8,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_layers=1,
            decoder_layers=2,
            num_queries=3,
            num_denoising=0,
            encoder_in_channels=[8] * 3,
            decoder_in_channels=[8] * 3,
            anchor_image_size=None,
        )
    ).eval()


def factors(model):
    rng = np.random.default_rng(0)
    made = {}
    for head in HEADS:
        out, into = model.get_submodule(f"model.decoder.{head}").weight.shape
        made[f"{head}.lora_A.weight"] = rng.normal(size=(2, into)).astype(np.float32)
        made[f"{head}.lora_B.weight"] = rng.normal(size=(out, 2)).astype(np.float32)
    return made


def write(folder, model, tensors):
    folder.mkdir()
    write_tensors(
        folder / "adapter_model.safetensors",
        {PREFIX + name: tensor for name, tensor in tensors.items()},
        {"format": "pt"},
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(HEADS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    data = {**model.config.to_dict(), "architectures": ["RTDetrForObjectDetection"]}
    return folder, write_folder(folder.parent / "base", {"x": np.zeros(1, np.float32)}, data)


PLACES = {
    "both": ("", "model.decoder."),
    "the first": ("",),
    "the second": ("model.decoder.",),
}


@pytest.mark.parametrize("places", PLACES)
def test_it_lands_once(model, tmp_path, places):
    wanted = factors(model)
    tensors = {place + name: t for place in PLACES[places] for name, t in wanted.items()}
    src, base = write(tmp_path / "src", model, tensors)
    report = regraft.convert(src, tmp_path / "new", to="transformers-v5", model=base)
    made = open_tensors(tmp_path / "new" / "adapter_model.safetensors")
    assert made.keys() == {f"{PREFIX}model.decoder.{name}" for name in wanted}
    assert all(np.array_equal(made[f"{PREFIX}model.decoder.{n}"], t) for n, t in wanted.items())
    assert any("stood in two places" in note for note in report.notes) == (places != "the second")


@pytest.mark.parametrize("places", PLACES)
def test_it_lands_in_memory(model, tmp_path, places):
    import torch

    wanted = factors(model)
    tensors = {place + name: t for place in PLACES[places] for name, t in wanted.items()}
    src, _ = write(tmp_path / "src", model, tensors)
    live = copy.deepcopy(model)
    loaded = regraft.load_adapter(live, src)
    state = (loaded if hasattr(loaded, "state_dict") else live).state_dict()
    for name, tensor in wanted.items():
        (found,) = [v for k, v in state.items() if k.replace(".default", "").endswith(name)]
        assert torch.equal(found, torch.from_numpy(tensor))


def test_two_adapters_for_one_module_are_an_error_in_memory(model, tmp_path):
    wanted = factors(model)
    tensors = {place + name: t for place in PLACES["both"] for name, t in wanted.items()}
    name = f"{HEADS[1]}.lora_B.weight"
    tensors[name] = tensors[name] + 1
    src, _ = write(tmp_path / "src", model, tensors)
    live = copy.deepcopy(model)
    before = {key: value.clone() for key, value in live.state_dict().items()}
    with pytest.raises(BadInputError, match="the same module"):
        regraft.load_adapter(live, src)
    after = live.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].equal(value) for key, value in before.items())


def test_two_adapters_for_one_module_are_an_error(model, tmp_path):
    wanted = factors(model)
    tensors = {place + name: t for place in PLACES["both"] for name, t in wanted.items()}
    name = f"{HEADS[1]}.lora_B.weight"
    tensors[name] = tensors[name] + 1
    src, base = write(tmp_path / "src", model, tensors)
    with pytest.raises(BadInputError, match="the same module") as caught:
        regraft.convert(src, tmp_path / "new", to="transformers-v5", model=base)
    assert [finding.key for finding in caught.value.findings] == [PREFIX + name]
    assert not (tmp_path / "new").exists()


TIED = {
    "T5ForConditionalGeneration": ("", "T5Config", {"d_model": 8, "d_kv": 4, "d_ff": 8}),
    "BartForConditionalGeneration": (
        "model.",
        "BartConfig",
        {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "decoder_layers": 1},
    ),
}


@pytest.fixture(params=TIED)
def tied(request):
    """A model whose embedding is one weight in three modules, and the path of its body."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path, config, sizes = TIED[request.param]
    heads = {"num_heads": 2, "num_layers": 1, "encoder_layers": 1}
    heads |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    made = getattr(transformers, config)(vocab_size=12, pad_token_id=1, **sizes, **heads)
    return getattr(transformers, request.param)(made).eval(), path


EMBEDDINGS = {
    "the shared one": ["shared"],
    "one of its users": ["encoder.embed_tokens"],
    "both users, each its own": ["encoder.embed_tokens", "decoder.embed_tokens"],
}


@pytest.mark.parametrize("which", EMBEDDINGS)
def test_modules_with_one_weight_have_adapters_of_their_own(tied, which, tmp_path):
    """T5's and BART's embedding is tied, not shared: what is adapted in one module is not in another."""
    import torch

    model, path = tied
    rng = np.random.default_rng(0)
    wanted = {}
    for module in EMBEDDINGS[which]:
        at = f"{PREFIX}{path}{module}."
        wanted[f"{at}lora_embedding_A"] = rng.normal(size=(2, 12)).astype(np.float32)
        wanted[f"{at}lora_embedding_B"] = rng.normal(size=(8, 2)).astype(np.float32)
    src = tmp_path / "src"
    src.mkdir()
    write_tensors(src / "adapter_model.safetensors", wanted, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": EMBEDDINGS[which]}
    (src / "adapter_config.json").write_text(json.dumps(config))
    data = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    base = write_folder(tmp_path / "base", {"x": np.zeros(1, np.float32)}, data)
    regraft.convert(src, tmp_path / "new", to="transformers-v5", model=base)
    made = open_tensors(tmp_path / "new" / "adapter_model.safetensors")
    assert made.keys() == wanted.keys()
    assert all(np.array_equal(made[name], tensor) for name, tensor in wanted.items())
    loaded = regraft.load_adapter(model, src)
    state = {
        key.replace(".default", ""): value
        for key, value in (loaded if hasattr(loaded, "state_dict") else model).state_dict().items()
        if "lora_" in key
    }
    assert len(state) == len(wanted)
    for name, tensor in wanted.items():
        (found,) = [v for k, v in state.items() if k.endswith(name.removeprefix(PREFIX))]
        assert torch.equal(found, torch.from_numpy(tensor))
