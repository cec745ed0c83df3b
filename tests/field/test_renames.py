"""Renames and their way back: what is undone is what was done, never a pattern read the other way round.

Sources: huggingface/transformers#46650, #48075, #45357, #45421, olive-ai/Olive#380, Blaizzy/mlx-vlm#1054,
huggingface/peft#3230. Keys and shapes are rebuilt.
"""

import pytest
from rebuilt import V4, V5, numbered, read, same, write_checkpoint

import regraft

HEAD = """
name = "mine"
title = "mine"
left = "transformers-v4"
right = "transformers-v5"
model_types = ["mine"]
"""


def book(folder, *equations, carries=()):
    text = HEAD + "".join(
        f'[[equation]]\nname = "e{n}"\ntext = "{each}"\nleft_kind = "any"\nright_kind = "any"\n'
        for n, each in enumerate(equations)
    )
    text += "".join(f'[[carry]]\nkeys = ["{key}"]\nwhy = "the same"\n' for key in carries)
    (folder / "mine.toml").write_text(text)
    return [folder / "mine.toml"]


def there_and_back(folder, shapes, rules, wanted):
    src = write_checkpoint(folder / "src", shapes, "mine")
    regraft.convert(src, folder / "new", to=V5, source=V4, rules=rules)
    assert read(folder / "new").keys() == set(wanted)
    regraft.convert(folder / "new", folder / "back", to=V4, source=V5, rules=rules)
    assert same(read(folder / "back"), numbered(shapes))


def test_the_way_back_adds_a_prefix_once(tmp_path):
    rules = book(tmp_path, "encoder.layers.{l}.{*q} : d == layers.{l}.{*q} : d")
    shapes = {f"encoder.layers.{n}.attn.out_proj.bias": (4,) for n in range(2)}
    there_and_back(tmp_path, shapes, rules, {k.removeprefix("encoder.") for k in shapes})


def test_names_that_take_each_others_places(tmp_path):
    """norm0 becomes norm1, and norm1 norm2: no rule sees what another one has made."""
    rules = book(
        tmp_path,
        "layers.{l}.norm0.weight : d == layers.{l}.norm1.weight : d",
        "layers.{l}.norm1.weight : d == layers.{l}.norm2.weight : d",
    )
    shapes = {f"layers.0.norm{n}.weight": (n + 2,) for n in range(2)}
    there_and_back(tmp_path, shapes, rules, ["layers.0.norm1.weight", "layers.0.norm2.weight"])


def test_a_rule_for_a_tower_leaves_the_others(tmp_path):
    rules = book(
        tmp_path,
        "model.vision_tower.layers.{l}.{*q} : d == model.vision_tower.encoder.layers.{l}.{*q} : d",
        carries=["model.language_model.{*q}"],
    )
    shapes = {
        "model.vision_tower.layers.0.bias": (2,),
        "model.language_model.layers.0.bias": (3,),
    }
    wanted = ["model.vision_tower.encoder.layers.0.bias", "model.language_model.layers.0.bias"]
    there_and_back(tmp_path, shapes, rules, wanted)


def test_two_names_that_come_to_one_are_an_error(tmp_path):
    """Two name spaces must not fall together; both rules are named."""
    rules = book(
        tmp_path,
        "model.{*q} : d == language_model.{*q} : d",
        "other.{*q} : d == language_model.{*q} : d",
    )
    src = write_checkpoint(tmp_path / "src", {"model.bias": (2,), "other.bias": (2,)}, "mine")
    with pytest.raises(regraft.RegraftError):
        regraft.convert(src, tmp_path / "new", to=V5, source=V4, rules=rules)
    assert not (tmp_path / "new").exists()


def test_the_closer_rule_wins(tmp_path):
    rules = book(
        tmp_path,
        "model.language_model.visual.{*q} : d == model.visual.{*q} : d",
        "model.language_model.{*q} : d == model.text.{*q} : d",
    )
    shapes = {
        "model.language_model.visual.blocks.0.attn.qkv.bias": (2,),
        "model.language_model.norm.bias": (3,),
    }
    there_and_back(
        tmp_path, shapes, rules, ["model.visual.blocks.0.attn.qkv.bias", "model.text.norm.bias"]
    )


def test_a_repeated_prefix_is_one_of_the_names(tmp_path):
    rules = book(tmp_path, "model.model.{*q} : d == model.{*q} : d")
    there_and_back(tmp_path, {"model.model.norm.bias": (2,)}, rules, ["model.norm.bias"])


def test_a_book_that_leads_elsewhere_is_not_followed(tmp_path):
    """Layouts that the target is none of: nothing is written under a wrong label."""
    (path,) = book(tmp_path, "a.{*q} : d == b.{*q} : d")
    path.write_text(path.read_text().replace(V4, "published").replace(V5, "mine"))
    src = write_checkpoint(tmp_path / "src", {"a.bias": (2,)}, "mine")
    with pytest.raises(regraft.RegraftError):
        regraft.convert(src, tmp_path / "new", to=V5, rules=[path])
    assert not (tmp_path / "new").exists()
