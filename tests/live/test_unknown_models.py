"""Models of a class that transformers does not know: the user's rule books tell, or nobody does."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel  # noqa: E402

import regraft  # noqa: E402
from regraft.errors import BadInputError, UnmatchedKeysError  # noqa: E402
from regraft.rules.book import load_book, only_books  # noqa: E402

OLD, NEW = "transformers-v4", "transformers-v5"
BOOK = """
name = "garden"
title = "Garden: experts in one tensor"
left = "{left}"
right = "{right}"
model_types = ["garden"]

[[equation]]
name = "stack"
text = '''
{{*p}}.experts.{{e}}.weight : o i == {{*p}}.bed.weight : (e o) i
where e = 2
'''

[[carry]]
keys = ["{{*p}}.head.{{*q}}"]
why = "the head is the same in both"
"""


class GardenConfig(PreTrainedConfig):
    model_type = "garden"


class Garden(PreTrainedModel):
    """A model of somebody's own: two experts in one linear, and a head."""

    config_class = GardenConfig
    base_model_prefix = "garden"

    def __init__(self, config):
        super().__init__(config)
        self.block = nn.Module()
        self.block.bed = nn.Linear(3, 8, bias=False)
        self.block.head = nn.Linear(3, 5)
        self.post_init()

    def forward(self, x):
        return self.block.head(x), self.block.bed(x)


@pytest.fixture
def garden():
    torch.manual_seed(0)
    return Garden(GardenConfig())


@pytest.fixture
def book(tmp_path):
    def make(left=OLD, right=NEW):
        file = tmp_path / f"{left}.toml"
        file.write_text(BOOK.format(left=left, right=right))
        return load_book(file)

    return make


def old_names(model):
    """Its tensors as the left layout has them."""
    state = model.state_dict()
    bed = state["block.bed.weight"]
    return {
        "block.experts.0.weight": bed[:4].clone(),
        "block.experts.1.weight": bed[4:].clone(),
        "block.head.weight": state["block.head.weight"],
        "block.head.bias": state["block.head.bias"],
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_without_rules_nothing_is_called_converted(garden):
    state = garden.state_dict()
    ways = [
        lambda: regraft.convert_state_dict(state, to=OLD, model=garden),
        lambda: regraft.convert_state_dict(state, to=NEW, model=garden),
        lambda: regraft.convert_state_dict(state, to=garden),
        lambda: regraft.mapping(garden).rename("block.bed.weight"),
    ]
    for way in ways:
        with pytest.raises(UnmatchedKeysError) as caught:
            way()
        (finding,) = caught.value.findings
        assert finding.code == "unknown-model"
        assert "Garden is not a class of transformers" in finding.message


def test_an_adapter_for_a_model_without_rules_is_refused(garden, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["head"], r=2)
    peft.get_peft_model(garden, config).save_pretrained(tmp_path / "lora")
    with pytest.raises(UnmatchedKeysError) as caught:
        regraft.load_adapter(Garden(GardenConfig()), tmp_path / "lora")
    assert caught.value.findings[0].code == "unknown-model"


def test_a_users_book_is_asked_for_every_way(garden, book):
    old = old_names(garden)
    with only_books([book()]):
        there = regraft.convert_state_dict(garden.state_dict(), to=OLD, model=garden)
        back = regraft.convert_state_dict(old, to=garden)
        own = regraft.convert_state_dict(garden.state_dict(), to=garden)
        mapping = regraft.mapping(garden)
    assert same(there, old)
    assert same(back, garden.state_dict())
    assert same(own, garden.state_dict())
    assert sum(there.report.rules.values()) == 1
    # The mapping was made while the book applied, and keeps it.
    assert mapping.rename("block.experts.1.weight") == "block.bed.weight"
    assert mapping.rename("block.bed.weight") == "block.bed.weight"
    assert "rule book garden" in str(mapping)


def test_a_book_of_other_layouts_is_asked_by_their_names_only(garden, book):
    old = old_names(garden)
    with only_books([book("published", "mine")]):
        there = regraft.convert_state_dict(garden.state_dict(), to="published", model=garden)
        back = regraft.convert_state_dict(there, to=garden)
        for to in (OLD, NEW):
            with pytest.raises(BadInputError) as caught:
                regraft.convert_state_dict(garden.state_dict(), to=to, model=garden)
            assert caught.value.findings[0].code == "unknown-layout"  # no book there has it
    assert same(there, old)
    assert same(back, garden.state_dict())
    assert back.report.layout == "mine"


def test_a_book_for_one_model_leaves_the_others_to_transformers(garden, book):
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=10,
    )
    holder = nn.ModuleDict({"text": LlamaModel(config), "garden": garden})
    with only_books([book()]):
        there = regraft.convert_state_dict(holder.state_dict(), to=OLD, model=holder)
        back = regraft.convert_state_dict(there, to=holder)
        assert "garden.block.experts.0.weight" in there
        assert same(back, holder.state_dict())
        with pytest.raises(BadInputError):
            regraft.convert_state_dict(holder.state_dict(), to="published", model=holder)


def test_a_missing_expert_is_an_error_under_a_book(garden, book):
    old = old_names(garden)
    del old["block.experts.1.weight"]
    with only_books([book()]), pytest.raises(BadInputError):
        regraft.convert_state_dict(old, to=garden)
