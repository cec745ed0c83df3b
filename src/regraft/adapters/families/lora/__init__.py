"""The variants of LoRA, one a file, under the name that PEFT gives them."""
