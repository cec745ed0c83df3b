"""Adapters of models that only the registry knows: what follows a new name, and what names grow wider."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.10")
peft = pytest.importorskip("peft", minversion="0.19")

from safetensors.torch import load_file, save_file  # noqa: E402

import regraft  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "base_model.model."
V4, V5 = "transformers-v4", "transformers-v5"


@pytest.fixture(scope="module")
def segformer():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[1, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[1, 1],
        decoder_hidden_size=8,
    )
    return transformers.SegformerForSemanticSegmentation(config)


@pytest.fixture(scope="module")
def autoencoder():
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    decoder = {
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
    }
    config = transformers.ViTMAEConfig(
        **sizes, **decoder, intermediate_size=12, decoder_intermediate_size=12, image_size=8
    )
    return transformers.ViTMAEForPreTraining(config)


@pytest.fixture(scope="module")
def siglip():
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**sizes, "vocab_size": 20, "max_position_embeddings": 8, "pad_token_id": 1}
    config = transformers.SiglipConfig(
        text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}
    )
    return transformers.SiglipModel(config)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear(module, out=8, into=8):
    return {
        f"{module}.lora_A.weight": drawn(2, into),
        f"{module}.lora_B.weight": drawn(out, 2),
    }


def convolution(module, into, size, out=8):
    return {
        f"{module}.lora_A.weight": drawn(2, into, size, size),
        f"{module}.lora_B.weight": drawn(out, 2, 1, 1),
    }


def write(folder, tensors, **fields):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "peft_version": "0.18.1", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def there_and_back(model, folder):
    """The tensors and the config in the new layout; the way back must give what there was."""
    base = folder.parent / "base"
    model.save_pretrained(base)
    new, old = folder.parent / "new", folder.parent / "old"
    regraft.convert(folder, new, to=V5, model=base)
    regraft.convert(new, old, to=V4, model=base)
    was, back = (load_file(f / "adapter_model.safetensors") for f in (folder, old))
    assert was.keys() == back.keys()
    assert all(torch.equal(was[name], back[name]) for name in was)
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (folder, old)]
    assert configs[0] == configs[1]
    tensors = load_file(new / "adapter_model.safetensors")
    config = json.loads((new / "adapter_config.json").read_text())
    return {name.removeprefix(PREFIX): x for name, x in tensors.items()}, config


@pytest.mark.parametrize("dora", [False, True])
def test_a_convolution_that_gets_another_name_keeps_its_lora(segformer, tmp_path, dora):
    old = "segformer.encoder.patch_embeddings.1.proj"
    tensors = convolution(old, 8, 3) | convolution(
        "segformer.encoder.patch_embeddings.0.proj", 3, 3
    )
    if dora:
        for number in (0, 1):
            place = f"segformer.encoder.patch_embeddings.{number}.proj.lora_magnitude_vector"
            tensors[place] = drawn(1, 8, 1, 1)
    names = [f"segformer.encoder.patch_embeddings.{n}.proj" for n in (0, 1)]
    folder = write(tmp_path / "lora", tensors, target_modules=names, use_dora=dora)
    made, _ = there_and_back(segformer, folder)
    new = "segformer.stages.1.patch_embeddings.proj"
    ends = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if dora else []))
    assert all(torch.equal(made[f"{new}.{end}"], tensors[f"{old}.{end}"]) for end in ends)
    loaded = regraft.load_adapter(_copy(segformer), folder)
    layer = loaded.get_submodule(f"{PREFIX}{new}")
    assert torch.equal(layer.lora_B["default"].weight, tensors[f"{old}.lora_B.weight"])


def test_a_saved_module_is_named_so_that_no_other_ends_in_it(segformer, tmp_path):
    saved = {
        name: tensor
        for name, tensor in segformer.state_dict().items()
        if ".patch_embeddings.proj." in name or ".linear_projections." in name
    }
    old = {
        name.replace("segformer.stages.", "segformer.encoder.patch_embeddings.")
        .replace(".patch_embeddings.proj", ".proj")
        .replace("linear_projections", "linear_c"): tensor.clone()
        for name, tensor in saved.items()
    }
    old |= linear("segformer.encoder.block.0.0.attention.self.query")
    old |= linear("segformer.encoder.block.1.0.attention.self.query")
    folder = write(tmp_path / "lora", old, target_modules=["query"], modules_to_save=["proj"])
    made, config = there_and_back(segformer, folder)
    assert saved.keys() < made.keys()
    assert "proj" not in config["modules_to_save"]  # q_proj ends in it now
    loaded = regraft.load_adapter(_copy(segformer), folder)
    wrapped = [n for n, m in loaded.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"]
    assert {n.removeprefix(PREFIX) for n in wrapped} == {n.rpartition(".")[0] for n in saved}


def test_a_path_is_shortened_only_where_no_other_module_ends_so(autoencoder, tmp_path):
    names = [f"decoder.decoder_layers.{layer}.output.dense" for layer in (0, 1)]
    tensors = {k: v for name in names for k, v in linear(name, 8, 12).items()}
    folder = write(tmp_path / "lora", tensors, target_modules=names)
    _, config = there_and_back(autoencoder, folder)
    assert config["target_modules"] == [f"decoder.decoder_layers.{n}.mlp.fc2" for n in (0, 1)]
    loaded = regraft.load_adapter(_copy(autoencoder), folder)
    assert sum("lora_A.default" in name for name, _ in loaded.named_parameters()) == 2


def test_trained_rows_follow_their_embedding_with_their_entry(siglip, tmp_path):
    owner = "vision_model.embeddings.position_embedding"
    text = "text_model.embeddings.token_embedding"
    tensors = {
        f"{owner}.token_adapter.trainable_tokens_delta": drawn(2, 8),
        f"{text}.token_adapter.trainable_tokens_delta": drawn(2, 8),
        **linear("vision_model.encoder.layers.0.self_attn.q_proj"),
    }
    rows = {owner: [0, 1], "token_embedding": [3, 4]}
    fields = {"target_modules": ["vision_model.encoder.layers.0.self_attn.q_proj"]}
    folder = write(tmp_path / "lora", tensors, trainable_token_indices=rows, **fields)
    made, config = there_and_back(siglip, folder)
    ends = [n for n in made if n.endswith("trainable_tokens_delta")]
    modules = dict(siglip.named_modules())
    assert all(n.removesuffix(".token_adapter.trainable_tokens_delta") in modules for n in ends)
    loaded = regraft.load_adapter(_copy(siglip), folder)
    before = siglip.get_submodule(text).weight
    after = loaded.merge_and_unload().get_submodule(text).weight
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3, 4]
    assert len(ends) == len(config["trainable_token_indices"]) == 2


def test_a_parameter_of_the_model_itself_has_a_place(siglip, tmp_path):
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    biases = {n: x + 1 for n, x in siglip.state_dict().items() if "bias" in n}
    biases = {
        (f"{n.removesuffix('.bias')}.base_layer.bias" if n == f"{module}.bias" else n): x
        for n, x in biases.items()
    }
    tensors = {**linear(module), **biases}
    folder = write(tmp_path / "lora", tensors, target_modules=[module], bias="all")
    loaded = regraft.load_adapter(_copy(siglip), folder)
    assert torch.equal(loaded.base_model.model.logit_bias, siglip.logit_bias + 1)


def _copy(model):
    made = type(model)(model.config)
    made.load_state_dict(model.state_dict())
    return made
