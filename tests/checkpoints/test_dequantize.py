"""``--dequantize``: the published formulas, and the numbers that transformers and compressed-tensors get."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints.models import mixtral, write_folder
from checkpoints.quantised_samples import (
    CONFIG,
    GPT_OSS,
    asymmetric,
    bits,
    fp8,
    gpt_oss,
    gptq,
    method,
    quantised,
)

import regraft
from regraft.cli import main
from regraft.storage.dtypes import DTYPES
from regraft.storage.safetensors import open_tensors

V4, V5 = "transformers-v4", "transformers-v5"
F8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2."


def converted(tmp_path, tensors, config, to=V4, **options):
    src = write_folder(tmp_path / "src", tensors, config, **options)
    report = regraft.convert(src, tmp_path / "out", to=to, dequantize=True)
    out = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        out |= open_tensors(file)
    return out, report


def scaled(rows, columns, block):
    """An FP8 weight and scales of all sizes, and the product by loops."""
    random = np.random.default_rng(1)
    weight = random.normal(size=(rows, columns)).astype(F8)
    cells = (-(-rows // block[0]), -(-columns // block[1]))
    scales = np.exp2(random.normal(size=cells) * 4).astype(np.float32)
    product = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            scale = scales[row // block[0], column // block[1]]
            product[row, column] = np.float32(weight[row, column]) * scale
    return weight, scales, product.astype(BF16)


@pytest.mark.parametrize("block", [(16, 16), (12, 20), (1, 32), (32, 32)])
@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
def test_fp8_is_the_number_times_its_blocks_scale(tmp_path, block, suffix):
    tensors = mixtral(32, 32)
    key = "model.layers.1.self_attn.q_proj."
    weight, scales, wanted = scaled(32, 32, block)
    tensors |= {key + "weight": weight, key + suffix: scales}
    out, report = converted(tmp_path, tensors, method("fp8", weight_block_size=list(block)))
    assert out.keys() == mixtral().keys()
    assert out[key + "weight"].dtype == BF16
    assert out[key + "weight"].tobytes() == wanted.tobytes()
    assert np.array_equal(out["lm_head.weight"], tensors["lm_head.weight"])
    assert "1 weights were dequantised" in report.notes[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_dequantised_checkpoint_is_stacked_like_any_other(tmp_path):
    tensors = quantised(fp8)
    out, report = converted(
        tmp_path, tensors, method("fp8", weight_block_size=[16, 16]), V5, shards=3
    )
    made = out["model.layers.1.mlp.experts.gate_up_proj"]
    parts = [tensors[f"model.layers.1.block_sparse_moe.experts.2.{w}.weight"] for w in ("w1", "w3")]
    assert made.dtype == BF16
    assert np.array_equal(made[2], np.concatenate(parts).astype(BF16))
    assert not any("scale" in name for name in out)
    assert report.to_dict()["checkpoint"]["casts"] == {"FP8 to BF16": 18}


WRITTEN = {"weight_scale_inv": "fp8", "weight_scale": "compressed-tensors"}
Q = "model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(
    ("suffix", "told", "block"),
    [
        ("weight_scale_inv", {}, (128, 128)),  # what transformers takes where nothing is told
        ("weight_scale_inv", {"weight_block_size": [128, 64]}, (128, 64)),
        ("weight_scale_inv", {"weight_block_size": [128, 128]}, (1, 50)),  # the grid tells another
        ("weight_scale", {"block_structure": [128, 64]}, (128, 64)),
        ("weight_scale", {"block_structure": [100, 128]}, (100, 128)),
    ],
)
def test_the_last_block_of_a_dim_may_be_a_part(tmp_path, suffix, told, block):
    weight, scales, wanted = scaled(300, 150, block)
    if suffix == "weight_scale":
        told = {"config_groups": {"group_0": {"weights": {"strategy": "block", **told}}}}
    tensors = mixtral(32, 32) | {Q + "weight": weight, Q + suffix: scales}
    out, _ = converted(tmp_path, tensors, method(WRITTEN[suffix], **told))
    assert out[Q + "weight"].tobytes() == wanted.tobytes()


def test_blocks_of_two_sizes_that_both_fit_are_not_guessed(tmp_path):
    weight, scales, _ = scaled(300, 256, (128, 128))
    tensors = mixtral(32, 32) | {Q + "weight": weight, Q + "weight_scale_inv": scales}
    src = write_folder(tmp_path / "src", tensors, CONFIG)
    with pytest.raises(regraft.BadInputError, match="weight_block_size"):
        regraft.convert(src, tmp_path / "out", to=V4, dequantize=True)


def test_empty_weights_and_single_numbers(tmp_path):
    tensors = mixtral(32, 32) | {
        Q + "weight": np.zeros((0, 32), F8),
        Q + "weight_scale_inv": np.ones((0, 1), np.float32),
        "lm_head.weight": np.array(3, F8),
        "lm_head.weight_scale": np.array(2, np.float32),
    }
    out, _ = converted(tmp_path, tensors, method("fp8"))
    assert out[Q + "weight"].shape == (0, 32)
    assert float(out["lm_head.weight"]) == 6


@pytest.mark.parametrize("stored", ["I8", "F4"])
def test_fp4_among_fp8(tmp_path, stored):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    numbers, exponents = bits(32, 32, dtype=np.int8), bits(32, 2) // 4 + 96
    scales = exponents.view(ml_dtypes.float8_e8m0fnu)
    held = numbers if stored == "I8" else numbers.view(DTYPES["F4"].numpy)
    weight, grid, wanted = scaled(32, 32, (32, 32))
    tensors = mixtral(32, 32) | {Q + "weight": held, Q + "weight_scale_inv": scales}
    tensors |= {"lm_head.weight": weight, "lm_head.weight_scale_inv": grid}
    out, _ = converted(tmp_path, tensors, method("fp8", expert_dtype="fp4"))
    assert out["lm_head.weight"].tobytes() == wanted.tobytes()
    grid = torch.tensor(exponents).view(torch.float8_e8m0fnu)
    wanted = Fp8Dequantize(None)._dequantize_one(torch.tensor(numbers), grid, torch.bfloat16)
    assert out[Q + "weight"].tobytes() == wanted.view(torch.int16).numpy().tobytes()


def test_mxfp4_of_compressed_tensors(tmp_path):
    packed, exponents = bits(32, 32), bits(32, 2) // 4 + 96
    tensors = mixtral(32, 32) | {Q + "weight_packed": packed, Q + "weight_scale": exponents}
    del tensors[Q + "weight"]
    written = method("compressed-tensors", format="mxfp4-pack-quantized")
    out, _ = converted(tmp_path, tensors, written)
    scales = np.exp2(exponents.repeat(2, axis=1).astype(np.float32) - 127)
    wanted = nvfp4_by_hand(packed, scales, np.float32(1), False)
    assert out[Q + "weight"].tobytes() == wanted.tobytes()
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    numbers = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**numbers))
    state = {"weight_packed": torch.tensor(packed), "weight_scale": torch.tensor(exponents)}
    compressor = compressors.BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    theirs = compressor.decompress(state, scheme)["weight"].float().numpy()
    assert np.array_equal(theirs, wanted.astype(np.float32))


def test_floats_of_six_bits_have_no_formula(tmp_path):
    tensors = mixtral(32, 32) | {Q + "weight_packed": bits(32, 24), Q + "weight_scale": bits(32, 1)}
    del tensors[Q + "weight"]
    written = method("compressed-tensors", format="mxfp6-pack-quantized")
    src = write_folder(tmp_path / "src", tensors, written)
    with pytest.raises(regraft.RefusedError, match="mxfp6"):
        regraft.convert(src, tmp_path / "out", to=V4, dequantize=True)


def test_scales_that_are_exponents(tmp_path):
    tensors = mixtral(32, 32)
    key = "model.layers.1.self_attn.q_proj.weight"
    tensors[key] = np.ones((32, 32), F8)
    tensors[key + "_scale_inv"] = np.array([[120, 127], [130, 255]], np.uint8)
    out, _ = converted(tmp_path, tensors, method("fp8", weight_block_size=[16, 16]))
    corners = out[key].astype(np.float32)[[0, 0, 16, 16], [0, 16, 0, 16]]
    assert corners[:3].tolist() == [2.0**-7, 1, 8]
    assert np.isnan(corners[3])


def nvfp4_by_hand(packed, scales, second, divides):
    table = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]
    rows, half = packed.shape
    made = np.empty((rows, 2 * half), np.float32)
    for row in range(rows):
        for column in range(2 * half):
            byte = int(packed[row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            number = np.float32(-table[code & 7] if code & 8 else table[code])
            scale = np.float32(scales[row, column // 16])
            scale = scale / second if divides else scale * second
            made[row, column] = number * scale
    return made.astype(BF16)


@pytest.mark.parametrize("writer", ["modelopt", "compressed-tensors"])
def test_nvfp4_has_two_scales(tmp_path, writer):
    packed = bits(32, 16)
    scales = np.random.default_rng(2).uniform(0.1, 200, (32, 2)).astype(F8)
    key = "model.layers.1.self_attn.q_proj."
    tensors = mixtral(32, 32)
    del tensors[key + "weight"]
    if writer == "modelopt":
        second = np.float32(0.003)
        tensors |= {key + "weight": packed, key + "weight_scale_2": second.reshape(())}
        tensors |= {key + "weight_scale": scales, key + "input_scale": np.ones((), np.float32)}
    else:
        divisor = np.array([437.0], np.float32)
        second = divisor[0]
        tensors |= {key + "weight_packed": packed, key + "weight_global_scale": divisor}
        tensors |= {key + "weight_scale": scales, key + "input_global_scale": divisor}
    out, _ = converted(tmp_path, tensors, method(writer, format="nvfp4-pack-quantized"))
    assert out.keys() == mixtral().keys()
    wanted = nvfp4_by_hand(packed, scales, second, writer != "modelopt")
    assert out[key + "weight"].tobytes() == wanted.tobytes()


def test_mxfp4_gives_what_transformers_gives(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    at, tensors = gpt_oss()
    out, _ = converted(tmp_path, tensors, GPT_OSS, V5)
    for name in ("gate_up_proj", "down_proj"):
        parts = [torch.tensor(tensors[f"{at}{name}{end}"]) for end in ("_blocks", "_scales")]
        wanted = convert_moe_packed_tensors(*parts)
        assert tuple(wanted.shape) == out[at + name].shape
        assert out[at + name].tobytes() == wanted.view(torch.int16).numpy().tobytes()


def test_fp8_gives_what_transformers_gives(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = mixtral(32, 32)
    key = "model.layers.1.self_attn.q_proj.weight"
    tensors[key], tensors[key + "_scale_inv"], _ = scaled(32, 32, (16, 8))
    out, _ = converted(tmp_path, tensors, method("fp8", weight_block_size=[16, 8]))
    weight = torch.tensor(tensors[key].view(np.uint8)).view(torch.float8_e4m3fn)
    scales = torch.tensor(tensors[key + "_scale_inv"])
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    assert out[key].tobytes() == wanted.view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize(
    ("tensors", "config", "error", "said"),
    [
        (quantised(gptq), method("gptq"), regraft.RefusedError, "GPTQ"),
        (
            quantised(asymmetric),
            method("compressed-tensors"),
            regraft.RefusedError,
            "compressed-tensors",
        ),
        (mixtral(32, 32), CONFIG, regraft.BadInputError, "nothing in this checkpoint"),
    ],
)
def test_what_has_no_formula_is_refused(tmp_path, tensors, config, error, said):
    src = write_folder(tmp_path / "src", tensors, config)
    with pytest.raises(error, match=said):
        regraft.convert(src, tmp_path / "out", to=V5, dequantize=True)
    assert not (tmp_path / "out").exists()


def test_scales_that_do_not_fit_are_an_error(tmp_path):
    tensors = quantised(fp8)
    tensors[EXPERT + "weight_scale_inv"] = np.ones((5, 3), np.float32)
    src = write_folder(tmp_path / "src", tensors, method("fp8", weight_block_size=[16, 16]))
    with pytest.raises(regraft.BadInputError, match="does not fit its numbers"):
        regraft.convert(src, tmp_path / "out", to=V5, dequantize=True)
    assert not (tmp_path / "out").exists()


def test_a_weight_without_its_scale_is_an_error(tmp_path):
    tensors = quantised(fp8, attention=True)
    del tensors[Q + "weight_scale_inv"]
    src = write_folder(tmp_path / "src", tensors, method("fp8", weight_block_size=[16, 16]))
    with pytest.raises(regraft.BadInputError, match="no scale for it") as caught:
        regraft.convert(src, tmp_path / "out", to=V5, dequantize=True)
    assert [finding.key for finding in caught.value.findings] == [Q + "weight"]


def test_an_error_on_the_way_names_the_source(tmp_path):
    tensors = quantised(fp8)
    del tensors[EXPERT + "weight"], tensors[EXPERT + "weight_scale_inv"]
    src = write_folder(tmp_path / "src", tensors, method("fp8", weight_block_size=[16, 16]))
    with pytest.raises(regraft.BadInputError, match="are missing") as caught:
        regraft.convert(src, tmp_path / "out", to=V5, dequantize=True)
    assert {finding.where for finding in caught.value.findings} == {str(src)}


def test_the_command_says_that_numbers_change(tmp_path, capsys):
    src = write_folder(tmp_path / "src", quantised(fp8), method("fp8"))
    arguments = ["convert", str(src), str(tmp_path / "out"), "--to", V5, "--dequantize"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "18 from FP8 to BF16" in told
    assert "bit for bit" not in told
    assert main([*arguments, "--overwrite", "--dry-run"]) == 1


def test_nvfp4_gives_what_compressed_tensors_gives(tmp_path):
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    numbers = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**numbers))
    packed = bits(32, 16)
    scales = np.random.default_rng(2).uniform(0.1, 200, (32, 2)).astype(F8)
    divisor = np.array([437.0], np.float32)
    key = "model.layers.1.self_attn.q_proj."
    tensors = mixtral(32, 32)
    del tensors[key + "weight"]
    tensors |= {key + "weight_packed": packed, key + "weight_global_scale": divisor}
    tensors |= {key + "weight_scale": scales}
    config = method("compressed-tensors", format="nvfp4-pack-quantized")
    out, _ = converted(tmp_path, tensors, config)
    state = {
        "weight_packed": torch.tensor(packed),
        "weight_scale": torch.tensor(scales.view(np.uint8)).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor(divisor),
    }
    compressor = compressors.BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    wanted = compressor.decompress(state, scheme)["weight"].float().numpy()
    made = out[key + "weight"].astype(np.float32)
    assert np.abs(made - wanted).max() <= 2**-8 * np.abs(wanted).max()
    assert np.allclose(made, wanted, rtol=2**-7)
