"""Families that change the bias of a module as well: it is changed as it was, wherever its rows have gone."""

import numpy as np
import pytest
import test_families as families
from making import slow_but
from test_families import FAMILY, MAKERS, SHAPES, TITLES, Case

import regraft
from regraft.adapters.convert import convert_adapter
from regraft.adapters.detect import Known
from regraft.adapters.ranks import Options
from regraft.dialects.names import layout_named
from regraft.dialects.peft.source import Source
from regraft.planning.model import ModelConfig

torch = families.torch

CHANGING = [title for title in MAKERS if TITLES[title].changes_bias]


class Biased:
    """Models get the biases that are told; merged biases are noted."""

    def __init__(self, monkeypatch):
        self.given, self.noted = {}, {}
        model_of, merged = families.model_of, families.merged

        def with_biases(weights, biased=False):
            model = model_of(weights, True)
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear):
                    module.bias.data = torch.tensor(self.bias(name, module.out_features))
            return model

        def noting(model):
            weights = merged(model)
            plain = model.get_base_model() if hasattr(model, "get_base_model") else model
            self.noted = {
                name.removesuffix(".bias"): tensor.detach().double().numpy()
                for name, tensor in plain.state_dict().items()
                if name.endswith(".bias")
            }
            return weights

        monkeypatch.setattr(families, "model_of", with_biases)
        monkeypatch.setattr(families, "merged", noting)

    def bias(self, name, size):
        if name not in self.given:
            random = np.random.default_rng(len(self.given) + 5)
            self.given[name] = random.standard_normal(size).astype(np.float32)
        return self.given[name]


def moved_rows(case, biases):
    """Biases after their weights' rows have moved: each is a weight whose columns are all the same."""
    weights = {
        name: np.repeat(biases[name.removesuffix(".weight")][:, None], w.shape[1], axis=1)
        for name, w in case.weights.items()
    }
    return {
        name.removesuffix(".weight"): np.ascontiguousarray(w[:, 0])
        for name, w in case.moved(weights).items()
    }


def test_there_are_families_that_change_biases():
    assert {"IA³", "RoAd", "LoRA with lora_bias"} <= set(CHANGING)


@pytest.mark.parametrize(
    "operation", slow_but(["split out"], ["rename", "join out", "split out", "reorder out"])
)
@pytest.mark.parametrize("title", CHANGING)
@pytest.mark.filterwarnings("ignore")
def test_biases_follow_rows(title, operation, tmp_path, monkeypatch):
    checked, changed = 0, False
    for number, make in enumerate(MAKERS[title]):
        for place, shape in enumerate(SHAPES[operation]):
            with monkeypatch.context() as patch:
                biased = Biased(patch)
                case = Case(shape, make, tmp_path / f"{number}.{place}", patch, seed=number)
                before, want = dict(biased.given), dict(biased.noted)
                rung, done, _ = case.rung()
                if rung != FAMILY:
                    continue
                biased.given = moved_rows(case, before)
                case.check(done)
                changed |= any((want[name] != before[name]).any() for name in want)
                for name, bias in moved_rows(case, want).items():
                    np.testing.assert_allclose(biased.noted[name], bias, atol=2e-5)
                checked += 1
    assert checked
    assert changed


@pytest.mark.parametrize("title", ["IA³", "RoAd"])
@pytest.mark.filterwarnings("ignore")
def test_a_changed_bias_is_no_lora(title, tmp_path, monkeypatch):
    """A LoRA leaves the bias as it is, so where the base has one, full rank is refused as well."""
    case = Case(SHAPES["stack"][0], MAKERS[title][0], tmp_path / "case", monkeypatch)
    names = [name.removesuffix("weight") + "bias" for name in case.weights]
    tensors = {**case.weights, **{n: np.full(16, 0.5, np.float32) for n in names}}
    tensors = {n: t[:8] if n.endswith("bias") and "e." in n else t for n, t in tensors.items()}
    families.write_tensors(case.base / "model.safetensors", tensors, {"format": "pt"})
    model = ModelConfig({"model_type": "test"}, str(case.base / "config.json"))
    known = Known((case.book,), {}, model, "test", "it was said so")
    monkeypatch.setattr(families.conversion, "find_books", lambda *_: known)
    v4, v5 = layout_named("transformers-v4"), layout_named("transformers-v5")
    source = Source("", "test", case.config, dict(case.tensors))
    with pytest.raises(regraft.RefusedError, match="bias"):
        convert_adapter(source, v5, model, v4, Options("dense"))
