"""Converting a Qwen3-MoE LoRA in memory to every dialect of language models, beside copying every tensor once.

The adapter of `bench_adapter.py`: 37248 tensors, and the work for each of them. Times are of the process's own clock.
"""

from __future__ import annotations

from measure import Contender, Goal, alternate, parse_arguments, report, use_one_thread

use_one_thread()

import sys  # noqa: E402
import time  # noqa: E402

from bench_adapter import ADAPTER_CONFIG, Arrays, make_adapter, make_model_config  # noqa: E402

from regraft.adapters.convert import convert_adapter  # noqa: E402
from regraft.dialects.base import dialects  # noqa: E402
from regraft.dialects.names import layout_named  # noqa: E402
from regraft.dialects.opening import Into  # noqa: E402
from regraft.dialects.peft.source import Source  # noqa: E402
from regraft.planning.model import ModelConfig  # noqa: E402

TARGETS = ("transformers-v5", "vllm", "sglang", "unsloth", "nemo", "gguf", "mlx", "litgpt")


def convert_to(name: str, arrays: Arrays, model: ModelConfig) -> object:
    """Everything but reading and writing files."""
    source = Source("", "memory", dict(ADAPTER_CONFIG), arrays)
    to = layout_named(name)
    into = None if to.dialect is None else Into(dialects()[to.dialect], to.dialect == "peft")
    return convert_adapter(source, to, model, into=into)


def main() -> None:
    arguments = parse_arguments(str(__doc__).splitlines()[0], rounds=7)
    arrays = make_adapter()
    model = ModelConfig(make_model_config().to_dict(), "memory")
    names = [name for name in TARGETS if name in sys.argv] or list(TARGETS)
    contenders = [
        Contender(name, lambda name=name: convert_to(name, arrays, model)) for name in names
    ]
    copy = Contender("numpy copy", lambda: {k: a.copy() for k, a in arrays.items()})
    seconds = alternate([*contenders, copy], arguments.rounds, clock=time.process_time)
    facts = {"tensors in": len(arrays)}
    goals = [Goal(name, "numpy copy", at_most=3) for name in names]
    report("Qwen3-MoE LoRA in memory, to each dialect", seconds, goals, facts, arguments.json)


if __name__ == "__main__":
    main()
