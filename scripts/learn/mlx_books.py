"""Learn what mlx-lm's `sanitize` does to a checkpoint of transformers: llama, and mixtral, whose experts are stacked.

pip install mlx-lm==0.32.2 mlx==0.32.4 mlx-cpu==0.32.4
python scripts/learn/mlx_books.py OUT
"""

import sys
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import numpy as np
from sizes import learn_config

CONFIGS = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
}


def converter(config):
    """mlx-lm's own way from a file's weights to the model's."""
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))

    def convert(state):
        weights = {key: mx.array(array) for key, array in state.items()}
        made = model.sanitize(weights) if hasattr(model, "sanitize") else weights
        return {key: np.array(array) for key, array in made.items()}

    return convert


def main():
    """Learn one book for each config."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, data in CONFIGS.items():
        found = learn_config(
            name,
            data,
            converter,
            "mlx",
            with_torch=False,
            source=f"mlx-lm 0.32.2, mlx_lm/models/{name}.py: Model.sanitize",
        )
        (out / f"mlx_{name}.toml").write_text(found.text)
        verified = ", ".join("equal" if each.equal else "NOT equal" for each in found.verified)
        print(f"mlx {name}: {found.explained} of {found.total} tensors explained; {verified}")


if __name__ == "__main__":
    main()
