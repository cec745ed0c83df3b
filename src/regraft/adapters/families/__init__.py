"""PEFT's tuner families, one file each: how their tensors follow their base weight, and what they come to."""
