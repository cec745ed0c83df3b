"""Names of tensors: templates and columns of numbers, live models, and files that were saved from under wrappers."""
