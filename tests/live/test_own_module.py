"""Modules that are no models of transformers: the user's own rule book tells how their state dicts were."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

import regraft  # noqa: E402

BOOK = """
name = "mine"
title = "Mine: q, k and v in one"
left = "mine-1"
right = "mine-2"
model_types = ["mine"]

[[equation]]
name = "qkv"
text = '''
blocks.{l}.q.weight : a i
blocks.{l}.k.weight : b i
blocks.{l}.v.weight : c i
    == blocks.{l}.qkv.weight : (a + b + c) i
where a = b, b = c
'''

[[carry]]
keys = ["blocks.{l}.o.weight : o i"]
kind = "linear"
why = "the same in both"
"""


class Mine(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        block = {"qkv": (size, 24), "o": (8, 8)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, sizes in block.items()})
            for _ in range(2)
        )


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(BOOK)
    return path


def old_of(model):
    found = {}
    for key, tensor in model.state_dict().items():
        if "qkv" in key:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            found |= {key.replace("qkv", name): part.clone() for name, part in parts}
        else:
            found[key] = tensor
    return found


def test_a_state_dict_goes_into_the_module_and_back(book):
    model, other = Mine(), Mine()
    old = old_of(model)
    with regraft.only_books(book):
        made = regraft.convert_state_dict(old, to=other)
        back = regraft.convert_state_dict(made, to="mine-1")
        same = regraft.convert_state_dict(made, to=other)
    other.load_state_dict(made, strict=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor) and torch.equal(same[key], tensor)
    assert back.keys() == old.keys() and all(torch.equal(back[key], old[key]) for key in old)
    assert made.report.layout == "mine-2" and sum(made.report.rules.values()) == 2


def test_everything_that_does_not_fit_is_said_together(book):
    old = old_of(Mine())
    old.pop("blocks.1.o.weight")
    old |= {f"blocks.0.{name}.weight": torch.ones(4, 8) for name in "qkv"}
    old["blocks.2.o.weight"] = torch.ones(8, 8)
    with regraft.only_books(book), pytest.raises(regraft.BadInputError) as told:
        regraft.convert_state_dict(old, to=Mine())
    found = [(each.key, each.code) for each in told.value.findings]
    assert found == [
        ("blocks.0.qkv.weight", "shape"),
        ("blocks.1.o.weight", "missing"),
        ("blocks.2.o.weight", "unmatched"),
    ]


def test_what_the_only_book_lacks_is_named(book):
    book.write_text(BOOK[: BOOK.index("[[carry]]")])
    for to in (Mine(), "mine-2"):
        with regraft.only_books(book), pytest.raises(regraft.BadInputError) as told:
            regraft.convert_state_dict(old_of(Mine()), to=to)
        assert "blocks.0.o.weight" in str(told.value) and "rule book" in str(told.value)


def test_without_a_book_the_way_on_is_named():
    with pytest.raises(regraft.BadInputError, match="only_books"):
        regraft.convert_state_dict(old_of(Mine()), to=Mine())


def test_one_book_needs_no_list(book):
    loaded = regraft.load_book(book)
    for each in (book, str(book), loaded, [book], [loaded]):
        with regraft.only_books(each):
            assert regraft.convert_state_dict(old_of(Mine()), to="mine-2")


class Grouped(Mine):
    """Its keys and values have fewer rows than its queries, which its config alone tells."""

    def __init__(self, config):
        super().__init__()
        self.config = config


CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 4}


@pytest.mark.parametrize("form", ["dict", "object", "named"])
def test_sizes_of_grouped_heads_come_from_the_modules_config(book, form):
    where = "a = config.num_attention_heads * config.head_dim, b = config.num_key_value_heads * config.head_dim, b = c"
    book.write_text(BOOK.replace("a = b, b = c", where))
    config = {"named": {**CONFIG, "model_type": "mine"}}.get(form, CONFIG)
    model = Grouped(SimpleNamespace(**config) if form == "object" else config)
    rows = {"q": slice(0, 16), "k": slice(16, 20), "v": slice(20, 24)}
    old = {}
    for key, tensor in model.state_dict().items():
        new = {key.replace("qkv", n): tensor[at] for n, at in rows.items()}
        old |= new if "qkv" in key else {key: tensor}
    with regraft.only_books(book):
        back = regraft.convert_state_dict(model.state_dict(), to="mine-1", model=model)
        made = regraft.convert_state_dict(old, to=model)
    assert back.keys() == old.keys() and all(torch.equal(back[key], old[key]) for key in old)
    model.load_state_dict(made, strict=True)
