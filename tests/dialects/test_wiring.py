"""A dialect that nobody has goes through every command, both ways."""

import json
from pathlib import Path

import numpy as np
import pytest
from dialects.pairs import FILE, Pairs

import regraft
from regraft.adapters.scale import Scale
from regraft.cli import main
from regraft.dialects import base
from regraft.errors import BadInputError
from regraft.testing import check_dialect, registered

GOLDEN = Path(__file__).parents[1] / "golden"
CASE = GOLDEN / "cases/mixtral__gud_attn"
BASE = GOLDEN / "bases/mixtral"


@pytest.fixture(autouse=True)
def pairs():
    with registered(Pairs()):
        yield


def test_the_kit_passes_it(tmp_path):
    check_dialect(Pairs(), tmp_path)


def test_the_kit_passes_peft(tmp_path):
    check_dialect(base.dialects()["peft"], tmp_path)


def test_the_kit_notices_a_lost_scale(tmp_path):
    class Forgetful(Pairs):
        def open(self, folder, root, weights):
            opened = super().open(folder, root, weights)
            for lora in opened.loras.values():
                lora.scale = Scale(lora.scale.rank, lora.scale.rank)
            return opened

    with pytest.raises(AssertionError, match="is off by"):
        check_dialect(Forgetful(), tmp_path)


@pytest.mark.parametrize("dst", ["made", "made.safetensors"])
def test_there_and_back(tmp_path, dst):
    """PEFT, v4 -> Pairs, v5 -> PEFT, v5: what it adds is the same as of PEFT, v4 -> PEFT, v5."""
    made = tmp_path / dst
    report = regraft.convert(CASE, made, to="pairs", model=BASE, verify=True)
    assert (
        report.adapters[0].verified and report.adapters[0].target_layout == "transformers-v5:pairs"
    )
    assert made.is_file() == dst.endswith("safetensors")
    assert not (tmp_path / ".made.regraft").exists()
    regraft.convert(made, tmp_path / "back", to="transformers-v5", model=BASE, verify=True)
    regraft.convert(CASE, tmp_path / "straight", to="transformers-v5", model=BASE)
    assert (
        main(["verify", str(tmp_path / "straight"), str(tmp_path / "back"), "--model", str(BASE)])
        == 0
    )
    assert main(["verify", str(CASE), str(made), "--model", str(BASE)]) == 0
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["target_parameters"]


def test_another_dialects_layout_moves(tmp_path):
    """Pairs, v5 -> PEFT, v4: the layout alone means PEFT."""
    regraft.convert(CASE, tmp_path / "made", to="pairs", model=BASE)
    regraft.convert(
        tmp_path / "made", tmp_path / "old", to="transformers-v4", model=BASE, verify=True
    )
    assert main(["verify", str(CASE), str(tmp_path / "old"), "--model", str(BASE)]) == 0


def test_the_command_line(tmp_path, capsys):
    made, back = tmp_path / "made.safetensors", tmp_path / "back"
    model = ["--model", str(BASE)]
    assert (
        main(["convert", str(CASE), str(made), "--to", "transformers-v5:pairs", *model, "--verify"])
        == 0
    )
    assert main(["convert", str(made), str(back), "--to", "peft", *model, "--from", "pairs"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(made), "--json"]) == 0
    (adapter,) = json.loads(capsys.readouterr().out)["adapters"]
    assert adapter["dialect"] == "pairs" and adapter["targets"]
    key = "model.layers.0.self_attn.q_proj.weight"
    assert main(["explain", str(made), key, "--to", "transformers-v4", *model]) == 0
    assert "pairs" not in capsys.readouterr().err
    assert main(["check", str(made), *model]) == 4
    assert "made-v5 --to transformers-v5" in capsys.readouterr().out
    assert main(["layouts"]) == 0
    assert "pairs" in capsys.readouterr().out


def test_merge(tmp_path):
    new = tmp_path / "base"
    regraft.convert(BASE, new, to="transformers-v5")
    regraft.convert(CASE, tmp_path / "made", to="pairs", model=BASE)
    merged = [tmp_path / "one", tmp_path / "two"]
    for src, dst in zip((CASE, tmp_path / "made"), merged, strict=True):
        regraft.convert(src, dst, to="transformers-v5", model=new, merge=True)
    one, two = (
        regraft.load_state_dict(path) if hasattr(regraft, "load_state_dict") else _read(path)
        for path in merged
    )
    assert one.keys() == two.keys()
    assert all(np.allclose(one[name], two[name], atol=1e-6) for name in one)


def _read(folder):
    from regraft.storage.safetensors import open_tensors

    return {
        name: x for file in folder.glob("*.safetensors") for name, x in open_tensors(file).items()
    }


def test_a_file_is_refused_where_a_folder_is_meant(tmp_path):
    with pytest.raises(BadInputError) as caught:
        regraft.convert(CASE, tmp_path / "out.gguf", to="pairs", model=BASE)
    assert ".safetensors" in caught.value.findings[0].fix
    made = tmp_path / "out.safetensors"
    made.write_text("mine")
    with pytest.raises(BadInputError) as caught:
        regraft.convert(CASE, made, to="pairs", model=BASE)
    assert caught.value.findings[0].code == "destination-exists" and made.read_text() == "mine"
    regraft.convert(CASE, made, to="pairs", model=BASE, overwrite=True)
    assert base.dialect_of(made).name == "pairs"


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def fails(self, folder, opened, result):
        (folder / FILE).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Pairs, "save", fails)
    with pytest.raises(BadInputError):
        regraft.convert(CASE, tmp_path / "out.safetensors", to="pairs", model=BASE)
    assert not list(tmp_path.iterdir())


def test_it_loads_into_a_live_model(tmp_path):
    from transformers import AutoModelForCausalLM

    regraft.convert(CASE, tmp_path / "made", to="pairs", model=BASE)
    outputs = []
    for path in (CASE, tmp_path / "made"):
        model = regraft.load_adapter(AutoModelForCausalLM.from_pretrained(BASE), path)
        outputs.append(model(model.dummy_inputs["input_ids"]).logits.detach().numpy())
    assert (
        np.allclose(*outputs, atol=1e-6)
        and regraft.verify(CASE, tmp_path / "made", model=BASE).equal
    )


def test_every_answer_to_which_dialect_answers(tmp_path, capsys):
    class Alike(Pairs):
        name = "alike"

    with registered(Alike()):
        check_answers(tmp_path, capsys)


def check_answers(tmp_path, capsys):
    made = tmp_path / "made"
    regraft.convert(CASE, made, to="pairs", model=BASE)
    args = ["convert", str(made), str(tmp_path / "out"), "--to", "peft", "--model", str(BASE)]
    assert main([*args, "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "ambiguous"
    choices = [choice["source"] for choice in error["findings"][0]["choices"]]
    assert choices == ["pairs", "alike"]
    for choice in choices:
        assert main([*args, "--from", choice, "--overwrite"]) == 0
        assert main(["inspect", str(made), "--from", choice]) == 0
        back = ["verify", str(made), str(tmp_path / "out"), "--model", str(BASE), "--from", choice]
        assert main(back) == 0
