"""A scale that is no finite number is an error wherever a file is opened, inspect included."""

import numpy as np
import pytest

from regraft.adapters.form import Lora
from regraft.adapters.scale import Scale
from regraft.dialects.base import PlainFile
from regraft.dialects.mlx import _parameters
from regraft.errors import BadInputError


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), 10**400])
def test_a_file_with_such_a_scale_is_not_opened(alpha):
    lora = Lora(np.zeros((2, 4)), np.zeros((3, 2)), Scale(2, alpha))
    with pytest.raises(BadInputError) as caught:
        PlainFile("", "file", {}, {}, {"w.weight": lora})
    assert [(f.code, f.key) for f in caught.value.findings] == [("config", "w.weight")]


@pytest.mark.parametrize("name", ["rank", "scale", "alpha"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400])
def test_numbers_of_mlx_are_finite(name, value):
    said = {"rank": 2, "scale": 1.0, "alpha": 2, name: value}
    with pytest.raises(BadInputError) as caught:
        _parameters({"lora_parameters": said, "lora_layers": 2}, "adapter_config.json")
    assert caught.value.findings[0].code == "config"
