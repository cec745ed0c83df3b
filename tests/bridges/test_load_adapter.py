"""``regraft.load_adapter`` on live models: plain ones, adapted ones, and whatever holds them."""

import gc
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
from making import quick_cases

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", minversion="0.19")

from golden_models import (  # noqa: E402
    INDEX,
    base_model,
    case_folder,
    is_adapted,
    is_bare,
    outputs,
    reference,
    same_tree,
    tree_of,
    two_adapters,
)
from peft.tuners.tuners_utils import set_adapter  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

import regraft  # noqa: E402
from regraft.bridges.peft.load import active_adapters  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

CASE = "mixtral__gud_attn"
SECOND = "mixtral__all_linear"
SAME = "mixtral__rslora"
"""It adapts the parameters that ``CASE`` adapts, as PEFT wants of all adapters of one model."""
REFUSED = ("mixtral__dora", "mixtral__lora_bias")
ODD_NAMES = ("weight", "lora_A", "lora_B", "model", "base_layer", "experts", "lora_")


class ValueHead(nn.Module):
    """As trainers wrap a policy: another module that also shows the config of the model inside."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model
        self.config = model.config
        self.summary = nn.Linear(4, 1)

    def forward(self, **inputs):
        return self.pretrained_model(**inputs)


class Plain(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.net = nn.ModuleDict({"inner": model})

    def forward(self, **inputs):
        return self.net["inner"](**inputs)


@pytest.mark.parametrize("name", quick_cases(name for name in INDEX if name not in REFUSED))
def test_every_golden_adapter_works_in_a_live_model(name):
    loaded = regraft.load_adapter(base_model(name), case_folder(name))
    assert isinstance(loaded, peft.PeftModel)
    assert is_adapted(loaded, name)


@pytest.mark.parametrize("name", ["mixtral__all_linear", "mixtral__mts_head", "mixtral__bias_all"])
def test_the_model_itself_is_adapted_in_a_holder(name):
    model = base_model(name)
    holder = nn.Sequential(model)
    assert regraft.load_adapter(holder, case_folder(name)) is holder
    assert is_adapted(model, name)
    assert active_adapters(model) == ["default"]


def test_the_class_is_the_one_that_the_task_asks_for():
    name = "qwen3_moe_seqcls__gud_attn"
    loaded = regraft.load_adapter(base_model(name), case_folder(name))
    stock = json.loads((case_folder(name) / "adapter_config.json").read_text())["task_type"]
    assert type(loaded) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[stock]


@pytest.mark.parametrize("adapter_name", ODD_NAMES)
@pytest.mark.parametrize("held", [False, True])
def test_the_adapters_name_does_not_matter(adapter_name, held):
    model = base_model(SECOND)
    loaded = regraft.load_adapter(
        nn.ModuleList([model]) if held else model, case_folder(SECOND), adapter_name=adapter_name
    )
    assert is_adapted(model if held else loaded, SECOND)


@pytest.mark.parametrize("adapter_name", ["a.b", "", "keys", "pop"])
def test_a_name_that_no_module_can_have_is_refused_at_once(adapter_name):
    model = base_model(CASE)
    before = tree_of(model)
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.load_adapter(model, case_folder(CASE), adapter_name=adapter_name)
    assert caught.value.findings[0].code == "bad-adapter-name"
    assert same_tree(before, tree_of(model))


def test_a_converted_adapter_loads_as_well(tmp_path):
    regraft.convert(case_folder(CASE), tmp_path / "new", to="transformers-v5")
    assert is_adapted(regraft.load_adapter(base_model(CASE), tmp_path / "new"), CASE)


def test_a_converted_adapter_of_a_dense_layer_keeps_it(tmp_path):
    name = "deepseek_v3__gud"
    regraft.convert(case_folder(name), tmp_path / "new", to="transformers-v5")
    assert is_adapted(regraft.load_adapter(base_model(name), tmp_path / "new"), name)


@pytest.mark.parametrize(
    "held",
    [
        lambda m: nn.Sequential(m),
        lambda m: nn.ModuleDict({"policy": m}),
        Plain,
        ValueHead,
        nn.DataParallel,
        lambda m: Plain(ValueHead(m)),
        lambda m: torch.compile(m, backend="eager"),
        lambda m: torch.compile(ValueHead(m), backend="eager"),
        lambda m: SimpleNamespace(model=m, tokenizer="none"),
        lambda m: SimpleNamespace(components={"text": Plain(m), "steps": 3}),
    ],
)
def test_a_holder_comes_back_as_itself(held):
    model = base_model(CASE)
    holder = held(model)
    assert regraft.load_adapter(holder, case_folder(CASE)) is holder
    assert is_adapted(model, CASE)
    if isinstance(holder, ValueHead | Plain):
        assert is_adapted(holder, CASE)


@pytest.mark.slow
def test_a_compiled_module_that_ran_gives_the_adapters_outputs():
    """What was traced without the adapter is traced again. (To trace a whole model takes long, and tells no more.)"""
    model = base_model(CASE)
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="eager")
    assert is_bare(model, CASE)
    regraft.load_adapter(nn.Sequential(model), case_folder(CASE))
    assert is_adapted(model, CASE)


def test_wrappers_inside_the_model_stay_around_what_they_wrap():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = base_model(CASE)
    layers = model.model.layers
    for number in range(len(layers)):
        layers[number] = checkpoint_wrapper(layers[number])
    attention = layers[0]._checkpoint_wrapped_module.self_attn
    attention.q_proj = checkpoint_wrapper(attention.q_proj)
    attention.k_proj = torch.compile(attention.k_proj, backend="eager")
    loaded = regraft.load_adapter(model, case_folder(CASE))
    assert is_adapted(loaded, CASE)
    assert type(layers[0]).__name__ == "CheckpointWrapper"
    assert isinstance(attention.q_proj._checkpoint_wrapped_module, peft.tuners.lora.Linear)
    assert isinstance(attention.k_proj._orig_mod, peft.tuners.lora.Linear)


def test_keys_under_the_holders_path_say_which_model(tmp_path):
    for file in case_folder(CASE).iterdir():
        shutil.copy(file, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    start = "base_model.model."
    moved = {key.replace(start, f"{start}policy.", 1): x for key, x in load_file(weights).items()}
    save_file(moved, weights, {"format": "pt"})
    policy, ref = base_model(CASE), base_model(CASE)
    regraft.load_adapter(nn.ModuleDict({"policy": policy, "ref": ref}), tmp_path)
    assert is_adapted(policy, CASE) and is_bare(ref, CASE)


def test_two_models_that_fit_are_named():
    policy, ref = base_model(CASE), base_model(CASE)
    before = tree_of(policy)
    with pytest.raises(regraft.AmbiguousError, match=r"policy .* and ref ") as caught:
        regraft.load_adapter(nn.ModuleDict({"policy": policy, "ref": ref}), case_folder(CASE))
    assert caught.value.findings[0].code == "which-target"
    assert same_tree(before, tree_of(policy))


def test_of_two_models_the_one_that_fits_is_taken():
    other, model = base_model("jamba__gud_attn"), base_model(CASE)
    before = tree_of(other)
    regraft.load_adapter(nn.ModuleDict({"draft": other, "main": model}), case_folder(CASE))
    assert is_adapted(model, CASE)
    assert same_tree(before, tree_of(other))


def test_one_model_in_two_places_is_one_model():
    model = base_model(CASE)
    regraft.load_adapter(nn.ModuleDict({"a": model, "b": model}), case_folder(CASE))
    assert is_adapted(model, CASE)


def test_a_holder_without_a_model_is_told_so():
    with pytest.raises(regraft.BadInputError, match=r"in this Linear.* load them with PEFT"):
        regraft.load_adapter(nn.Linear(2, 2), case_folder(CASE))


@two_adapters
@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")]
)
def test_a_second_adapter_is_added_and_the_first_stays_active(wrap):
    first = regraft.load_adapter(base_model(CASE), case_folder(CASE))
    holder = wrap(first)
    assert regraft.load_adapter(holder, case_folder(SAME), adapter_name="other") is holder
    assert is_adapted(first, CASE)
    first.set_adapter("other")
    assert is_adapted(first, SAME)


@two_adapters
def test_a_second_adapter_in_the_model_itself():
    model = base_model(CASE)
    holder = Plain(model)
    regraft.load_adapter(holder, case_folder(CASE), is_trainable=True)
    trained = [path for path, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in path for path in trained)
    regraft.load_adapter(holder, case_folder("mixtral__patterns_layer"), adapter_name="other")
    assert is_adapted(model, CASE)
    assert [path for path, p in model.named_parameters() if p.requires_grad] == trained
    set_adapter(model, "other")
    assert is_adapted(model, "mixtral__patterns_layer")
    assert regraft.load_adapter(model, case_folder(SAME), adapter_name="third") is model


def test_a_second_adapter_needs_no_newer_peft_than_there_is(monkeypatch):
    """transformers 5.24 asks for a PEFT that is not published, in all its own methods for adapters."""
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "99.0.0")
    model = base_model(CASE)
    regraft.load_adapter(nn.Sequential(model), case_folder(CASE))
    regraft.load_adapter(model, case_folder("mixtral__patterns_layer"), adapter_name="other")
    assert is_adapted(model, CASE)
    with regraft.installed():
        model.load_adapter(case_folder(SAME), adapter_name="third")
        with pytest.raises(regraft.RefusedError, match=r"wants PEFT 99\.0\.0") as caught:
            model.load_adapter(peft_config=peft.LoraConfig(), adapter_state_dict={})
    assert caught.value.findings[0].code == "needs-newer-peft"
    assert peft.__version__ in caught.value.findings[0].message


def test_a_name_that_is_taken_is_an_error():
    loaded = regraft.load_adapter(base_model(CASE), case_folder(CASE))
    with pytest.raises(regraft.BadInputError, match="hotswap=True") as caught:
        regraft.load_adapter(loaded, case_folder(SECOND))
    assert caught.value.findings[0].code == "adapter-exists"
    assert is_adapted(loaded, CASE)


def test_sixteen_bits_lose_nothing(tmp_path):
    """Factors of 32 bits stay so on a base of 16, in a PeftModel and in the model itself."""
    want = load_file(case_folder(CASE) / "adapter_model.safetensors")
    key = next(k for k in want if "q_proj.lora_A" in k)
    for wrap in (lambda m: m, lambda m: nn.Sequential(m)):
        loaded = regraft.load_adapter(wrap(base_model(CASE).bfloat16()), case_folder(CASE))
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer = next(m for n, m in loaded.named_modules() if n.endswith(path))
        assert torch.equal(layer.lora_A["default"].weight, want[key])


# Failing loads ---------------------------------------------------------------------------------


def changed(tmp_path, change):
    """The case's adapter, after ``change`` of its config and tensors."""
    folder = tmp_path / "changed"
    shutil.copytree(case_folder(CASE), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config, tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def drop_layer(config, tensors):
    for key in [k for k in tensors if ".layers.1.self_attn.q_proj." in k]:
        del tensors[key]


def add_layer(config, tensors):
    for key in [k for k in tensors if ".layers.1.self_attn.q_proj." in k]:
        tensors[key.replace(".layers.1.", ".layers.7.")] = tensors[key].clone()


def widen(config, tensors):
    for key in [k for k in tensors if ".self_attn.q_proj.lora_A" in k]:
        tensors[key] = torch.cat([tensors[key], tensors[key]], 1)


def rename(config, tensors):
    config["target_modules"].append("strange_proj")
    for key in [k for k in tensors if ".self_attn.q_proj." in k]:
        tensors[key.replace("q_proj", "strange_proj")] = tensors.pop(key)


@pytest.mark.slow
@pytest.mark.parametrize("change", [drop_layer, add_layer, widen, rename])
@pytest.mark.parametrize(
    "held",
    [
        "bare",
        "holder",
        pytest.param("second", marks=two_adapters),
        pytest.param("second-inside", marks=two_adapters),
    ],
)
def test_a_failed_load_leaves_the_model_as_it_was(change, held, tmp_path):
    folder = changed(tmp_path, change)
    model = base_model(CASE)
    target = nn.Sequential(model) if "inside" in held or held == "holder" else model
    if "second" in held:
        target = regraft.load_adapter(target, case_folder(SAME))
    before = tree_of(target)
    want = outputs(model, CASE)
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.load_adapter(target, folder, adapter_name="new")
    assert all(finding.key or finding.where for finding in caught.value.findings)
    assert same_tree(before, tree_of(target))
    assert torch.equal(outputs(model, CASE), want)
    gc.collect()
    regraft.load_adapter(target, case_folder(CASE), adapter_name="new")


def test_what_peft_raises_leaves_the_model_as_it_was_too(monkeypatch):
    model = base_model(CASE)
    before = tree_of(model)
    made = []

    def fail(self, *args, **options):
        made.append(self)
        if len(made) == 5:
            raise RuntimeError("out of memory")
        return kept(self, *args, **options)

    kept = peft.tuners.lora.LoraLayer.update_layer
    monkeypatch.setattr(peft.tuners.lora.Linear, "update_layer", fail)
    for target in (model, nn.Sequential(model)):
        made.clear()
        with pytest.raises(RuntimeError, match="out of memory"):
            regraft.load_adapter(target, case_folder(CASE))
        assert len(made) == 5
        assert same_tree(before, tree_of(model))


def test_several_adapters_in_a_folder_are_named(tmp_path):
    for name in (CASE, SECOND):
        shutil.copytree(case_folder(name), tmp_path / name)
    with pytest.raises(regraft.AmbiguousError, match=f"{SECOND}, {CASE}"):
        regraft.load_adapter(base_model(CASE), tmp_path)


# Hotswapping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("other", ["mixtral__rslora", "mixtral__patterns_layer", CASE])
def test_hotswap_puts_ranks_and_scales_in_place(other, held):
    model = base_model(SECOND)
    target = nn.Sequential(model) if held else model
    target = regraft.load_adapter(target, case_folder(SECOND))
    layers = [id(m) for m in model.modules()]
    assert regraft.load_adapter(target, case_folder(other), hotswap=True) is target
    assert [id(m) for m in model.modules()] == layers
    assert is_adapted(model, other)
    regraft.load_adapter(target, case_folder(SECOND), hotswap=True)
    assert is_adapted(model, SECOND)


@two_adapters
def test_hotswap_leaves_other_adapters_alone():
    loaded = regraft.load_adapter(base_model(SECOND), case_folder(SECOND), adapter_name="a")
    regraft.load_adapter(loaded, case_folder(SECOND), adapter_name="aa")
    regraft.load_adapter(loaded, case_folder(CASE), adapter_name="a", hotswap=True)
    assert is_adapted(loaded, CASE)
    loaded.set_adapter("aa")
    assert is_adapted(loaded, SECOND)


def test_a_swapped_adapter_is_saved_as_what_it_is(tmp_path):
    loaded = regraft.load_adapter(base_model(SECOND), case_folder(SECOND))
    regraft.load_adapter(loaded, case_folder("mixtral__rslora"), hotswap=True)
    loaded.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["use_rslora"]


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (CASE, SECOND, "no-place"),
        ("mixtral__mts_head", CASE, "missing"),
        ("mixtral__ia3_attn", CASE, "hotswap"),
    ],
)
def test_what_cannot_be_swapped_changes_nothing(first, second, code):
    loaded = regraft.load_adapter(base_model(first), case_folder(first))
    before = tree_of(loaded)
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.load_adapter(loaded, case_folder(second), hotswap=True)
    assert code in {finding.code for finding in caught.value.findings}
    assert same_tree(before, tree_of(loaded))
    assert is_adapted(loaded, first)


def test_hotswap_needs_something_to_replace():
    with pytest.raises(regraft.BadInputError, match="without hotswap first"):
        regraft.load_adapter(base_model(CASE), case_folder(CASE), hotswap=True)


def test_a_model_prepared_for_compiling_keeps_its_shapes():
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    name = "qwen2_moe__shared_only"
    loaded = regraft.load_adapter(base_model(name), case_folder(name))
    prepare_model_for_compiled_hotswap(loaded, target_rank=32)
    shapes = {path: p.shape for path, p in loaded.named_parameters()}
    with torch.no_grad():
        for path, parameter in loaded.named_parameters():
            if "lora_" in path:
                parameter.normal_()
    regraft.load_adapter(loaded, case_folder(name), hotswap=True)
    assert is_adapted(loaded, name)
    assert {path: p.shape for path, p in loaded.named_parameters()} == shapes


def test_no_warning_about_missing_keys():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = regraft.load_adapter(base_model(CASE), case_folder(CASE))
    assert not [str(w.message) for w in told if "missing" in str(w.message)]
    assert reference(CASE)[1].shape == outputs(loaded, CASE).shape


def test_adalora_needs_a_model_of_its_own_around(tmp_path):
    options = {"target_modules": ["q_proj"], "total_step": 10, "init_r": 3, "target_r": 2}
    made = peft.get_peft_model(base_model(CASE), peft.AdaLoraConfig(**options))
    made.save_pretrained(tmp_path)
    holder = Plain(base_model(CASE))
    with pytest.raises(regraft.RefusedError) as raised:
        regraft.load_adapter(holder, tmp_path)
    assert raised.value.findings[0].code == "needs-peft-model"
    assert is_bare(holder.net["inner"], CASE)
    regraft.load_adapter(holder.net["inner"], tmp_path)
