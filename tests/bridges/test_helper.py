"""Helper processes: what they import, what they may do, and how they die."""

import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import regraft
from regraft.bridges.helper import Helper, HelperEndedError
from regraft.bridges.transformers.trial import try_checkpoint
from regraft.errors import BadInputError
from regraft.import_path import clean_path, import_path

BASE = Path(__file__).parents[1] / "golden" / "bases" / "mixtral"


def answer_modules(question):
    return sorted({name.partition(".")[0] for name in sys.modules})


def answer_with(question):
    return eval(question)


@pytest.fixture
def helper():
    made = []

    def make(function):
        made.append(Helper("test_helper", function))
        return made[-1]

    yield make
    for one in made:
        one.close()


def importable():
    """Every top-level module that there is for a helper to import."""
    there = {found.name for found in pkgutil.iter_modules()}
    return {name for name in there | sys.stdlib_module_names if name.isidentifier()} - {"__main__"}


_ASK = """
import sys
from regraft.planning.model import load_model
from regraft.bridges.transformers.trial import Loading, try_checkpoint
sys.path[:0] = ["", "."]
try_checkpoint(Loading(load_model("."), "."))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["command", "python"])
def test_files_of_the_current_folder_are_never_run(tmp_path, way):
    """A file under every name that a helper can import lies in the current folder, the checkpoint's: none is run.

    Its config names code that comes with it, under names that are planted, too.
    """
    names = {
        *importable(),
        "sitecustomize",
        "usercustomize",
        "torch",
        "random",
        "regraft",
        "modeling_mixtral",
        "configuration_mixtral",
    }
    assert len(names) > 200
    shutil.copytree(BASE, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_mixtral.MixtralConfig",
        "AutoModelForCausalLM": "modeling_mixtral.MixtralForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in names:
        text = f"open({str(tmp_path / 'RUN')!r}, 'a').write('{name} ')\n"
        (tmp_path / f"{name}.py").write_text(text)
    command = Path(sys.executable).with_name("regraft")
    start = [str(command)] if command.exists() else [sys.executable, "-P", "-m", "regraft"]
    asked = [sys.executable, "-P", "-c", _ASK]
    out = subprocess.run(
        [*start, "check", "."] if way == "command" else asked,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert not (tmp_path / "RUN").exists(), (tmp_path / "RUN").read_text()


def test_import_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = str(Path(regraft.__file__).parents[1])
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    entries = ["", ".", "lib", str(tmp_path), str(tmp_path / "link"), "/usr/lib", home]
    assert clean_path(entries, [tmp_path]) == ["/usr/lib", home]
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(tmp_path) not in import_path()


@pytest.mark.slow
def test_regraft_is_found_where_it_is_not_on_the_path(helper, monkeypatch):
    tests = str(Path(__file__).parent)
    kept = [p for p in sys.path if p and Path(p) != Path(regraft.__file__).parents[1]]
    monkeypatch.setattr(sys, "path", [*kept, tests])
    assert helper("answer_with").ask("__import__('regraft').__file__") == regraft.__file__


@pytest.mark.slow
def test_the_network_is_out_of_reach(helper):
    there = helper("answer_with")
    tried = (
        "[getattr(__import__('socket'), 'create_connection')(('127.0.0.1', 9))]",
        "[__import__('socket').getaddrinfo('example.org', 80)]",
    )
    for question in tried:
        with pytest.raises(HelperEndedError, match="does not use the network"):
            there.ask(question)
    assert there.ask("__import__('huggingface_hub').constants.HF_HUB_OFFLINE") is True


@pytest.mark.slow
def test_a_death_is_told_with_its_last_words(helper):
    there = helper("answer_with")
    with pytest.raises(HelperEndedError, match=r"status 1.*ZeroDivisionError: division by zero"):
        there.ask("1 / 0")
    assert there.ask("1 + 1") == 2
    with pytest.raises(HelperEndedError, match="status -9"):
        there.ask("__import__('os').kill(__import__('os').getpid(), 9)")


def test_no_answer_in_time(helper, monkeypatch):
    monkeypatch.setenv("REGRAFT_HELPER_SECONDS", "1")
    there = helper("answer_with")
    with pytest.raises(HelperEndedError, match="no answer after 1 seconds"):
        there.ask("__import__('time').sleep(60)")
    assert not there.is_running


def _base(tmp_path, **fields):
    data = {**json.loads((BASE / "config.json").read_text()), **fields}
    (tmp_path / "config.json").write_text(json.dumps(data))
    return tmp_path


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "AutoTokenizer", "PreTrainedModel"])
def test_only_classes_of_models_are_built(tmp_path, name):
    from regraft.bridges.transformers.blank import classes_of
    from regraft.planning.model import load_model

    with pytest.raises(BadInputError, match="no model in transformers") as caught:
        classes_of(load_model(_base(tmp_path, architectures=[name])), None, lambda: [])
    assert caught.value.findings[0].code == "model-config"


def test_nothing_is_fetched(tmp_path):
    """A config that names a repository to load a part of the model from."""
    from regraft.bridges.transformers.trial import Loading
    from regraft.planning.model import load_model

    config = {
        "model_type": "detr",
        "architectures": ["DetrModel"],
        "use_timm_backbone": False,
        "backbone": "someone/something",
        "use_pretrained_backbone": True,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="offline") as caught:
        try_checkpoint(Loading(load_model(tmp_path), str(tmp_path)))
    assert caught.value.findings[0].code == "model-config"


@pytest.mark.parametrize("count", [2**31, 10**30, 10**400])
def test_counts_that_no_model_has(tmp_path, count):
    from regraft.planning.model import load_model

    folder = _base(tmp_path, num_local_experts=count, text_config={"num_hidden_layers": count})
    with pytest.raises(BadInputError) as caught:
        load_model(folder)
    keys = [finding.key for finding in caught.value.findings]
    assert keys == ["num_local_experts", "text_config.num_hidden_layers"]
