"""Classes of somebody's own on transformers, whose layouts only a rule book of their author's knows."""

import shlex
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import regraft  # noqa: E402
from regraft.cli import main  # noqa: E402

BOOK = """
name = "own"
title = "q and k in one"
left = "split"
right = "fused"
model_types = ["own-loaded"]

[[equation]]
name = "qk"
text = '''
{*p}.{l}.q.weight : a i, {*p}.{l}.k.weight : b i == {*p}.{l}.qk.weight : (a + b) i
where a = b
'''
left_kind = "linear"
right_kind = "linear"

[[carry]]
keys = ["{*p}.{l}.out.weight : o i"]
kind = "linear"
why = "the same in both"
"""


class OwnConfig(transformers.PreTrainedConfig):
    model_type = "own-loaded"


class Block(torch.nn.Module):
    def __init__(self, *, fused):
        super().__init__()
        sizes = {"qk": 12} if fused else {"q": 6, "k": 6}
        for name, size in sizes.items():
            self.add_module(name, torch.nn.Linear(6, size, bias=False))
        self.out = torch.nn.Linear(6, 6, bias=False)

    def forward(self, x):
        q, k = self.qk(x).chunk(2, -1) if hasattr(self, "qk") else (self.q(x), self.k(x))
        return x + self.out(q * k)


class Fused(transformers.PreTrainedModel):
    config_class = OwnConfig
    fused = True

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(Block(fused=self.fused) for _ in range(2))
        self.post_init()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Split(Fused):
    fused = False


X = torch.linspace(-1, 1, 12).view(2, 6)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(BOOK)
    return path


@pytest.fixture
def old(tmp_path):
    """A checkpoint in the old layout, and the model that it is of."""
    model = Split(OwnConfig())
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.3)
    model.save_pretrained(tmp_path / "old")
    return tmp_path / "old", model


def copy_of(old):
    """The same model in the class of today."""
    model = Fused(OwnConfig())
    with torch.no_grad():
        for new, was in zip(model.layers, old.layers, strict=True):
            new.qk.weight.copy_(torch.cat([was.q.weight, was.k.weight]))
            new.out.weight.copy_(was.out.weight)
    return model


@pytest.fixture
def adapter(tmp_path, old):
    """An adapter of the old layout, and what the old model says with it."""
    config = peft.LoraConfig(r=2, target_modules=["q", "k", "out"])
    model = peft.get_peft_model(Split.from_pretrained(old[0]), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora", model(X)


def test_an_adapter_goes_into_the_layout_that_the_names_tell(book, old, adapter):
    folder, said = adapter
    with regraft.only_books(book):
        loaded = regraft.load_adapter(copy_of(old[1]), folder)
    torch.testing.assert_close(loaded(X), said, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        regraft.load_adapter(copy_of(old[1]), folder, rules=book)(X), said, rtol=1e-4, atol=1e-5
    )
    with regraft.only_books(book), regraft.installed():
        hooked = peft.PeftModel.from_pretrained(copy_of(old[1]), folder)
    torch.testing.assert_close(hooked(X), said, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_its_own_layout_stays(book, old, adapter):
    """The old class is in the layout that the adapter has."""
    folder, said = adapter
    loaded = regraft.load_adapter(Split.from_pretrained(old[0]), folder, rules=book)
    torch.testing.assert_close(loaded(X), said, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_with_an_adapter_on_top(book, old, adapter):
    model = Fused(OwnConfig())
    regraft.load_checkpoint(model, old[0], adapter=adapter[0], rules=book)
    torch.testing.assert_close(model(X), adapter[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_makes_what_the_book_makes(book, old, dtype):
    with regraft.only_books(book):
        model = regraft.from_pretrained(Fused, old[0], dtype=dtype)
    expected = copy_of(old[1]).to(dtype).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert model.regraft_load.way != "off"


def test_from_pretrained_never_goes_on_without_what_the_book_makes(book, old):
    folder: Path = old[0]
    with (
        regraft.only_books(book),
        pytest.raises(regraft.BadInputError, match="no values") as caught,
    ):
        regraft.from_pretrained(Fused, folder, load="off")
    assert "layers.0.qk.weight" in {finding.key for finding in caught.value.findings}
    tensors = old[1].state_dict()
    del tensors["layers.1.k.weight"]
    old[1].save_pretrained(folder, state_dict=tensors)
    with regraft.only_books(book), pytest.raises(regraft.BadInputError, match=r"layers\.1\.k"):
        regraft.from_pretrained(Fused, folder)


def test_a_book_is_named_by_a_text_or_a_path(book):
    assert regraft.load_book(str(book)) == regraft.load_book(book)


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_the_command_that_mends_it_names_the_book(kind, book, old, adapter, tmp_path):
    """It runs as it is printed."""
    src = adapter[0] if kind == "adapter" else old[0]
    found = regraft.check(src, model=old[0], to="fused", rules=book)
    words = shlex.split(found.remedy[0])
    assert words[-2:] == ["--rules", str(book)] and main(words[1:]) == 0
    both = regraft.check(src, model=old[0], to="fused", rules=[book, "built-in"])
    assert shlex.split(both.remedy[0])[-4:] == ["--rules", str(book), "--rules", "built-in"]
