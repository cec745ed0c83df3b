"""Models loaded from what is not a folder of safetensors here: stores, DCP, Megatron-Core's folders, ranks' files."""

import json
from pathlib import Path

import pytest
from object_server import serving

import regraft
from regraft.errors import BadInputError
from regraft.sources.places import opened
from regraft.storage import objects, outline

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


@pytest.fixture
def server(monkeypatch):
    with serving() as running:
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "r")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        running.put_folder(MIXTRAL, "b/mixtral")
        yield running


def bare_mixtral():
    config = transformers.AutoConfig.from_pretrained(MIXTRAL)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_from_a_store(expected, server):
    """By S3, and by plain HTTP, where nothing can be listed: the folder, and the file alone."""
    wanted = expected(MIXTRAL)
    places = ["s3://b/mixtral", f"{server.url}/b/mixtral"]
    for place in places:
        check_equal(state_of(place, dtype=torch.float32), wanted)
    for place in [*places, f"{server.url}/b/mixtral/model.safetensors"]:
        model = bare_mixtral()
        done = regraft.load_checkpoint(model, place)
        assert done.way == "copy"
        check_equal(wanted, model.state_dict())
    assert opened() == 0


@pytest.mark.parametrize("name", [FOLDERS[0], FOLDERS[3]])
def test_what_training_left_by_http(expected, server, name):
    """A server that cannot list is asked for what torch calls its files."""
    server.put_folder(TESTS / "storage" / name, "b/run")
    place = f"{server.url}/b/run"
    check_equal(state_of(place, dtype=torch.float32), expected(TESTS / "storage" / name))
    assert opened() == 0


def test_files_of_torch_by_http(server, tmp_path):
    model = bare_mixtral()
    half = list(model.state_dict().items())
    files = {
        "pytorch_model-00001-of-00002.bin": half[::2],
        "pytorch_model-00002-of-00002.bin": half[1::2],
    }
    for file, rows in files.items():
        torch.save(dict(rows), tmp_path / file)
    names = {name: file for file, rows in files.items() for name, _ in rows}
    index = {"metadata": {}, "weight_map": names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((MIXTRAL / "config.json").read_bytes())
    server.put_folder(tmp_path, "b/torch")
    again = bare_mixtral()
    regraft.load_checkpoint(again, f"{server.url}/b/torch")
    check_equal(model.state_dict(), again.state_dict())


def test_faults_while_a_model_is_loaded(expected, server, monkeypatch):
    """What may pass is asked for again; what stays is an error with the address, and leaves the model as it was."""
    monkeypatch.setattr(objects, "PAUSE", 0.0)
    monkeypatch.setattr(outline, "_HEAD", 4096)
    wanted = expected(MIXTRAL)
    place = f"{server.url}/b/mixtral"
    for fault in ("503", "drop", "short", "less"):
        server.fault = lambda request, fault=fault: fault if request.number % 3 == 0 else None
        model = bare_mixtral()
        regraft.load_checkpoint(model, place)
        check_equal(wanted, model.state_dict())
    server.fault = lambda request: "etag" if request.range and request.range[0] else None
    model = bare_mixtral()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BadInputError, match="changed while it was read") as caught:
        regraft.load_checkpoint(model, place)
    assert caught.value.findings[0].where == f"{place}/model.safetensors"
    check_equal(before, model.state_dict())


def test_a_place_without_weights(server):
    server.data["b/bare/config.json"] = server.data["b/mixtral/config.json"]
    for place in ("s3://b/bare", f"{server.url}/b/bare"):
        with pytest.raises(BadInputError, match="no weights here") as caught:
            state_of(place)
        assert caught.value.findings[0].where == place


def test_what_transformers_would_have_to_read_itself_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="transformers cannot read it by itself"):
        regraft.from_pretrained(
            transformers.AutoModelForCausalLM, TESTS / "storage" / FOLDERS[0], load="off"
        )
    assert opened() == 0
