"""Checking: whether an adapter or a checkpoint loads as it is, and whether a rule book is sound."""
