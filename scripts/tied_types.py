"""The model types whose embeddings transformers 4 ties where a config does not say it: for files whose class cannot be
asked.

python scripts/tied_types.py > src/regraft/checkpoints/tables/tied_types.txt     with transformers 4.57

transformers 5 ties two tensors of a file only where they are equal, so its defaults change nothing of a file.
"""

from __future__ import annotations

import warnings
from contextlib import suppress


def main() -> None:
    """Print a type a line."""
    warnings.simplefilter("ignore")
    import transformers

    types = transformers.CONFIG_MAPPING
    print(f"# transformers {transformers.__version__}, by scripts/tied_types.py")
    for name in sorted(types.keys()):
        with suppress(Exception):  # some cannot be made without the configs of their parts
            config = types[name]()
            if config.get_text_config(decoder=True).tie_word_embeddings:
                print(name)


if __name__ == "__main__":
    main()
