"""Every family under every operation, by real PEFT layers: merge before, convert, merge after, equal."""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from making import book_of, equation_of, headers_of, slow_but

from regraft.adapters import convert as conversion
from regraft.adapters.convert import convert_adapter
from regraft.adapters.detect import Known
from regraft.adapters.families.base import BASE, DENSE, FAMILY, LORA, NONE, OPERATIONS
from regraft.adapters.families.table import all_families
from regraft.adapters.ranks import Options
from regraft.arrays.apply import apply_plan
from regraft.dialects.names import layout_named
from regraft.dialects.peft.config_check import PEFT_TYPES
from regraft.dialects.peft.source import Source
from regraft.errors import RefusedError
from regraft.layouts.graph import edges_to
from regraft.planning.build import build_plan
from regraft.planning.model import ModelConfig
from regraft.storage.safetensors import write_tensors

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import families_page

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

HEAD = """name = "test"
title = "a book for tests"
left = "transformers-v4"
right = "transformers-v5"
model_types = ["test"]
"""
PARAMETERS = """
[[parameters]]
side = "right"
module = "m.{l}.x"
names = ["w"]
"""
SAME = "m.{l}.o.weight : o i == m.{l}.o.weight : o i where o = 16, i = 16"


@dataclass(frozen=True)
class Shape:
    """An equation and the weights it reads, some of which are adapted."""

    text: str
    weights: dict
    absent: tuple = ()
    alike: bool = False
    """Whether all modules get the same numbers, and nothing else is adapted."""
    kind: str = "linear"


JOIN_OUT = "m.{l}.q.weight : a i\nm.{l}.k.weight : b i\n== m.{l}.n.weight : (a + b) i where a = 8, b = 8, i = 16"
JOIN_IN = "m.{l}.q.weight : o a\nm.{l}.k.weight : o b\n== m.{l}.n.weight : o (a + b) where a = 8, b = 8, o = 16"
SPLIT_OUT = (
    "m.{l}.n.weight : (a + b) i\n== m.{l}.q.weight : a i\nm.{l}.k.weight : b i\nwhere i = 16, "
)
SPLIT_IN = (
    "m.{l}.n.weight : o (a + b)\n== m.{l}.q.weight : o a\nm.{l}.k.weight : o b\nwhere o = 16, "
)
TWO = {"m.0.q": (8, 16), "m.0.k": (8, 16)}
TWO_IN = {"m.0.q": (16, 8), "m.0.k": (16, 8)}
ONE = {"m.0.n": (16, 16)}
STACK = "m.{l}.e.{e}.w.weight : o i == m.{l}.x.w : e o i where e = 2, o = 8, i = 16"

SHAPES = {
    "rename": [
        Shape(
            "m.{l}.q.weight : o i == m.{l}.z.weight : o i where o = 8, i = 16", {"m.0.q": (8, 16)}
        ),
        Shape(
            "m.{l}.q.weight : o i == n.{l}.q.weight : o i where o = 8, i = 16", {"m.0.q": (8, 16)}
        ),
    ],
    "join out": [
        Shape(JOIN_OUT, TWO),
        Shape(JOIN_OUT, TWO, alike=True),
        Shape(JOIN_OUT, TWO, absent=("m.0.k",)),
    ],
    "join in": [
        Shape(JOIN_IN, TWO_IN),
        Shape(JOIN_IN, TWO_IN, alike=True),
        Shape(JOIN_IN, TWO_IN, absent=("m.0.q",)),
    ],
    "split out": [Shape(SPLIT_OUT + "a = 8, b = 8", ONE), Shape(SPLIT_OUT + "a = 6, b = 10", ONE)],
    "split in": [Shape(SPLIT_IN + "a = 8, b = 8", ONE), Shape(SPLIT_IN + "a = 6, b = 10", ONE)],
    "transpose": [
        Shape(
            "m.{l}.q.weight : o i == m.{l}.z.weight : i o where o = 8, i = 16", {"m.0.q": (8, 16)}
        )
    ],
    "reorder out": [
        Shape(
            "m.{l}.n.weight : (h d t) i == m.{l}.z.weight : (h t d) i where h = 2, t = 2, d = 4, i = 16",
            ONE,
        ),
        Shape(
            "m.{l}.n.weight : (a + b) i == m.{l}.z.weight : (b + a) i where a = 4, b = 12, i = 16",
            ONE,
        ),
    ],
    "reorder in": [
        Shape(
            "m.{l}.n.weight : o (h d t) == m.{l}.z.weight : o (h t d) where h = 2, t = 2, d = 4, o = 16",
            ONE,
        ),
        Shape(
            "m.{l}.n.weight : o (a + b) == m.{l}.z.weight : o (b + a) where a = 4, b = 12, o = 16",
            ONE,
        ),
    ],
    "stack": [Shape(STACK, {"m.0.e.0.w": (8, 16), "m.0.e.1.w": (8, 16)}, kind="experts")],
}


def named(config, targets):
    config.target_modules = set(targets)
    if getattr(config, "feedforward_modules", None):
        forward = config.feedforward_modules  # PEFT takes entries of target_modules only
        config.feedforward_modules = {x for x in targets if x.rpartition(".")[2] in forward}
    return config


ZERO_BIAS = 1e-9
"""A dropout that asks for trained biases of zero."""

MAKERS = {
    "LoHa": [lambda: peft.LoHaConfig(r=2, alpha=3, init_weights=False)],
    "LoKr": [
        lambda: peft.LoKrConfig(r=2, alpha=3, init_weights=False),
        lambda: peft.LoKrConfig(r=1, alpha=3, init_weights=False, decompose_both=True),
    ],
    "AdaLoRA": [
        lambda: peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=10),
        lambda: peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=-1, total_step=10),
    ],
    "HiRA": [lambda: peft.HiraConfig(r=2)],
    "DeLoRA": [lambda: peft.DeloraConfig(r=2, delora_lambda=3)],
    "MiSS": [
        lambda: peft.MissConfig(r=4),
        lambda: peft.MissConfig(r=4, init_weights="mini", mini_r=2),
    ],
    "VeRA": [
        lambda: peft.VeraConfig(r=3),
        lambda: peft.VeraConfig(r=3, save_projection=False, projection_prng_key=7),
    ],
    "PVeRA": [
        lambda: peft.PveraConfig(r=3),
        lambda: peft.PveraConfig(r=3, save_projection=False, projection_prng_key=7),
    ],
    "GraLoRA": [
        lambda: peft.GraloraConfig(r=4, alpha=6, gralora_k=2),
        lambda: peft.GraloraConfig(r=4, alpha=6, gralora_k=2, hybrid_r=1),
    ],
    "WaveFT": [
        lambda: peft.WaveFTConfig(n_frequency=3, scaling=9.0),
        lambda: peft.WaveFTConfig(n_frequency=3, scaling=9.0, use_idwt=False),
    ],
    "TinyLoRA": [
        lambda: peft.TinyLoraConfig(r=2, u=3),
        lambda: peft.TinyLoraConfig(r=2, u=3, weight_tying=0.5),
        lambda: peft.TinyLoraConfig(r=2, u=3, weight_tying=1.0),
    ],
    "UniLoRA": [lambda: peft.UniLoraConfig(r=2, theta_d_length=9, save_indices=True)],
    "SuperTuning": [
        lambda: peft.SupertuningConfig(sparsity=0.9),
        lambda: peft.SupertuningConfig(sparsity=0.9, r=2, lora_alpha=3),
    ],
    "PSOFT": [
        lambda: peft.PsoftConfig(r=3),
        lambda: peft.PsoftConfig(r=3, ab_svd_init="pissa_init", use_cayley_neumann=True),
        lambda: peft.PsoftConfig(r=3, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False),
    ],
    "OSF": [
        lambda: peft.OSFConfig(effective_rank=6),
        lambda: peft.OSFConfig(effective_rank=0.5, rank_pattern={"m.0.[qk]$": 5}),
    ],
    "DEFT": [
        lambda: peft.DeftConfig(r=2),
        lambda: peft.DeftConfig(r=2, alpha=3, decomposition_method="qr"),
        lambda: peft.DeftConfig(r=2, alpha=3),
        lambda: peft.DeftConfig(r=2, para=True),
    ],
    "BEFT": [lambda: peft.BeftConfig()],
    "AdaMSS": [
        lambda: peft.AdamssConfig(r=4, num_subspaces=2, subspace_rank=2),
        lambda: peft.AdamssConfig(r=6, num_subspaces=3, subspace_rank=1, use_dynamic_rank=True),
    ],
    "Lily": [
        lambda: peft.LilyConfig(r=2, num_B=2, stride_A=1),
        lambda: peft.LilyConfig(r=3, num_B=3, stride_A=2, scaling=0.5),
    ],
    "Poly of one task": [
        lambda: peft.PolyConfig(r=2, n_skills=3),
        lambda: peft.PolyConfig(r=2, n_skills=3, n_splits=2),
    ],
    "Poly": [
        lambda: peft.PolyConfig(r=2, n_skills=3, n_tasks=2),
        lambda: peft.PolyConfig(r=2, n_skills=3, n_tasks=2, n_splits=2),
    ],
    "PEANuT": [
        lambda: peft.PeanutConfig(r=2, depth=1),
        lambda: peft.PeanutConfig(r=2, depth=0, act_fn="tanh"),
    ],
    "FRoD": [lambda: peft.FrodConfig(sparse_rate=0.1, progressbar=False)],
    "GLoRA": [
        lambda: peft.GloraConfig(r=2),
        lambda: peft.GloraConfig(r=2, config_C="none", config_D_E="none"),
        lambda: peft.GloraConfig(r=2, config_A_B="vector", config_C="vector", config_D_E="vector"),
    ],
    "VB-LoRA": [
        lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2),
        lambda: peft.VBLoRAConfig(
            r=2, num_vectors=8, vector_length=4, topk=2, save_only_topk_weights=True
        ),
    ],
    "FourierFT": [lambda: peft.FourierFTConfig(n_frequency=3, scaling=9.0)],
    "RandLoRA": [lambda: peft.RandLoraConfig(r=4)],
    "SHiRA": [lambda: peft.ShiraConfig(r=1)],
    "C3A": [
        lambda: peft.C3AConfig(block_size=4),
        lambda: peft.C3AConfig(block_size=4, block_size_pattern={"k": 2}),
    ],
    "IA³": [
        lambda: peft.IA3Config(feedforward_modules=[]),
        lambda: peft.IA3Config(feedforward_modules=["q", "k", "n", "o", "w"]),
    ],
    "OFT": [
        lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False),
        lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=True),
        lambda: peft.OFTConfig(oft_block_size=4, block_share=True),
    ],
    "BOFT": [lambda: peft.BOFTConfig(boft_block_size=4)],
    "HRA": [lambda: peft.HRAConfig(r=2), lambda: peft.HRAConfig(r=2, apply_GS=True)],
    "RoAd": [
        lambda: peft.RoadConfig(variant="road_1", group_size=4),
        lambda: peft.RoadConfig(variant="road_2", group_size=4),
        lambda: peft.RoadConfig(variant="road_4", group_size=4),
    ],
    "DoRA": [lambda: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True)],
    "LoRA with lora_bias": [
        lambda: peft.LoraConfig(r=2, lora_alpha=3, lora_bias=True),
        lambda: peft.LoraConfig(r=2, lora_alpha=3, lora_bias=True, lora_dropout=ZERO_BIAS),
    ],
    "aLoRA": [lambda: peft.LoraConfig(r=2, lora_alpha=3, alora_invocation_tokens=[1])],
    "LoRA started by PiSSA or OLoRA": [
        lambda: peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa"),
        lambda: peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights="olora"),
    ],
    "BdLoRA": [
        lambda: peft.LoraConfig(
            r=4,
            lora_alpha=3,
            use_bdlora={
                "target_modules_bd_a": ["q", "n"],
                "target_modules_bd_b": ["k", "o"],
                "nblocks": 2,
                "match_strict": False,
            },
        )
    ],
    "VeLoRA, MonteCLoRA": [
        lambda: peft.LoraConfig(r=2, lora_alpha=3, velora_config=peft.VeloraConfig()),
        lambda: peft.LoraConfig(r=2, lora_alpha=3, monteclora_config=peft.MontecloraConfig()),
    ],
    "KaSA": [lambda: peft.LoraConfig(r=2, lora_alpha=3, kasa_config=peft.KasaConfig())],
}


class Stacked(torch.nn.Module):
    """Experts in one parameter."""

    def __init__(self, weight):
        super().__init__()
        self.w = torch.nn.Parameter(weight)


def model_of(weights, biased=False):
    """A model with these weights, by the names of their modules (or of the parameter)."""
    root = torch.nn.Module()
    for name, array in weights.items():
        *path, leaf = name.removesuffix(".weight").split(".")
        here = root
        for part in path[:-1] if array.ndim == 3 else path:
            if not hasattr(here, part):
                here.add_module(part, torch.nn.Module())
            here = getattr(here, part)
        tensor = torch.tensor(np.array(array), dtype=torch.float32)
        if array.ndim == 3:
            here.add_module(path[-1], Stacked(tensor))
            continue
        linear = torch.nn.Linear(array.shape[1], array.shape[0], bias=biased)
        linear.weight.data = tensor
        here.add_module(leaf, linear)
    return root


class KMeans:
    """Clusters in place of scikit-learn's, which PEFT asks for: rows by their first number."""

    def __init__(self, n_clusters, **_):
        self.count = n_clusters

    def fit_predict(self, rows):
        return np.argsort(np.argsort(rows[:, 0])) * self.count // len(rows)


@pytest.fixture
def clusters(monkeypatch):
    """AdaMSS can be made, whether or not scikit-learn is installed."""
    package, module = ModuleType("sklearn"), ModuleType("sklearn.cluster")
    module.KMeans = KMeans
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", module)


def acting(model):
    """The weights of a model as they act on unit vectors, where what a module adds depends on all its inputs."""
    made = {}
    for name, module in model.eval().base_model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and "." in name and "lily_" not in name:
            made[name.removesuffix(".base_layer") + ".weight"] = module
    for name, module in made.items():
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        with torch.no_grad():
            out = layer(torch.eye(module.in_features)[None])[0] - module.bias
        made[name] = out.T.double().numpy()
    return made


def mixed(model):
    """The weights of a Poly model as they act on its last task."""
    made = {}
    for name, module in model.eval().base_model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("base_layer"):
            made[name + ".weight"] = module.weight.detach().double().numpy()
        if not isinstance(module, peft.tuners.poly.PolyLayer):
            continue
        task = torch.tensor([module.n_tasks["default"] - 1])
        with torch.no_grad():
            out = module(torch.eye(module.in_features)[None], task_ids=task)[0]
            made[name + ".weight"] = (out - module.base_layer.bias).T.double().numpy()
    return made


def merged(model):
    """The weights of a PEFT model after merging."""
    if model.peft_type == "POLY":
        return mixed(model)
    if model.peft_type == "LILY":
        return acting(model)
    plain = model.eval().merge_and_unload()
    return {
        name: tensor.detach().double().numpy()
        for name, tensor in plain.state_dict().items()
        if not name.endswith("bias")
    }


def has_biases(config):
    """Whether modules have biases; an AdaMSS depends on them as on its weights, and they are drawn each time."""
    return config.peft_type != "ADAMSS"


def trained(shape, make, seed):
    """A source adapter with random numbers: its config, its tensors, base weights, merged weights."""
    random = np.random.default_rng(seed)
    weights = {
        name + ".weight": random.standard_normal(size).astype(np.float32)
        for name, size in shape.weights.items()
    }
    targets = [name for name in shape.weights if name not in shape.absent]
    if not shape.alike:
        weights["m.0.o.weight"] = random.standard_normal((16, 16)).astype(np.float32)
        targets.append("m.0.o")
    torch.manual_seed(seed)
    config = named(make(), targets)
    switched = getattr(config, "alora_invocation_tokens", None)
    if switched:
        config.alora_invocation_tokens = None
    model = peft.get_peft_model(model_of(weights, has_biases(config)), config)
    config.alora_invocation_tokens = switched
    made = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_B" in name:
            leaf = name.split(".")[-2:] if "default" in name else name
            value = torch.randn_like(parameter) * 0.5
            key = str(leaf), tuple(parameter.shape)
            value = made.setdefault(key, value) if shape.alike else value
            zero = name.endswith("bias") and config.to_dict().get("lora_dropout") == ZERO_BIAS
            parameter.data = value.to(parameter.dtype) * (0 if zero else 1)
    tensors = {
        name: tensor.detach().clone().contiguous().numpy()
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    data = config.to_dict()
    data = json.loads(json.dumps(data, default=lambda x: sorted(x) if isinstance(x, set) else x))
    return data, tensors, weights, merged(model)


def loaded(config, tensors, weights, folder):
    """The merged weights of a model with a converted adapter, as PEFT loads it."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    again = peft.PeftConfig.from_pretrained(folder)
    again.alora_invocation_tokens = None  # merged as it is once the tokens have come
    model = peft.get_peft_model(model_of(weights, has_biases(again)), again)
    state = {name: torch.tensor(np.array(x)) for name, x in tensors.items()}
    result = peft.set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    shared = ("ranknum", "vera_A", "vera_B", "vector_bank", "randlora_A", "randlora_B")
    shared += ("unilora_theta_d", "tinylora_v")
    own = [k for k in result.missing_keys if "default" in k and not any(s in k for s in shared)]
    assert not own, own
    return merged(model)


class Case:
    """One adapter on its way through one equation."""

    def __init__(self, shape, make, folder, monkeypatch, seed=0):
        self.shape, self.folder = shape, folder
        kinds = {"left_kind": "linear", "right_kind": shape.kind}
        text = equation_of(shape.text, "it", **kinds) + equation_of(
            SAME, "same", "linear", "linear"
        )
        text += PARAMETERS
        self.book = book_of(text, head=HEAD)
        self.config, self.tensors, self.weights, self.merged = trained(shape, make, seed)
        self.base = folder / "base"
        self.base.mkdir(parents=True, exist_ok=True)
        (self.base / "config.json").write_text('{"model_type": "test"}')
        write_tensors(self.base / "model.safetensors", self.weights, {"format": "pt"})
        self.monkeypatch = monkeypatch

    def moved(self, tensors):
        plan = build_plan(headers_of(tensors), edges_to([self.book], "transformers-v5"))
        return apply_plan(plan, list(tensors.values()))

    def convert(self, via=None, weights=False, back=None):
        path = self.base if weights else self.folder
        model = ModelConfig({"model_type": "test"}, str(path / "config.json"))
        known = Known((self.book,), {}, model, "test", "it was said so")
        self.monkeypatch.setattr(conversion, "find_books", lambda *_: known)
        if back is not None:
            source = Source("", "test", back.config, back.tensors, back.metadata, aside=back.aside)
            return convert_adapter(source, layout_named("transformers-v4"), model)
        source = Source("", "test", self.config, dict(self.tensors))
        v4, v5 = layout_named("transformers-v4"), layout_named("transformers-v5")
        return convert_adapter(source, v5, model, v4, Options(via))

    def rung(self):
        """Where it lands by itself; the result, where there is one."""
        for weights in (False, True):
            try:
                done = self.convert(weights=weights)
            except RefusedError as error:
                refused = error
                continue
            family = done.config["peft_type"] == self.config["peft_type"]
            changed = done.config["peft_type"] == "LORA" and any(
                t.rung != FAMILY for t in done.report.targets
            )
            return (
                (BASE if done.report.targets[0].rung == "base" else LORA) if changed else FAMILY,
                done,
                family,
            )
        assert all(finding.fix for finding in refused.findings)
        try:
            return DENSE, self.convert(via="dense", weights=True), False
        except RefusedError:
            return NONE, None, False

    def check(self, done, tolerance=2e-5):
        """The law, by what PEFT makes of the result."""
        want = self.moved(self.merged)
        got = loaded(done.config, done.tensors, self.moved(self.weights), self.folder / "out")
        assert got.keys() == want.keys()
        for name, array in want.items():
            scale = np.abs(array).max()
            assert np.abs(got[name] - array).max() < tolerance * scale, name


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


TITLES = {family.title: family for family in all_families()}


UNREACHED = {("Lily", "rename"): NONE}
"""What no shape here comes to: for Lily, modules that would share otherwise (test_more_families)."""


WOVEN = {
    "join out": Shape(
        "m.{l}.q.weight : (d t) i, m.{l}.k.weight : (d u) i == m.{l}.z.weight : (d (t + u)) i "
        "where t = 1, u = 1, d = 8, i = 16",
        {"m.0.q": (8, 16), "m.0.k": (8, 16)},
    ),
    "join in": Shape(
        "m.{l}.q.weight : o (d t), m.{l}.k.weight : o (d u) == m.{l}.z.weight : o (d (t + u)) "
        "where t = 1, u = 1, d = 8, o = 16",
        {"m.0.q": (16, 8), "m.0.k": (16, 8)},
    ),
}
"""Parts whose rows, or columns, alternate in what they become."""


@pytest.mark.usefixtures("quiet", "clusters")
@pytest.mark.parametrize("operation", WOVEN)
@pytest.mark.parametrize("title", ["IA³", "VeRA", "LoHa", "HiRA"])
def test_what_alternates_is_put_in_its_order(title, operation, tmp_path, monkeypatch):
    """Laid out one part after the other, everything would be there, and nearly all of it elsewhere."""
    for number, make in enumerate(MAKERS[title]):
        case = Case(WOVEN[operation], make, tmp_path / str(number), monkeypatch, seed=number)
        _, done, _ = case.rung()
        assert done is not None
        case.check(done)


@pytest.mark.usefixtures("quiet", "clusters")
@pytest.mark.parametrize("operation", slow_but(["join out"], OPERATIONS))
@pytest.mark.parametrize("title", MAKERS)
def test_the_law_for_every_family_and_operation(title, operation, tmp_path, monkeypatch):
    """Where it lands is what the table says, and what it lands on is equal."""
    cell = TITLES[title].cell(operation)
    landed = set()
    for number, make in enumerate(MAKERS[title]):
        for place, shape in enumerate(SHAPES[operation]):
            case = Case(shape, make, tmp_path / f"{number}.{place}", monkeypatch, seed=number)
            rung, done, _ = case.rung()
            landed.add(rung)
            if done is not None:
                case.check(done)
                back = case.convert(back=done, weights=True)
                assert back.tensors.keys() == case.tensors.keys()
                for name, tensor in case.tensors.items():
                    assert (back.tensors[name] == tensor).all(), name
                assert back.config == case.config
    assert landed == {cell.rung, cell.better} - {None, UNREACHED.get((title, operation))}


ELSEWHERE = {
    "Arrow": "names only; PEFT makes one of several adapters",
    "Bone": "test_family_layers",
    "QA-LoRA": "test_more_families; PEFT makes one on a quantised base only",
    "trainable tokens": "test_family_layers",
}


def test_every_family_is_compared_with_pefts_own_layer():
    assert {family.title for family in all_families()} == {*MAKERS, *ELSEWHERE}


def test_the_page_says_what_the_code_declares():
    assert families_page.PAGE.read_text(encoding="utf-8") == families_page.page(), (
        "run scripts/families_page.py"
    )


def test_every_peft_type_has_a_family_or_is_bound_to_no_weight():
    unbound = {
        "ADAPTION_PROMPT",
        "ARROW",
        "CARTRIDGE",
        "CPT",
        "LN_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "P_TUNING",
        "SHADOW",
        "XLORA",
    }
    known = {name for family in all_families() for name in family.types}
    assert known | unbound == PEFT_TYPES
    assert not known & unbound
