"""Small files as tools write them, and what they add to the base, by plain numpy over their own definitions."""

import json

import numpy as np

RANDOM = np.random.default_rng(7)
H, RANK = 8, 2


def numbers(*shape, dtype=np.float32):
    """Whole numbers, so that sums and products are exact."""
    return RANDOM.integers(-3, 4, shape).astype(dtype)


def pair(out, into, rank=RANK, kernel=(), dtype=np.float32):
    """A down and an up."""
    ones = (1,) * len(kernel)
    return numbers(rank, into, *kernel, dtype=dtype), numbers(out, rank, *ones, dtype=dtype)


def product(down, up, scale=1.0):
    """What a LoRA adds."""
    flat = up.reshape(len(up), -1).astype(float) @ down.reshape(len(down), -1).astype(float)
    return scale * flat.reshape(len(up), *down.shape[1:])


BFL = {
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.1.img_attn.qkv": (3 * H, H),
    "double_blocks.0.txt_attn.proj": (H, H),
    "double_blocks.0.img_mlp.0": (4 * H, H),
    "double_blocks.0.img_mod.lin": (6 * H, H),
    "single_blocks.0.linear1": (7 * H, H),
    "single_blocks.11.linear2": (H, 5 * H),
    "final_layer.adaLN_modulation.1": (2 * H, H),
    "final_layer.linear": (6, H),
}


def in_diffusers(added):
    """What is added to FLUX's weights under its own names, under diffusers' names."""
    names = {
        "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
        "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.net.0.proj",
        "double_blocks.0.img_mod.lin": "transformer_blocks.0.norm1.linear",
        "single_blocks.11.linear2": "single_transformer_blocks.11.proj_out",
        "final_layer.linear": "proj_out",
    }
    made = {}
    for name, delta in added.items():
        if name.endswith("qkv"):
            block = f"transformer_blocks.{name.split('.')[1]}.attn."
            parts = np.split(delta, 3)
            made.update({f"{block}to_{x}": part for x, part in zip("qkv", parts, strict=True)})
        elif name.endswith("linear1"):
            block = f"single_transformer_blocks.{name.split('.')[1]}."
            q, k, v, mlp = np.split(delta, [H, 2 * H, 3 * H])
            made |= {block + f"attn.to_{x}": part for x, part in zip("qkv", (q, k, v), strict=True)}
            made[block + "proj_mlp"] = mlp
        elif name.endswith("adaLN_modulation.1"):
            made["norm_out.linear"] = np.concatenate(np.split(delta, 2)[::-1])
        else:
            made[names[name]] = delta
    return made


def kohya_flux(alpha=1, dtype=np.float16):
    """A LoRA of FLUX as sd-scripts writes it, and what it adds under FLUX's own names."""
    tensors, added = {}, {}
    for name, (out, into) in BFL.items():
        down, up = pair(out, into, dtype=dtype)
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down, up
        tensors[f"{stem}.alpha"] = np.array(alpha, dtype)
        added[name] = product(down, up, alpha / RANK)
    return tensors, added


def read_diffusers(tensors, metadata):
    """What a file adds as diffusers and PEFT read it."""
    said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    added = {}
    for name, down in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removesuffix(".lora_A.weight")
        component, _, module = path.partition(".")
        up = tensors[f"{path}.lora_B.weight"]
        escaped = module.replace(".", r"\.")
        usual = said.get(f"{component}.lora_alpha", len(down))
        patterns = said.get(f"{component}.alpha_pattern", {})
        alpha = patterns.get(f"^{escaped}", patterns.get(escaped, usual))
        added[module if component in ("unet", "transformer") else path] = product(
            down, up, alpha / len(down)
        )
    return added


def read_pairs(tensors):
    """What plain LoRAs with alpha keys add, by the name that the file has."""
    added = {}
    for name, down in tensors.items():
        for a, b in (
            (".lora_down.weight", ".lora_up.weight"),
            (".lora_A.weight", ".lora_B.weight"),
        ):
            if name.endswith(a):
                stem = name.removesuffix(a)
                alpha = float(tensors.get(f"{stem}.alpha", len(down)))
                added[stem] = product(down, tensors[stem + b], alpha / len(down))
    return added
