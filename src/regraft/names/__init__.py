"""Tensor names as templates and columns of numbers."""
