"""Adapters of live models saved in a layout of choice, by a call and by a Trainer's callback."""

from pathlib import Path

import pytest
import torch
import transformers
from making import same_bits
from peft import LoraConfig, get_peft_model

import regraft
from regraft.storage.safetensors import open_tensors

GOLDEN = Path(__file__).parent.parent / "golden"
CASE = GOLDEN / "cases/mixtral__gud_attn"


def base():
    return transformers.MixtralForCausalLM.from_pretrained(
        GOLDEN / "bases/mixtral", dtype=torch.float32
    )


def same_weights(one, other, file="adapter_model.safetensors"):
    before, after = open_tensors(one / file), open_tensors(other / file)
    return before.keys() == after.keys() and all(
        same_bits(before[name], after[name]) for name in before
    )


def test_what_was_loaded_from_the_old_layout_is_saved_in_it_again(tmp_path):
    model = regraft.load_adapter(base(), CASE.parent, "mine", subfolder=CASE.name)
    report = regraft.save_adapter(
        model, tmp_path / "out", to="transformers-v4", adapter="mine", verify=True
    )
    assert same_weights(CASE, tmp_path / "out")
    assert report.adapters[0].verified and report.source == "the PeftModel in memory"


def test_one_inside_a_transformers_model_and_in_a_holder(tmp_path):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = base()

    holder = Holder()
    regraft.load_adapter(holder, CASE)
    regraft.save_adapter(holder, tmp_path / "out", to="transformers-v4")
    assert same_weights(CASE, tmp_path / "out")
    regraft.save_adapter(holder, tmp_path / "new")
    assert regraft.check(tmp_path / "new", model=GOLDEN / "bases/mixtral").healthy


def test_a_name_that_is_not_there(tmp_path):
    model = regraft.load_adapter(base(), CASE)
    with pytest.raises(regraft.BadInputError, match="no adapter 'other'; it has default"):
        regraft.save_adapter(model, tmp_path / "out", adapter="other")


def test_a_refusal_writes_nothing(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(regraft.RegraftError):
        regraft.save_adapter(get_peft_model(base(), config), tmp_path / "out.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, at):
        return {"input_ids": torch.arange(4) + at, "labels": torch.arange(4) + at}


def train(model, folder, callback):
    args = transformers.TrainingArguments(
        folder, max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(model, args, train_dataset=Texts(), callbacks=[callback]).train()
    return Path(folder) / "checkpoint-1"


def test_a_trainer_saves_an_adapter_in_a_layout_of_choice(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    model = get_peft_model(base(), config)
    made = train(model, tmp_path, regraft.SaveInLayout("transformers-v4"))
    assert (made / "optimizer.pt").is_file() and (made / "adapter_model.safetensors").is_file()
    other = made / "transformers-v4"
    assert sorted(path.name for path in other.iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    regraft.convert(other, tmp_path / "back", to="transformers-v5")
    assert same_weights(made, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "checkpoint-1"]


def test_a_trainer_saves_a_model_in_a_layout_of_choice(tmp_path):
    made = train(base(), tmp_path, regraft.SaveInLayout("transformers-v4", folder="old"))
    assert regraft.verify(made, made / "old").equal
    assert not (made / "old/optimizer.pt").exists()


def test_a_training_that_could_not_be_saved_does_not_begin(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(regraft.RegraftError):
        train(get_peft_model(base(), config), tmp_path, regraft.SaveInLayout("gguf"))
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_model_that_is_not_of_transformers_is_told_where_to_go(tmp_path):
    """It has an adapter; that regraft saves those of transformers models only is what is wrong."""
    own = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = get_peft_model(own, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(regraft.BadInputError, match="no transformers model") as error:
        regraft.save_adapter(model, tmp_path / "out", to="vllm")
    assert error.value.findings[0].code == "no-model"
    assert "save_pretrained" in str(error.value) and not (tmp_path / "out").exists()


BOOK = """
name = "own"
title = "qkv in one"
left = "own-split"
right = "own"
model_types = ["own-moe"]

[[equation]]
name = "qkv"
text = '''
{*p}.{l}.q.weight : a i, {*p}.{l}.k.weight : b i, {*p}.{l}.v.weight : c i == {*p}.{l}.qkv.weight : (a + b + c) i
where a = b, b = c
'''
left_kind = "linear"
right_kind = "linear"

[[carry]]
keys = ["{*p}.{l}.out.weight : o i"]
kind = "linear"
why = "the same in both"
"""


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(6, 18, bias=False)
        self.out = torch.nn.Linear(6, 6, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(q * k + v)


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.head = torch.nn.Linear(6, 8)


class OwnConfig(transformers.PreTrainedConfig):
    model_type = "own-moe"


class Own(transformers.PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = Plain()
        self.post_init()

    def forward(self, input_ids=None, labels=None):
        x = torch.nn.functional.one_hot(input_ids, 6).float()
        for layer in self.body.layers:
            x = layer(x)
        logits = self.body.head(x)
        return {"loss": logits.square().mean(), "logits": logits}


def own_lora(kind):
    model = get_peft_model(kind, LoraConfig(r=2, target_modules=["qkv", "out"]))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    return model


@pytest.mark.parametrize("kind", [Plain, lambda: Own(OwnConfig())])
def test_a_class_of_ones_own_is_saved_by_ones_own_book(kind, tmp_path):
    book = tmp_path / "own.toml"
    book.write_text(BOOK)
    model = own_lora(kind())
    report = regraft.save_adapter(
        model, tmp_path / "split", to="own-split", rules=book, verify=True
    )
    assert report.adapters[0].source_layout == "own" and len(report.targets) == 8
    assert report.own_rules == [str(book)]
    regraft.save_adapter(model, tmp_path / "same", rules=book)
    regraft.convert(tmp_path / "split", tmp_path / "back", to="own", rules=book)
    assert same_weights(tmp_path / "same", tmp_path / "back")
    with pytest.raises(regraft.RegraftError):
        regraft.save_adapter(model, tmp_path / "none", to="own-split")
    assert not (tmp_path / "none").exists()


def test_what_the_own_book_does_not_know_is_told(tmp_path):
    book = tmp_path / "own.toml"
    book.write_text(BOOK)
    model = get_peft_model(Plain(), LoraConfig(r=2, target_modules=["head"]))
    with pytest.raises(regraft.RegraftError, match="head"):
        regraft.save_adapter(model, tmp_path / "out", to="own-split", rules=book)


def test_a_trainer_of_a_class_of_ones_own_saves_in_its_other_layout(tmp_path):
    book = tmp_path / "own.toml"
    book.write_text(BOOK)
    made = train(
        own_lora(Own(OwnConfig())), tmp_path / "run", regraft.SaveInLayout("own-split", rules=book)
    )
    regraft.convert(made / "own-split", tmp_path / "back", to="own", rules=book)
    assert same_weights(made, tmp_path / "back")
