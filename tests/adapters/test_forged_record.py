"""What a file says of its own past is believed only where its tensors, its config and its base bear it out."""

import json
import shutil

import numpy as np
import pytest
from test_golden import GOLDEN, base_of

import regraft
from regraft.adapters.provenance import KEY, digest, digest_all
from regraft.checking.certificate import verify_adapters
from regraft.storage.safetensors import open_tensors, read_header, write_tensors

V4, V5 = "transformers-v4", "transformers-v5"
KEPT, WEIGHTS = "regraft_kept.safetensors", "adapter_model.safetensors"
EMPTY = json.dumps({"format": 1, "layout": V5, "source": {"layout": V4}})
OPTIONS = {"mixtral__dora": {"via": "dense"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each case in the layout that it goes back from, with its base."""
    root = tmp_path_factory.mktemp("made")

    def of(case):
        folder = root / case
        if not folder.exists():
            regraft.convert(
                GOLDEN / "cases" / case, folder, to=V5, model=base_of(case), **OPTIONS.get(case, {})
            )
        return folder

    return of


def written(file, change, metadata=None):
    header = read_header(file)
    tensors = {name: np.array(tensor) for name, tensor in open_tensors(file).items()}
    change(tensors)
    said = dict(header.metadata)
    if metadata:
        entry = json.loads(said.get(KEY, EMPTY))
        metadata(entry, tensors)
        said[KEY] = json.dumps(entry)
    write_tensors(file, tensors, said)


def unchanged(_):
    pass


def other_factors(tensors):
    for name, tensor in tensors.items():
        tensors[name] = (tensor * 3).astype(tensor.dtype)


def other_file_beside(folder):
    written(folder / KEPT, other_factors)


def another_norm(folder):
    """A trained tensor that the record says the base had."""
    added = "base_model.model.model.norm.weight"

    def put(tensors):
        tensors[added] = np.full(32, 7, np.float32)

    def say(entry, tensors):
        name = added.removeprefix("base_model.model.")
        entry["kept"].setdefault("filled", {})[name] = digest(tensors[added])

    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["modules_to_save"] = [*(config.get("modules_to_save") or []), "model.norm"]
    file.write_text(json.dumps(config))
    written(folder / WEIGHTS, put, say)


def another_adapter_beside(folder):
    """Factors that are said to have been rounded, and are others."""
    file = folder / WEIGHTS
    tensors = {n: np.array(t) * np.float32(2) for n, t in open_tensors(GOLD / WEIGHTS).items()}
    write_tensors(folder / KEPT, tensors, {"format": "pt"})

    def say(entry, there):
        entry["kept"]["changed"] = digest_all(there)

    written(file, unchanged, say)


GOLD = GOLDEN / "cases" / "mixtral__gud_attn"


def another_whole(folder):
    """A LoRA that is said to stand in for another adapter."""
    tensors = {n: np.array(t) * np.float32(2) for n, t in open_tensors(GOLD / WEIGHTS).items()}
    write_tensors(folder / KEPT, tensors, {"format": "pt"})
    written(folder / WEIGHTS, unchanged, lambda e, t: e.update(kept={"whole": digest_all(t)}))


def said_of_config(field, value):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())

        def say(entry, _):
            entry["config"][field] = [value, config.get(field)]
            entry["had"] = [*entry["had"], field]

        written(folder / WEIGHTS, unchanged, say)

    change.__name__ = f"{field}={value}"
    return change


def sums_of_others(folder):
    """A scale of its own for a LoRA whose sum with the base is saved."""

    def say(entry, _):
        for module in entry["kept"]["modules"].values():
            module["alpha"] = 1000

    written(folder / WEIGHTS, unchanged, say)


FORGED = [
    ("jamba__all_linear_bias", other_file_beside),
    ("jamba__all_linear_bias", sums_of_others),
    ("mixtral__dora", other_file_beside),
    ("mixtral__gud_attn", another_norm),
    ("mixtral__gud_attn", another_adapter_beside),
    ("mixtral__gud_attn", another_whole),
    ("mixtral__gud_attn", said_of_config("layers_to_transform", [0])),
    ("mixtral__gud_attn", said_of_config("exclude_modules", ["q_proj"])),
    ("mixtral__gud_attn", said_of_config("use_rslora", True)),
    ("mixtral__gud_attn", said_of_config("use_dora", True)),
    ("mixtral__gud_attn", said_of_config("init_lora_weights", "pissa")),
    ("mixtral__gud_attn", said_of_config("peft_type", "LOHA")),
    ("mixtral__gud_attn", said_of_config("modules_to_save", ["q_proj"])),
    ("mixtral__gud_attn", said_of_config("layer_replication", [[0, 2], [0, 2]])),
    ("mixtral__gud_attn", said_of_config("rank_pattern", {"(a+)+$": 3})),
    ("mixtral__trainable_tokens", said_of_config("trainable_token_indices", [3, 2, 1])),
]


@pytest.mark.parametrize(
    ("case", "forge"), FORGED, ids=[f"{case}-{forge.__name__}" for case, forge in FORGED]
)
def test_what_comes_back_adds_what_the_file_adds(case, forge, made, tmp_path):
    src, base = tmp_path / "src", base_of(case)
    shutil.copytree(made(case), src)
    forge(src)
    before = verify_adapters(src, made(case), base)
    back = tmp_path / "back"
    regraft.convert(src, back, to=V4, model=base)
    assert verify_adapters(src, back, base).equal
    # It is the golden case's own only where the file still was, whatever it said.
    assert verify_adapters(GOLDEN / "cases" / case, back, base).equal == before.equal


@pytest.mark.parametrize("case", ["jamba__all_linear_bias", "mixtral__dora"])
def test_without_the_base_nothing_is_taken_on_trust(case, made, tmp_path):
    src, bare = tmp_path / "src", tmp_path / "base"
    shutil.copytree(made(case), src)
    bare.mkdir()
    shutil.copy(base_of(case) / "config.json", bare)
    done = regraft.convert(src, tmp_path / "back", to=V4, model=bare)
    assert any("--model" in note or "not given back" in note for note in done.notes)
    assert verify_adapters(src, tmp_path / "back", base_of(case)).equal


def test_a_tensor_that_the_record_calls_the_bases_own_is_compared_with_it(made, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(made("mixtral__gud_attn"), src)
    another_norm(src)
    found = verify_adapters(made("mixtral__gud_attn"), src, base_of("mixtral__gud_attn"))
    assert [f.code for f in found.differences] == ["extra"]
    assert not verify_adapters(GOLD, src).equal


def test_what_was_approximated_goes_back_as_what_it_is(tmp_path):
    case, new, back = "mixtral__dora", tmp_path / "new", tmp_path / "back"
    base = base_of(case)
    regraft.convert(GOLDEN / "cases" / case, new, to=V5, model=base, via="svd:2")
    assert not (new / KEPT).exists()
    assert regraft.convert(new, back, to=V4, model=base, verify=True).written
    assert json.loads((back / "adapter_config.json").read_text()).get("use_dora") in (None, False)


def test_a_note_of_a_config_has_to_lead_to_the_config(tmp_path):
    new, back = tmp_path / "new", tmp_path / "back"
    regraft.convert(base_of("mixtral__dora"), new, to=V5)
    file = next(new.glob("*.safetensors"))
    regraft.convert(new, tmp_path / "first", to=V4)
    had = json.loads((tmp_path / "first" / "config.json").read_text())

    def say(entry, _):
        entry.setdefault("config", {})["hidden_act"] = ["gelu", "silu"]
        entry.setdefault("had", []).append("hidden_act")

    written(file, unchanged, say)
    regraft.convert(new, back, to=V4)
    assert json.loads((back / "config.json").read_text())["hidden_act"] == had["hidden_act"]
