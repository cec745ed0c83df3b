"""Loading a checkpoint into a live model without converting it first: what transformers loads, to the bit."""

import copy
import io
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import regraft
from regraft.errors import BadInputError, RegraftError, UnmatchedKeysError
from regraft.live import load as load_module
from regraft.live import memory, pages
from regraft.rules.book import only_books

if not pages.can_map():
    pytest.skip("files cannot be mapped here", allow_module_level=True)

BASES = Path(__file__).parents[1] / "golden/bases"
MLX = Path(__file__).parents[2] / "scripts/learn/books/mlx_mixtral.toml"
WAYS = ("map", "copy")


def same(one, other):
    """Whether two models have the same tensors, bit for bit, with the same ties."""
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(raw(tensor), raw(right[key])), key
    ties = [
        {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        for model in (one, other)
    ]
    assert sorted(ties[0].values()) == sorted(ties[1].values())
    return True


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A Mixtral whose experts are long enough to be mapped, in the layout of transformers 4; three shards."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    tensors = regraft.convert_state_dict(model.state_dict(), to="transformers-v4", model=model)
    folder = tmp_path_factory.mktemp("big") / "v4"
    write(folder, tensors, config, 3)
    return folder


def write(folder, tensors, config, shards=1):
    """A checkpoint as older releases wrote it."""
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    where, names = {}, list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        step = -(-len(names) // shards)
        mine = names[number * step : (number + 1) * step]
        save_file(
            {name: tensors[name].contiguous() for name in mine}, folder / file, {"format": "pt"}
        )
        where |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def causal(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("way", WAYS)
def test_the_bits_are_those_that_transformers_loads(big, way):
    model = regraft.from_pretrained(AutoModelForCausalLM, big, load=way)
    assert same(model, causal(big))
    done = model.regraft_load
    assert done.way == way
    assert done.tensors == len(model.state_dict())
    assert done.mapped + done.copied == done.bytes
    assert (done.mapped > done.bytes // 2) == (way == "map")
    assert not model.training


@pytest.mark.parametrize(
    "name", sorted(path.name for path in BASES.iterdir() if path.name != "llava_mixtral")
)
def test_every_golden_base_loads_as_transformers_loads_it(name):
    config = json.loads((BASES / name / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    stock, stock_info = cls.from_pretrained(BASES / name, output_loading_info=True)
    model, info = regraft.from_pretrained(cls, BASES / name, output_loading_info=True)
    assert model.regraft_load.way == "map", model.regraft_load
    assert same(model, stock)
    assert info == stock_info
    used, stock_used = (
        [(type(c), c.source_patterns, c.target_patterns) for c in m._weight_conversions]
        for m in (model, stock)
    )
    assert used == stock_used


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
def test_missing_and_unexpected_keys_are_those_of_transformers(big, cls):
    torch.manual_seed(0)
    stock, stock_info = cls.from_pretrained(big, output_loading_info=True)
    torch.manual_seed(0)
    model, info = regraft.from_pretrained(cls, big, output_loading_info=True)
    assert model.regraft_load.way == "map", model.regraft_load
    assert info == stock_info
    assert same(model, stock)


def test_what_it_saves_is_what_transformers_saves(big, tmp_path):
    regraft.from_pretrained(AutoModelForCausalLM, big).save_pretrained(tmp_path / "a")
    causal(big).save_pretrained(tmp_path / "b")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other


def test_other_code_loads_through_it_while_it_is_installed(big):
    with regraft.installed(load="copy"):
        assert causal(big).regraft_load.way == "copy"
        with regraft.installed(load="off"):
            assert not hasattr(causal(big), "regraft_load")
        assert causal(big).regraft_load.way == "copy"
    assert not hasattr(causal(big), "regraft_load")
    with pytest.raises(BadInputError, match="'quick'"):
        regraft.from_pretrained(AutoModelForCausalLM, big, load="quick")


def test_bin_shards(big, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((big / "config.json").read_bytes())
    where = {}
    for number, path in enumerate(sorted(big.glob("*.safetensors"))):
        name = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        torch.save(load_file(path), folder / name)
        where |= dict.fromkeys(load_file(path), name)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    model = regraft.from_pretrained(AutoModelForCausalLM, folder)
    assert model.regraft_load.way == "map"
    assert same(model, causal(big))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    regraft.load_checkpoint(empty, folder)
    assert same(empty, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_casts_are_left_to_transformers_and_said(big, dtype):
    with pytest.warns(UserWarning, match="most of it is cast"):
        model = regraft.from_pretrained(AutoModelForCausalLM, big, dtype=dtype)
    assert model.regraft_load.way == "off"
    assert "cast" in str(model.regraft_load)
    assert same(model, causal(big, dtype=dtype))


def test_a_few_casts_are_done(big, tmp_path, monkeypatch):
    monkeypatch.setattr(
        transformers.MixtralForCausalLM, "_keep_in_fp32_modules_strict", ["q_proj"], raising=False
    )
    folder = tmp_path / "half"
    config = transformers.AutoConfig.from_pretrained(big)
    config.dtype = torch.bfloat16
    tensors = {k: t for p in big.glob("*.safetensors") for k, t in load_file(p).items()}
    write(folder, {k: t.to(torch.bfloat16) for k, t in tensors.items()}, config)
    stock = causal(folder)
    model = regraft.from_pretrained(AutoModelForCausalLM, folder)
    assert {t.dtype for t in stock.state_dict().values()} == {torch.float32, torch.bfloat16}
    assert model.regraft_load.way == "map", model.regraft_load
    assert same(model, stock)
    assert "cast" in str(model.regraft_load)


def test_a_key_mapping_of_ones_own_is_left_to_transformers(big, tmp_path):
    tensors = {f"old.{k}": t for p in big.glob("*.safetensors") for k, t in load_file(p).items()}
    write(tmp_path / "odd", tensors, transformers.AutoConfig.from_pretrained(big))
    with pytest.warns(UserWarning, match=r"old\..* is .* for transformers alone"):
        model = regraft.from_pretrained(
            AutoModelForCausalLM, tmp_path / "odd", key_mapping={r"^old\.": ""}
        )
    assert model.regraft_load.way == "off"
    assert same(model, causal(big))


def test_a_state_dict_and_offload_are_left_to_transformers(big, tmp_path):
    config = causal(big).config
    with pytest.warns(UserWarning, match="a state dict was given"):
        regraft.from_pretrained(
            transformers.MixtralForCausalLM,
            None,
            config=config,
            state_dict=causal(big).state_dict(),
        )


# What a mapped tensor does


@pytest.fixture
def mapped(big):
    model = regraft.from_pretrained(AutoModelForCausalLM, big)
    assert model.regraft_load.mapped
    return model


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.iterdir())}


def stacked(model):
    return model.model.layers[0].mlp.experts.gate_up_proj


def test_training_changes_the_model_and_no_file(mapped, big):
    before = files_of(big)
    stock = causal(big)
    ids = torch.arange(8)[None]
    for model in (mapped, stock):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    # Where a tensor begins in memory can change the last bit of a sum.
    for key, tensor in stock.state_dict().items():
        assert torch.allclose(mapped.state_dict()[key], tensor, rtol=1e-4, atol=1e-7), key
    assert not torch.equal(stacked(mapped), stacked(causal(big)))
    assert files_of(big) == before


def test_edits_in_place_stay_in_the_process(mapped, big):
    before = files_of(big)
    with torch.no_grad():
        for parameter in mapped.parameters():
            parameter.mul_(2).add_(1)
    for key, tensor in causal(big).state_dict().items():
        assert torch.equal(mapped.state_dict()[key], tensor * 2 + 1)
    assert files_of(big) == before


def child(model, queue):
    with torch.no_grad():
        first = float(stacked(model).sum())
        stacked(model).zero_()
    queue.put((first, float(stacked(model).sum())))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_process_has_its_own(mapped):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    want = float(stacked(mapped).sum())
    process = context.Process(target=child, args=(mapped, queue))
    process.start()
    assert queue.get() == (want, 0.0)
    process.join()
    assert float(stacked(mapped).sum()) == want


def test_it_is_pickled_saved_copied_and_moved_as_any_other(mapped, big, tmp_path):
    stock = causal(big)
    assert same(pickle.loads(pickle.dumps(mapped)), stock)
    torch.save(mapped.state_dict(), tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in stock.state_dict().items())
    buffer = io.BytesIO()
    torch.save(mapped, buffer)
    assert same(copy.deepcopy(mapped), stock)
    shared = copy.deepcopy(stacked(mapped).detach()).share_memory_()
    assert torch.equal(shared, stacked(stock))
    assert same(copy.deepcopy(mapped).to(torch.bfloat16), causal(big).to(torch.bfloat16))
    assert mapped.to("meta").device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_it_is_pinned_and_sent_to_a_gpu(mapped, big):
    assert stacked(mapped).detach().pin_memory().is_pinned()
    assert same(mapped.to("cuda").to("cpu"), causal(big))


def maps():
    return Path("/proc/self/maps").read_text().count(".safetensors")


def test_pages_are_unmapped_when_the_tensors_go(big):
    before = maps()
    model = regraft.from_pretrained(AutoModelForCausalLM, big)
    assert maps() > before
    kept = stacked(model).detach()
    want = kept.clone()
    del model
    assert torch.equal(kept, want)
    del kept
    assert maps() == before


def test_the_files_are_needed_no_more(big, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    for path in big.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = regraft.from_pretrained(AutoModelForCausalLM, folder)
    for path in folder.iterdir():
        path.unlink()
    assert same(model, causal(big))


# Limits and faults


def test_without_mappings_left_it_copies_and_says_so(big, monkeypatch):
    monkeypatch.setattr(pages.Budget, "now", lambda: pages.Budget(3))
    model = regraft.from_pretrained(AutoModelForCausalLM, big)
    assert same(model, causal(big))
    assert "max_map_count" in str(model.regraft_load)
    assert model.regraft_load.mapped + model.regraft_load.copied == model.regraft_load.bytes


def test_where_the_system_refuses_a_mapping_it_copies(big, monkeypatch):
    count = 0

    def sometimes(address, size, file, at):
        nonlocal count
        count += 1
        return count % 3 and real(address, size, file, at)

    real = pages._map
    monkeypatch.setattr(pages, "_map", sometimes)
    model = regraft.from_pretrained(AutoModelForCausalLM, big)
    assert same(model, causal(big))
    assert model.regraft_load.mapped + model.regraft_load.copied == model.regraft_load.bytes


@pytest.fixture
def mine(big, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in big.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def truncated(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5000)


def replaced(path):
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def touched(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")


def gone(path):
    path.unlink()


@pytest.mark.parametrize("happens", [truncated, replaced, touched, gone])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("late", [False, True])
def test_a_file_that_changes_before_the_load_is_done_is_an_error(
    mine, monkeypatch, happens, way, late
):
    """Before any of its bytes is read, or when all of them are."""
    path = sorted(mine.glob("*.safetensors"))[1]
    real = memory.fill_slices if late else memory.make_parts

    def changing(*args, **options):
        if late:
            result = real(*args, **options)
            happens(path)
            return result
        happens(path)
        return real(*args, **options)

    if late:
        monkeypatch.setattr(memory, "fill_slices", changing)
    else:
        monkeypatch.setattr("regraft.bridges.transformers.loading.make_parts", changing)
        monkeypatch.setattr(load_module, "make_parts", changing)
    with pytest.raises(RegraftError) as caught:
        regraft.from_pretrained(AutoModelForCausalLM, mine, load=way)
    assert {f.code for f in caught.value.findings} == {"file-changed"}
    assert path.name in str(caught.value)


# Into a model that is there


class Holder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.net = model
        self.value = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["cpu", "meta", "holder"])
def test_load_checkpoint_into_a_model(big, way, where):
    config = transformers.AutoConfig.from_pretrained(big)
    with torch.device("meta" if where == "meta" else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    before = dict(model.named_parameters())
    head = Holder(model) if where == "holder" else model
    done = regraft.load_checkpoint(head, big, load=way)
    assert head.regraft_load is done
    assert (done.mapped > 0) == (way == "map")
    model.eval()
    assert not any(tensor.is_meta for tensor in model.buffers())
    stock = causal(big)
    assert same(model, stock)
    assert torch.equal(model(torch.arange(5)[None]).logits, stock(torch.arange(5)[None]).logits)
    if where != "meta":
        assert all(before[name] is p for name, p in model.named_parameters())


def test_an_optimizer_that_was_made_before_trains_what_was_loaded(big):
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(big))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regraft.load_checkpoint(model, big)
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(stacked(model), stacked(causal(big)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_stay_tied(tmp_path, device):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    saved = transformers.LlamaForCausalLM(config)
    saved.save_pretrained(tmp_path)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    regraft.load_checkpoint(model, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    assert same(regraft.from_pretrained(AutoModelForCausalLM, tmp_path), saved)


def test_all_that_does_not_fit_is_said_at_once_and_nothing_is_loaded(big, mine):
    gone = "model.layers.0.input_layernorm.weight"
    index = json.loads((mine / "model.safetensors.index.json").read_text())
    path = mine / index["weight_map"][gone]
    tensors = load_file(path)
    del tensors[gone]
    tensors["model.layers.0.nobody.weight"] = torch.zeros(2)
    save_file(tensors, path, {"format": "pt"})
    del index["weight_map"][gone]
    index["weight_map"]["model.layers.0.nobody.weight"] = path.name
    (mine / "model.safetensors.index.json").write_text(json.dumps(index))
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(big))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UnmatchedKeysError) as caught:
        regraft.load_checkpoint(model, mine)
    found = {(f.code, f.key) for f in caught.value.findings}
    assert found == {("unmatched", "model.layers.0.nobody.weight"), ("missing", gone)}
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    assert not hasattr(model, "regraft_load")


def test_a_fault_leaves_the_model_as_it_was(mine, monkeypatch):
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(mine))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    path = sorted(mine.glob("*.safetensors"))[2]
    real = memory.fill_slices

    def changing(*args, **options):
        result = real(*args, **options)
        touched(path)
        return result

    monkeypatch.setattr(memory, "fill_slices", changing)
    with pytest.raises(BadInputError):
        regraft.load_checkpoint(model, mine)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_a_checkpoint_of_another_tool_is_loaded_through_its_book(tmp_path):
    """Its experts are stacked, gate and up apart; the model wants them as one."""
    folder = tmp_path / "mlx"
    with only_books([MLX, "built-in"]):
        regraft.convert(BASES / "mixtral", folder, to="mlx")
        model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
        done = regraft.load_checkpoint(model, folder)
        loaded = regraft.from_pretrained(AutoModelForCausalLM, folder)
    assert same(loaded, causal(BASES / "mixtral"))
    assert loaded.regraft_load.way == "map"
    assert done.tensors == len(model.state_dict())
    assert same(model.eval(), causal(BASES / "mixtral", dtype=model.dtype))


def test_a_shape_is_told_with_keys_that_are_unknown(mine):
    path = sorted(mine.glob("*.safetensors"))[0]
    tensors = load_file(path) | {"nobody.weight": torch.zeros(2)}
    save_file(tensors, path, {"format": "pt"})
    index = json.loads((mine / "model.safetensors.index.json").read_text())
    index["weight_map"]["nobody.weight"] = path.name
    (mine / "model.safetensors.index.json").write_text(json.dumps(index))
    config = transformers.AutoConfig.from_pretrained(mine)
    config.vocab_size = 11
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnmatchedKeysError) as caught:
        regraft.load_checkpoint(model, mine)
    assert {f.code for f in caught.value.findings} == {"unmatched", "shape"}


def test_a_shape_that_is_another_ones(big):
    config = transformers.AutoConfig.from_pretrained(big)
    config.vocab_size = 11
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BadInputError) as caught:
        regraft.load_checkpoint(model, big)
    assert {f.code for f in caught.value.findings} == {"shape"}
    assert len(caught.value.findings) == 2


def test_a_cast_is_done_and_said(big):
    config = transformers.AutoConfig.from_pretrained(big)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    done = regraft.load_checkpoint(model, big)
    assert "cast" in str(done)
    assert same(model.eval(), causal(big, dtype=torch.bfloat16))


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float64])
def test_a_model_without_memory_gets_its_own_dtype(big, tmp_path, saved):
    """`from_config` makes float32, and most checkpoints hold something else."""
    config = transformers.AutoConfig.from_pretrained(big)
    tensors = {}
    for file in big.glob("*.safetensors"):
        tensors |= load_file(file)
    folder = tmp_path / "cast"
    write(folder, {name: tensor.to(saved) for name, tensor in tensors.items()}, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    done = regraft.load_checkpoint(model, folder)
    assert "cast" in str(done)
    assert same(model, causal(folder, dtype=torch.float32))


def test_memory_that_others_look_at_is_filled_and_not_replaced(big):
    """Of a model that processes share, and of one whose parameters are parts of a flat buffer."""
    config = transformers.AutoConfig.from_pretrained(big)
    stock = causal(big)
    shared = AutoModelForCausalLM.from_config(config).share_memory()
    flat = AutoModelForCausalLM.from_config(config)
    buffer = torch.nn.utils.parameters_to_vector(flat.parameters()).detach()
    torch.nn.utils.vector_to_parameters(buffer, flat.parameters())
    wanted = torch.nn.utils.parameters_to_vector(stock.parameters())
    for model in (shared, flat):
        places = [p.data_ptr() for p in model.parameters()]
        done = regraft.load_checkpoint(model, big)
        assert [p.data_ptr() for p in model.parameters()] == places
        assert done.mapped == 0
        assert same(model, stock)
    assert torch.equal(buffer, wanted)
    shared.half()
    regraft.load_checkpoint(shared.share_memory(), big)
    assert shared.lm_head.weight.is_shared()


def test_what_is_loaded_in_inference_mode_can_be_trained(big):
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(big))
    with torch.inference_mode():
        regraft.load_checkpoint(model, big)
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()


def test_nobody_but_regraft_loads_a_checkpoint_into_a_model(big):
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(big))
    with pytest.raises(BadInputError) as caught:
        regraft.load_checkpoint(model, big, load="off")
    assert "one of map, copy" in str(caught.value)


def test_frequencies_that_older_releases_saved_change_nothing(big, tmp_path):
    """What transformers leaves out of a file is no reason to leave the load to it."""
    tensors = {}
    for file in big.glob("*.safetensors"):
        tensors |= load_file(file)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    folder = tmp_path / "older"
    write(folder, tensors, transformers.AutoConfig.from_pretrained(big))
    stock, told = causal(folder, output_loading_info=True)
    model, found = regraft.from_pretrained(AutoModelForCausalLM, folder, output_loading_info=True)
    assert model.regraft_load.way == "map"
    assert found == told
    assert same(model, stock)


def test_a_model_whose_state_dict_is_a_copy_is_refused(big):
    """As FullyShardedDataParallel's is: what is put there does not reach the model."""
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(big))

    def copied(module, state, prefix, metadata):
        state |= {key: tensor.clone() for key, tensor in state.items()}

    model.register_state_dict_post_hook(copied)
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.load_checkpoint(model, big)
    assert [f.code for f in caught.value.findings] == ["flattened"]


def test_what_is_computed_draws_no_weight_anew(tmp_path):
    """The initialisation of CLIP's embeddings, which have a buffer, reaches into the modules below them."""
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    saved = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    saved.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.CLIPVisionModel(saved.config)
    regraft.load_checkpoint(model, tmp_path)
    assert same(model, saved)
    assert all(
        torch.equal(mine, its) for mine, its in zip(model.buffers(), saved.buffers(), strict=True)
    )
    assert not any(hasattr(p, "_is_hf_initialized") for p in model.parameters())


def test_buffers_that_nobody_computes_are_told(big):
    config = transformers.AutoConfig.from_pretrained(big)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.model.norm.register_buffer("mine", torch.ones(3), persistent=False)
    done = regraft.load_checkpoint(model, big)
    assert "model.norm.mine" in str(done)
    assert same(model, causal(big))
    assert model.model.norm.mine.is_meta and not model.model.rotary_emb.inv_freq.is_meta


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_adapter_goes_into_the_model_or_all_is_as_it_was(tmp_path, device):
    from regraft.bridges.peft.load import active_adapters

    case = BASES.parent / "cases/mixtral__gud_attn"
    base = BASES / "mixtral"
    config = transformers.AutoConfig.from_pretrained(base)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    before = dict(model.named_parameters())
    values = {key: p.detach().clone() for key, p in before.items()}
    with pytest.raises(RegraftError):
        regraft.load_checkpoint(model, base, adapter=tmp_path)
    assert all(before[key] is p for key, p in model.named_parameters())
    if device == "cpu":
        assert all(torch.equal(values[key], p) for key, p in model.named_parameters())
    assert all(p.device.type == device for p in model.parameters())
    assert not hasattr(model, "regraft_load")
    regraft.load_checkpoint(model, base, adapter=case)
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, regraft.load_adapter(causal(base), case)(ids).logits)
    assert active_adapters(model) == ["default"]


def unlike(folder, case, change):
    """The adapter, with one of its tensors changed."""
    folder.mkdir()
    for path in case.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def shared_mixtral():
    """A model in memory that others look at, which a load fills where it is."""
    config = transformers.AutoConfig.from_pretrained(BASES / "mixtral")
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).share_memory()


def wider(tensors):
    key = next(key for key in tensors if "q_proj.lora_B" in key)
    tensors[key] = torch.zeros(tensors[key].shape[0] + 2, tensors[key].shape[1])


def strange(tensors):
    for key in [key for key in tensors if "q_proj" in key]:
        tensors[key.replace("q_proj", "x_proj")] = tensors.pop(key)


@pytest.mark.parametrize("change", [wider, strange, dict.clear])
def test_an_adapter_that_does_not_fit_is_known_before_the_base_is_written(tmp_path, change):
    model = shared_mixtral()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = unlike(tmp_path / "odd", BASES.parent / "cases/mixtral__gud_attn", change)
    with pytest.raises(RegraftError) as caught:
        regraft.load_checkpoint(model, BASES / "mixtral", adapter=adapter)
    assert "half-loaded" not in {f.code for f in caught.value.findings}
    assert dict.fromkeys(before, True) == {
        key: torch.equal(before[key], tensor) for key, tensor in model.state_dict().items()
    }
    assert not hasattr(model, "regraft_load") and not hasattr(model, "peft_config")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), BadInputError([])])
def test_an_adapter_that_fails_at_last_names_what_is_not_as_it_was(monkeypatch, error):
    from regraft.bridges.peft.load import Inside

    def fails(inside):
        raise error

    monkeypatch.setattr(Inside, "rehearse", lambda inside: None)
    monkeypatch.setattr(Inside, "put", fails)
    adapter = BASES.parent / "cases/mixtral__gud_attn"
    with pytest.raises(type(error)) as caught:
        regraft.load_checkpoint(shared_mixtral(), BASES / "mixtral", adapter=adapter)
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "half-loaded" in told or "not as they were" in told
    assert "q_proj" in told


def test_an_adapter_goes_on_top_of_memory_that_others_look_at():
    case = BASES.parent / "cases/mixtral__gud_attn"
    model = shared_mixtral()
    regraft.load_checkpoint(model, BASES / "mixtral", adapter=case)
    ids = torch.arange(6)[None]
    want = regraft.load_adapter(causal(BASES / "mixtral"), case)
    assert torch.equal(model(ids).logits, want(ids).logits)


def test_an_adapter_on_top(tmp_path):
    case = BASES.parent / "cases/mixtral__gud_attn"
    base = BASES / "mixtral"
    want = regraft.load_adapter(causal(base), case)
    model = regraft.from_pretrained(AutoModelForCausalLM, base, adapter=case)
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, want(ids).logits)


# Who loads models beside people


class Sums(Dataset):
    """Each item is computed with the model, in a worker, which changes its weights afterwards."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    @torch.no_grad()
    def __getitem__(self, at):
        head = self.model.lm_head.weight
        found = float(head.double().sum())
        head.zero_()
        return found, float(head.double().sum())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_workers_of_a_data_loader_have_their_own(big):
    model = regraft.from_pretrained(AutoModelForCausalLM, big)
    want = float(model.lm_head.weight.detach().double().sum())
    loader = DataLoader(Sums(model), batch_size=2, num_workers=2, multiprocessing_context="fork")
    firsts = [batch[0].tolist()[0] for batch in loader]
    assert firsts == [want, want]
    assert same(model, causal(big))


def test_a_trainer_trains_what_is_loaded_while_it_is_installed(big, tmp_path):
    before = files_of(big)
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    trained = []
    for way in ("map", "off"):
        with regraft.installed(load=way):
            torch.manual_seed(0)
            model = causal(big)
            options = transformers.TrainingArguments(
                output_dir=tmp_path / way, max_steps=2, per_device_train_batch_size=2, report_to=[],
                save_strategy="steps", save_steps=2, use_cpu=True, seed=0, disable_tqdm=True,
            )  # fmt: skip
            transformers.Trainer(model, options, train_dataset=data).train()
            trained.append((model, causal(tmp_path / way / "checkpoint-2")))
    (model, saved), (stock, _) = trained
    assert saved.regraft_load.way == "map"
    assert same(model, saved.train())
    for key, tensor in stock.state_dict().items():
        assert torch.allclose(model.state_dict()[key], tensor, rtol=1e-4, atol=1e-6), key
    assert files_of(big) == before


def test_a_pipeline_loads_through_it(big):
    stock = causal(big)
    with regraft.installed():
        made = transformers.pipeline(
            "text-generation", model=str(big), tokenizer=Letters(), device="cpu"
        )
    assert made.model.regraft_load.way == "map"
    assert same(made.model, stock)


class Letters(transformers.PreTrainedTokenizer):
    """A tokenizer that needs no files."""

    vocab_size = 64

    def get_vocab(self):
        return {chr(32 + i): i for i in range(64)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index):
        return chr(32 + index)


def test_a_revision_in_the_hubs_cache(big, tmp_path):
    """Two revisions of a repository, and the files are links, as the Hub's client makes them."""
    repo = tmp_path / "models--org--name"
    for commit, ref, factor in (("a" * 40, "main", 1), ("b" * 40, "old", 2)):
        folder = repo / "snapshots" / commit
        folder.mkdir(parents=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "blobs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
        for path in big.iterdir():
            blob = repo / "blobs" / f"{path.name}-{factor}"
            if path.suffix == ".safetensors":
                tensors = {key: t * factor for key, t in load_file(path).items()}
                save_file(tensors, blob, {"format": "pt"})
            else:
                blob.write_bytes(path.read_bytes())
            (folder / path.name).symlink_to(Path("../../blobs") / blob.name)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    for revision, factor in (("main", 1), ("old", 2), ("b" * 40, 2)):
        model = regraft.from_pretrained(
            AutoModelForCausalLM, "org/name", revision=revision, **options
        )
        assert model.regraft_load.way == "map"
        stock = AutoModelForCausalLM.from_pretrained("org/name", revision=revision, **options)
        assert same(model, stock)
        assert torch.equal(model.lm_head.weight, causal(big).lm_head.weight * factor)


@pytest.mark.parametrize("way", ["map", "copy"])
def test_from_pretrained_in_inference_mode(big, way):
    with torch.inference_mode():
        model = regraft.from_pretrained(AutoModelForCausalLM, big, load=way)
        logits = model(torch.arange(5)[None]).logits
    assert model.regraft_load.way == way
    assert not any(p.is_inference() for p in model.parameters())
    assert torch.equal(logits, causal(big)(torch.arange(5)[None]).logits)
