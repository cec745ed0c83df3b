"""What provokes the codes of live models, and of what transformers and PEFT know."""

import shutil

import pytest
from errors.lab import CASES, provokes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from holders import Holder, data_parallel, fsdp1, vit  # noqa: E402
from safetensors.torch import save_model  # noqa: E402
from torch import nn  # noqa: E402

import regraft  # noqa: E402
from regraft.bridges.peft import hook  # noqa: E402
from regraft.bridges.peft.known import open_one  # noqa: E402
from regraft.bridges.transformers import registry  # noqa: E402
from regraft.planning.model import load_model  # noqa: E402
from regraft.rules.said import saying  # noqa: E402

CASE = CASES / "mixtral__gud_attn"


def golden_model(lab, name="mixtral"):
    """The live model of a golden base, with whatever weights."""
    config = transformers.AutoConfig.from_pretrained(lab.base(name))
    return transformers.AutoModelForCausalLM.from_config(config)


# Models and classes


@provokes("model-config")
def _(lab):
    from regraft.bridges.transformers.blank import classes_of

    classes_of(load_model(lab.base(architectures=["pipeline"])), None, list)


@provokes("transformers-version")
def _(lab):
    registry.check_version.cache_clear()
    lab.patch.setattr(registry.transformers, "__version__", "4.50.0")
    try:
        registry.check_version()
    finally:
        registry.check_version.cache_clear()


@provokes("unknown-transform")
def _(lab):
    from regraft.bridges.transformers.imported import _unknown_transform
    from regraft.errors import RefusedError

    class Transform:
        unknown = "it is code"

    class Scoped:
        transform = Transform()

    raise RefusedError(_unknown_transform("mixtral", Scoped()))


@provokes("which-class")
def _(lab):
    from bridges import test_guessed_class as guessed

    guessed.told(guessed.folder(lab.path / "base"), guessed.OLD_FILE)


@provokes("unknown-class")
def _(lab):
    from bridges import test_guessed_class as guessed

    with saying(architecture="Nope"):
        guessed.told(guessed.folder(lab.path / "base"), guessed.OLD_FILE)


# State dicts


def _to(model, keys):
    regraft.convert_state_dict({key: torch.zeros(1) for key in keys}, to=model)


@provokes("not-a-model")
def _(lab):
    regraft.mapping(nn.Linear(2, 2))


@provokes("no-home")
def _(lab):
    _to(vit(), ["a.b", "c"])


@provokes("two-models")
def _(lab):
    _to(Holder(policy=vit(), reference=vit()), vit().state_dict())


@provokes("two-prefixes")
def _(lab):
    keys = list(vit().state_dict())
    _to(Holder(net=vit()), [f"{name}.{key}" for name in ("first", "second") for key in keys])


@provokes("two-homes")
def _(lab):
    _to(Holder(net=vit(), classifier=nn.Linear(2, 2)), vit().state_dict())


@provokes("two-values")
def _(lab):
    model = vit()
    state = model.state_dict()
    state |= {f"module.{key}": tensor + 1 for key, tensor in state.items()}
    regraft.convert_state_dict(state, to=model)


# Adapters in live models


@provokes("no-model")
def _(lab):
    regraft.load_adapter(nn.Linear(2, 2), CASE)


@provokes("which-target")
def _(lab):
    held = nn.ModuleDict({"policy": golden_model(lab), "reference": golden_model(lab)})
    regraft.load_adapter(held, CASE)


@provokes("which-adapter")
def _(lab):
    for name in ("first", "second"):
        shutil.copytree(CASE, lab.path / "several" / name)
    open_one(lab.path / "several")


@provokes("no-place")
def _(lab):
    from regraft.bridges.peft.holders import choose

    model = golden_model(lab)
    del model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = None
    choose(model, open_one(CASE))


@provokes("adapter-exists")
def _(lab):
    regraft.load_adapter(regraft.load_adapter(golden_model(lab), CASE), CASE)


@provokes("no-such-adapter")
def _(lab):
    regraft.load_adapter(golden_model(lab), CASE, hotswap=True)


@provokes("hotswap")
def _(lab):
    loaded = regraft.load_adapter(golden_model(lab), CASES / "mixtral__ia3_attn")
    regraft.load_adapter(loaded, CASE, hotswap=True)


@provokes("bad-adapter-name")
def _(lab):
    regraft.load_adapter(golden_model(lab), CASE, adapter_name="a.b")


@provokes("needs-peft-model")
def _(lab):
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(golden_model(lab), prompts).save_pretrained(lab.path / "prompts")
    regraft.load_adapter(data_parallel(golden_model(lab)), lab.path / "prompts")


@provokes("needs-newer-peft")
def _(lab):
    lab.patch.setattr(hook.transformers.integrations.peft, "MIN_PEFT_VERSION", "99.0.0", False)
    with regraft.installed():
        golden_model(lab).load_adapter(adapter_state_dict={}, peft_config=peft.LoraConfig())


@provokes("adapter-inside")
def _(lab):
    model = peft.get_peft_model(golden_model(lab), peft.LoraConfig(target_modules=["q_proj"]))
    model.config.save_pretrained(lab.path / "full")

    save_model(model, lab.path / "full" / "model.safetensors")
    regraft.convert(lab.path / "full", lab.path / "new", to="transformers-v5")


@provokes("flattened")
def _(lab):
    regraft.load_adapter(fsdp1(golden_model(lab)), CASE)


@provokes("unknown-peft")
def _(lab):
    hook._hooks.cache_clear()
    lab.patch.setattr(hook.PeftAdapterMixin, "load_adapter", lambda self, path: None)
    try:
        regraft.install()
    finally:
        hook._hooks.cache_clear()


@provokes("hooked-over")
def _(lab):
    regraft.install()
    usual = peft.PeftModel.load_adapter
    try:
        peft.PeftModel.load_adapter = lambda self: None
        regraft.uninstall()
    finally:
        peft.PeftModel.load_adapter = usual
        regraft.uninstall()


@provokes("placement")
def _(lab):
    from regraft.live.ranks import local_region

    class Partial:
        def is_replicate(self):
            return False

    class Spread:
        device_mesh, placements, shape = "a mesh", (Partial(),), (2,)

    local_region(Spread(), "weight")


@provokes("half-loaded")
def _(lab):
    from regraft.errors import BadInputError, Finding
    from regraft.live.load import _with_half_loaded

    raise _with_half_loaded(BadInputError(Finding("file-changed", "it ended early")), ["weight"])
