"""The notebooks of the documentation run, and show what stands in them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from notebook import NOTEBOOKS, made_anew, plain


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path):
    assert plain(made_anew(path)) == plain(path.read_text(encoding="utf-8")), (
        "run scripts/notebook.py"
    )
