"""LyCORIS' algebras: what each adds, by its definition, and what becomes of it in other dialects."""

import numpy as np
import pytest
from dialects.image.samples import H, numbers, pair, product, read_diffusers, read_pairs
from dialects.image.test_image import check, convert, same_bits

import regraft
from regraft.storage.safetensors import write_tensors

__all__ = ["convert"]

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV, CONV_MODULE = "lora_unet_mid_block_resnets_0_conv1", "mid_block.resnets.0.conv1"
N = 16


def weight(module=MODULE, shape=(N, N)):
    return numbers(*shape) + 0.5


@pytest.fixture
def base(tmp_path):
    weights = {f"{MODULE}.weight": weight(), f"{CONV_MODULE}.weight": weight(shape=(N, N, 3, 3))}
    write_tensors(tmp_path / "base.safetensors", weights, {})
    weights["path"] = tmp_path / "base.safetensors"
    return weights


def named(stem, **tensors):
    return {f"{stem}.{role.replace('__', '.')}": tensor for role, tensor in tensors.items()}


def loha(rank=3, into=N):
    t = {"hada_w1_a": numbers(N, rank), "hada_w1_b": numbers(rank, into)}
    t |= {
        "hada_w2_a": numbers(N, rank),
        "hada_w2_b": numbers(rank, into),
        "alpha": np.float32(rank * 2),
    }
    return t, 2 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def lokr(decomposed=True):
    t = {
        "lokr_w1": numbers(2, 2),
        "lokr_w2_a": numbers(8, 1),
        "lokr_w2_b": numbers(1, 8),
        "alpha": np.float32(3),
    }
    return t, 3 * np.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"])


def test_loha_and_lokr_of_low_rank_become_lora_exactly(convert):
    for make in (loha, lokr):
        tensors, want = make()
        made, header = convert(named(STEM, **tensors), "diffusers")
        check(read_diffusers(made, header), {MODULE: want})
        assert "became LoRA, exactly" in " ".join(convert.report.notes)
        assert convert.report.targets[0].rung == "lora"


def test_a_whole_lokr_has_scale_1_and_full_rank(convert):
    tensors = {"lokr_w1": numbers(4, 4), "lokr_w2": numbers(4, 4), "alpha": np.float32(1e10)}
    with pytest.raises(regraft.RefusedError, match="--via dense"):
        convert(named(STEM, **tensors), "diffusers")
    made, header = convert(named(STEM, **tensors), "diffusers", via="dense")
    check(read_diffusers(made, header), {MODULE: np.kron(tensors["lokr_w1"], tensors["lokr_w2"])})
    kept, _ = convert(named(STEM, **tensors), "comfyui")
    assert float(
        kept["diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.alpha"]
    ) == np.float32(1e10)


def test_a_lower_rank_is_made_where_it_is_asked_for(convert):
    tensors, want = loha(rank=5)
    made, header = convert(named(STEM, **tensors), "diffusers", via="svd:4")
    (got,) = read_diffusers(made, header).values()
    left, values, right = np.linalg.svd(want)
    np.testing.assert_allclose(got, (left[:, :4] * values[:4]) @ right[:4], rtol=1e-4, atol=1e-3)
    lost = np.sqrt((values[4:] ** 2).sum() / (values**2).sum())
    assert convert.report.targets[0].error == pytest.approx(lost, rel=1e-3)


def test_tucker_lora_of_a_convolution(convert):
    down, mid, up = numbers(2, N, 1, 1), numbers(2, 2, 3, 3), numbers(N, 2, 1, 1)
    tensors = named(
        CONV, lora_down__weight=down, lora_mid__weight=mid, lora_up__weight=up, alpha=np.float32(4)
    )
    want = 2 * np.einsum("oa,abhw,bi->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    made, header = convert(tensors, "diffusers")
    check(read_diffusers(made, header), {CONV_MODULE: want})
    there, between = convert(tensors, "comfyui")
    same_bits(convert(there, "kohya", between)[0], tensors)


def test_tucker_loha_and_lokr_of_a_convolution(convert):
    core = {f"hada_t{n}": numbers(2, 2, 3, 3) for n in (1, 2)}
    tensors = core | {f"hada_w{n}_{x}": numbers(2, N) for n in (1, 2) for x in "ab"}
    one, two = (
        np.einsum(
            "rshw,ro,si->oihw",
            tensors[f"hada_t{n}"],
            tensors[f"hada_w{n}_a"],
            tensors[f"hada_w{n}_b"],
        )
        for n in (1, 2)
    )
    made, header = convert(named(CONV, **tensors), "diffusers", via="dense")
    check(read_diffusers(made, header), {CONV_MODULE: one * two})
    tensors = {"lokr_w1_a": numbers(4, 1), "lokr_w1_b": numbers(1, 4), "alpha": np.float32(1)}
    tensors |= {
        "lokr_t2": numbers(2, 2, 3, 3),
        "lokr_w2_a": numbers(2, 4),
        "lokr_w2_b": numbers(2, 4),
    }
    inner = np.einsum(
        "rshw,ro,si->oihw", tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    )
    outer = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    want = np.einsum("ac,bdhw->abcdhw", outer, inner).reshape(N, N, 3, 3) / 2
    made, header = convert(named(CONV, **tensors), "diffusers", via="dense")
    check(read_diffusers(made, header), {CONV_MODULE: want})
    there, _ = convert(named(CONV, **tensors), "comfyui")
    assert not any("lokr_w1_a" in key for key in there)
    made, header = convert(there, "diffusers", via="dense")
    check(read_diffusers(made, header), {CONV_MODULE: want})


def glora_older():
    a1, a2, b1, b2 = numbers(2, N), numbers(N, 2), numbers(2, N), numbers(N, 2)
    return {"a1": a1, "a2": a2, "b1": b1, "b2": b2}, lambda w: w @ a2 @ a1 + b2 @ b1


def glora_newer():
    a1, a2, b1, b2 = numbers(N, 2), numbers(2, N), numbers(N, 2), numbers(2, N)
    return {"a1": a1, "a2": a2, "b1": b1, "b2": b2}, lambda w: w @ a1 @ a2 + b1 @ b2


@pytest.mark.parametrize("make", [glora_older, glora_newer])
def test_glora_needs_the_base(convert, base, make):
    factors, adds = make()
    tensors = named(
        STEM, **{f"{role}__weight": t for role, t in factors.items()}, alpha=np.float32(4)
    )
    with pytest.raises(regraft.RefusedError, match=r"depends on the base|multiplies the base"):
        convert(tensors, "diffusers")
    with pytest.raises(regraft.RefusedError) as error:
        convert(tensors, "diffusers", via="dense")
    assert error.value.findings[0].code == "needs-base-weights"
    made, header = convert(tensors, "diffusers", via="dense", model=base["path"])
    check(read_diffusers(made, header), {MODULE: 2 * adds(base[f"{MODULE}.weight"])})


@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3_on_either_side(convert, base, on_input):
    w, factor = base[f"{MODULE}.weight"], numbers(N)
    tensors = named(STEM, weight=factor, on_input=np.float32(on_input))
    made, header = convert(tensors, "diffusers", via="dense", model=base["path"])
    check(read_diffusers(made, header), {MODULE: w * (factor if on_input else factor[:, None])})
    with pytest.raises(regraft.RefusedError, match="does not read IA3"):
        convert(tensors, "comfyui")


def test_oft_keeps_within_its_constraint_and_rescales(convert, base):
    w, blocks = base[f"{MODULE}.weight"], numbers(4, 4, 4) / 4
    limit, factor = 0.02 * N, 1 + numbers(N, 1) / 8
    skew = blocks - blocks.transpose(0, 2, 1)
    skew = skew * min(1, limit / np.sqrt((skew**2).sum()))
    turns = [(np.eye(4) + q) @ np.linalg.inv(np.eye(4) - q) for q in skew]
    want = (
        np.concatenate([r.T @ rows for r, rows in zip(turns, np.split(w, 4), strict=True)]) * factor
        - w
    )
    tensors = named(
        STEM, oft_blocks=blocks, rescale=factor.astype(np.float32), alpha=np.float32(0.02)
    )
    made, header = convert(tensors, "diffusers", via="dense", model=base["path"])
    (got,) = read_diffusers(made, header).values()
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("conv", [False, True])
def test_dora_on_either_axis(convert, base, axis, conv):
    module, stem = (CONV_MODULE, CONV) if conv else (MODULE, STEM)
    kernel = (3, 3) if conv else ()
    w = base[f"{module}.weight"]
    down, up = numbers(2, N, *kernel), numbers(N, 2, *([1] * len(kernel)))
    ones = (1,) * len(kernel)
    m = np.abs(numbers(N)) + 1
    scale = m.reshape((N, 1, *ones) if axis == "out" else (1, N, *ones))
    tensors = named(
        stem, lora_down__weight=down, lora_up__weight=up, alpha=np.float32(2), dora_scale=scale
    )
    whole = w + product(down, up)
    dims = tuple(d for d in range(w.ndim) if d != (0 if axis == "out" else 1))
    want = scale * whole / np.sqrt((whole**2).sum(axis=dims, keepdims=True)) - w
    made, header = convert(tensors, "diffusers", via="dense", model=base["path"])
    if axis == "out":
        name = f"unet.{module}.lora_magnitude_vector"
        assert made[name].shape == ((1, N, 1, 1) if conv else (N,))
        same_bits(convert(made, "kohya", header)[0], tensors)
    else:
        (got,) = read_diffusers(made, header).values()
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert convert(tensors, "comfyui")[0]
    with pytest.raises(regraft.RefusedError, match=r"the lengths of the base's rows|the in axis"):
        convert(tensors, "comfyui" if axis == "out" else "diffusers")


def test_deltas_of_weights_norms_and_biases(convert):
    norm = "lora_unet_mid_block_resnets_0_norm1"
    tensors = named(CONV, diff=numbers(N, N, 3, 3), diff_b=numbers(N)) | named(
        norm, w_norm=numbers(N), b_norm=numbers(N)
    )
    there, between = convert(tensors, "comfyui", source="sd15")
    assert "diffusion_model.middle_block.0.in_layers.0.w_norm" in there
    same_bits(convert(there, "kohya", between, source="sd15")[0], tensors)
    with pytest.raises(regraft.RefusedError, match="norms or biases"):
        convert(tensors, "diffusers", via="dense")


# -- on weights that are split and fused


QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PARTS = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]


def test_loha_is_split_with_its_rows(convert):
    tensors = named(
        QKV,
        hada_w1_a=numbers(3 * N, 4),
        hada_w1_b=numbers(4, N),
        hada_w2_a=numbers(3 * N, 4),
        hada_w2_b=numbers(4, N),
    )
    want = (tensors[f"{QKV}.hada_w1_a"] @ tensors[f"{QKV}.hada_w1_b"]) * (
        tensors[f"{QKV}.hada_w2_a"] @ tensors[f"{QKV}.hada_w2_b"]
    )
    made, header = convert(tensors, "diffusers", source="flux", via="dense")
    check(read_diffusers(made, header), dict(zip(PARTS, np.split(want, 3), strict=True)))


def test_lokr_is_split_where_its_blocks_allow_it(convert):
    """w1 has a row for each part; otherwise a LoKr with a decomposed w2 becomes a LoRA."""
    for rows in (6, 4):
        size = 3 * N // rows
        tensors = named(
            QKV,
            lokr_w1=numbers(rows, 4),
            lokr_w2_a=numbers(size, 1),
            lokr_w2_b=numbers(1, 4),
            alpha=np.float32(1),
        )
        want = np.kron(
            tensors[f"{QKV}.lokr_w1"], tensors[f"{QKV}.lokr_w2_a"] @ tensors[f"{QKV}.lokr_w2_b"]
        )
        made, header = convert(tensors, "diffusers", source="flux")
        check(read_diffusers(made, header), dict(zip(PARTS, np.split(want, 3), strict=True)))


def test_dora_follows_rows_and_needs_all_parts(convert):
    m = np.abs(numbers(3 * N)) + 1
    tensors = named(
        QKV,
        lora_down__weight=numbers(2, N),
        lora_up__weight=numbers(3 * N, 2),
        alpha=np.float32(2),
        dora_scale=m[:, None],
    )
    made, header = convert(tensors, "diffusers", source="flux")
    np.testing.assert_array_equal(
        made[f"transformer.{PARTS[1]}.lora_magnitude_vector"], m[N : 2 * N]
    )
    same_bits(convert(made, "kohya", header, source="flux")[0], tensors)
    some = {k: v for k, v in made.items() if "to_k" not in k}
    with pytest.raises(regraft.RefusedError, match="lengths of their rows"):
        convert(some, "kohya", source="flux")


def test_bfls_control_adapters(convert):
    """New norms are no deltas: only ComfyUI has a name for them; biases follow their rows."""
    tensors = {
        "double_blocks.0.img_attn.norm.query_norm.scale": numbers(8),
        "double_blocks.0.img_attn.qkv.lora_A.weight": numbers(2, H),
        "double_blocks.0.img_attn.qkv.lora_B.weight": numbers(3 * H, 2),
        "double_blocks.0.img_attn.qkv.lora_B.bias": numbers(3 * H),
        "img_in.lora_A.weight": numbers(2, 10),
        "img_in.lora_B.weight": numbers(H, 2),
    }
    for to in ("diffusers", "kohya"):
        with pytest.raises(regraft.RefusedError, match=r"takes the place|norms or biases"):
            convert(tensors, to, source="flux")
    made, _ = convert(tensors, "comfyui", source="flux")
    base = "diffusion_model.double_blocks.0.img_attn"
    assert f"{base}.norm.query_norm.scale.set_weight" in made
    assert made["diffusion_model.img_in.reshape_weight"].tolist() == [H, 10]
    np.testing.assert_array_equal(
        made[f"{base}.qkv.diff_b"], tensors["double_blocks.0.img_attn.qkv.lora_B.bias"]
    )
    del tensors["double_blocks.0.img_attn.norm.query_norm.scale"]
    made, header = convert(tensors, "diffusers", source="flux")
    np.testing.assert_array_equal(
        made[f"transformer.{PARTS[2]}.lora_B.bias"],
        tensors["double_blocks.0.img_attn.qkv.lora_B.bias"][2 * H :],
    )
    assert read_pairs(made) and "lora_bias" in header["lora_adapter_metadata"]


def test_a_kernel_is_the_bases_where_tensors_do_not_show_it(convert, tmp_path):
    """A LoKr of a convolution is flat, and patches of sd3 are 2 by 2."""
    t = {"lokr_w1": numbers(2, 2), "lokr_w2_a": numbers(4, 1), "lokr_w2_b": numbers(1, 2 * 4)}
    base = tmp_path / "base.safetensors"
    write_tensors(base, {"pos_embed.proj.weight": numbers(8, 4, 2, 2)}, {})
    made, header = convert(
        named("lora_unet_x_embedder_proj", **t), "diffusers", source="sd3", model=base, verify=True
    )
    want = np.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(8, 4, 2, 2)
    check(read_diffusers(made, header), {"pos_embed.proj": want})


def test_alphas_that_were_not_there_do_not_come_back(convert):
    """One module has an alpha, and the other has none."""
    other = STEM.replace("to_q", "to_k")
    t = {f"{s}.lora_{x}.weight": numbers(4, 4) for s in (STEM, other) for x in ("down", "up")}
    t[f"{STEM}.alpha"] = np.float32(2)
    made, header = convert(t, "diffusers", source="sdxl")
    back, _ = convert(made, "kohya", header)
    same_bits(back, t)
    del t[f"{STEM}.alpha"]
    made, header = convert(t, "comfyui", source="sdxl")
    back, _ = convert(made, "kohya", header)
    same_bits(back, t)


def oft_v2(size, count=1, into=N, **more):
    return {"oft_R__weight": 0.3 * numbers(count, size * (size - 1) // 2), **more}


def rotated(weight, tensors, size, conv=False):
    """OneTrainer's forward of unit vectors: a linear's input is turned, a convolution's kernel."""
    upper = tensors["oft_R__weight"].astype(np.float64)
    if "oft_R__scaled_oft" in tensors:
        upper = upper / upper.shape[1] ** 0.5
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    whole = np.zeros((flat.shape[1],) * 2)
    for start in range(0, flat.shape[1], size):
        q = np.zeros((size, size))
        q[np.triu_indices(size, 1)] = upper[start // size if len(upper) > 1 else 0]
        q -= q.T
        turn = np.eye(size) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        whole[start : start + size, start : start + size] = turn
    made = (flat @ whole if conv else (np.eye(len(whole)) @ whole @ flat.T).T).reshape(weight.shape)
    if "dora_scale" in tensors:
        factor = tensors["dora_scale"] / tensors["initial_norm"]
        made = made * factor.reshape(-1, *[1] * (weight.ndim - 1))
    return made - weight


OFT_V2 = {
    "each": oft_v2(4, 4),
    "shared": oft_v2(4),
    "whole": oft_v2(N),
    "scaled": oft_v2(4, 4, oft_R__scaled_oft=np.array(1)),
    "dora": oft_v2(4, 4, dora_scale=1 + numbers(N, 1) ** 2, initial_norm=1 + numbers(N, 1) ** 2),
}


@pytest.mark.parametrize("name", OFT_V2)
def test_onetrainers_oft_turns_the_in_axis(convert, base, name):
    tensors = OFT_V2[name]
    size = N if name == "whole" else 4
    made, header = convert(
        named(STEM, **tensors), "diffusers", via="dense", model=base["path"], verify=True
    )
    want = rotated(base[f"{MODULE}.weight"], tensors, size)
    check(read_diffusers(made, header), {MODULE: want})
    kept, _ = convert(named(STEM, **tensors), "kohya")
    same_bits(kept, named(STEM, **tensors))


def test_onetrainers_oft_of_a_convolution_turns_the_kernel(convert, base):
    tensors = oft_v2(8, 18)
    made, header = convert(
        named(CONV, **tensors), "diffusers", via="dense", model=base["path"], verify=True
    )
    want = rotated(base[f"{CONV_MODULE}.weight"], tensors, 8, conv=True)
    check(read_diffusers(made, header), {CONV_MODULE: want})


def test_onetrainers_oft_follows_rows_and_half_of_its_dora_is_an_error(convert):
    """A rotation of the in axis is that of each part of a fused weight, and of the whole where all parts have it."""
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    fused = named(stem, **oft_v2(4, 4))
    split = {
        f"lora_transformer_transformer_blocks_0_attn_to_{x}.oft_R.weight": fused[
            f"{stem}.oft_R.weight"
        ]
        for x in "qkv"
    }
    made, _ = convert(split, "kohya", source="flux")
    same_bits(made, fused)
    with pytest.raises(regraft.BadInputError, match="dora_scale and initial_norm"):
        convert(named(STEM, **oft_v2(4, 4), initial_norm=numbers(N, 1)), "kohya")


def test_dora_of_part_of_a_fused_weight_takes_the_other_lengths_from_the_base(convert, tmp_path):
    """q has DoRA, k a plain LoRA, v nothing: their magnitudes are the lengths that their rows have anyway."""
    block = "transformer_blocks.0.attn"
    weights = {f"{block}.to_{x}.weight": weight(shape=(H, H)) + n for n, x in enumerate("qkv")}
    write_tensors(tmp_path / "base.safetensors", weights, {})
    (down, up), (other, more) = (pair(H, H) for _ in range(2))
    magnitude = 1 + numbers(H) ** 2
    tensors = {
        f"transformer.{block}.to_q.lora_A.weight": down,
        f"transformer.{block}.to_q.lora_B.weight": up,
        f"transformer.{block}.to_q.lora_magnitude_vector": magnitude,
        f"transformer.{block}.to_k.lora_A.weight": other,
        f"transformer.{block}.to_k.lora_B.weight": more,
    }
    with pytest.raises(regraft.RefusedError, match="give the base's weights as --model"):
        convert(tensors, "kohya", source="flux")
    base = tmp_path / "base.safetensors"
    made, _ = convert(tensors, "kohya", source="flux", model=base, verify=True)
    (stem,) = {key.split(".")[0] for key in made}
    assert stem == "lora_unet_double_blocks_0_img_attn_qkv"
    up, down = (made[f"{stem}.lora_{x}.weight"].astype(float) for x in ("up", "down"))
    whole = np.concatenate(list(weights.values()))
    moved = whole + up @ down * float(made[f"{stem}.alpha"]) / len(down)
    m = made[f"{stem}.dora_scale"].astype(float).reshape(-1, 1)
    got = moved * m / np.linalg.norm(moved, axis=1, keepdims=True)
    q = weights[f"{block}.to_q.weight"] + product(*_ends(tensors, f"transformer.{block}.to_q"))
    q = q * magnitude[:, None] / np.linalg.norm(q, axis=1, keepdims=True)
    k = weights[f"{block}.to_k.weight"] + product(other, more)
    np.testing.assert_allclose(
        got, np.concatenate([q, k, weights[f"{block}.to_v.weight"]]), rtol=1e-5
    )
    back, _ = convert(made, "diffusers", source="flux", model=base, verify=True)
    assert {key.rsplit(".lora", 1)[0][-4:] for key in back} == {"to_q", "to_k", "to_v"}


def _ends(tensors, stem):
    return (tensors[f"{stem}.lora_{x}.weight"] for x in "AB")
