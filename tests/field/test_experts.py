"""LoRA on experts: packings of releases, what joining does to ranks and scales, and the way back.

Sources: NVIDIA-NeMo/Automodel#3592, unslothai/unsloth#6930, unslothai/unsloth-zoo#1269, huggingface/transformers#42491,
#43261, #44478, OpenPipe/ART#575, unslothai/unsloth-zoo#812, unslothai/unsloth-zoo#779. Keys and shapes are rebuilt.
"""

import numpy as np
import pytest
from rebuilt import (
    PREFIX,
    V4,
    V5,
    codes,
    config_of,
    lora,
    numbered,
    read,
    same,
    write_adapter,
    write_base,
)

import regraft

EXPERTS, HIDDEN, INNER, RANK = 4, 16, 6, 2
AT = f"{PREFIX}model.layers.0.mlp.experts."
QWEN = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


def per_expert(names=QWEN, module="mlp.experts", experts=range(EXPERTS), rank=RANK):
    sizes = dict.fromkeys(names[:2], (INNER, HIDDEN)) | {names[2]: (HIDDEN, INNER)}
    return lora(
        {
            f"model.layers.0.{module}.{e}.{name}": sizes[name]
            for e in experts
            for name in names
            if name in sizes
        },
        rank,
    )


def packed(experts, old, hidden=HIDDEN, inner=INNER, rank=RANK):
    """Factors of stacked experts as PEFT names them; before 0.19 ``in`` and ``out`` are taken the other way round."""
    shapes = {}
    for name, (out, inside) in (
        ("base_layer.", (2 * inner, hidden)),
        ("", (hidden, inner)),
    ):
        out, inside = (inside, out) if old else (out, inside)
        shapes[f"{AT}{name}lora_A.weight"] = (experts * rank, inside)
        shapes[f"{AT}{name}lora_B.weight"] = (out, experts * rank)
    return shapes


def deltas(tensors, experts, old, scale):
    """What packed factors add to each expert: A is cut by experts, and experts are the fastest in B."""
    found = {}
    for name, key in (("gate_up", "base_layer."), ("down", "")):
        a, b = (tensors[f"{AT}{key}lora_{letter}.weight"] for letter in "AB")
        a = a.reshape(experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, experts)
        each = [scale * b[:, :, e] @ a[e] for e in range(experts)]
        found[name] = [delta.T if old else delta for delta in each]
    return found


def test_packed_factors_of_before_peft_0_19(tmp_path):
    model = write_base(tmp_path / "base", "qwen3_moe", num_hidden_layers=1)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    src = write_adapter(
        tmp_path / "src", packed(EXPERTS, True), target_parameters=parameters, peft_version="0.18.1"
    )
    regraft.convert(
        src, tmp_path / "new", to=f"{V5}/peft-0.19", source=f"{V5}/peft-0.18", model=model
    )
    old, new = read(src), read(tmp_path / "new")
    assert {k: v.shape for k, v in new.items()} == packed(EXPERTS, False)
    before, after = deltas(old, EXPERTS, True, 2.0), deltas(new, EXPERTS, False, 2.0)
    assert all(
        np.array_equal(a, b) for n in before for a, b in zip(before[n], after[n], strict=True)
    )
    regraft.convert(
        tmp_path / "new",
        tmp_path / "back",
        to=f"{V5}/peft-0.18",
        source=f"{V5}/peft-0.19",
        model=model,
    )
    assert same(read(tmp_path / "back"), old)


def test_square_experts_tell_no_packing(tmp_path):
    """With hidden = 2 x inner both packings have the same shapes for gate and up."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 12, "moe_intermediate_size": 6}
    model = write_base(tmp_path / "base", "qwen3_moe", **sizes)
    shapes = {k: v for k, v in packed(4, True, hidden=12).items() if "base_layer" in k}
    one = {k.replace("base_layer.", ""): v for k, v in shapes.items()}
    src = write_adapter(tmp_path / "src", one, target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(regraft.AmbiguousError) as caught:
        regraft.convert(src, tmp_path / "new", to=V4, model=model)
    assert "packing" in str(caught.value)


def test_norms_do_not_see_exchanged_experts_and_verify_does(tmp_path):
    """Factors whose B is cut with the experts slowest: the same shapes and norms, other experts."""
    model = write_base(tmp_path / "base", "qwen3_moe", num_hidden_layers=1)
    src = write_adapter(tmp_path / "src", per_expert(), target_modules=list(QWEN))
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert regraft.verify(src, tmp_path / "new", model=model)
    wrong = read(tmp_path / "new")
    name = f"{AT}lora_B.weight"
    b = wrong[name]
    other = b.reshape(b.shape[0], RANK, EXPERTS).transpose(0, 2, 1).reshape(b.shape)
    assert np.isclose(np.linalg.norm(b), np.linalg.norm(other)) and not np.array_equal(b, other)
    write_adapter(
        tmp_path / "new",
        {**wrong, name: other},
        **config_of(tmp_path / "new"),
    )
    assert not regraft.verify(src, tmp_path / "new", model=model)


@pytest.mark.parametrize(
    ("kind", "names", "module"),
    [("qwen3_moe", QWEN, "mlp.experts"), ("mixtral", MIXTRAL, "block_sparse_moe.experts")],
)
def test_joined_experts_keep_their_scale(kind, names, module, tmp_path):
    """Gate and up come to twice the rank, so their alpha doubles, and nothing else's does."""
    model = write_base(tmp_path / "base", kind, num_hidden_layers=1)
    shapes = per_expert(names, module) | lora({"model.layers.0.self_attn.q_proj": (16, 16)})
    src = write_adapter(tmp_path / "src", shapes, target_modules=[*names, "q_proj"])
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    config = config_of(tmp_path / "new")
    ranks = {p: r for p, r in config["rank_pattern"].items() if "gate_up" in p}
    alphas = {p: a for p, a in config["alpha_pattern"].items() if "gate_up" in p}
    assert set(ranks.values()) == {2 * RANK} and set(alphas.values()) == {8} and config["r"] == RANK
    assert config["lora_alpha"] == 4
    assert regraft.verify(src, tmp_path / "new", model=model)
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4, model=model)
    assert same(read(tmp_path / "back"), read(src))


def test_what_was_trained_on_stacked_experts_has_an_exact_image_of_before(tmp_path):
    model = write_base(tmp_path / "base", "qwen3_moe", num_hidden_layers=1)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    src = write_adapter(tmp_path / "src", packed(EXPERTS, False), target_parameters=parameters)
    regraft.convert(src, tmp_path / "new", to=V4, source=f"{V5}/peft-0.19", model=model)
    assert read(tmp_path / "new").keys() == numbered(per_expert()).keys()
    assert regraft.verify(src, tmp_path / "new", model=model, source=f"{V5}/peft-0.19")


def test_twelve_experts_are_sorted_by_number(tmp_path):
    model = write_base(tmp_path / "base", "qwen3_moe", num_hidden_layers=1, num_experts=12)
    shapes = per_expert(experts=range(12))
    tensors = numbered(shapes)
    src = write_adapter(tmp_path / "src", dict(sorted(tensors.items())), target_modules=list(QWEN))
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    a = read(tmp_path / "new")[f"{AT}lora_A.weight"].reshape(12, RANK, INNER)
    last = tensors[f"{PREFIX}model.layers.0.mlp.experts.11.down_proj.lora_A.weight"]
    assert np.array_equal(a[11], last)


@pytest.mark.parametrize("moved", [(3, 9), (0, 4)])
def test_an_expert_with_another_number_is_an_error(moved, tmp_path):
    """The number of an expert is no place in a list."""
    model = write_base(tmp_path / "base", "qwen3_moe", num_hidden_layers=1)
    shapes = {
        k.replace(f"experts.{moved[0]}.", f"experts.{moved[1]}."): v
        for k, v in per_expert().items()
    }
    src = write_adapter(tmp_path / "src", shapes, target_modules=list(QWEN))
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert codes(caught) == {"extra"}


def test_narrow_experts(tmp_path):
    """The larger dim is not always the inputs': gate and up have more outputs than inputs here."""
    sizes = {"hidden_size": 6, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    model = write_base(tmp_path / "base", "qwen3_moe", **sizes)
    shapes = lora(
        {
            f"model.layers.0.mlp.experts.{e}.{name}": (6, 16) if name == "down_proj" else (16, 6)
            for e in range(EXPERTS)
            for name in QWEN
        }
    )
    src = write_adapter(tmp_path / "src", shapes, target_modules=list(QWEN))
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert regraft.verify(src, tmp_path / "new", model=model)
    regraft.convert(tmp_path / "new", tmp_path / "back", to=V4, model=model)
    assert same(read(tmp_path / "back"), read(src))


def test_each_expert_with_a_rank_of_its_own(tmp_path):
    model = write_base(tmp_path / "base", "qwen3_moe", num_hidden_layers=1)
    shapes = {}
    for e in range(EXPERTS):
        shapes |= per_expert(experts=[e], rank=e + 1)
    pattern = {f"experts.{e}.{name}": e + 1 for e in range(EXPERTS) for name in QWEN}
    src = write_adapter(
        tmp_path / "src", shapes, target_modules=list(QWEN), rank_pattern=pattern, lora_alpha=3
    )
    regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert regraft.verify(src, tmp_path / "new", model=model)


def test_a_packing_that_says_what_it_is_is_believed(tmp_path):
    """Unsloth's files name their layout, and PEFT's reading of it would be wrong for every expert."""
    model = write_base(tmp_path / "base", "qwen3_moe", num_hidden_layers=1)
    shapes = packed(EXPERTS, False)
    src = write_adapter(
        tmp_path / "src",
        shapes,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        lora_B_layout="grouped_by_expert",
    )
    try:
        regraft.convert(src, tmp_path / "new", to=V4, model=model)
    except regraft.RegraftError:
        return
    old = read(src)
    b = old[f"{AT}lora_B.weight"].reshape(HIDDEN, EXPERTS, RANK)
    a = old[f"{AT}lora_A.weight"].reshape(EXPERTS, RANK, INNER)
    new = read(tmp_path / "new")
    at = f"{PREFIX}model.layers.0.mlp.experts.1.down_proj."
    made = new[f"{at}lora_B.weight"] @ new[f"{at}lora_A.weight"]
    assert np.allclose(made, b[:, 1] @ a[1])
