"""`regraft.checking.check`: what it predicts is what happens."""

import json
import shlex
import shutil

import numpy as np
import pytest
from making import quick_cases

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", minversion="0.19")

from golden_models import (  # noqa: E402
    GOLDEN,
    INDEX,
    base_model,
    case_folder,
    is_adapted,
)

import regraft  # noqa: E402
from regraft.bridges.helper import Helper  # noqa: E402
from regraft.bridges.peft.trial import StockPeft  # noqa: E402
from regraft.checking.check import check  # noqa: E402
from regraft.cli import main  # noqa: E402
from regraft.storage.safetensors import open_tensors, write_tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def base_folder(name):
    return GOLDEN / "bases" / INDEX[name]["base"]


def checked(folder, name, **options):
    (verdict,) = check(folder, model=base_folder(name), **options).verdicts
    return verdict


def loads_rightly(folder, name):
    """Whether stock PEFT loads an adapter, and the model gives what it gave where it was trained."""
    try:
        return is_adapted(peft.PeftModel.from_pretrained(base_model(name), folder), name)
    except Exception:
        return False


def copy_of(name, tmp_path, config=None, tensors=None):
    """A copy of a case with another config or other tensors."""
    folder = tmp_path / "changed"
    folder.mkdir()
    source = case_folder(name) if isinstance(name, str) else name
    data = json.loads((source / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(data | (config or {})))
    if tensors is None:
        shutil.copy(source / WEIGHTS, folder / WEIGHTS)
    else:
        write_tensors(folder / WEIGHTS, tensors(dict(open_tensors(source / WEIGHTS))), {})
    return folder


def carry_out(lines):
    """Run the commands of a remedy; the folder that the last of them writes."""
    for line in lines:
        program, *args = shlex.split(line)
        assert program == "regraft"
        assert main([*args, "--quiet"]) == 0
    return shlex.split(lines[-1])[3]


@pytest.mark.parametrize("name", quick_cases(INDEX))
def test_every_golden_adapter_as_it_is(name):
    verdict = checked(case_folder(name), name)
    assert verdict.healthy == loads_rightly(case_folder(name), name), verdict
    assert verdict.tried.startswith("transformers 5")
    if not verdict.healthy:
        assert verdict.causes or verdict.findings
        assert verdict.remedy_tried == bool(verdict.remedy) == (verdict.no_remedy is None)


@pytest.mark.parametrize("name", quick_cases(list(INDEX)[::4]))
def test_what_regraft_makes_of_them(name, tmp_path):
    try:
        regraft.convert(
            case_folder(name), tmp_path / "v5", to="transformers-v5", model=base_folder(name)
        )
    except regraft.RefusedError:
        assert not checked(case_folder(name), name).remedy
        return
    assert checked(tmp_path / "v5", name).healthy
    assert loads_rightly(tmp_path / "v5", name)


def test_a_wrong_scale_and_its_factor(tmp_path):
    name = "mixtral__rslora"
    verdict = checked(case_folder(name), name)
    (row,) = [row for row in verdict.rows if row.outcome != "lands"]
    assert (row.pattern, row.count) == ("model.layers.{0,1}.mlp.experts.gate_up_proj", 2)
    assert row.outcome == "scaled"
    assert row.factor == pytest.approx(2**0.5)
    assert any("rsLoRA" in cause for cause in verdict.causes)


def test_the_remedy_mends_it(tmp_path):
    name = "mixtral__gate_up"
    folder = tmp_path / "lora"
    shutil.copytree(case_folder(name), folder)
    verdict = checked(folder, name)
    assert verdict.counts == {"dropped": 2}
    made = carry_out(verdict.remedy)
    assert checked(made, name).healthy
    assert loads_rightly(made, name)


def test_names_that_peft_claims_in_the_new_layout(tmp_path):
    """What PEFT loads wrongly in its own layout is mended by the way there and back."""
    name = "deepseek_v3__gud"
    regraft.convert(
        case_folder(name), tmp_path / "v5", to="transformers-v5", model=base_folder(name)
    )
    config = json.loads((tmp_path / "v5" / CONFIG).read_text())
    named = [entry for entry in config["target_parameters"] if entry.endswith(".weight")]
    assert named
    folder = copy_of(
        tmp_path / "v5",
        tmp_path,
        {
            "target_parameters": [x for x in config["target_parameters"] if x not in named],
            "target_modules": [entry.removesuffix(".weight") for entry in named],
            "rank_pattern": {
                key.replace(r"\.weight", ""): rank for key, rank in config["rank_pattern"].items()
            },
        },
    )
    assert not loads_rightly(folder, name)
    verdict = checked(folder, name)
    assert verdict.healthy is False
    assert verdict.counts["dropped"] > 0
    assert any("moves it out of target_modules" in cause for cause in verdict.causes)
    made = carry_out(verdict.remedy)
    assert loads_rightly(made, name)


def test_zero_b_is_dead(tmp_path):
    name = "mixtral__gud_attn"

    def zeroed(tensors):
        return {k: np.zeros_like(x) if "lora_B" in k else x for k, x in tensors.items()}

    verdict = checked(copy_of(name, tmp_path, tensors=zeroed), name)
    assert verdict.healthy is False
    assert verdict.dead == sum(row.count for row in verdict.rows)
    assert any("B is zero" in cause for cause in verdict.causes)


def test_one_dead_target_is_told_and_healthy(tmp_path):
    name = "mixtral__all_linear"

    def zeroed(tensors):
        (key,) = [k for k in tensors if "layers.1.self_attn.q_proj.lora_B" in k]
        return tensors | {key: np.zeros_like(tensors[key])}

    verdict = checked(copy_of(name, tmp_path, tensors=zeroed), name)
    assert verdict.healthy is True
    assert verdict.dead == 1


def test_values_that_are_no_numbers(tmp_path):
    name = "mixtral__all_linear"

    def broken(tensors):
        key = next(k for k in tensors if "q_proj.lora_A" in k)
        tensor = np.array(tensors[key])
        tensor[0, 0] = np.nan
        return tensors | {key: tensor}

    verdict = checked(copy_of(name, tmp_path, tensors=broken), name)
    assert verdict.healthy is False
    assert any("finite" in cause for cause in verdict.causes)


def test_a_lora_that_the_model_does_not_call():
    """The model reads the weight of such a module: PEFT takes the LoRA, and it does nothing."""
    name = "jamba__all_linear_bias"
    verdict = checked(case_folder(name), name)
    assert verdict.healthy is False
    assert verdict.counts.get("uncalled") or verdict.error is not None


def test_files_that_are_wrong_in_themselves(tmp_path):
    name = "mixtral__all_linear"
    folder = copy_of(name, tmp_path, {"r": "four"})
    verdict = checked(folder, name)
    assert verdict.healthy is False
    assert [finding.key for finding in verdict.findings] == ["r"]


def test_a_weights_file_by_itself(tmp_path):
    name = "mixtral__all_linear"
    folder = copy_of(name, tmp_path)
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    assert checked(folder / "other.safetensors", name).healthy


def test_several_adapters(tmp_path):
    for name in ("mixtral__all_linear", "mixtral__gate_up"):
        shutil.copytree(case_folder(name), tmp_path / "all" / name)
    result = check(tmp_path / "all", model=base_folder("mixtral__gate_up"))
    found = {verdict.name: verdict.healthy for verdict in result.verdicts}
    assert found == {"mixtral__all_linear": True, "mixtral__gate_up": False}
    assert not result.healthy
    (mended,) = [v for v in result.verdicts if not v.healthy]
    made = carry_out(mended.remedy)
    assert checked(made, "mixtral__gate_up").healthy


def test_without_a_model_nothing_is_claimed():
    verdict = check(case_folder("mixtral__gate_up")).verdicts[0]
    assert verdict.healthy is False
    assert verdict.tried is None
    assert verdict.counts == {"elsewhere": 2}
    assert verdict.remedy
    assert not verdict.remedy_tried


class _NoPeft(StockPeft):
    @property
    def is_there(self):
        return False


def test_without_peft_nothing_is_called_healthy(tmp_path):
    name = "mixtral__gud_attn"
    assert checked(case_folder(name), name, peft=_NoPeft()).healthy is False
    regraft.convert(
        case_folder(name), tmp_path / "v5", to="transformers-v5", model=base_folder(name)
    )
    verdict = checked(tmp_path / "v5", name, peft=_NoPeft())
    assert verdict.healthy is None
    assert any("nothing was tried" in note for note in verdict.notes)


@pytest.mark.parametrize("name", list(INDEX)[1::6])
def test_for_the_old_transformers(name, tmp_path):
    verdict = checked(case_folder(name), name, to="transformers-v4")
    assert verdict.healthy is True, verdict
    assert verdict.tried is None
    try:
        regraft.convert(
            case_folder(name), tmp_path / "v5", to="transformers-v5", model=base_folder(name)
        )
    except regraft.RefusedError:
        return
    there = checked(tmp_path / "v5", name, to="transformers-v4")
    old, new = open_tensors(case_folder(name) / WEIGHTS), open_tensors(tmp_path / "v5" / WEIGHTS)
    moved = old.keys() != new.keys() or any((old[key] != new[key]).any() for key in old)
    assert there.healthy is (not moved)
    assert bool(there.remedy) is moved


@pytest.mark.slow
def test_in_a_process_of_its_own():
    """Where PEFT is hooked, or not imported, another process tries; it says the same."""
    name = "mixtral__gate_up"
    here = checked(case_folder(name), name)
    tried = StockPeft(Helper("regraft.bridges.peft.trial", "attempt"))
    with regraft.installed():
        there = checked(case_folder(name), name, peft=tried)
    assert tried.helper.is_running
    tried.helper.close()
    assert (there.counts, there.healthy) == (here.counts, here.healthy)


def test_checkpoints(tmp_path):
    base = GOLDEN / "bases" / "mixtral"
    assert check(base).healthy
    regraft.convert(base, tmp_path / "v5", to="transformers-v5")
    assert check(tmp_path / "v5").healthy
    (old,) = check(tmp_path / "v5", to="transformers-v4").verdicts
    assert old.healthy is False
    assert old.remedy
    assert check(base, to="transformers-v4").healthy


def _checkpoint(tmp_path, change):
    base = GOLDEN / "bases" / "mixtral"
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    tensors = dict(open_tensors(base / "model.safetensors"))
    write_tensors(folder / "model.safetensors", change(tensors), {"format": "pt"})
    return check(folder).verdicts[0]


def test_a_checkpoint_without_a_tensor(tmp_path):
    def drop(tensors):
        return {k: x for k, x in tensors.items() if k != "model.layers.1.self_attn.q_proj.weight"}

    verdict = _checkpoint(tmp_path, drop)
    assert verdict.healthy is False
    assert verdict.counts["missing"] == 1


def test_a_checkpoint_without_an_expert(tmp_path):
    def drop(tensors):
        return {k: x for k, x in tensors.items() if "layers.0.block_sparse_moe.experts.2" not in k}

    assert _checkpoint(tmp_path, drop).healthy is False


def test_a_checkpoint_with_another_shape(tmp_path):
    def cut(tensors):
        key = "model.layers.1.self_attn.q_proj.weight"
        return tensors | {key: np.array(tensors[key][:-1])}

    verdict = _checkpoint(tmp_path, cut)
    assert verdict.healthy is False
    assert verdict.counts["mismatched"] == 1


def test_a_checkpoint_with_one_tensor_too_many(tmp_path):
    def add(tensors):
        return tensors | {"model.layers.9.extra.weight": np.zeros((2, 2), np.float32)}

    verdict = _checkpoint(tmp_path, add)
    assert verdict.healthy is False
    assert verdict.counts["unexpected"] == 1


def test_stacked_experts_alone_tell_the_class(tmp_path):
    """They are named by their module, which has no weight; the class was taken for one without a head."""
    config = json.loads((base_folder("qwen3_moe__gud") / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    regraft.convert(
        case_folder("qwen3_moe__gud"), tmp_path / "new", to="transformers-v5", model=tmp_path
    )
    (verdict,) = check(tmp_path / "new", model=tmp_path).verdicts
    assert verdict.healthy, verdict


def test_a_classifier_on_a_base_of_a_language_model(tmp_path):
    """The task says the class, and the saved head how many labels the base is loaded with."""
    base = base_folder("mixtral__gud_attn")
    size = json.loads((base / "config.json").read_text())["hidden_size"]
    at = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    shapes = {f"{at}A.weight": (2, size), f"{at}B.weight": (size, 2)}
    shapes["base_model.model.score.weight"] = (5, size)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "SEQ_CLS"}
    config |= {"target_modules": r".*layers\.0\.self_attn\.q_proj", "modules_to_save": ["score"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    write_tensors(tmp_path / WEIGHTS, {k: np.ones(s, np.float32) for k, s in shapes.items()}, {})
    (verdict,) = check(tmp_path, model=base).verdicts
    assert verdict.healthy and any("5 labels" in note for note in verdict.notes), verdict


def test_the_command(capsys):
    name = "mixtral__rslora"
    args = ["check", str(case_folder(name)), "--model", str(base_folder(name))]
    assert main(args) == 4
    words = capsys.readouterr().out
    assert "wrong scale: 1.414 times what it should be" in words
    assert "2 with a wrong scale, 10 loaded" in words
    assert "Fix (tried: the result loads correctly):" in words
    assert main([*args, "--quiet"]) == 4
    assert capsys.readouterr().out == ""
    assert main([*args, "--json"]) == 4
    data = json.loads(capsys.readouterr().out)
    assert data["healthy"] is False
    assert data["verdicts"][0]["counts"] == {"scaled": 2, "lands": 10}
    assert main([*args, "--for", "transformers-v4", "-q"]) == 0
    assert main([*args, "--for", "transformers-v6"]) == 2
    assert main(["check", str(case_folder(name) / "nothing")]) == 1


def test_a_wrong_base_is_told_before_anything_is_built():
    class Never(StockPeft):
        def attempt(self, trial):
            raise AssertionError("a model was built")

    verdict = checked(case_folder("dbrx__all_linear"), "mixtral__gud_attn", peft=Never())
    assert verdict.healthy is False
    assert [finding.code for finding in verdict.findings] == ["wrong-base"]
