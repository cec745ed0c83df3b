"""Through every holder: an old state dict becomes strictly loadable and equal, and goes back."""

from functools import cache

import pytest
import torch
from holders import HOLDERS, mixtral, vit
from making import slow_but

from regraft.live.state_dict import convert_state_dict
from regraft.names.live import walk

FAMILIES = {"vit": vit, "mixtral": mixtral}


@cache
def saved(family):
    """The weights of a model, as transformers 5 has them and as transformers 4 had them."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    new = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return new, dict(convert_state_dict(new, to="transformers-v4", model=model))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "holder", slow_but(["itself", "holder", "peft", "holder of ddp of peft"], HOLDERS)
)
def test_there_and_back(family, holder):
    new, old = saved(family)
    assert old.keys() != new.keys()
    torch.manual_seed(1)
    held = HOLDERS[holder](FAMILIES[family]())
    [model] = walk(held).models
    path = f"{model.path}." if model.path else ""
    for prefix in dict.fromkeys(("", path, "module.actor.")):
        with torch.no_grad():
            for parameter in held.parameters():
                parameter.zero_()
        source = {prefix + key: tensor for key, tensor in old.items()}
        held.load_state_dict(dict(convert_state_dict(source, to=held)), strict=True)
        state = held.state_dict()
        assert all(torch.equal(whole(state[model.keys[k][0]]), new[k]) for k in new)
    back = convert_state_dict(state, to="transformers-v4", model=held)
    for key, tensor in old.items():
        assert torch.equal(whole(back[path + key]), tensor), key
