"""A demonstration: ``python -m regraft.demo`` converts a bundled adapter and proves the result."""
