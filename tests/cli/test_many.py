"""Several sources on one command line: each by itself, and one verdict each."""

import json
import shlex
import shutil
import signal
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from dialects.test_tools import ATTENTION, make_adapter, make_base

import regraft
import regraft.converting.convert as convert_module
from regraft.checking.check import check, check_with
from regraft.cli import main
from regraft.errors import BadInputError, Finding
from regraft.sources.resolve import find_sources
from regraft.storage.safetensors import open_tensors, write_tensors
from regraft.views.schema import schema_of

GOLDEN = Path(__file__).parents[1] / "golden"
CASES, BASES = GOLDEN / "cases", GOLDEN / "bases"
TO = ("--to", "transformers-v5")


@pytest.fixture
def loras(tmp_path):
    """A folder as people have it: good ones, a refused one, a broken one, one two folders down, and a checkpoint."""
    folder = tmp_path / "loras"
    for name, case in {
        "a": "mixtral__gud_attn",
        "dora": "mixtral__dora",
        "deep/er": "mixtral__gud_attn",
    }.items():
        shutil.copytree(CASES / case, folder / name)
    shutil.copytree(CASES / "mixtral__gud_attn", folder / "torn")
    (folder / "torn/adapter_model.safetensors").write_bytes(b"nothing")
    shutil.copytree(BASES / "mixtral", folder / "model")
    (folder / "README.md").write_text("mine")
    return folder


def convert(capsys, *args):
    status = main(["convert", *map(str, args), *TO])
    return status, *capsys.readouterr()


def test_each_is_converted_by_itself_and_a_table_says_what_became_of_it(loras, tmp_path, capsys):
    status, words, told = convert(capsys, loras, tmp_path / "out")
    assert status == 1
    assert sorted(p.name for p in (tmp_path / "out").glob("[!.]*")) == ["a", "deep", "model"]
    assert (tmp_path / "out/deep/er/adapter_config.json").is_file()
    lines = [line for line in words.splitlines() if line[:1].isalpha() and line != "Fix:"]
    table = {line.split()[0]: line.split()[1] for line in lines}
    assert "5 sources: 3 converted, 1 refused, 1 failed" in words
    assert {name: table[name] for name in ("a", "dora", "deep/er", "torn", "model")} == {
        "a": "converted", "dora": "refused", "deep/er": "converted", "torn": "failed", "model": "converted",
    }  # fmt: skip
    assert (
        f'a: Load with transformers 5: PeftModel.from_pretrained(model, "{tmp_path}/out/a")'
        in words
    )
    assert "README.md" in told and "torn: failed" in told


def test_json_is_a_line_for_each(loras, tmp_path, capsys):
    status, words, _ = convert(capsys, loras, tmp_path / "out", "--json", "--jobs", "2")
    lines = [json.loads(line) for line in words.splitlines()]
    for line in lines:
        jsonschema.validate(line, schema_of("convert"))
    assert status == 1
    assert [(line["name"], line["verdict"]) for line in lines] == [
        ("a", "converted"), ("deep/er", "converted"), ("dora", "refused"), ("model", "converted"), ("torn", "failed"),
    ]  # fmt: skip
    assert {f["code"] for f in lines[2]["error"]["findings"]} == {"no-image"}
    assert lines[0]["report"]["adapters"][0]["tensors_in"] == 64


def test_a_second_run_finds_them_unchanged(loras, tmp_path, capsys):
    convert(capsys, loras / "a", loras / "deep/er", tmp_path / "out")
    status, words, _ = convert(capsys, tmp_path / "out/a", tmp_path / "out/er", tmp_path / "again")
    assert status == 0
    assert "2 sources: 2 unchanged" in words


def test_fail_fast_stops(loras, tmp_path, capsys):
    args = (loras / "torn", loras / "a", tmp_path / "out", "--fail-fast")
    status, words, _ = convert(capsys, *args)
    assert status == 1
    assert "1 failed, 1 not tried" in words
    assert not (tmp_path / "out").exists()


def test_two_of_one_name_are_told_before_anything_is_written(loras, tmp_path, capsys):
    shutil.copytree(loras / "a", tmp_path / "other/a")
    status, _, told = convert(capsys, loras / "a", tmp_path / "other/a", tmp_path / "out")
    assert status == 1
    assert str(tmp_path / "other/a") in told and not (tmp_path / "out").exists()


def data_of(page):
    return json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])["page"]


def test_one_page_for_a_folder_of_all_kinds(loras, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert convert(capsys, loras, tmp_path / "out", "--html", page)[0] == 1
    data = data_of(page)
    assert data["verdict"]["value"] == "3 converted, 1 refused, 1 failed"
    assert {s["name"]: s["tone"] for s in data["sources"]} == {
        "a": "good", "deep/er": "good", "dora": "warning", "model": "good", "torn": "bad",
    }  # fmt: skip
    sides = [
        {row["group"]: len(row["path"]) for row in data[side]["rows"]} for side in ("left", "right")
    ]
    assert set(sides[0]) == {"a", "deep/er", "dora", "model"}
    assert set(sides[1]) == {"a", "deep/er", "model"}
    for flow in data["flows"]:
        groups = {data["left"]["rows"][row]["group"] for row in flow["sources"]}
        groups |= {data["right"]["rows"][row]["group"] for row in flow["targets"]}
        assert len(groups) == 1
    assert {f["code"] for f in data["findings"]} >= {"no-image"}
    assert any(fact["name"].startswith("a: Load with") for fact in data["next"])


def test_what_takes_one_source_is_usage(loras, tmp_path, capsys):
    status, _, told = convert(capsys, loras, tmp_path / "out", "--in-place")
    assert status == 2 and "--in-place" in told
    status, _, told = convert(capsys, loras / "a")
    assert status == 2 and "DST is missing" in told


def test_check_has_a_verdict_for_each(loras, capsys):
    args = [
        "check",
        str(loras / "a"),
        str(loras / "torn"),
        "--model",
        str(BASES / "mixtral"),
        "--json",
    ]
    assert main(args) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line in lines:
        jsonschema.validate(line, schema_of("check"))
    assert [line["verdict"] for line in lines] == ["healthy", "failed"]
    assert "adapter_model.safetensors" in lines[1]["hint"]


def test_check_has_the_same_status_however_it_answers(tmp_path, capsys):
    """The answer no is 4; what cannot be read at all is 1, as of one source."""
    loras, page = tmp_path / "loras", tmp_path / "page.html"
    for name in ("mixtral__gud_attn", "mixtral__dora"):
        shutil.copytree(CASES / name, loras / name)
    how = ([], ["--html", str(page)], ["--json"], ["--quiet"])
    for given in how:
        assert main(["check", str(loras), *given]) == 4
    (loras / "bare").mkdir()
    shutil.copy(loras / "mixtral__dora/adapter_model.safetensors", loras / "bare")
    for given in how:
        assert main(["check", str(loras), *given]) == 1
    words = capsys.readouterr().out
    assert "bare: put the adapter_config.json there that save_pretrained" in words.split("Fix:")[-1]
    assert [source["name"] for source in data_of(page)["sources"]] == [
        "bare",
        "mixtral__dora",
        "mixtral__gud_attn",
    ]


def test_one_base_for_all_is_not_that_of_each(tmp_path, capsys):
    loras = tmp_path / "loras"
    for name in ("mixtral__gud_attn", "qwen3_moe__gud", "qwen3_moe__mts_router"):
        shutil.copytree(CASES / name, loras / name)
    base = ("--model", str(BASES / "mixtral"), "--json")
    assert main(["check", str(loras), "--for", "transformers-v4", *base]) == 4
    found = {}
    for line in capsys.readouterr().out.splitlines():
        document = json.loads(line)
        found[document["name"]] = document
    assert found["mixtral__gud_attn"]["verdict"] == "healthy"
    for name in ("qwen3_moe__gud", "qwen3_moe__mts_router"):
        assert found[name]["verdict"] == "unknown" and "of mixtral" in found[name]["why"]
        assert "--model BASE" in found[name]["hint"]
    status, out, _ = convert(capsys, loras, tmp_path / "out", *base)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [line["verdict"] for line in lines] == ["converted", "converted", "unchanged"]
    assert ["of mixtral" in line["why"] for line in lines] == [False, True, True]


def test_what_mends_it_for_a_tool_can_be_run_as_it_is(tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        shutil.copytree(CASES / "mixtral__only_up", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    check_args = ["check", "one", "two", "--for", "vllm", "--json"]
    assert main([*check_args, "--model", str(BASES / "mixtral")]) == 4
    for line in capsys.readouterr().out.splitlines():
        document = json.loads(line)
        name, command = document["name"], shlex.split(document["fix"][0])
        assert command[2:4] == [name, f"{name}-vllm"]
        assert main([*command[1:], "--quiet"]) == 0
    # The command names no base that nobody knows: what it needs is said.

    def asks(*given, **named):
        raise BadInputError(Finding("not-found", "no base", fix="give it with --model"))

    monkeypatch.setattr("regraft.checking.for_tool.convert_adapter", asks)
    assert main(check_args) == 4
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert "BASE" not in first["fix"][0] and "add --model" in first["hint"]


def test_a_page_of_what_a_tool_does(tmp_path, capsys):
    page = tmp_path / "page.html"
    lora = str(CASES / "mixtral__only_up")
    assert main(["check", lora, "--for", "vllm", "--html", str(page)]) == 4
    states = {row["state"]: row["facts"] for row in data_of(page)["left"]["rows"]}
    assert set(states) == {"fails"} and "projections" in states["fails"]["why"]


def test_where_nothing_is_found_the_error_is_that_of_opening(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    status, _, told = convert(capsys, tmp_path / "empty", tmp_path / "out")
    assert status == 1 and "empty" in told


def test_links_hidden_and_deep_folders_are_not_followed(loras):
    (loras / "again").symlink_to(loras)
    shutil.copytree(loras / "a", loras / ".cache/a")
    items, deeper = find_sources([loras], depth=0)
    assert [item.name for item in items] == ["a", "dora", "model", "torn"]
    assert deeper == [loras / "deep"]
    with pytest.raises(BadInputError):
        find_sources([loras / "a", loras / "a"])


def test_links_to_folders_elsewhere_are_told(loras, tmp_path, capsys):
    shutil.move(loras / "a", tmp_path / "other-disk")
    (loras / "a").symlink_to(tmp_path / "other-disk")
    (loras / "latest").symlink_to("dora")  # it is converted under its own name
    _, _, told = convert(capsys, loras, tmp_path / "out")
    assert "links to folders are not followed" in told
    assert f"lead to): {loras / 'a'}\n" in told
    status, _, _ = convert(capsys, loras / "a", tmp_path / "out-a")
    assert status == 0


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors", "adapter_config.json"])
def test_check_tells_sources_of_one_name_apart_by_their_paths(file, tmp_path, monkeypatch, capsys):
    for team in ("teamA", "teamB"):
        shutil.copytree(CASES / "mixtral__gud_attn", tmp_path / team / "lora")
    monkeypatch.chdir(tmp_path)
    given = [str(Path(team, "lora", file)) for team in ("teamA", "teamB")]
    assert main(["check", *given, *given, "--json"]) == 4
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = given if file.endswith("safetensors") else ["teamA/lora", "teamB/lora"]
    assert [line["name"] for line in lines] == wanted
    # Of results no two may have one name.
    assert main(["convert", *given, "out", "--to", "transformers-v5"]) == 1
    assert "several sources have this name" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_many_is_a_line_too(number, loras, monkeypatch, capsys):
    def ended(src, asked):
        if src.name == "dora":
            signal.raise_signal(number)
        return check_with(src, asked)

    monkeypatch.setattr("regraft.checking.check.check_with", ended)
    # What a shell starts in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["check", str(loras), "--json"]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("name") for line in lines] == ["a", "deep/er", None]
    assert lines[-1]["error"]["kind"] == "interrupted"


def test_an_adapter_is_named_by_its_config(tmp_path, capsys):
    shutil.copytree(CASES / "mixtral__gud_attn", tmp_path / "lora")
    given = str(tmp_path / "lora/adapter_config.json")
    assert main(["inspect", given]) == 0
    assert main(["convert", given, str(tmp_path / "out"), "--to", "transformers-v5"]) == 0
    assert (tmp_path / "out/adapter_config.json").is_file()


def kohya_file(path):
    """What sd-scripts writes for one layer of Stable Diffusion 1.5."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": np.ones((4, 320), np.float32),
        f"{name}.lora_up.weight": np.ones((320, 4), np.float32),
        f"{name}.alpha": np.array(4, np.float32),
    }
    write_tensors(path, tensors, {"ss_base_model_version": "sd_v1"})


def test_a_tools_file_beside_adapters_is_one_of_many(tmp_path, capsys):
    """One file of an image tool does not make the folder its own, with the other adapters as company."""
    folder = tmp_path / "loras"
    shutil.copytree(CASES / "mixtral__gud_attn", folder / "a")
    kohya_file(folder / "style.safetensors")
    status, words, _ = convert(capsys, folder, tmp_path / "out")
    assert status == 1 and "2 sources: 1 converted, 1 refused" in words
    with pytest.raises(regraft.RegraftError):
        regraft.convert(folder, tmp_path / "one", to="diffusers")
    assert main(["convert", str(folder), str(tmp_path / "two"), "--to", "diffusers"]) == 1
    assert (tmp_path / "two/style.safetensors").is_file()


def test_one_that_is_the_same_in_both_layouts_is_unchanged(tmp_path, capsys):
    """Attention alone has the same names; the layout that is named for it is one of two."""
    folder = tmp_path / "loras"
    for name in "ab":
        shutil.copytree(CASES / "mixtral__gud_attn", folder / name)
        file = folder / name / "adapter_model.safetensors"
        kept = {n: np.array(t) for n, t in open_tensors(file).items() if "self_attn" in n}
        write_tensors(file, kept, {"format": "pt"})
        config = json.loads((folder / name / "adapter_config.json").read_text())
        config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    status, words, _ = convert(capsys, folder, tmp_path / "out")
    assert status == 0 and "2 sources: 2 unchanged" in words


def test_another_tool_s_files_are_not_called_unchanged(tmp_path, capsys):
    """MLX names Llama's modules as transformers does, and its file is another one all the same."""
    base = make_base(tmp_path / "base", "llama")
    src = [make_adapter(tmp_path / name, ATTENTION) for name in "ab"]
    command = [
        "convert",
        *map(str, src),
        str(tmp_path / "out"),
        "--to",
        "mlx",
        "--model",
        str(base),
    ]
    assert main(command) == 0
    assert "2 sources: 2 converted" in capsys.readouterr().out


COMMANDS = {
    "inspect": (CASES / "mixtral__gud_attn",),
    "check": (CASES / "mixtral__gud_attn", "--for", "vllm"),
    "verify": (CASES / "mixtral__gud_attn", CASES / "mixtral__gud_attn"),
    "explain": (BASES / "mixtral", "lm_head.weight", *TO),
    "diff": (BASES / "mixtral", BASES / "mixtral"),
    "slices": (BASES / "mixtral", *TO, "--ep", "2"),
    "layouts": (),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_verbose_and_quiet_everywhere(command, capsys):
    args = [command, *map(str, COMMANDS[command])]
    status = main(args)
    loud = capsys.readouterr()
    assert main([*args, "-q"]) == status
    quiet = capsys.readouterr()
    assert main([*args, "-v"]) == status
    verbose = capsys.readouterr()
    assert quiet.out == quiet.err == ""
    assert verbose.out == loud.out
    if command in ("inspect", "verify", "explain", "diff"):
        assert "INFO: " in verbose.err and "INFO: " not in loud.err


def _llama(folder: Path, **more: object) -> Path:
    """An adapter of Llama, whose names are the same in both layouts; its base is named where DoRA is asked for."""
    folder.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    numbers = np.random.default_rng(0)
    tensors = {
        f"{stem}.lora_A.weight": numbers.normal(size=(4, 16)).astype(np.float32),
        f"{stem}.lora_B.weight": numbers.normal(size=(16, 4)).astype(np.float32),
    }
    if more.get("use_dora"):
        tensors[f"{stem}.lora_magnitude_vector"] = np.ones(16, np.float32)
    write_tensors(folder / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


LLAMA = {
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_dora_that_is_the_same_in_both_layouts_is_not_called_another(tmp_path, rslora, scale):
    """Its targets have a LoRA's scale, so nothing of it differs."""
    lora = _llama(tmp_path / "dora", use_dora=True, use_rslora=rslora, **LLAMA)
    report = regraft.convert(lora, tmp_path / "out", to="transformers-v5")
    assert [target.scale for target in report.targets] == [scale]
    (verdict,) = check(lora, to="transformers-v4").verdicts
    assert verdict.healthy is True and not verdict.remedy
    assert [row.scale for row in verdict.rows] == [scale]


def test_an_adapter_of_an_unknown_model_is_unknown_and_not_broken(tmp_path, capsys):
    _llama(tmp_path / "whose")
    assert main(["check", str(tmp_path / "whose")]) == 4
    words = capsys.readouterr().out
    assert "Not known whether it loads with transformers-v5" in words and "--model" in words
    assert "Will not load" not in words and "No fix is known" not in words
    shutil.copytree(CASES / "mixtral__gud_attn", tmp_path / "old")
    assert main(["check", str(tmp_path), "--json"]) == 4
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["name"]: line["verdict"] for line in lines}["whose"] == "unknown"


def stopped_at(monkeypatch, number):
    """Let Ctrl-C come before source ``number`` is converted; the sources that were begun."""
    begun = []
    real = convert_module.convert_with

    def convert_with(src, dst, asked):
        if len(begun) == number:
            raise KeyboardInterrupt
        begun.append(Path(src).name)
        return real(src, dst, asked)

    monkeypatch.setattr(convert_module, "convert_with", convert_with)
    return begun


def test_an_interrupted_folder_goes_on_where_it_was(loras, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_at(patch, 2)
        status, _, told = convert(capsys, loras, tmp_path / "out")
    assert status == 130 and "2 of 5 sources are done; the same command with --resume" in told
    shutil.rmtree(loras / "torn"), shutil.rmtree(loras / "dora")
    begun = stopped_at(monkeypatch, 99)
    status, words, told = convert(capsys, loras, tmp_path / "out", "--resume")
    assert status == 0, told
    assert begun == ["model"]
    assert "a: converted, transformers-v4 -> transformers-v5 (done by the run before)" in words
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "deep", "model"]


def test_what_failed_is_tried_again_and_nothing_else(loras, tmp_path, capsys, monkeypatch):
    status, words, _ = convert(capsys, loras, tmp_path / "out")
    assert status == 1 and "with --resume tries those again that failed" in words
    shutil.rmtree(loras / "torn")
    shutil.copytree(loras / "a", loras / "torn")
    begun = stopped_at(monkeypatch, 99)
    status, words, _ = convert(capsys, loras, tmp_path / "out", "--resume")
    assert status == 1 and begun == ["dora", "torn"]
    assert "5 sources: 4 converted, 1 refused" in words


def test_other_options_are_named_where_a_folder_is_resumed(loras, tmp_path, capsys):
    convert(capsys, loras, tmp_path / "out")
    status, _, told = convert(capsys, loras, tmp_path / "out", "--compact", "--resume")
    assert status == 1 and "--compact is yes now, and was not given" in told


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_source_that_changed_is_not_taken_for_done(loras, tmp_path, capsys, overwrite):
    convert(capsys, loras, tmp_path / "out")
    config = loras / "a/adapter_config.json"
    config.write_text(config.read_text() + "\n")
    args = ["--resume", "--json", *["--overwrite"] * overwrite]
    _, words, _ = convert(capsys, loras, tmp_path / "out", *args)
    first = json.loads(words.splitlines()[0])
    if overwrite:
        assert first["verdict"] == "converted" and "before" not in first["why"]
    else:
        [finding] = first["error"]["findings"]
        assert finding["code"] == "other-work" and "adapter_config.json" in finding["message"]


def verify(capsys, *args):
    status = main(["verify", *map(str, args)])
    return status, *capsys.readouterr()


def test_a_folder_is_verified_one_by_one(loras, tmp_path, capsys):
    shutil.rmtree(loras / "torn"), shutil.rmtree(loras / "dora")
    assert convert(capsys, loras, tmp_path / "out")[0] == 0
    status, words, _ = verify(capsys, loras, tmp_path / "out")
    assert status == 0 and "3 sources: 3 equal" in words
    shutil.rmtree(tmp_path / "out/a")
    shutil.copytree(CASES / "mixtral__gud_attn", tmp_path / "out/new")
    (tmp_path / "out/model/model.safetensors").write_bytes(b"nothing")
    page = tmp_path / "page.html"
    status, words, _ = verify(capsys, loras, tmp_path / "out", "--json", "--html", page)
    found = [json.loads(line) for line in words.splitlines()]
    for line in found:
        jsonschema.validate(line, schema_of("verify"))
    assert status == 1  # one of them cannot be read
    assert [(one["name"], one["verdict"]) for one in found] == [
        ("a", "not equal"), ("deep/er", "equal"), ("model", "failed"), ("new", "not equal"),
    ]  # fmt: skip
    assert data_of(page)["verdict"]["value"] == "2 not equal, 1 equal, 1 failed"
    shutil.rmtree(tmp_path / "out/model"), shutil.rmtree(loras / "model")
    assert verify(capsys, loras, tmp_path / "out")[0] == 4


def test_every_adapter_of_a_folder_is_told_apart(loras, tmp_path):
    shutil.copytree(loras / "a", tmp_path / "set")
    shutil.copytree(loras / "a", tmp_path / "set/second")
    regraft.convert(tmp_path / "set", tmp_path / "out", to="transformers-v5")
    found = regraft.verify(tmp_path / "set", tmp_path / "out")
    assert found.equal and {target.adapter for target in found.targets} == {".", "second"}
    shutil.rmtree(tmp_path / "out/second")
    found = regraft.verify(tmp_path / "set", tmp_path / "out")
    [missing] = found.differences
    assert missing.code == "missing" and missing.where == str(tmp_path / "out/second")
    assert found.targets and {target.adapter for target in found.targets} == {"."}


def test_a_page_of_a_run_that_was_resumed(loras, tmp_path, capsys):
    convert(capsys, loras, tmp_path / "out")
    page = tmp_path / "page.html"
    assert convert(capsys, loras, tmp_path / "out", "--resume", "--html", page)[0] == 1
    assert data_of(page)["verdict"]["value"] == "3 converted, 1 refused, 1 failed"
