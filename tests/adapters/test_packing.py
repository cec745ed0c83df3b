"""The packing of stacked experts, by formula and against real PEFT."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import same_bits

from regraft.dialects.peft.packing import PACKINGS, pack, packing_of_version, swaps, unpack

KINDS = ["experts", "experts-transposed", "experts-unmarked"]


@given(
    st.sampled_from(PACKINGS),
    st.sampled_from(KINDS),
    st.tuples(*[st.integers(1, 5)] * 4),
)
def test_unpack_is_the_inverse_of_pack(packing, kind, sizes):
    experts, rank, out, into = sizes
    swapped = swaps(packing, kind, experts)
    a = np.arange(experts * rank * into).reshape(experts, rank, into)
    b = np.arange(experts * out * rank).reshape(experts, out, rank)
    packed = pack(a, b, swapped=swapped)
    x, y = (out, into) if swapped else (into, out)
    assert [p.shape for p in packed] == [(experts * rank, x), (y, rank * experts)]
    back = unpack(*packed, experts, swapped=swapped)
    assert same_bits(back[0], a)
    assert same_bits(back[1], b)
    again = pack(*back, swapped=swapped)
    assert all(same_bits(p, q) for p, q in zip(packed, again, strict=True))


def test_a_is_expert_major_and_b_rank_major():
    a, b = np.arange(6).reshape(3, 2, 1), np.arange(6).reshape(3, 1, 2)
    first, second = pack(a, b, swapped=False)
    assert first[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert second[0].tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(
    ("version", "packing"),
    [
        ("0.17.0", "peft-0.18"),
        ("0.18.1", "peft-0.18"),
        ("0.18.2.dev0", "peft-0.18"),
        ("0.19.0", "peft-0.19"),
        ("0.21.2", "peft-0.19"),
        ("0.100.0", "peft-0.19"),
        ("1.0.0", "peft-0.19"),
        (None, None),
        ("", None),
        (18, None),
    ],
)
def test_the_version_tells_the_packing(version, packing):
    assert packing_of_version(version) == packing


@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_merges_what_we_unpack(kind, experts):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft", minversion="0.19")
    out = into = 4
    if experts > 1:
        out = 5
    shape = (experts, out, into) if kind == "experts" else (experts, into, out)

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(shape))
            if kind == "experts-transposed":
                self.is_transposed = True

        def forward(self, x):
            return x

    model = torch.nn.Module()
    model.experts = Experts()
    model.forward = lambda x: model.experts(x)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=[],
        target_parameters=["experts.weight"],
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, config)
    state = peft.get_peft_model_state_dict(wrapped)
    a, b = (state[f"base_model.model.experts.lora_{n}.weight"].numpy() for n in "AB")
    merged = wrapped.merge_and_unload().experts.weight.detach().numpy()
    swapped = swaps("peft-0.19", kind, experts)
    first, second = unpack(a, b, experts, swapped=swapped)
    assert first.shape == (experts, 3, into)
    assert second.shape == (experts, out, 3)
    delta = 2 * second @ first
    want = delta if kind == "experts" else delta.transpose(0, 2, 1)
    np.testing.assert_allclose(merged, want, rtol=1e-4, atol=1e-6)
    assert np.abs(want).max() > 1e-3
