"""Models loaded from what is not a folder of safetensors here: stores, DCP, Megatron-Core's folders, ranks' files."""

from pathlib import Path

import pytest
from object_server import serving

import regraft
from regraft.errors import BadInputError
from regraft.places import opened

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TESTS = Path(__file__).parents[1]
MIXTRAL = TESTS / "golden" / "bases" / "mixtral"
FOLDERS = ["megatron/llama", "megatron/qwen3_moe", "megatron/deepseek_v3", "dcp/flat", "dcp/ranks"]


def state_of(source, **options):
    model = regraft.from_pretrained(transformers.AutoModelForCausalLM, source, **options)
    assert model.regraft_load.way == "copy"
    assert model.name_or_path == str(source)
    return model.state_dict()


def check_equal(one, other):
    assert one.keys() == other.keys()
    wrong = [name for name in one if not torch.equal(one[name].float(), other[name].float())]
    assert not wrong


@pytest.fixture
def expected(tmp_path):
    def converted(source):
        regraft.convert(source, tmp_path / "v5", to="transformers-v5")
        cls = transformers.AutoModelForCausalLM
        return cls.from_pretrained(tmp_path / "v5", dtype=torch.float32).state_dict()

    return converted


@pytest.mark.parametrize("name", FOLDERS)
def test_what_training_left(expected, name):
    source = TESTS / "storage" / name
    check_equal(state_of(source, dtype=torch.float32), expected(source))
    assert opened() == 0


@pytest.mark.parametrize("name", FOLDERS[:2])
def test_into_a_model_that_is_there(expected, name):
    source = TESTS / "storage" / name
    config = transformers.AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    done = regraft.load_checkpoint(model, source)
    assert done.way == "copy"
    check_equal(model.state_dict(), expected(source))


def test_from_a_store(expected, monkeypatch):
    with serving() as server:
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "r")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.put_folder(MIXTRAL, "b/mixtral")
        got = state_of("s3://b/mixtral", dtype=torch.float32)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(MIXTRAL), dtype=torch.float32
        )
        regraft.load_checkpoint(model, "s3://b/mixtral")
    check_equal(got, expected(MIXTRAL))
    check_equal(got, model.state_dict())


def test_what_transformers_would_have_to_read_itself_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="transformers cannot read it by itself"):
        regraft.from_pretrained(
            transformers.AutoModelForCausalLM, TESTS / "storage" / FOLDERS[0], load="off"
        )
    assert opened() == 0
