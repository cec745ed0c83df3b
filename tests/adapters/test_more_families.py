"""What the merged weights of one adapter do not show: biases, routers, and what must stay as it is."""

import json
import warnings

import numpy as np
import pytest
from making import book_of, equation_of
from test_families import HEAD, SHAPES, Case, model_of

from regraft.adapters import convert as conversion
from regraft.adapters.convert import convert_adapter
from regraft.adapters.detect import Known
from regraft.adapters.families.adamss import Adamss
from regraft.adapters.families.lily import Lily
from regraft.adapters.families.osf import Osf
from regraft.adapters.families.table import family_of
from regraft.adapters.ranks import Options
from regraft.dialects.names import layout_named
from regraft.dialects.peft import unbound
from regraft.dialects.peft.config import VARIANTS
from regraft.dialects.peft.source import Source
from regraft.errors import BadInputError, RefusedError, UnmatchedKeysError
from regraft.planning.model import ModelConfig

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

V4, V5 = layout_named("transformers-v4"), layout_named("transformers-v5")
TENSOR = np.float32([[1]])


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def convert(config, tensors, book, monkeypatch, **options):
    model = ModelConfig({"model_type": "test"}, "nowhere/config.json")
    known = Known((book,), {}, model, "test", "it was said so")
    monkeypatch.setattr(conversion, "find_books", lambda *_: known)
    monkeypatch.setattr(unbound, "books_of", lambda *_: (book,))
    return convert_adapter(Source("", "test", config, tensors), V5, model, V4, Options(**options))


def book(text, left="linear", right="linear"):
    return book_of(equation_of(text, "it", left, right), head=HEAD)


# -- biases


def biased(weights, biases):
    model = model_of(weights, biased=True)
    for name, bias in biases.items():
        model.get_submodule(name).bias.data = torch.tensor(bias)
    return model


BIASED = {
    "BEFT": lambda **_: peft.BeftConfig(),
    "GLoRA": lambda **more: peft.GloraConfig(r=2, config_D_E="vector", **more),
}
JOINS = {
    "join out": (
        {"m.0.q": slice(0, 8), "m.0.k": slice(8, 16)},
        {"m.0.n": slice(0, 16)},
    ),
    "split out": (
        {"m.0.n": slice(0, 16)},
        {"m.0.q": slice(0, 8), "m.0.k": slice(8, 16)},
    ),
}


@pytest.mark.parametrize("operation", JOINS)
@pytest.mark.parametrize("title", BIASED)
def test_biases_that_change_move_with_their_rows(title, operation, tmp_path, monkeypatch):
    random = np.random.default_rng(3)
    whole = random.standard_normal((16, 16)).astype(np.float32)
    bias = random.standard_normal(16).astype(np.float32)

    def made(parts):
        weights = {f"{name}.weight": whole[rows] for name, rows in parts.items()}
        return biased(weights, {name: bias[rows] for name, rows in parts.items()})

    before, after = JOINS[operation]
    config = BIASED[title](**({"config_C": "none"} if operation == "join out" else {}))
    config.target_modules = set(before)
    model = peft.get_peft_model(made(before), config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = torch.tensor(random.standard_normal(parameter.shape)).float()
    data = json.loads(json.dumps(config.to_dict(), default=sorted))
    tensors = {n: t.numpy().copy() for n, t in peft.get_peft_model_state_dict(model).items()}
    done = convert(data, tensors, book(SHAPES[operation][0].text), monkeypatch)
    (tmp_path / "adapter_config.json").write_text(json.dumps(done.config))
    again = peft.get_peft_model(made(after), peft.PeftConfig.from_pretrained(tmp_path))
    state = {n: torch.tensor(np.array(t)) for n, t in done.tensors.items()}
    assert not peft.set_peft_model_state_dict(again, state).unexpected_keys
    x = torch.tensor(random.standard_normal((3, 16))).float()
    outputs = []
    for one, parts in ((model, before), (again, after)):
        one.eval()
        found = [one.base_model.model.get_submodule(name)(x) for name in parts]
        outputs.append(torch.cat(found, dim=1).detach().numpy())
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-4 * np.abs(outputs[0]).max()


def test_a_bias_that_changes_is_not_added_twice(monkeypatch):
    tensors = {"base_model.model.m.0.n.beft_bias": np.ones((1, 16), np.float32)}
    config = {"peft_type": "BEFT", "target_modules": ["n"]}
    with pytest.raises(RefusedError, match="once for each piece"):
        convert(config, tensors, book(SHAPES["split in"][0].text), monkeypatch)


# -- quantised bases


def test_a_qa_lora_becomes_the_lora_that_peft_computes(monkeypatch):
    variant = peft.tuners.lora.variants.QALoraLinearVariant
    random = np.random.default_rng(0)
    a, b = random.standard_normal((3, 4)), random.standard_normal((8, 3))

    class Layer(torch.nn.Module):
        in_features, scaling, qalora_group_size = 16, {"d": 5 / 3}, {"d": 4}

        def __init__(self):
            super().__init__()
            self.lora_A = torch.nn.ModuleDict({"d": torch.nn.Linear(4, 3, bias=False)})
            self.lora_B = torch.nn.ModuleDict({"d": torch.nn.Linear(3, 8, bias=False)})
            self.lora_dropout = torch.nn.ModuleDict({"d": torch.nn.Identity()})

    layer = Layer().double()
    layer.lora_A["d"].weight.data, layer.lora_B["d"].weight.data = map(torch.tensor, (a, b))
    want = variant.forward(layer, "d", torch.eye(16).double(), torch.zeros(16, 8).double()).T
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q"],
        "use_qalora": True,
        "qalora_group_size": 4,
    }
    tensors = {
        "base_model.model.m.0.q.lora_A.weight": a,
        "base_model.model.m.0.q.lora_B.weight": b,
    }
    done = convert(config, tensors, book(SHAPES["transpose"][0].text), monkeypatch)
    got_a, got_b = (done.tensors[f"base_model.model.m.0.z.lora_{x}.weight"] for x in "AB")
    scale = done.config["lora_alpha"] / done.config["r"]
    assert not done.config.get("use_qalora")
    assert np.abs((got_b @ got_a).T * scale - want.detach().numpy()).max() < 1e-12
    rows = convert(config, tensors, book(SHAPES["join out"][0].text), monkeypatch, via=None)
    assert rows.config["use_qalora"]
    assert rows.tensors["base_model.model.m.0.n.lora_A.weight"].shape == (3, 4)


# -- what depends on the input, or on other modules


def lily(paths, stride=1):
    random = np.random.default_rng(1)
    tensors = {}
    for path in paths:
        for leaf, shape in (("A", (2, 16)), ("B", (4, 8)), ("router", (2, 2))):
            key = f"base_model.model.{path}.lily_{leaf}.weight"
            tensors[key] = random.standard_normal(shape).astype(np.float32)
    return tensors, {"peft_type": "LILY", "r": 2, "num_B": 2, "stride_A": stride}


RENAME = "m.{l}.q.weight : o i == m.{l}.z.weight : o i where o = 8, i = 16"


def shared(tensors, leaf, *paths):
    keys = [f"base_model.model.{path}.lily_{leaf}.weight" for path in paths]
    for key in keys[1:]:
        tensors[key] = tensors[keys[0]]


def test_lily_follows_a_new_name_where_the_same_modules_share(monkeypatch):
    paths = [f"m.{layer}.q" for layer in (0, 1, 2, 10)]
    tensors, config = lily(paths, stride=2)
    shared(tensors, "B", *paths)
    shared(tensors, "A", *paths[:2])
    shared(tensors, "A", *paths[2:])
    config["target_modules"] = ["q"]
    done = convert(config, tensors, book(RENAME), monkeypatch)
    assert done.tensors == {name.replace(".q.", ".z."): t for name, t in tensors.items()}


def test_lily_is_refused_where_others_would_share(monkeypatch):
    tensors, config = lily(["m.0.q", "m.1.q"])
    config["target_modules"] = ["q", "z"]
    with pytest.raises(RefusedError, match="other modules than before would share"):
        convert(config, tensors, book(RENAME), monkeypatch)


def test_families_that_read_the_input_are_never_merged_away(monkeypatch):
    tensors, config = lily(["m.0.q", "m.0.k"])
    config["target_modules"] = ["q", "k"]
    with pytest.raises(RefusedError) as error:
        convert(config, tensors, book(SHAPES["join out"][0].text), monkeypatch, via="dense")
    assert all("cannot merge it either" in f.fix for f in error.value.findings)
    assert not Lily.merges


def test_adamss_follows_names_only(monkeypatch):
    tensors = {
        f"base_model.model.m.0.q.adamss_{end}": np.ones(shape, np.float32)
        for end, shape in (
            ("A.0", (2, 4)),
            ("A.1", (2, 4)),
            ("B.0", (5, 2)),
            ("B.1", (3, 2)),
            ("newB", (4, 17)),
        )
    }
    config = {"peft_type": "ADAMSS", "r": 4, "target_modules": ["q"]}
    done = convert(config, tensors, book(RENAME), monkeypatch)
    assert list(done.tensors) == [name.replace(".q.", ".z.") for name in tensors]
    assert done.config["target_modules"] == ["m.0.z"]
    with pytest.raises(RefusedError, match="clusters"):
        convert(config, tensors, book(SHAPES["transpose"][0].text), monkeypatch)
    assert Adamss.cell("stack").rung == "none"


# -- what is missing


def drop(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def changed(**fields):
    return lambda config, tensors: ({**config, **fields}, tensors)


MISSING = {
    "no projections": (
        lambda: peft.TinyLoraConfig(r=2, u=3, save_projection=False),
        lambda config, tensors: (config, tensors),
        "save_projection was off",
    ),
    "another seed": (
        lambda: peft.TinyLoraConfig(r=2, u=3),
        changed(projection_seed=1),
        "drawn otherwise",
    ),
    "no matrices": (
        lambda: peft.VeraConfig(r=3),
        lambda config, tensors: (config, drop(tensors, "vera_A")),
        "save_projection is on",
    ),
    "a vector less": (
        lambda: peft.TinyLoraConfig(r=2, u=3),
        lambda config, tensors: (config, drop(tensors, "tinylora_v.1")),
        "not in the file",
    ),
    "no vector": (
        lambda: peft.UniLoraConfig(r=2, theta_d_length=9, save_indices=True),
        lambda config, tensors: (config, drop(tensors, "theta_d")),
        "not in the file",
    ),
    "no places": (
        lambda: peft.SupertuningConfig(sparsity=0.9, save_precomputed_indices=False),
        lambda config, tensors: (config, tensors),
        "save_precomputed_indices",
    ),
    "a wavelet": (
        lambda: peft.WaveFTConfig(n_frequency=3, wavelet_family="db2"),
        lambda config, tensors: (config, tensors),
        "'db2'",
    ),
    "random vectors": (
        lambda: peft.PsoftConfig(r=3, psoft_svd="lowrank"),
        lambda config, tensors: (config, tensors),
        "random numbers",
    ),
    "an activation": (
        lambda: peft.PeanutConfig(r=2, depth=1, act_fn="gelu"),
        lambda config, tensors: (config, tensors),
        "'gelu'",
    ),
    "no shared matrices": (
        lambda: peft.FrodConfig(sparse_rate=0.1, progressbar=False, save_projection=False),
        lambda config, tensors: (config, tensors),
        "save_projection was off",
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named(name, tmp_path, monkeypatch):
    make, change, why = MISSING[name]
    case = Case(SHAPES["stack"][0], make, tmp_path, monkeypatch)
    case.config, case.tensors = change(case.config, case.tensors)
    via = "dense" if name == "no shared matrices" else None
    with pytest.raises(RefusedError) as error:
        case.convert(via, weights=True)
    assert all(why in finding.message and finding.fix for finding in error.value.findings)


RANKED = {
    "LoHa": lambda: peft.LoHaConfig(r=2, alpha=3, init_weights=False),
    "DeLoRA": lambda: peft.DeloraConfig(r=2, delora_lambda=3),
    "PVeRA": lambda: peft.PveraConfig(r=2),
    "HRA": lambda: peft.HRAConfig(r=2),
    "DoRA": lambda: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True),
    "Lily": lambda: peft.LilyConfig(r=2, num_B=2, stride_A=1),
    "MiSS": lambda: peft.MissConfig(r=2),
    "GraLoRA": lambda: peft.GraloraConfig(r=2, alpha=6, gralora_k=2),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=3, init_weights=False, decompose_factor=2),
}


@pytest.mark.parametrize("title", RANKED)
def test_tensors_have_the_rank_that_the_config_gives(title, tmp_path, monkeypatch):
    case = Case(SHAPES["rename"][0], RANKED[title], tmp_path, monkeypatch)
    case.config["r"] = 4
    with pytest.raises(BadInputError, match=r"gives the rank 4, its tensors have 2"):
        case.convert(None)


# -- copies of saved biases

BIAS_TURNED = "m.{l}.r.bias : (h t) == m.{l}.r.bias : (t h) where h = 2, t = 3"


def biases(monkeypatch, equation):
    rule = book_of(equation_of(RENAME) + equation_of(equation, "bias"), head=HEAD)
    names = ("m.0.r.bias", "m.0.r.original_module.bias")
    tensors = {f"base_model.model.{name}": np.arange(6, dtype=np.float32) for name in names}
    tensors |= {
        "base_model.model.m.0.q.lora_A.weight": np.ones((1, 16), np.float32),
        "base_model.model.m.0.q.lora_B.weight": np.ones((8, 1), np.float32),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"], "bias": "all"}
    return convert(config, tensors, rule, monkeypatch)


def test_a_copy_of_a_bias_gets_its_new_name(monkeypatch):
    done = biases(monkeypatch, "m.{l}.r.bias : o == m.{l}.s.bias : o where o = 6")
    names = {name.removeprefix("base_model.model.m.0.") for name in done.tensors}
    assert names == {"z.lora_A.weight", "z.lora_B.weight", "s.bias", "s.original_module.bias"}


def test_a_copy_of_a_bias_stands_on_what_stays(monkeypatch):
    with pytest.raises(RefusedError, match="a copy of is stored differently"):
        biases(monkeypatch, BIAS_TURNED)


# -- adapters that name no module

ROTATED = """m.{l}.k_proj.weight : (h d t) i == m.{l}.k_proj.weight : (h t d) i
where h = 2, t = 2, d = 4, i = 16"""


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE"])
def test_a_prefix_stays_where_heads_keep_their_order(kind, monkeypatch):
    config, tensors = {"peft_type": kind}, {"prompt_embeddings": TENSOR}
    model = book(RENAME)
    monkeypatch.setattr(conversion, "find_books", lambda *_: Known((), {}, None, None, "nothing"))
    monkeypatch.setattr(unbound, "books_of", lambda *_: (model,))
    done = convert_adapter(Source("", "test", config, tensors), V5)
    assert done.tensors == tensors
    monkeypatch.setattr(unbound, "books_of", lambda *_: (book(ROTATED),))
    with pytest.raises(RefusedError, match="attention heads"):
        convert_adapter(Source("", "test", config, tensors), V5)


def test_no_rule_of_the_library_reorders_keys_or_values(monkeypatch):
    monkeypatch.setattr(unbound, "books_of", lambda *_: None)
    source = Source("", "test", {"peft_type": "PREFIX_TUNING"}, {"prompt_embeddings": TENSOR})
    assert not unbound.check_unbound(source, None)


ALONE = {
    "X-LoRA": ({"peft_type": "XLORA", "layerwise_scalings": True}, "base_model.classifier.weight"),
    "Shadow": ({"peft_type": "SHADOW"}, "base_model.model.m.0.shadow_down.default.weight"),
    "UniLoRA": ({"peft_type": "UNILORA", "target_modules": ["q"]}, "base_model.unilora_theta_d"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_goes_by_the_order_of_modules_stays_or_is_refused(name, monkeypatch):
    config, key = ALONE[name]
    tensors = {key: TENSOR}
    same = book("m.{l}.q.weight : o i == m.{l}.q.weight : o i")
    done = convert(config, tensors, same, monkeypatch)
    assert done.tensors == tensors
    assert done.config == config
    assert done.report.copied
    with pytest.raises(RefusedError, match=r"order of|copy of the base") as error:
        convert(config, tensors, book(RENAME), monkeypatch)
    assert error.value.findings[0].fix
    monkeypatch.setattr(unbound, "books_of", lambda *_: None)
    with pytest.raises(UnmatchedKeysError):
        convert_adapter(Source("", "test", config, tensors), V5)


def test_x_lora_that_scales_all_layers_alike_stays(monkeypatch):
    config = {"peft_type": "XLORA", "layerwise_scalings": False}
    tensors = {"base_model.internal_xlora_classifier.layers.0.weight": TENSOR}
    assert convert(config, tensors, book(RENAME), monkeypatch).tensors == tensors


def test_unilora_without_places_stays_where_its_modules_do(monkeypatch):
    config, key = {"peft_type": "UNILORA", "target_modules": ["v"]}, "base_model.unilora_theta_d"
    assert convert(config, {key: TENSOR}, book(RENAME), monkeypatch).report.copied


# -- configs


def test_osf_finds_a_rank_by_the_pattern_that_is_written():
    patterns = Osf.spell({"q": 5, r"^m\.1\.k": 6})
    read = Osf({"effective_rank": 2, "rank_pattern": patterns}, {})
    wanted = {"m.0.q": 5, "m.0.xq": 2, "m.0.q.k": 2, "m.1.k": 6, "m.1.kk": 2, "l.m.1.k": 2}
    for path, rank in wanted.items():
        assert read.settings(path) == {"effective_rank": rank}, path


def test_every_variant_of_lora_that_peft_has_is_known():
    """What a new PEFT adds must get a family, or be found to be a plain LoRA."""
    variants = {
        name.removesuffix("Variant")
        for name, value in vars(peft.tuners.lora.variants).items()
        if isinstance(value, type) and name.endswith("Variant") and not name.startswith("_")
    }
    assert variants - {"Lora"} == {
        "ALoraLinear",
        "ArrowLinear",
        "BdLoraLinear",
        "DoraConv1d",
        "DoraConv2d",
        "DoraConv3d",
        "DoraEmbedding",
        "DoraLinear",
        "KasaLinear",
        "MiCAEmbedding",  # a plain LoRA that starts otherwise
        "MiCALinear",
        "MontecloraLinear",
        "QALoraLinear",
        "VeloraLinear",
    }
    switches = {
        name
        for name in peft.LoraConfig(r=1).to_dict()
        if name.startswith("use_") or name.endswith(("_config", "_tokens", "_bias"))
    }
    start = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
    not_the_sum = {"use_rslora", "megatron_config", "runtime_config"}
    assert switches - start - not_the_sum == set(VARIANTS)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", "eva"])
def test_what_only_starts_otherwise_is_a_plain_lora(init):
    assert family_of({"peft_type": "LORA", "init_lora_weights": init}) is None


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_a_start_that_cannot_be_repeated_follows_names_only(init, tmp_path, monkeypatch):
    make = lambda: peft.LoraConfig(r=2, lora_alpha=3)  # noqa: E731
    case = Case(SHAPES["join out"][0], make, tmp_path, monkeypatch)
    case.config["init_lora_weights"] = init
    with pytest.raises(RefusedError, match="cannot be repeated"):
        case.convert(weights=True)
    case = Case(SHAPES["rename"][0], make, tmp_path / "rename", monkeypatch)
    case.config["init_lora_weights"] = init
    done = case.convert()
    assert done.config["init_lora_weights"] == init
    assert "base_model.model.m.0.z.lora_A.weight" in done.tensors
