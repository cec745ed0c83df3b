"""What holds for every test: no network, one thread, steady property tests."""

import contextlib
import gc
import os

# Read when the libraries are imported, so set before anything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Several workers share the cores, and what they start inherits this.
os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

with contextlib.suppress(ImportError):
    import torch

    torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
