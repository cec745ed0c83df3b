"""PEFT's files: what their keys and configs say, and how they are written."""
