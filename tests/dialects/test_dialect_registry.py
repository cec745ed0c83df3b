"""Which dialects are asked about a path."""

from importlib import import_module

import pytest

from regraft.dialects.registry import _BUILT_IN, _FILES, sniffed


@pytest.mark.parametrize("name", sorted(_FILES))
def test_a_dialect_is_asked_where_a_file_of_its_name_is(name):
    module = import_module(_BUILT_IN[name].partition(":")[0])
    own = getattr(module, "WEIGHTS", None) or module.FILE
    assert own.endswith(_FILES[name])


def test_a_folder_without_its_file_needs_no_dialect(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert set(sniffed(tmp_path)) == {"peft"}
