"""Lint of rule books and of the ordered renames of other libraries, before any tensor is read."""
