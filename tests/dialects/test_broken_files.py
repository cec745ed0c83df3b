"""Files of every dialect with one thing wrong: an error that names it, and never a result."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.errors import RegraftError
from regraft.storage.safetensors import open_tensors, read_header, write_tensors

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from dialect_files import assert_as_much, copied, energy, sound_inputs

DEEP = "[" * 100_000
SAID = "lora_adapter_metadata"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return sound_inputs(tmp_path_factory.mktemp("sound") / "inputs")


@pytest.fixture(scope="module")
def one_of(sound):
    return {(each.dialect, each.path.name.partition("-")[0]): each for each in sound}


def converted(source, each, folder):
    out = folder / ("out.safetensors" if source.is_file() else "out")
    regraft.convert(source, out, to=each.to, model=each.base)
    return out


def test_sound_files_add_as_much_as_what_they_become(sound, tmp_path):
    known = 0
    for number, each in enumerate(sound):
        folder = tmp_path / str(number)
        folder.mkdir()
        before = energy(each.path, each.dialect)
        assert_as_much(before, energy(converted(each.path, each, folder), each.to))
        known += before is not None
    assert known > len(sound) - 6


def wrong(one, folder, change):
    """The findings on an input that was changed."""
    source, files = copied(one, folder)
    change(source, files)
    with pytest.raises(RegraftError) as caught:
        converted(source, one, folder)
    assert not (folder / "out").exists()
    return caught.value.findings


def rewritten(path, change):
    """Change the tensors, or the header, of a file of safetensors."""
    tensors = {name: np.array(x) for name, x in open_tensors(path).items()}
    metadata = dict(read_header(path).metadata)
    change(tensors, metadata)
    path.unlink()
    write_tensors(path, tensors, metadata)


def image(sound, name):
    return next(each for each in sound if each.dialect == name)


IMAGE = ["kohya", "onetrainer", "bfl", "xlabs", "diffusers", "comfyui", "ai-toolkit", "peft-image"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda x: x[..., None, None].repeat(2, -1), "shape"),
        (lambda x: x[:0], "shape"),
        (lambda x: x.reshape(-1), "shape"),
        (lambda x: x.astype(np.complex64), "dtype"),
        (lambda x: x.astype(np.int64), "dtype"),
        (lambda _: None, "shape"),
    ],
)
def test_a_factor_of_an_image_model(sound, tmp_path, change, code):
    def broken(tensors, metadata):
        key = next(n for n in tensors if "lora_up" in n or "lora_B" in n or ".up." in n)
        made = change(tensors.pop(key))
        if made is not None:
            tensors[key] = made

    def change_weights(_, files):
        rewritten(next(f for f in files if f.suffix == ".safetensors"), broken)

    for name in IMAGE:
        folder = tmp_path / name
        folder.mkdir()
        (found,) = wrong(image(sound, name), folder, change_weights)
        assert (found.code, bool(found.key), bool(found.fix)) == (code, True, True), name


@pytest.mark.parametrize("alpha", [np.zeros(0), np.ones(2), np.complex64(1), np.float32("nan")])
def test_an_alpha_of_an_image_model(sound, tmp_path, alpha):
    def broken(tensors, metadata):
        tensors[next(n for n in tensors if n.endswith(".alpha"))] = np.asarray(alpha)

    one = image(sound, "kohya")
    (found,) = wrong(one, tmp_path, lambda source, _: rewritten(source, broken))
    assert found.key.startswith("lora_unet_")


@pytest.mark.parametrize(
    "value",
    [
        DEEP,
        "{",
        "[]",
        *({"transformer." + k: v} for k, v in (
            ("lora_alpha", "16"), ("lora_alpha", float("nan")), ("alpha_pattern", [1]),
            ("alpha_pattern", {"(": 1}), ("use_rslora", 1), ("r", 0), ("r", 3),
        )),
    ],
)  # fmt: skip
def test_a_header_of_diffusers(sound, tmp_path, value):
    def broken(tensors, metadata):
        old = json.loads(metadata[SAID])
        metadata[SAID] = value if isinstance(value, str) else json.dumps({**old, **value})
        metadata.pop("regraft.origin", None)

    one = image(sound, "diffusers")
    found = wrong(one, tmp_path, lambda source, _: rewritten(source, broken))
    assert {finding.code for finding in found} <= {"not-json", "not-an-object", "config", "shape"}
    assert all(SAID in f"{finding.key}{finding.message}" for finding in found)


@pytest.mark.parametrize("entry", ["regraft.origin", "software", "regraft"])
def test_entries_that_tell_something_besides_may_be_anything(sound, tmp_path, entry):
    one = image(sound, "ai-toolkit")
    source, _ = copied(one, tmp_path)
    rewritten(source, lambda _, metadata: metadata.update({entry: DEEP}))
    converted(source, one, tmp_path)


@pytest.mark.parametrize("text", ["abc", "nan", "1e999"])
def test_one_alpha_in_the_header(tmp_path, text):
    file = tmp_path / "lora.safetensors"
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {
        f"{stem}.lora_down.weight": np.ones((2, 8), np.float32),
        f"{stem}.lora_up.weight": np.ones((8, 2), np.float32),
    }
    write_tensors(file, tensors, {"ss_network_alpha": text})
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(file, tmp_path / "out.safetensors", to="diffusers", source="flux")
    assert [finding.key for finding in caught.value.findings] == ["ss_network_alpha"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", "8"),
        ("alpha_pattern", ".*"),
        ("rank_pattern", {"to_q": 3}),
        ("r", 3),
        ("use_rslora", "yes"),
        ("target_modules", ["to_q"]),
        ("exclude_modules", ["to_q"]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa"),
    ],
)
def test_a_config_beside_an_image_model_s_adapter(sound, tmp_path, field, value):
    def change(source, _):
        file = source / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))

    assert wrong(image(sound, "peft-image"), tmp_path, change)


@pytest.mark.parametrize(
    "text",
    [
        "lora_r: 2\nlora_r: 4\nlora_alpha: 6",
        "lora_r: 2\nlora_alpha: 6\nlora_query: 'no'",
        "lora_r: 2\nlora_alpha: .nan",
        "lora_r: -2\nlora_alpha: 6",
        "lora_r: 2000-13-45\nlora_alpha: 6",
        f"lora_r: {'9' * 5000}\nlora_alpha: 6",
        "lora_r: " + DEEP[:1000],
        "? [1]\n: 2",
        "#" * 300_000,
        "",
    ],
)
def test_settings_of_litgpt(one_of, tmp_path, text):
    def change(source, _):
        (source / "hyperparameters.yaml").write_text(text)

    assert wrong(one_of["litgpt", "llama"], tmp_path, change)


@pytest.mark.parametrize("base", ["a" * 5000, "a\0b"])
@pytest.mark.parametrize("name", ["vllm", "unsloth", "nemo", "tinker"])
def test_a_base_s_name_may_be_anything(sound, tmp_path, name, base):
    each = next(one for one in sound if one.dialect == name)
    source, _ = copied(each, tmp_path)
    file = source / "adapter_config.json"
    config = {**json.loads(file.read_text()), "base_model_name_or_path": base}
    file.write_text(json.dumps(config))
    regraft.inspect(source, model=each.base)
    out = converted(source, each, tmp_path)
    shutil.rmtree(out)


def test_a_factor_of_megatron_without_dims(sound, tmp_path):
    def broken(tensors, metadata):
        tensors[next(n for n in tensors if "lora_A" in n)] = np.float32(1)

    one = image(sound, "megatron-bridge")
    assert wrong(one, tmp_path, lambda source, files: rewritten(files[0], broken))


PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("vllm", PREFIX, ""),
        ("tinker", ".experts.w1.", ".experts.gate_proj."),
        ("tinker", "model.layers.0.mlp.experts.w1.", "model.layers.0.mlp.experts.0.gate_proj."),
        ("tinker", "model.layers.0.mlp.experts.w1.", "model.unembed_tokens."),
        ("tinker", "model.layers.0.mlp.experts.w1.", "layers.0.attn.q_proj."),
    ],
)
def test_one_thing_under_two_names(sound, tmp_path, name, old, new):
    """A tool has both names for it, and only one of the two would be left."""

    def broken(tensors, metadata):
        for key in [key for key in tensors if old in key and "layers.0" in key][:2]:
            doubled = tensors[key][0] if ".0.gate" in new else tensors[key]
            tensors[key.replace(old, new, 1)] = doubled * 3
            if new == "model.unembed_tokens.":
                tensors[PREFIX + "lm_head." + key.partition(old)[2]] = doubled
            if new == "layers.0.attn.q_proj.":
                tensors[key.replace(old, new.replace("attn", "self_attn"), 1)] = doubled

    found = wrong(
        image(sound, name),
        tmp_path,
        lambda source, _: rewritten(source / "adapter_model.safetensors", broken),
    )
    assert {finding.code for finding in found} == {"two-values"}
    assert all(finding.key and finding.fix for finding in found)


@pytest.mark.parametrize(("count", "sound_count"), [(1, False), (2, True), (-1, True), (0, True)])
def test_mlx_makes_adapters_in_the_last_layers_alone(one_of, tmp_path, count, sound_count):
    one = one_of["mlx", "llama"]
    source, _ = copied(one, tmp_path)
    file = source / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": count}))
    if sound_count:
        converted(source, one, tmp_path)
        return
    with pytest.raises(regraft.BadInputError, match="the last 1 layers alone") as caught:
        converted(source, one, tmp_path)
    assert ".0." in caught.value.findings[0].key
