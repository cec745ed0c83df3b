"""The page that inspects files in a browser: what `regraft inspect --json` says, without any network."""

import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dialects.image.samples import H, kohya_flux, numbers, pair
from dialects.image.test_image import sdxl

import regraft
from regraft.cli import main
from regraft.storage.safetensors import write_tensors
from regraft.storage.torch_write import write_torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
GOLDEN = ROOT / "tests/golden/cases"
ADAPTER = (
    "dialect",
    "peft_type",
    "base_model",
    "model_type",
    "peft_version",
    "rslora",
    "variants",
    "tensors",
    "bytes",
    "dtypes",
    "layouts",
    "layout",
    "ranks",
    "alphas",
    "scales",
)
"""What the page tells of an adapter; targets it shows in other words."""
FOUND = re.compile(r"found [^ )]+")
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


class Inspector:
    """The page, opened, in a browser whose every request is answered from site/ or refused."""

    def __init__(self, chromium):
        self.errors, self.refused = [], []
        self.context = chromium.new_context(viewport={"width": 360, "height": 740})
        self.context.route("**/*", self._serve)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(5000)
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("console", lambda said: self.errors.append(said.text))
        self.tab.goto("https://inspector.invalid/index.html")

    def _serve(self, route):
        name = route.request.url.removeprefix("https://inspector.invalid/")
        file = SITE / name
        if route.request.method == "GET" and "/" not in name and file.suffix in TYPES:
            route.fulfill(body=file.read_bytes(), content_type=TYPES[file.suffix])
        else:
            self.refused.append(route.request.url)
            route.abort()

    def show(self, *files, to="#files"):
        """Choose files, or a folder; the cards that come."""
        self.tab.evaluate("document.getElementById('answers').replaceChildren()")
        self.tab.set_input_files(to, files)
        self.tab.wait_for_selector("article")
        return self.tab.locator("article")

    def facts(self, src):
        """What is said of a file, or of the files in a folder."""
        files = [src] if src.is_file() else [p for p in sorted(src.iterdir()) if p.is_file()]
        cards = self.show(*map(str, files))
        assert cards.count() == 1
        return json.loads(cards.locator("pre.json").text_content())


@pytest.fixture(scope="module")
def inspector(chromium):
    made = Inspector(chromium)
    yield made
    made.context.close()
    assert made.errors == []
    assert made.refused == []


def same(got, want):
    """Whether the page tells what the command does of an adapter; its evidence may be in other words."""
    assert {name: got[name] for name in ADAPTER} == {name: want[name] for name in ADAPTER}
    for evidence in (got["evidence"], want["evidence"]):
        assert evidence
    assert FOUND.findall(str(got["evidence"])) == FOUND.findall(str(want["evidence"]))


def said(capsys, src):
    """What the command says."""
    main(["inspect", str(src), "--json"])
    return json.loads(capsys.readouterr().out)


def test_adapters_of_peft(inspector, capsys):
    """All committed examples, as one folder."""
    want = {adapter["name"]: adapter for adapter in said(capsys, GOLDEN)["adapters"]}
    cards = inspector.show(str(GOLDEN), to="#folder")
    assert cards.count() == len(want) == len(list(GOLDEN.iterdir()))
    names = cards.locator("h2").all_text_contents()
    for name, text in zip(names, cards.locator("pre.json").all_text_contents(), strict=True):
        got, wanted = json.loads(text), want.pop(name.split("/")[1])
        same(got, wanted)
        assert [x["code"] for x in got["problems"]] == [x["code"] for x in wanted["problems"]]


@pytest.mark.parametrize("to", ["vllm", "unsloth", "nemo", "mlx", "gguf", "litgpt"])
def test_adapters_of_other_tools(inspector, capsys, tmp_path, to):
    if to in ("gguf", "litgpt"):
        pytest.importorskip({"gguf": "gguf", "litgpt": "yaml"}[to])
    case = ROOT / "tests/golden/cases/mixtral__gud_attn"
    base = ROOT / "tests/golden/bases/mixtral"
    made = tmp_path / ("made.gguf" if to == "gguf" else "made")
    regraft.convert(case, made, to=to, model=base)
    (want,) = said(capsys, made)["adapters"]
    got = inspector.facts(made)
    assert want["dialect"] == to
    same(got, want)


def test_torchtune(inspector, capsys, tmp_path):
    """Its file is torch's, of whose pickle nothing is run."""
    pairs = {
        f"layers.{n}.attn.q_proj.lora_{x}.weight": numbers(*shape)
        for n in (0, 1)
        for x, shape in (("a", (2, 8)), ("b", (4, 2)))
    }
    write_torch(tmp_path / "adapter_model.pt", pairs)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (want,) = said(capsys, tmp_path)["adapters"]
    got = inspector.facts(tmp_path)
    assert want["dialect"] == "torchtune"
    same(got, want)


@pytest.mark.parametrize(
    "field, value, code",
    [
        ("r", 3, "shape"),
        ("exclude_modules", ["w1"], "not-targeted"),
        ("layers_to_transform", [1], "not-targeted"),
        ("target_modules", ["w1", "w2", "w3"], "not-targeted"),
        ("target_modules", r".*\.(w[123]|[qk]_proj)", "not-targeted"),
        ("target_modules", ["nothing"], "targets-nothing"),
        ("lora_alpha", "8", "config"),
        ("peft_type", "LORAX", "peft-type"),
    ],
)
def test_configs_that_do_not_fit(inspector, capsys, tmp_path, field, value, code):
    case = GOLDEN / "mixtral__gud_attn"
    config = json.loads((case / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    shutil.copy(case / "adapter_model.safetensors", tmp_path)
    told = said(capsys, tmp_path)
    wanted = told["error"]["findings"] if "error" in told else told["adapters"][0]["problems"]
    got = inspector.facts(tmp_path)
    codes = [got["code"]] if "code" in got else [each["code"] for each in got["problems"]]
    assert set(codes) == {each["code"] for each in wanted} == {code}


STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"


def factors(stem, **shapes):
    return {f"{stem}.{role}": numbers(*shape) for role, shape in shapes.items()}


DOWN, UP = pair(H, H)
QWEN = "transformer.transformer_blocks.0.img_mlp.net.2"
PEFT_HEADER = {
    "lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 8.0, "transformer.use_rslora": false}'
}
IMAGES = {
    "kohya": (kohya_flux(3)[0], {"ss_network_module": "networks.lora_flux"}),
    "onetrainer": (sdxl()[0], {"ot_revision": "1", "ss_base_model_version": "sdxl_"}),
    "diffusers": ({f"{QWEN}.lora_A.weight": DOWN, f"{QWEN}.lora_B.weight": UP}, PEFT_HEADER),
    "ai-toolkit": (
        {f"diffusion_model.{QWEN[12:]}.lora_A.weight": DOWN, f"{QWEN}.lora_B.weight": UP},
        {"software": '{"name": "ai-toolkit"}', "ss_base_model_version": "qwen_image"},
    ),
    "loha": (
        factors(STEM, hada_w1_a=(8, 2), hada_w1_b=(2, 8), hada_w2_a=(8, 2), hada_w2_b=(2, 8))
        | {f"{STEM}.alpha": np.float16(0.3)},
        {"ss_network_module": "lycoris.kohya", "ss_base_model_version": "sdxl_base_v1-0"},
    ),
    "lokr": (factors(FLUX, lokr_w1=(3, 1), lokr_w2_a=(8, 4), lokr_w2_b=(4, 8)), {}),
    "half": (factors(STEM, **{"lora_down.weight": (2, 8)}), {}),
    "oft": (factors(STEM, oft_blocks=(4, 2, 2)) | {f"{STEM}.alpha": np.float32(1e-3)}, {}),
    "boft": (factors(STEM, oft_blocks=(2, 4, 2, 2)), {}),
    "dora": (
        factors(
            STEM, **{"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "dora_scale": (8, 1)}
        ),
        {},
    ),
    "processors": (
        factors(
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor",
            **{"to_k_lora.down.weight": (2, 768), "to_k_lora.up.weight": (8, 2)},
        ),
        {},
    ),
    "xlabs": (
        factors(
            "double_blocks.0.processor",
            **{"qkv_lora1.down.weight": (2, 8), "qkv_lora1.up.weight": (24, 2)},
        ),
        {},
    ),
    "new weights": (
        factors("double_blocks.0.img_attn.norm.query_norm", scale=(8,))
        | factors("double_blocks.0.img_attn.qkv.lora_A", weight=(2, 8))
        | factors("double_blocks.0.img_attn.qkv.lora_B", weight=(24, 2)),
        {},
    ),
    "nowhere": (
        {"lora_unet_nowhere.lora_up.weight": UP, "lora_unet_nowhere.lora_down.weight": DOWN},
        {},
    ),
    "other base": (kohya_flux()[0], {"ss_base_model_version": "sdxl_base_v1-0"}),
    "text encoders": (
        factors(
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            **{"lora_down.weight": (2, 8), "lora_up.weight": (32, 2)},
        )
        | factors(STEM, **{"lora_down.weight": (2, 8), "lora_up.weight": (8, 2)}),
        {},
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_models(inspector, capsys, tmp_path, name):
    file = tmp_path / f"{name}.safetensors"
    write_tensors(file, *IMAGES[name])
    want = said(capsys, file)
    for field in ("schema_version", "regraft", "seconds"):
        del want[field]
    assert inspector.facts(file) == want


def zipped(name, content):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, content)
    return made.getvalue()


def damaged():
    """Files that are none, and what is said of each."""
    whole = (GOLDEN / "mixtral__gud_attn/adapter_model.safetensors").read_bytes()
    length = (1 << 40).to_bytes(8, "little")
    yield "cut.safetensors", whole[:200], "The file is cut off"
    yield "half.safetensors", whole[:-100], "The file is cut off"
    yield "large.safetensors", length + b"{}", "the format allows 100000000"
    yield "short.safetensors", b"abc", "has 3 bytes"
    yield "text.safetensors", (20).to_bytes(8, "little") + b"hello, this is text.", "no JSON text"
    yield "page.safetensors", b"<!DOCTYPE html><html>" + b" " * 600, "a web page"
    yield "pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"
    yield "torch.bin", b"PK\x03\x04" + b"\0" * 600, "its directory is missing"
    yield "archive.bin", zipped("a/data.pkl", b"cos\nsystem\n(S'true'\ntR."), "no plain data needs"
    yield "other.bin", zipped("a/data.pkl", b"\x80\x02}X\x01\0\0\0aK\x01s."), "no dict of tensors"
    yield "model.gguf", b"GGUF\x03\0\0\0" + b"\0" * 16, "no LoRA"
    yield "notes.txt", b"hello", "no weights among these files"


def test_files_that_are_none(inspector, tmp_path):
    for name, content, why in damaged():
        file = tmp_path / name
        file.write_bytes(content)
        assert why in inspector.show(str(file)).inner_text(), name


def test_words_and_names_are_shown_as_text(inspector, tmp_path):
    """A file's names are somebody else's; none of them becomes an element."""
    file = tmp_path / "odd.safetensors"
    odd = "<img src=x onerror=alert(1)>"
    write_tensors(file, kohya_flux()[0], {"ss_sd_model_name": odd})
    card = inspector.show(str(file))
    assert card.locator("img").count() == 0
    assert odd in card.locator("dl").inner_text()
    assert "LoRA for FLUX.1, written as by kohya." in card.locator(".verdict").inner_text()
    assert inspector.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_files_may_be_dropped(inspector):
    inspector.tab.evaluate(
        """names => {
            const dropped = new DataTransfer();
            for (const name of names) dropped.items.add(new File(["version https://git-lfs"], name));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, cancelable: true }));
        }""",
        ["one.safetensors", "two.safetensors"],
    )
    inspector.tab.get_by_text("Done: 2 files read.").wait_for()
    assert inspector.tab.locator("article h2").all_text_contents() == [
        "one.safetensors",
        "two.safetensors",
    ]


def test_a_slow_pattern_stops_neither_the_page_nor_the_next_file(chromium, tmp_path):
    case = GOLDEN / "mixtral__gud_attn"
    config = json.loads((case / "adapter_config.json").read_text())
    slow = config | {"rank_pattern": {"(([a-z0-9._]+)*)*X": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(slow))
    files = [str(tmp_path / "adapter_config.json"), str(case / "adapter_model.safetensors")]
    inspector = Inspector(chromium)
    inspector.tab.clock.install()
    inspector.tab.set_input_files("#files", files)
    inspector.tab.get_by_text("Reading").wait_for()
    inspector.tab.clock.fast_forward(21_000)
    inspector.tab.get_by_text("It takes more than 20 seconds").wait_for()
    assert inspector.facts(case)["layout"] == "transformers-v4"
    inspector.context.close()


def test_nothing_can_be_sent(inspector):
    sent = inspector.tab.evaluate("fetch('https://example.com').then(() => true, () => false)")
    assert sent is False
    assert all("Content Security Policy" in text or "violates" in text for text in inspector.errors)
    inspector.errors.clear()
    assert inspector.refused == []


def test_the_site_is_small():
    assert sum(path.stat().st_size for path in SITE.iterdir()) < 500_000
