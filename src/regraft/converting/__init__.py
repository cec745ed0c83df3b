"""Converting: what `convert`, `plan`, `slices` and `save_adapter` do, from what was asked to what is written."""
