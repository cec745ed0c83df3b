"""PEFT's and transformers' own functions while regraft is installed."""

import inspect
import json
import shutil
import threading

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
    is_bare,
    same_tree,
    tree_of,
    two_adapters,
)
from peft.utils import hotswap  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers.integrations.peft import PeftAdapterMixin  # noqa: E402

import regraft  # noqa: E402
from regraft.bridges.peft import hook  # noqa: E402
from regraft.bridges.peft.handing import peft_seams  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

CASE = "mixtral__gud_attn"
SAME = "mixtral__rslora"
NAMES = [n for n in INDEX if n not in ("mixtral__dora", "mixtral__lora_bias")]


def replaced():
    """Everything that installing or loading touches, as it is now."""
    patches = [*hook._hooks().patches, *peft_seams().patches]
    return [(patch.label, patch.current()) for patch in patches]


@pytest.fixture
def installed():
    before = replaced()
    with regraft.installed():
        yield
    assert replaced() == before


def stock(model, path, **options):
    return peft.PeftModel.from_pretrained(model, path, **options)


def mixin(model, path, **options):
    model.load_adapter(str(path), **options)
    return model


@pytest.mark.parametrize("load", [stock, mixin], ids=["peft", "mixin"])
def test_without_it_they_are_as_they_were(load):
    """What the rest shows: the stock loaders get this one wrong."""
    name = "mixtral__rslora"
    assert not is_adapted(load(base_model(name), str(case_folder(name))), name)


@pytest.mark.parametrize("name", quick_cases(NAMES))
def test_from_pretrained(name, installed):
    loaded = peft.PeftModel.from_pretrained(base_model(name), str(case_folder(name)))
    assert is_adapted(loaded, name)


@pytest.mark.parametrize("name", quick_cases(NAMES[::3]))
def test_the_models_own_load_adapter(name, installed):
    assert is_adapted(mixin(base_model(name), case_folder(name)), name)


def test_what_it_returns_is_what_transformers_returns(installed):
    info = base_model(CASE).load_adapter(str(case_folder(CASE)))
    if info is not None:
        assert not info.missing_keys and not info.unexpected_keys
        assert info.to_dict()


@pytest.mark.parametrize("adapter_name", ["weight", "lora_A", "model"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_names_and_memory(adapter_name, low_cpu_mem_usage, installed):
    loaded = peft.PeftModel.from_pretrained(
        base_model(CASE),
        case_folder(CASE),
        adapter_name,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert is_adapted(loaded, CASE)
    assert is_adapted(mixin(base_model(CASE), case_folder(CASE), adapter_name=adapter_name), CASE)


@two_adapters
def test_a_second_adapter(installed):
    loaded = peft.PeftModel.from_pretrained(base_model(CASE), case_folder(CASE))
    result = loaded.load_adapter(case_folder(SAME), "other")
    assert result.missing_keys == result.unexpected_keys == []
    assert is_adapted(loaded, CASE)
    loaded.set_adapter("other")
    assert is_adapted(loaded, SAME)


def test_a_subfolder_and_a_config_of_the_callers(installed, tmp_path):
    shutil.copytree(case_folder(CASE), tmp_path / "inner")
    loaded = peft.PeftModel.from_pretrained(base_model(CASE), tmp_path, subfolder="inner")
    assert is_adapted(loaded, CASE)
    config = peft.PeftConfig.from_pretrained(str(case_folder(CASE)))
    targets = set(config.target_modules)
    loaded = peft.PeftModel.from_pretrained(base_model(CASE), case_folder(CASE), config=config)
    assert is_adapted(loaded, CASE)
    assert set(config.target_modules) == targets
    loaded = peft.PeftModel.from_pretrained(
        base_model(CASE), case_folder(CASE), is_trainable=True, torch_device="cpu"
    )
    assert any(p.requires_grad for p in loaded.parameters())


def test_hotswapping(installed):
    loaded = peft.PeftModel.from_pretrained(base_model(CASE), case_folder(CASE))
    hotswap.hotswap_adapter(loaded, str(case_folder(SAME)), "default", torch_device="cpu")
    assert is_adapted(loaded, SAME)
    model = mixin(base_model(CASE), case_folder(CASE))
    mixin(model, case_folder(SAME), adapter_name="default", hotswap=True)
    assert is_adapted(model, SAME)


def test_a_model_from_the_adapters_folder(installed, tmp_path):
    shutil.copytree(case_folder(CASE), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = str(GOLDEN / "bases" / INDEX[CASE]["base"])
    file.write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", attn_implementation="eager", dtype=torch.float32
    )
    assert is_adapted(model, CASE)


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.config = model.config

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("name", [CASE, "mixtral__all_linear", "mixtral__subset_regex"])
def test_a_holder_that_peft_wraps_itself(prefixed, name, installed, tmp_path):
    shutil.copytree(case_folder(name), tmp_path / "a")
    if prefixed:
        weights = tmp_path / "a" / "adapter_model.safetensors"
        start = "base_model.model."
        moved = {k.replace(start, f"{start}inner.", 1): x for k, x in load_file(weights).items()}
        save_file(moved, weights, {"format": "pt"})
    loaded = peft.PeftModel.from_pretrained(Holder(base_model(name)), tmp_path / "a")
    assert isinstance(loaded, peft.PeftModel)
    assert is_adapted(loaded, name)


@pytest.mark.parametrize("load", [stock, mixin], ids=["peft", "mixin"])
def test_a_failed_load_leaves_the_model_as_it_was(load, installed, tmp_path):
    shutil.copytree(case_folder(CASE), tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    for key in [k for k in tensors if ".layers.1.self_attn.q_proj." in k]:
        del tensors[key]
    save_file(tensors, weights, {"format": "pt"})
    model = base_model(CASE)
    before = tree_of(model)
    with pytest.raises(regraft.RegraftError):
        load(model, tmp_path / "a")
    assert same_tree(before, tree_of(model))
    assert is_bare(model, CASE)


def test_refusals_come_through(installed):
    with pytest.raises(regraft.RefusedError):
        peft.PeftModel.from_pretrained(base_model(CASE), case_folder("mixtral__dora"))


def test_what_is_no_file_goes_the_usual_way(installed):
    loaded = peft.PeftModel.from_pretrained(base_model(CASE), case_folder(CASE))
    state = peft.get_peft_model_state_dict(loaded)
    other = peft.get_peft_model(base_model(CASE), loaded.peft_config["default"])
    assert not peft.set_peft_model_state_dict(other, state).unexpected_keys


def test_other_modules_go_the_usual_way(installed, tmp_path):
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    made = peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), config)
    made.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 3)), tmp_path)
    one, other = (peft.get_peft_model_state_dict(m) for m in (made, again))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_installing_twice_takes_uninstalling_twice():
    before = replaced()
    stock = inspect.getattr_static(peft.PeftModel, "from_pretrained")
    regraft.install()
    hooked = inspect.getattr_static(peft.PeftModel, "from_pretrained")
    with regraft.installed():
        assert inspect.getattr_static(peft.PeftModel, "from_pretrained") is hooked
    assert hooked is not stock
    assert inspect.signature(peft.PeftModel.from_pretrained)
    regraft.uninstall()
    assert replaced() == before
    assert inspect.getattr_static(peft.PeftModel, "from_pretrained") is stock
    regraft.uninstall()
    assert replaced() == before


def test_an_error_inside_uninstalls():
    before = replaced()
    with pytest.raises(ZeroDivisionError), regraft.installed():
        raise ZeroDivisionError
    assert replaced() == before


def test_what_another_library_put_on_top_is_not_torn_off(monkeypatch):
    before = replaced()
    regraft.install()
    hooked = peft.PeftModel.load_adapter
    monkeypatch.setattr(peft.PeftModel, "load_adapter", lambda self: None)
    with pytest.raises(regraft.RefusedError, match=r"peft\.peft_model\.PeftModel\.load_adapter"):
        regraft.uninstall()
    assert peft.PeftModel.load_adapter is not hooked
    monkeypatch.undo()
    regraft.uninstall()
    assert replaced() == before


def test_an_unknown_release_is_told(monkeypatch):
    hook._hooks.cache_clear()
    monkeypatch.setattr(PeftAdapterMixin, "load_adapter", lambda self, path: None)
    try:
        with pytest.raises(regraft.RefusedError, match=transformers.__version__) as caught:
            regraft.install()
        assert caught.value.findings[0].code == "unknown-peft"
        assert "PeftAdapterMixin.load_adapter" in str(caught.value.findings[0].key)
    finally:
        hook._hooks.cache_clear()


def test_threads_do_not_disturb_each_other():
    """One thread loads through regraft while others load in the usual way."""
    before = replaced()
    stock = base_model(CASE)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(stock, config)
    errors = []
    # from_pretrained itself replaces functions of torch and transformers for a while, and is not for threads.
    bases = {name: [base_model(name) for _ in range(3)] for name in (CASE, SAME)}
    others = [base_model(CASE) for _ in range(6)]

    def through_regraft(name):
        for model in bases[name]:
            loaded = regraft.load_adapter(model, case_folder(name))
            if not is_adapted(loaded, name):
                errors.append(name)

    def usual():
        for model in others:
            made = peft.get_peft_model(model, config)
            state = peft.get_peft_model_state_dict(made)
            if peft.set_peft_model_state_dict(made, state).unexpected_keys:
                errors.append("usual")

    threads = [threading.Thread(target=through_regraft, args=(n,)) for n in (CASE, SAME)]
    threads += [threading.Thread(target=usual)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert replaced() == before
