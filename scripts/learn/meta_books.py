"""Write the rule book of Meta's own Llama checkpoints (consolidated.00.pth, one rank).

    python scripts/learn/meta_books.py OUT

Meta publishes no converter to transformers, so what is learned from is the function below: the names are those of
`llama/model.py` (meta-llama/llama), the order of rows in q and k that of its rotary embeddings, whose halves alternate
(as in `permute` of transformers' convert_llama_weights_to_hf.py, the other way round).
"""

from sizes import LLAMA, write_books

NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def converter_of(config):
    """A function from transformers' names to Meta's, for one config."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def convert(state):
        made = {}
        for key, weight in state.items():
            if key in OUTER:
                made[OUTER[key]] = weight
                continue
            _, _, layer, path = key.removesuffix(".weight").split(".", 3)
            count = heads.get(path.rpartition(".")[2])
            if count is not None:
                halves = weight.reshape(count, 2, -1, weight.shape[-1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            made[f"layers.{layer}.{NAMES[path]}.weight"] = weight
        return made

    return convert


def main():
    """Write the book, and say what it is worth."""
    write_books(
        "meta",
        {"llama": LLAMA},
        converter_of,
        with_torch=False,
        source="by hand: meta-llama/llama, llama/model.py; scripts/learn/meta_books.py",
    )


if __name__ == "__main__":
    main()
