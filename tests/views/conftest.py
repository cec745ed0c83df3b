"""A browser for the tests of the page, and pages to look at."""

import sys
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.storage.safetensors import write_tensors
from regraft.views.html import write_page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from browser import find_browser, launch_arguments

    program = find_browser()
    if program is None:
        pytest.skip(
            newlines="there is no Chromium: run scripts/browser.py, or name one in REGRAFT_BROWSER"
        )
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=launch_arguments())
        yield browser
        browser.close()


@pytest.fixture
def look(chromium, tmp_path):
    """Opens a page of regraft's; a script error or any request beside the file itself fails the test."""
    contexts, errors, requests = [], [], []

    def open_page(page, width=1200, height=900, scheme="light"):
        file = tmp_path / "page.html"
        write_page(page, file)
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(5000)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert set(requests) <= {(tmp_path / "page.html").as_uri()}


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The report of a checkpoint with renamed, fused and unchanged tensors."""
    out = tmp_path_factory.mktemp("page") / "out"
    base = ROOT / "tests/golden/bases/mixtral"
    return regraft.convert(base, out, to="transformers-v5", dry_run=True)


@pytest.fixture(scope="session")
def rescaled(tmp_path_factory):
    """The report of an adapter one of whose targets is rescaled."""
    out = tmp_path_factory.mktemp("page") / "out"
    case = ROOT / "tests/golden/cases/mixtral__patterns_projection"
    return regraft.convert(case, out, to="transformers-v5", dry_run=True)


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """The report of a checkpoint with 37155 tensors."""
    from json import dumps

    folder = tmp_path_factory.mktemp("many")
    layers, experts = 48, 256
    one = np.zeros((2, 2), np.float32)
    tensors = {"model.embed_tokens.weight": one, "model.norm.weight": one[0], "lm_head.weight": one}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            tensors[f"{at}self_attn.{name}_proj.weight"] = one
        tensors[f"{at}input_layernorm.weight"] = one[0]
        tensors[f"{at}block_sparse_moe.gate.weight"] = np.zeros((experts, 2), np.float32)
        for expert in range(experts):
            for part in ("w1", "w2", "w3"):
                tensors[f"{at}block_sparse_moe.experts.{expert}.{part}.weight"] = one
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config = {
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_hidden_layers": layers,
        "hidden_size": 2,
        "intermediate_size": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 2,
    }
    (folder / "config.json").write_text(dumps(config))
    return regraft.convert(folder, folder / "out", to="transformers-v5", dry_run=True)
