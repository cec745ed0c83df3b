"""Learn what mlx-lm's `sanitize` does to a checkpoint of transformers: llama, and mixtral, whose experts are stacked.

pip install mlx-lm==0.32.2 mlx==0.32.4 mlx-cpu==0.32.4
python scripts/learn/mlx_books.py OUT
"""

from importlib import import_module

import mlx.core as mx
import numpy as np
from sizes import LLAMA, MIXTRAL, write_books

CONFIGS = {"llama": LLAMA, "mixtral": MIXTRAL}


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
    for name, config in CONFIGS.items():
        source = f"mlx-lm 0.32.2, mlx_lm/models/{name}.py: Model.sanitize"
        write_books("mlx", {name: config}, converter, with_torch=False, source=source)


if __name__ == "__main__":
    main()
