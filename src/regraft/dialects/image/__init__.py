"""Files of LoRAs for image and video models: kohya, diffusers, ComfyUI, ai-toolkit, and who writes like them."""
