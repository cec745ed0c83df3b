"""Regular expressions of files: bounded in time, with the meaning that they have for re."""

import json
import re
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import regraft
from regraft.errors import BadInputError
from regraft.storage import expressions, slow_expressions
from regraft.storage.expressions import expression, is_expression, spell, start_file
from regraft.storage.safetensors import read_header, write_tensors
from regraft.storage.slow_expressions import find_slow

GOLDEN = Path(__file__).parents[1] / "golden"
FIELDS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")

# What training tools write: ms-swift, Unsloth, LLaMA-Factory and PEFT's documentation have expressions like these.
GENUINE = [
    r"^(model(?=\.).*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))$",
    r"^(language_model|model)(?!.*(lm_head|output|emb|wte|shared)).*",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj)))",
    r".*\.layers\.(?:1[0-9]|2[0-7])\..*_proj",
    r"(.*\.)?(model\.layers\.[0-3]\.self_attn\.(q|k)_proj)$",
    r".*(?<!vision_)model\.layers\.\d+\.mlp\.experts\.(\d+)\.w[13]",
    r"model\.layers\.(\d+)\.mlp\.experts\.\1\.w1",
    r"(?P<a>q|k)_proj.*(?P=a)",
    r"(?i:MODEL)\..*Q_PROJ|x{,2}|a{|{}|[[:alpha:]]|b{e<=1}|[]x]|[^]x]+|c{2,}d{,}",
]
PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.experts.11.w1",
    "language_model.model.layers.3.self_attn.k_proj",
    "vision_model.encoder.layers.23.mlp.fc1",
    "model.layers.2.mlp.down_proj",
    "lm_head",
    "q_proj.k.q",
    "xx",
    "[:alpha:]",
    "b{e<=1}",
    "cccddd",
    "a{",
    "{}",
    "",
]


def patterns_of_the_corpora():
    """Every expression in a config of the repository, as PEFT uses it, and those of transformers' registry."""
    found = set(GENUINE)
    for file in GOLDEN.rglob("adapter_config.json"):
        config = json.loads(file.read_text())
        for name, value in config.items():
            if name in FIELDS and isinstance(value, str):
                found.add(value)
            if name.endswith("_pattern") and isinstance(value, dict):
                found.update(value, (rf"(.*\.)?({key})$" for key in value))
    return sorted(found)


def names_of_the_corpora():
    names = set(PATHS)
    for file in sorted(GOLDEN.rglob("*.safetensors")):
        names.update(name.rpartition(".")[0] for name in list(read_header(file).tensors)[::7])
    return sorted(names)


@pytest.fixture(autouse=True)
def fresh():
    start_file("adapter_config.json")


@pytest.fixture
def short(monkeypatch):
    """A quarter of the time that files are given, since a slow pattern takes all of it."""
    for module in (expressions, slow_expressions):
        monkeypatch.setattr(module, "SECONDS", 0.5)


def compare(pattern, texts):
    found = expression(pattern, "target_modules")
    for text in texts:
        for how in ("match", "fullmatch", "search"):
            want = getattr(re.compile(pattern), how)(text)
            for got in (getattr(found, how)(text), getattr(found._slow, how)(text)):
                assert (got is None) == (want is None), (pattern, how, text)
                if want is not None:
                    assert (got.span(), got.groups()) == (want.span(), want.groups())


def test_every_pattern_means_what_it_means_for_re():
    texts = names_of_the_corpora()
    patterns = patterns_of_the_corpora()
    assert len(texts) > 100
    assert len(patterns) >= len(GENUINE)
    for pattern in patterns:
        compare(pattern, texts)


_PIECES = (
    r"a b . \. [ab] [^a] [[a] []a] (a) (?:ab|b) (?!a) (?=b) \d ^ $ { } {e} {1} {,2} {1,} *? + * ? |"
    r" (?<=a) (?<!b) \b x{a} && -- ~~ ||"
)
PIECES = _PIECES.split()


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=7).map("".join), st.text("ab.0{}e", max_size=6))
def test_any_pattern_means_what_it_means_for_re(pattern, text):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except re.error:
        assert not is_expression(pattern)
        return
    if is_expression(pattern):
        compare(pattern, [text])


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a|a)*$",
        r"(([a-z0-9._])+)+\d",
    ],
)
@pytest.mark.slow
def test_a_slow_one_is_refused(pattern):
    start_file("lora/adapter_config.json")
    text = "a" * 40 + ".self_attn.q_proj" + "a" * 40 + "!"
    begin = time.process_time()
    with pytest.raises(BadInputError) as caught:
        for at in range(1000):
            expression(pattern, "target_modules").fullmatch(f"{text}{at}!")
            expression(pattern, "target_modules").search(f"{text}{at}!")
    assert time.process_time() - begin < 6
    (finding,) = caught.value.findings
    assert (finding.code, finding.key) == ("slow-pattern", "target_modules")
    assert finding.where == "lora/adapter_config.json"
    assert pattern in finding.message
    assert finding.fix


@pytest.mark.slow
def test_many_that_are_slow_together(short):
    """The time is one for all patterns of a file."""
    start_file("x")
    begin = time.process_time()
    with pytest.raises(BadInputError):
        for number in range(1000):
            expression(rf"(a|a)*$|x{{{number}}}", "rank_pattern").match("a" * 17 + "b")
    assert time.process_time() - begin < 10


def test_a_sound_one_is_never_refused():
    """The work of a large adapter: many modules, many times."""
    start_file("x")
    names = [f"model.layers.{n // 128}.mlp.experts.{n % 128}.gate_proj" for n in range(6000)]
    for pattern in GENUINE:
        for name in names:
            expression(pattern, "target_modules").fullmatch(name)
    assert expressions._local.spent.seconds < expressions.SECONDS / 2


@pytest.mark.parametrize(
    "text", ["(", "a**", "(?P<a", "[", "\\", "(" * 5000 + ")" * 5000, "a{9999999999}", "(?i"]
)
def test_what_is_none(text):
    assert not is_expression(text)
    with pytest.raises(BadInputError, match="no regular expression"):
        expression(text, "rank_pattern")


def test_braces_and_brackets():
    assert spell(r"\{a{2}[\]{]{b") == r"\{a{2}[\]{]\{b"


@pytest.mark.slow
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_an_adapter_with_a_slow_pattern(tmp_path, field, short):
    src = tmp_path / "src"
    src.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    long = "base_model.model." + "a" * 60 + ".q_proj"
    tensors = {}
    for path in (name, long):
        tensors[f"{path}.lora_A.weight"] = np.ones((2, 4), np.float32)
        tensors[f"{path}.lora_B.weight"] = np.ones((4, 2), np.float32)
    write_tensors(src / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    slow = r"(?:a|a)*$"
    config[field] = slow if field == "target_modules" else {slow: 2}
    (src / "adapter_config.json").write_text(json.dumps(config))
    begin = time.process_time()
    with pytest.raises(BadInputError, match=r"more than 0\.5 seconds") as caught:
        regraft.convert(
            src, tmp_path / "out", to="transformers-v5", model=GOLDEN / "bases" / "mixtral"
        )
    assert time.process_time() - begin < 20
    assert caught.value.findings[0].code == "slow-pattern"
    assert caught.value.findings[0].key == field


HUNG_BY_RE = "(([a-z0-9._])+)+X"
"""The ``regex`` package sees at once that there is no X; ``re`` does not."""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exclude_modules", HUNG_BY_RE),
        ("rank_pattern", {HUNG_BY_RE: 4}),
        ("alpha_pattern", {"q_proj": 8, HUNG_BY_RE: 4}),
        ("layers_pattern", ["layers", HUNG_BY_RE]),
    ],
)
@pytest.mark.slow
def test_a_pattern_that_is_slow_where_peft_reads_it(tmp_path, field, value, short):
    src = tmp_path / "src"
    shutil.copytree(GOLDEN / "cases" / "mixtral__gud_attn", src)
    path = src / "adapter_config.json"
    config = {**json.loads(path.read_text()), field: value}
    if field == "layers_pattern":
        config["layers_to_transform"] = [0, 1]
    path.write_text(json.dumps(config))
    with pytest.raises(BadInputError) as caught:
        regraft.inspect(src, model=GOLDEN / "bases" / "mixtral")
    assert [(f.code, f.key) for f in caught.value.findings] == [("slow-pattern", field)]


def test_a_sound_pattern_is_not_slow_however_involved():
    names = {f"model.layers.{n}.self_attn.q_proj" for n in range(100)}
    involved = r"(?:.*?(?:language|text|layers).*?(?:self_attn|mlp).*?(?:[qkvo]_proj|gate))+"
    assert find_slow([("target_modules", involved)], names) == []
