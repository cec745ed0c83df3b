"""Processes of a distributed run, in tests."""

import multiprocessing

import torch.multiprocessing


def run(function, *args, count):
    """Calls `function(rank, *args)` in `count` processes; an exception in one is raised here.

    They are forked from a process that has imported what all of them need, once for all tests. It has
    no threads of torch, so that a fork of it is sound, as one of the test's own process would not be.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch.distributed.fsdp",
            "torch.distributed.tensor",
            "transformers.models.auto.modeling_auto",
            "transformers.models.mixtral.modeling_mixtral",
            "regraft.live.load",
            "pytest",
        ]
    )
    torch.multiprocessing.start_processes(function, args, nprocs=count, start_method="forkserver")
