"""Files of LoRAs for image and video models: kohya, diffusers, ComfyUI, ai-toolkit, and who writes like them."""

PEFT = "peft-image"
"""PEFT's folder, for the denoiser of an image model."""
DIALECTS = ("kohya", "diffusers", "comfyui", "ai-toolkit", PEFT)
"""Those that can be written."""
