"""Tiny live models, and what people put them into."""

import warnings

import peft
import torch
import transformers
from torch import nn


def vit(head=True):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    return (transformers.ViTForImageClassification if head else transformers.ViTModel)(config)


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        num_local_experts=4,
        vocab_size=32,
        tie_word_embeddings=False,
    )
    return transformers.MixtralForCausalLM(config)


class Holder(nn.Module):
    """Children by name, as people write them."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class ValueHead(nn.Module):
    def __init__(self, pretrained_model):
        super().__init__()
        self.pretrained_model = pretrained_model
        self.v_head = Holder(summary=nn.Linear(16, 1))
        self.config = pretrained_model.config


class Pipeline:
    """As diffusers' pipelines: no module, and models as attributes."""

    def __init__(self, **models):
        self.scheduler = "none"
        self.__dict__.update(models)


def lora(model, **changes):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "q_proj" in n]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, **changes))


def compiled(model):
    return torch.compile(model, backend="eager")


def process_group():
    """A group of this process alone, which every test of the process shares.

    It is made at most once and never taken down: torch has one default group, tests of several files want it, and in
    which order a worker runs the files is not known. The store is in memory, so no two workers meet at a port or file.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    return torch.distributed.group.WORLD


def data_parallel(model):
    return nn.DataParallel(model)


def distributed(model):
    process_group()
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(model, use_orig_params=True, inner=False):
    process_group()
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    layers = {type(m) for m in model.modules() if type(m).__name__.endswith(("Layer", "Attention"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            use_orig_params=use_orig_params,
            auto_wrap_policy=ModuleWrapPolicy(layers) if inner else None,
        )


def fsdp2(model):
    process_group()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def checkpointed(model):
    """Activation checkpointing around every layer, by torch's wrapper."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    apply_activation_checkpointing(
        model, check_fn=lambda m: type(m).__name__.endswith("Layer") and not hasattr(m, "_fsdp")
    )
    return model


def hooked(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in model.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook("cpu"))
    return model


HOLDERS = {
    "itself": lambda m: m,
    "holder": lambda m: Holder(model=m),
    "sequential": lambda m: nn.Sequential(m, nn.Linear(2, 2)),
    "module dict": lambda m: nn.ModuleDict({"net": m}),
    "data parallel": data_parallel,
    "ddp": distributed,
    "fsdp1": fsdp1,
    "fsdp1 flat": lambda m: fsdp1(m, use_orig_params=False),
    "fsdp1 inner": lambda m: fsdp1(m, inner=True),
    "fsdp1 inner flat": lambda m: fsdp1(m, inner=True, use_orig_params=False),
    "fsdp2": fsdp2,
    "compiled": compiled,
    "compiled layer": lambda m: _compile_layer(m),
    "peft": lora,
    "compiled peft": lambda m: compiled(lora(m)),
    "peft of compiled": lambda m: lora(compiled(m)),
    "ddp of peft": lambda m: distributed(lora(m)),
    "fsdp1 of checkpointed": lambda m: fsdp1(checkpointed(m)),
    "compiled ddp": lambda m: compiled(distributed(m)),
    "checkpointed": checkpointed,
    "checkpointed peft": lambda m: checkpointed(lora(m)),
    "hooked": hooked,
    "value head": ValueHead,
    "value head of peft": lambda m: ValueHead(lora(m)),
    "ddp of value head": lambda m: distributed(ValueHead(m)),
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(m),
    "holder of ddp of peft": lambda m: Holder(inner=Holder(actor=distributed(lora(m)))),
}


def _compile_layer(model):
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    layers[1] = compiled(layers[1])
    return model
