"""Whole checkpoints, file to file: bytes move, values are never read, and memory stays bounded."""
