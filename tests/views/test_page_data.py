"""Pages from reports: every tensor is on them once, with what became of it."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.checkpoints.verify import verify
from regraft.cli import main
from regraft.dialects.peft.inspect import inspect
from regraft.errors import BadInputError
from regraft.names.patterns import group_alike
from regraft.storage.safetensors import open_tensors, write_tensors
from regraft.views.data import page_of_inspection, page_of_report, page_of_verification
from regraft.views.html import render_page, write_page
from regraft.views.model import STATES, path_of
from regraft.views.schema import schema_of

GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
BASE = GOLDEN / "bases/mixtral"
LORA = GOLDEN / "cases/mixtral__gud_attn"


def keys(row):
    """The keys of a row, written out."""
    names = [""]
    for part in row.path:
        parts = (
            [part] if isinstance(part, str) else [str(n) for a, b in part for n in range(a, b + 1)]
        )
        names = [f"{name}.{text}" if name else text for name in names for text in parts]
    return names


def all_keys(side):
    return Counter(key for row in side.rows for key in keys(row))


def all_tensors(side):
    """The same; a weight may be adapted and saved at once."""
    return Counter((key, row.facts.get("stored")) for row in side.rows for key in keys(row))


def check_whole(page):
    """Rows count what they stand for, no key stands on a side twice, and flows lead to rows."""
    for side in (page.left, page.right):
        for row in side.rows if side else ():
            assert row.count == len(keys(row))
            assert row.state in STATES
        assert not side or set(all_tensors(side).values()) <= {1}
    sources = Counter(i for flow in page.flows for i in flow.sources)
    targets = Counter(i for flow in page.flows for i in flow.targets)
    assert set(sources) == set(range(len(page.left.rows)))
    assert set(targets) == set(range(len(page.right.rows)))
    json.dumps(json.loads(render_page(page).split('id="data">')[1].split("</script>")[0]))


# For these models the installed transformers is asked, which takes seconds.
FOREIGN = [case for case in INDEX if case.startswith(("dbrx__", "llava_"))]


@pytest.mark.parametrize("case", [case for case in INDEX if case not in FOREIGN[1:]])
def test_every_golden_adapter(case, tmp_path):
    base = GOLDEN / "bases" / INDEX[case]["base"]
    try:
        report = regraft.convert(
            GOLDEN / "cases" / case, tmp_path / "o", to="transformers-v5", model=base, dry_run=True
        )
    except regraft.RefusedError:
        report = regraft.convert(
            GOLDEN / "cases" / case, tmp_path / "o", to="transformers-v4", model=base, dry_run=True
        )
        assert report.adapters[0].copied
    page = page_of_report(report)
    check_whole(page)
    ranks = {
        key: row.facts["rank"]
        for row in page.right.rows
        if "rank" in row.facts
        for key in keys(row)
    }
    assert ranks == {target.key: target.rank for target in report.targets}
    shown = page_of_inspection(inspect(GOLDEN / "cases" / case, model=base))
    assert set(all_tensors(shown.left).values()) == {1}


def test_a_checkpoint(converted, tmp_path):
    page = page_of_report(converted)
    check_whole(page)
    assert set(all_keys(page.left)) == set(open_tensors(BASE / "model.safetensors"))
    regraft.convert(BASE, tmp_path / "out", to="transformers-v5")
    result = open_tensors(tmp_path / "out/model.safetensors")
    assert set(all_keys(page.right)) == set(result)
    states = {key: row.state for row in page.right.rows for key in keys(row)}
    assert states["model.layers.0.mlp.experts.gate_up_proj"] == "fused"
    assert states["model.layers.0.mlp.gate.weight"] == "renamed"
    assert states["model.norm.weight"] == "kept"
    back = page_of_report(
        regraft.convert(tmp_path / "out", tmp_path / "b", to="transformers-v4", dry_run=True)
    )
    check_whole(back)
    assert {row.state for row in back.left.rows} == {"split", "renamed", "kept"}


def test_turned(tmp_path):
    case = next(name for name in INDEX if name.startswith("qwen3_vl_moe__"))
    base = GOLDEN / "bases" / INDEX[case]["base"]
    out = tmp_path / "o"
    report = regraft.convert(GOLDEN / "cases" / case, out, to="transformers-v5", model=base)
    assert "turned" in {row.state for row in page_of_report(report).right.rows}


def test_scales_of_quantised_weights(tmp_path):
    folder = tmp_path / "fp8"
    shutil.copytree(BASE, folder)
    tensors = {name: t.copy() for name, t in open_tensors(BASE / "model.safetensors").items()}
    for name in [n for n in tensors if ".experts." in n]:
        rows, columns = tensors[name].shape
        tensors[f"{name}_scale_inv"] = np.ones((rows // 8, columns // 8), np.float32)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (folder / "config.json").write_text(json.dumps(config))
    for to in ("transformers-v5", "transformers-v4"):
        report = regraft.convert(folder, tmp_path / to, to=to)
        page = page_of_report(report)
        check_whole(page)
        assert set(all_keys(page.left)) == set(tensors)
        made = open_tensors(tmp_path / to / "model.safetensors")
        assert set(all_keys(page.right)) == set(made)
        scales = {row.state for row in page.right.rows if keys(row)[0].endswith("_scale_inv")}
        assert scales == {"kept"}  # where the loader of fp8 wants them


def test_differences(tmp_path):
    out = tmp_path / "out"
    regraft.convert(BASE, out, to="transformers-v5")
    file = out / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in open_tensors(file).items()}
    tensors["model.norm.weight"][0] += 1
    tensors["new.weight"] = tensors.pop("lm_head.weight")
    write_tensors(file, tensors, {"format": "pt"})
    page = page_of_verification(verify(BASE, out))
    states = {key: row.state for row in page.right.rows for key in keys(row)}
    assert {key: state for key, state in states.items() if STATES[state].tone == "bad"} == {
        "model.norm.weight": "differs",
        "lm_head.weight": "missing",
        "new.weight": "extra",
    }
    assert page.verdict.name == "Not equal"
    assert page.verdict.tone == "bad"


def test_all_that_differs_is_listed(tmp_path):
    out = tmp_path / "out"
    regraft.convert(BASE, out, to="transformers-v4")
    file = out / "model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in open_tensors(file).items()}
    write_tensors(file, tensors, {"format": "pt"})
    result = verify(BASE, out)
    assert {finding.key for finding in result.differences} == set(tensors)


def test_html_of_every_command(tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "page.html"
    runs = [
        (0, ["convert", LORA, tmp_path / "a", "--to", "transformers-v5"]),
        (0, ["convert", LORA, tmp_path / "d", "--to", "transformers-v5", "--dry-run", "-q"]),
        (0, ["convert", BASE, out, "--to", "transformers-v5", "--json"]),
        (0, ["verify", BASE, out]),
        (0, ["inspect", LORA]),
        (3, ["convert", GOLDEN / "cases/mixtral__dora", tmp_path / "x", "--to", "transformers-v5"]),
        (1, ["inspect", tmp_path / "nothing"]),
        (1, ["verify", BASE, tmp_path / "nothing"]),
    ]
    for status, command in runs:
        file.unlink(missing_ok=True)
        assert main([*map(str, command), "--html", str(file)]) == status
        words = capsys.readouterr().out
        assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
        loud = status == 0 and not {"-q", "--json"} & set(command)
        assert (f"Page: {file}" in words) == loud
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["none/page.html", "."])
def test_html_where_none_can_be(where, tmp_path, capsys):
    command = ["convert", str(LORA), str(tmp_path / "o"), "--to", "transformers-v5"]
    assert main([*command, "--html", str(tmp_path / where)]) == 2
    assert "--html" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_failed_write_leaves_nothing(converted, tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(BadInputError):
        write_page(page_of_report(converted), tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.slow
def test_nothing_of_it_is_imported_without_html(tmp_path):
    probe = (
        "import sys; from regraft.cli import main; main(sys.argv[1:]);"
        "heavy = [f'regraft.views.{name}' for name in ('data', 'html', 'schema')];"
        "print([name for name in (*heavy, 'jinja2', 'rich.progress') if name in sys.modules])"
    )
    command = ["convert", str(LORA), str(tmp_path / "o"), "--to", "transformers-v5"]
    done = subprocess.run(
        [sys.executable, "-c", probe, *command], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_paths_keep_odd_names():
    for name in ("a..b", ".a", "a.", "w1.0.1", "0", "a.00.b", "a.1"):
        (pattern,) = group_alike([name])
        assert ".".join(path_of(pattern)) == name


def test_an_approximation_shows_its_error(tmp_path):
    out = tmp_path / "o"
    case = GOLDEN / "cases/mixtral__dora"
    report = regraft.convert(case, out, to="transformers-v5", model=BASE, via="svd:6")
    page = page_of_report(report)
    check_whole(page)
    near = {t.key: f"{t.error:.2g}" for t in report.targets if t.rung == "svd"}
    shown = {
        key: row.facts["error"]
        for row in page.right.rows
        if row.facts.get("rung") == "approximated"
        for key in keys(row)
    }
    assert near
    assert shown == near
    assert page.verdict.tone == "warning"
    assert "approximated, off by" in page.verdict.value


def test_an_adapter_in_its_base(tmp_path):
    out = tmp_path / "o"
    report = regraft.convert(LORA, out, to="transformers-v5", model=BASE, merge=True)
    page = page_of_report(report)
    check_whole(page)
    merged = {
        key
        for row in page.right.rows
        if row.facts.get("rung") == "added to the base"
        for key in keys(row)
    }
    assert merged == {target.key for target in report.targets}
    assert f"{len(merged)} tensors merged" in page.verdict.value


def test_adapters_that_are_equal_and_not(tmp_path, capsys):
    out, file = tmp_path / "o", tmp_path / "page.html"
    regraft.convert(LORA, out, to="transformers-v5")
    command = ["verify", str(LORA), str(out), "--html", str(file)]
    assert main(command) == 0
    weights = out / "adapter_model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in open_tensors(weights).items()}
    changed = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[changed][0] += 1
    write_tensors(weights, tensors, {"format": "pt"})
    assert main(command) == 4
    data = json.loads(file.read_text().split('id="data">')[1].split("</script>")[0])
    states = Counter(row["state"] for row in data["page"]["left"]["rows"])
    assert states["differs"] == 1
    assert states["equal"] > 0
    assert data["page"]["verdict"]["name"] == "Not equal"
    capsys.readouterr()
    assert main([*command, "--json"]) == 4
    jsonschema = pytest.importorskip("jsonschema")
    found = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schema_of("verify")).validate(found)
