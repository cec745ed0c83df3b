import torch, transformers
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from regraft.names.skeleton import *


def skeleton_of(model):
    subs = []
    kinds = {}
    pars = {}
    for n, m in model.named_modules():
        if isinstance(m, PreTrainedModel):
            mro = [
                c
                for c in type(m).__mro__
                if issubclass(c, PreTrainedModel) and c is not PreTrainedModel
            ]
            cl = tuple(c.__name__ for c in mro)
            native = next(
                (c.__name__ for c in mro if c.__module__.startswith("transformers.")), None
            )
            subs.append(
                SubModel(
                    n,
                    cl,
                    native,
                    m.config.model_type,
                    m.config,
                    m.base_model_prefix,
                    tuple(m._keys_to_ignore_on_load_unexpected or ()),
                )
            )
        w = {torch.nn.Linear: "linear", Conv1D: "conv1d", torch.nn.Embedding: "embedding"}
        k = next((v for c, v in w.items() if isinstance(m, c)), None)
        own = []
        for p, t in m._parameters.items():
            if t is None:
                continue
            full = f"{n}.{p}" if n else p
            if k and p == "weight":
                kinds[full] = k
            elif k is None and not isinstance(m, torch.nn.modules.conv._ConvNd):
                if t.ndim == 3:
                    kinds[full] = (
                        "experts-transposed" if getattr(m, "is_transposed", False) else "experts"
                    )
                    own.append(p)
                elif t.ndim == 2:
                    kinds[full] = "parameter"
                    own.append(p)
        if own:
            pars[n] = tuple(own)
    return Skeleton(
        tuple(subs), {k: tuple(v.shape) for k, v in model.state_dict().items()}, kinds, pars
    )
