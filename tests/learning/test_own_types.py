"""Learning from a converter of a model type of somebody's own: other sizes are made of a checkpoint's headers."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from regraft.bridges.transformers.outlines import outlines
from regraft.cli import main
from regraft.errors import BadInputError
from regraft.learning.headers import resized
from regraft.learning.probe import labels

NAMES = (
    ("dim", "n_heads", "n_kv", "ffn", "n_blocks", "vocab", "n_experts", "head_dim"),
    (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
        "num_experts",
        "head_dim",
    ),
    ("width", "nhead", "kv", "inner", "depth", "tokens", "experts", "d_head"),
)
SIZES = (
    (64, 4, 2, 176, 2, 96, None, 16),
    (512, 8, 8, 2048, 12, 32000, None, 64),
    (32, 4, 2, 64, 2, 99, 4, 8),
    (64, 4, 1, 176, 2, 96, None, 32),
    (16, 2, 2, 32, 2, 32, 4, 8),
)


def headers(width, heads, kv, inner, layers, vocab, experts, head, *, dense=0):
    """A model of one's own, with a fused qkv and maybe experts; the first ``dense`` layers have none."""
    shapes = {"tok.weight": (vocab, width)}
    for layer in range(layers):
        at = f"blocks.{layer}."
        shapes[at + "attn.qkv.weight"] = ((heads + 2 * kv) * head, width)
        shapes |= {at + "attn.o.weight": (width, heads * head), at + "norm": (width,)}
        parts = ["mlp"]
        if experts and layer >= dense:
            shapes[at + "router.weight"] = (experts, width)
            parts = [f"experts.{expert}" for expert in range(experts)]
        for part in parts:
            shapes |= {
                f"{at}{part}.up.weight": (inner, width),
                f"{at}{part}.down.weight": (width, inner),
            }
    return shapes | {"out.weight": (vocab, width)}


def config_of(names, sizes):
    return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}


@pytest.mark.parametrize("size", range(3))
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_made_of_headers_are_those_of_a_model(sizes, names, size):
    config = config_of(names, sizes)
    if sizes[1] == sizes[2]:
        del config[names[2]]  # as many of k and v as of q: many configs do not say it
    shapes, small = resized(headers(*sizes), config, size)
    told = [small.get(name) for name in names]
    told[2] = told[2] or told[1]
    assert shapes == headers(*told)
    assert small != config


def test_layers_that_are_not_alike_do_not_become_more():
    config = config_of(NAMES[0], SIZES[2])
    few = headers(*SIZES[2], dense=1)
    shapes, small = resized(few, config, 2)
    assert small["n_blocks"] == 2 and small["n_experts"] == 9
    assert shapes == headers(*(small[name] for name in NAMES[0]), dense=1)
    many = {**config, "n_blocks": 6}
    shapes, small = resized(headers(32, 4, 2, 64, 6, 99, 4, 8, dense=1), many, 1)
    assert small["n_blocks"] == 3
    assert shapes == headers(*(small[name] for name in NAMES[0]), dense=1)


def test_what_stays_is_not_changed_and_lists_follow_the_layers():
    config = {
        **config_of(NAMES[0], SIZES[0]),
        "kinds": ["full", "local"],
        "pad_id": 96,
        "eps": 1e-5,
    }
    _, small = resized(headers(*SIZES[0]), config, 2, {"dim": 64})
    assert small["dim"] == 64 and small["eps"] == 1e-5
    assert small["kinds"] == ["full", "local", "local", "local"] and small["n_blocks"] == 4


CONVERT = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file
src, dst, only = map(Path, sys.argv[1:])
config = json.loads((src / "config.json").read_text())
heads, kv, head = (config[name] for name in ("n_heads", "n_kv", "head_dim"))
assert str(only) in ("any", str(config["dim"])), "of another size"
made = {}
for key, x in load_file(src / "model.safetensors").items():
    key = key.replace("blocks.", "layers.")
    if "qkv" not in key:
        made[key] = x
        continue
    for name, part in zip("qkv", np.split(x, [heads * head, (heads + kv) * head])):
        if name != "v":
            part = part.reshape(-1, 2, head // 2, part.shape[1]).swapaxes(1, 2).reshape(part.shape)
        made[key.replace("qkv", name)] = np.ascontiguousarray(part)
dst.mkdir()
save_file(made, dst / "model.safetensors")
"""


@pytest.fixture
def own(tmp_path):
    """The folder of a model of one's own type, and its converter."""
    save_file(labels(headers(*SIZES[0])), tmp_path / "model.safetensors")
    config = {"model_type": "of-my-own", **config_of(NAMES[0], SIZES[0])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "convert.py").write_text(CONVERT)
    return tmp_path


def learned(own: Path, only="any", **options):
    book = own / "book.toml"
    given = {
        "--config": own / "config.json",
        "--with": f"{sys.executable} {own}/convert.py {{src}} {{dst}} {only}",
    }
    options = {name: str(value) for name, value in {**given, "-o": book, **options}.items()}
    assert main(["learn", *(word for pair in options.items() for word in pair)]) == 0
    return book.read_text()


@pytest.mark.slow
def test_a_converter_of_ones_own_type_is_learned_at_several_sizes(own, capsys):
    text = learned(own)
    assert "d = config.n_kv" in text and "config.n_heads" in text
    assert "Seen at 4 sizes" in text


def test_a_config_alone_of_ones_own_type_asks_for_headers(own, capsys):
    (own / "elsewhere").mkdir()
    whole = outlines(str(own / "config.json"), 2, None)
    config = (own / "config.json").rename(own / "elsewhere/config.json")
    found = outlines(str(config), 2, None, None, own / "model.safetensors")
    assert [(each.shapes, each.config) for each in found] == [
        (each.shapes, each.config) for each in whole
    ]
    given = ["learn", "--config", str(config), "--with", "x {src} {dst}", "-o", str(own / "b.toml")]
    assert main(given) == 1
    assert "whose headers are enough: --headers CHECKPOINT" in capsys.readouterr().err


@pytest.mark.slow
def test_a_converter_that_fails_at_other_sizes_is_learned_at_the_checkpoints_own(own):
    text = learned(own, "64")
    assert "not every size that was made from the headers is one of a model" in text
    assert "of another size" in text and "Seen at 1 size;" in text


def test_weights_with_names_of_their_own_beside_a_config_that_is_known(own):
    config = {"model_type": "llama", **config_of(NAMES[1], SIZES[0])}
    (own / "config.json").write_text(json.dumps(config))
    known = outlines(str(own), 3, None)
    assert [each.from_headers for each in known] == [True] * 3
    assert known[2].shapes == headers(*SIZES[0])
    (own / "model.safetensors").unlink()
    assert not outlines(str(own), 1, None)[0].from_headers
    with pytest.raises(BadInputError) as caught:
        outlines(str(own), 1, None, None, own / "model.safetensors")
    assert "no such file" in str(caught.value)
