"""An alpha that no 32-bit float holds is refused by name, not written as an infinite one."""

from types import SimpleNamespace

import numpy as np
import pytest

from regraft.adapters.scale import Scale
from regraft.dialects.image.write import _alpha
from regraft.errors import RefusedError


def delta(alpha, dtype=np.float32):
    down = np.zeros((2, 4), dtype)
    return SimpleNamespace(
        scale=Scale(2, alpha, False),
        algebra="LORA",
        rank=2,
        tensors={"down": down},
        alpha_dtype=None,
    )


@pytest.mark.parametrize("alpha", [10**306, 1e306, 1e-300, 10**400])
def test_what_leaves_the_range_is_refused(alpha):
    with pytest.raises(RefusedError) as caught:
        _alpha(delta(alpha), "x.alpha", None)
    assert caught.value.findings[0].code == "not-representable"


@pytest.mark.parametrize("alpha", [2**70, 3, 0, -1.5])
def test_what_a_dtype_holds_is_written(alpha):
    assert float(_alpha(delta(alpha, np.float16), "x.alpha", None)) == alpha
