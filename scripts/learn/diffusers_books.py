"""Learn rule books from diffusers' own converters of single-file checkpoints: FLUX and SDXL.

    pip install diffusers==0.42.1
    python scripts/learn/diffusers_books.py OUT [flux] [sdxl]

The converters are functions on state dicts (`diffusers.loaders.single_file_utils`), called with labelled tensors.
FLUX's has its widths in its code, so it is learned at those widths with one block of each kind; others are sizes of the
UNet's own config. Prints how many tensors are explained, of how many.
"""

import sys

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils as files
from sizes import out_folder, write_book

from regraft.learning.learn import learn_pairs
from regraft.learning.watch import pair_of

SOURCE = "diffusers 0.42.1, loaders/single_file_utils.py:"


FLUX_WIDTH, FLUX_INNER = 3072, 12288


def flux_shapes(double, single, width=FLUX_WIDTH, inner=FLUX_INNER):
    """BFL's names; only the widths that the converter has in its code are kept, the others are small."""
    shapes = {}

    def linear(name, out, into):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    small = 3
    for name in ("time_in", "vector_in", "guidance_in"):
        linear(f"{name}.in_layer", 7, small)
        linear(f"{name}.out_layer", 5, 7)
    linear("img_in", 11, 2)
    linear("txt_in", 13, 2)
    for n in range(double):
        for stream in ("img", "txt"):
            p = f"double_blocks.{n}.{stream}_"
            linear(p + "mod.lin", 18, small)
            linear(p + "attn.qkv", 3 * 8, small)
            linear(p + "attn.proj", 9, small)
            linear(p + "mlp.0", 10, small)
            linear(p + "mlp.2", 6, small)
            shapes[p + "attn.norm.query_norm.scale"] = (4,)
            shapes[p + "attn.norm.key_norm.scale"] = (4,)
    for n in range(single):
        p = f"single_blocks.{n}."
        linear(p + "modulation.lin", 9, small)
        linear(p + "linear1", 3 * width + inner, small)
        linear(p + "linear2", 5, small)
        shapes[p + "norm.query_norm.scale"] = shapes[p + "norm.key_norm.scale"] = (4,)
    linear("final_layer.linear", 8, small)
    linear("final_layer.adaLN_modulation.1", 12, small)
    return shapes


def flux(out):
    """BFL's single file to diffusers."""
    pairs = [
        pair_of(
            lambda state: files.convert_flux_transformer_checkpoint_to_diffusers(dict(state)),
            flux_shapes(*blocks),
            None,
            with_torch=True,
            where=f"{blocks[0]} and {blocks[1]} blocks",
        )
        for blocks in ((2, 3), (3, 2))
    ]
    found = learn_pairs(
        pairs,
        layouts=("bfl", "diffusers"),
        name="flux",
        model_types=["flux"],
        source=SOURCE + "convert_flux_transformer_checkpoint_to_diffusers",
    )
    write_book(out / "flux.toml", found)


def unet_config(width):
    """A UNet as SDXL's, with small widths."""
    return {
        "sample_size": 16,
        "block_out_channels": (width, 2 * width, 4 * width),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 12,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 52,
        "norm_num_groups": 4,
    }


def ldm_names(config):
    """The names of the original UNet, found by trying which diffusers' converter takes."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    return model.config, {k: tuple(v.shape) for k, v in model.state_dict().items()}


def sdxl(out):
    """LDM's UNet to diffusers."""
    pairs = []
    for width in (8, 16):
        config, new = ldm_names(unet_config(width))
        old = {ldm_name(key): shape for key, shape in new.items()}
        pairs.append(
            pair_of(
                lambda state, config=config: files.convert_ldm_unet_checkpoint(
                    {f"model.diffusion_model.{k}": v for k, v in state.items()}, dict(config)
                ),
                old,
                None,
                with_torch=True,
                where=f"width {width}",
            )
        )
    found = learn_pairs(
        pairs,
        layouts=("ldm", "diffusers"),
        name="sdxl_unet",
        model_types=["sdxl_unet"],
        source=SOURCE + "convert_ldm_unet_checkpoint",
    )
    write_book(out / "sdxl_unet.toml", found)


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_name(key):
    """The name that the original UNet has for one of diffusers' (only to make the probe's names)."""
    heads = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for new, old in heads.items():
        if key.startswith(new + "."):
            return old + key[len(new) :]
    part = key.split(".")
    if part[0] == "mid_block":
        place = (
            ["middle_block", "1"]
            if part[1] == "attentions"
            else ["middle_block", str(2 * int(part[2]))]
        )
        rest = part[3:]
        kind = part[1]
    else:
        block, kind, layer, rest = int(part[1]), part[2], int(part[3]), part[4:]
        if part[0] == "down_blocks":
            number = 3 * block + layer + 1
            if kind == "downsamplers":
                return f"input_blocks.{3 * block + 3}.0.op." + ".".join(rest[1:])
            place = ["input_blocks", str(number), "1" if kind == "attentions" else "0"]
        else:
            number = 3 * block + layer
            if kind == "upsamplers":
                return f"output_blocks.{3 * block + 2}.{2 if block < 2 else 1}." + ".".join(rest)
            place = ["output_blocks", str(number), "1" if kind == "attentions" else "0"]
    if kind == "resnets":
        rest = [_RESNET[rest[0]], *rest[1:]]
    return ".".join([*place, *rest])


def main():
    """Learn the books that are asked for."""
    out, wanted = out_folder(), sys.argv[2:] or ["flux", "sdxl"]
    np.seterr(all="ignore")
    for name in wanted:
        {"flux": flux, "sdxl": sdxl}[name](out)


if __name__ == "__main__":
    main()
