"""Learn what llama.cpp's converter makes of llama and mixtral: names, the q/k permutation, stacked experts.

pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.16      (its sdist has llama.cpp in vendor/)
python scripts/learn/gguf_books.py OUT WHERE/vendor/llama.cpp

The converter's own methods are run on labels (``modify_tensors``); its tokenizers, which are no part of that, are
stood in for. What it computes and adds by itself (``rope_freqs``) is no weight of the model.
"""

import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

from sizes import LLAMA, MIXTRAL, write_books

TOKENIZERS = ("base", "multimodal", "tekken", "sentencepiece")
CONFIGS = {"llama": LLAMA, "mixtral": MIXTRAL}


def load_converter(where):
    """llama.cpp's converter as a module."""
    for name in ("mistral_common", "mistral_common.tokens", "mistral_common.tokens.tokenizers"):
        sys.modules[name] = MagicMock()
    for name in TOKENIZERS:
        sys.modules[f"mistral_common.tokens.tokenizers.{name}"] = MagicMock()
    sys.path[:0] = [str(where / "gguf-py"), str(where)]
    import convert_hf_to_gguf

    return convert_hf_to_gguf


def converter(module, config):
    """The tensors of a file as the converter names and permutes them, before it quantises any."""

    def convert(state):
        model = object.__new__(module.LlamaModel)
        model.hparams, model.hf_arch = config, config["architectures"][0]
        model.block_count = config["num_hidden_layers"]
        model.tensor_map = module.gguf.get_tensor_name_map(model.model_arch, model.block_count)
        made = {}
        for name, tensor in state.items():
            block = re.search(r"\.(\d+)\.", name)
            for new, data in model.modify_tensors(tensor, name, int(block[1]) if block else None):
                made[new] = data
        return made

    return convert


def main():
    """Learn one book for each config."""
    module = load_converter(Path(sys.argv[2]))
    write_books(
        "gguf",
        CONFIGS,
        lambda config: converter(module, config),
        with_torch=True,
        source="llama.cpp in llama-cpp-python 0.3.16, run on labels by scripts/learn/gguf_books.py",
    )


if __name__ == "__main__":
    main()
