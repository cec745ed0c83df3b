"""transformers' own patterns run without a time limit: none may be of the kind that takes long."""

import re

import pytest

pytest.importorskip("transformers")

from regraft.bridges.transformers import registry

INVOLVED = re.compile(r"\)[*+{]|\(\?P=|\\[1-9]")


def test_no_pattern_of_the_registry_repeats_a_group():
    patterns = {
        step.pattern.pattern
        for entry in registry.entries()
        for transform in registry.look_up(entry) or ()
        for step in (transform.forward, transform.backward)
    }
    assert len(patterns) > 100
    assert [pattern for pattern in patterns if INVOLVED.search(pattern)] == []
