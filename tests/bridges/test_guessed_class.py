"""A config that names no class of transformers: what is at hand decides, it is said, or the user is asked."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import regraft
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.cli import main
from regraft.errors import AmbiguousError, BadInputError
from regraft.planning.model import load_model
from regraft.rules.said import saying
from regraft.storage.safetensors import open_tensors, write_tensors

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT = {"model_type": "llama", **SIZES, "num_key_value_heads": 1, "vocab_size": 20}
VISION = {"model_type": "clip_vision_model", **SIZES, "image_size": 8, "patch_size": 4}
LLAVA = {"model_type": "llava", "text_config": TEXT, "vision_config": VISION}
HEAD, BASE = "LlavaForConditionalGeneration", "LlavaModel"
OLD_FILE, NEW_HEAD = "language_model.model.", "model.language_model."
WRAPPED = "model.language_model.model."


def folder(path, *architectures):
    path.mkdir(exist_ok=True)
    named = {"architectures": list(architectures)} if architectures else {}
    (path / "config.json").write_text(json.dumps({**LLAVA, **named}))
    return path


def told(path, prefix, task=None):
    model = load_model(path)
    keys = [f"{prefix}layers.0.self_attn.q_proj.weight"]
    return InstalledTransformers().book(
        model, keys, {}, model.architectures(), adapter=True, task=task
    )


def adapter(path, prefix, **config):
    """A LoRA on one query projection, as PEFT writes it."""
    path.mkdir()
    name = f"base_model.model.{prefix}layers.0.self_attn.q_proj"
    factors = {"A": np.ones((2, 8), np.float32), "B": np.ones((8, 2), np.float32)}
    tensors = {f"{name}.lora_{x}.weight": factor for x, factor in factors.items()}
    write_tensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    entries = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps({**entries, **config}))
    return path


@pytest.mark.parametrize(
    ("named", "prefix", "task", "expected"),
    [
        ([], NEW_HEAD, None, HEAD),
        (["MyLlava"], NEW_HEAD, None, HEAD),
        ([], "language_model.", None, BASE),
        ([], OLD_FILE, "CAUSAL_LM", HEAD),
        ([], OLD_FILE, "FEATURE_EXTRACTION", BASE),
        (["MyLlavaForConditionalGeneration"], OLD_FILE, None, HEAD),
        (["MyLlavaModel"], OLD_FILE, None, BASE),
    ],
)
def test_what_is_at_hand_decides_and_is_said(tmp_path, named, prefix, task, expected):
    found = told(folder(tmp_path / "base", *named), prefix, task)
    assert found.architecture == expected
    (note,) = found.notes
    assert "had to be guessed" in note and expected in note and "--architecture" in note
    assert "guessed" in found.evidence


def test_the_names_of_the_bases_own_weights_decide(tmp_path):
    base = folder(tmp_path / "base")
    with pytest.raises(AmbiguousError):
        told(base, OLD_FILE)
    weights = {"language_model.lm_head.weight": np.zeros((20, 8), np.float32)}
    write_tensors(base / "model.safetensors", weights, {"format": "pt"})
    assert told(base, OLD_FILE).architecture == HEAD


@pytest.mark.parametrize("named", [[], ["MyThing"]])
def test_a_tie_whose_results_differ_asks(tmp_path, named):
    base = folder(tmp_path / "base", *named)
    with pytest.raises(AmbiguousError) as caught:
        told(base, OLD_FILE)
    (finding,) = caught.value.findings
    assert finding.code == "which-class"
    assert HEAD in finding.message and BASE in finding.message
    assert "--architecture CLASS" in finding.fix
    for architecture in (HEAD, BASE):
        with saying(architecture=architecture):
            found = told(base, OLD_FILE)
        assert found.architecture == architecture and not found.notes


def test_an_unknown_class_around_a_known_one_is_not_taken_for_it(tmp_path):
    base = folder(tmp_path / "base", "ColThing")
    with pytest.raises(AmbiguousError) as caught:
        told(base, WRAPPED, "FEATURE_EXTRACTION")
    assert f"{BASE} at model, {HEAD} at model" in caught.value.findings[0].message
    with saying(architecture=HEAD):
        assert told(base, WRAPPED).architecture == "ColThing"


@pytest.mark.parametrize("architecture", ["Nope", "LlamaModel", "pipeline"])
def test_a_class_that_is_not_there_is_refused_with_those_that_are(tmp_path, architecture):
    with saying(architecture=architecture), pytest.raises(BadInputError) as caught:
        told(folder(tmp_path / "base"), OLD_FILE)
    (finding,) = caught.value.findings
    assert finding.code == "unknown-class"
    assert HEAD in finding.message


def test_the_user_is_asked_and_answers_in_python_and_on_the_command_line(tmp_path, capsys):
    base, lora = folder(tmp_path / "base"), adapter(tmp_path / "lora", OLD_FILE)
    with pytest.raises(AmbiguousError):
        regraft.convert(lora, tmp_path / "a", to="transformers-v5", model=base)
    assert not (tmp_path / "a").exists()
    regraft.convert(lora, tmp_path / "a", to="transformers-v5", model=base, architecture=HEAD)
    names = set(open_tensors(tmp_path / "a" / "adapter_model.safetensors"))
    name = f"base_model.model.{NEW_HEAD}layers.0.self_attn.q_proj"
    assert names == {f"{name}.lora_{x}.weight" for x in "AB"}

    words = ["convert", str(lora), str(tmp_path / "b"), "--to", "transformers-v5"]
    words += ["--model", str(base)]
    assert main(words) == 1
    assert "--architecture" in capsys.readouterr().err
    assert main([*words, "--architecture", HEAD]) == 0
    assert set(open_tensors(tmp_path / "b" / "adapter_model.safetensors")) == names
    given = ["--model", str(base), "--architecture", HEAD]
    assert main(["inspect", str(lora), *given]) == 0
    key = f"{OLD_FILE}layers.0.self_attn.q_proj.weight"
    assert main(["explain", str(lora), key, "--to", "transformers-v5", *given]) == 0
    assert main(["verify", str(lora), str(tmp_path / "b"), *given]) == 0
    assert main(["diff", str(lora), str(tmp_path / "b"), *given]) == 0


def test_a_guess_stands_in_the_report_and_in_json(tmp_path, capsys):
    base = folder(tmp_path / "base")
    lora = adapter(tmp_path / "lora", OLD_FILE, task_type="CAUSAL_LM")
    words = ["convert", str(lora), str(tmp_path / "out"), "--to", "transformers-v5", "--json"]
    assert main([*words, "--model", str(base)]) == 0
    (report,) = json.loads(capsys.readouterr().out)["adapters"]
    assert any("had to be guessed" in note and HEAD in note for note in report["notes"])
