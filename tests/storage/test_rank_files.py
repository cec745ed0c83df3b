"""One file of DTensors for each rank, as verl saves them, against the whole tensors."""

import pickle
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints.models import mixtral
from object_server import serving

import regraft
from regraft.errors import BadInputError
from regraft.sources.places import leave, locate
from regraft.storage import rank_files as rank_files_module
from regraft.storage.dcp import Record
from regraft.storage.rank_files import _mesh_shape, rank_files, read_rank_files
from regraft.storage.safetensors import open_tensors
from regraft.storage.torch_file import Tensor

RANKS = Path(__file__).parent / "dcp" / "ranks"


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    leave()


def whole():
    """What scripts/make_dcp.py cut and saved."""
    made = mixtral(inner=5, layers=1)
    return {name: array.astype(kind_of(name)) for name, array in made.items()}


def kind_of(name):
    if "norm" in name:
        return np.float32
    return np.float16 if "lm_head" in name else ml_dtypes.bfloat16


def test_parts_make_up_the_tensors():
    got = open_tensors(locate(RANKS) / "model.safetensors")
    expected = whole()
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype)
        assert got[name].tobytes() == array.tobytes(), name


def test_a_run_of_ranks_is_a_source(tmp_path, monkeypatch):
    """Here and in a store, the config from the folder that verl puts it in; the optimizer is named, and left."""
    here = regraft.convert(RANKS, tmp_path / "here", to="transformers-v5")
    assert "optim_world_size_4_rank_0.pt" in "\n".join(here.checkpoint.notes)
    assert (tmp_path / "here" / "config.json").is_file()
    regraft.convert(Path(__file__).parent / "dcp" / "flat", tmp_path / "flat", to="transformers-v5")
    one, other = (open_tensors(tmp_path / at / "model.safetensors") for at in ("here", "flat"))
    assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in other.items()}
    with serving() as server:
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "r")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.put_folder(RANKS, "b/run")
        regraft.convert("s3://b/run", tmp_path / "from-s3", to="transformers-v5")
    for name in ("model.safetensors", "config.json"):
        made = (tmp_path / at / name for at in ("here", "from-s3"))
        assert len({path.read_bytes() for path in made}) == 1


def copied(tmp_path):
    shutil.copytree(RANKS, tmp_path / "run")
    return tmp_path / "run"


def change(path, old, new):
    """Another word in a file's pickle, of the same length."""
    assert len(old) == len(new)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            assert old in data or not name.endswith("data.pkl")
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"Replicate", b"Partiallo", "placed as|how it is cut"),
        (b"_local_tensor", b"_other_tensor", "no DTensor with its part"),
        (b"_flatten_rank_map", b"_flatten_rank_mop", None),
    ],
)
def test_what_is_no_plain_dtensor_is_named(tmp_path, old, new, said):
    run = copied(tmp_path)
    for path in run.glob("model_*.pt"):
        change(path, old, new)
    if said is None:
        read_rank_files(rank_files(run))
        return
    with pytest.raises(BadInputError, match=said) as caught:
        read_rank_files(rank_files(run))
    assert caught.value.findings[0].code == "bad-dcp"
    assert caught.value.findings[0].key


def shard(kind, **fields):
    record = Record(kind)
    record.state = fields
    return record


@pytest.mark.parametrize(
    ("mesh", "cuts"),
    [
        ((2, 2), ((0, 2), (0, None))),
        ((2, 3), ((1, None), (0, None))),
        ((2, 2, 2), ((0, 4), (0, 2), (0, None))),
        ((2, 2, 2), ((0, 2), (0, None), (0, None))),
        ((2, 2, 2), (None, (1, 2), (1, None))),
        ((3, 2), ((0, None), (0, None))),
    ],
)
def test_where_parts_belong_is_what_torch_says(mesh, cuts):
    """Cut by one or more dims of the mesh, and by FSDP over tensor parallelism, which cuts first."""
    torch = pytest.importorskip("torch")
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard

    shape = (24, 16)
    theirs, ours = [], []
    for cut in cuts:
        if cut is None:
            theirs.append(Replicate())
            ours.append(shard("Replicate"))
        elif cut[1] is None:
            theirs.append(Shard(cut[0]))
            ours.append(shard("Shard", dim=cut[0]))
        else:
            theirs.append(_StridedShard(cut[0], split_factor=cut[1]))
            ours.append(shard("_StridedShard", dim=cut[0], split_factor=cut[1]))
    for rank, at in enumerate(np.ndindex(mesh)):
        local, offset = _compute_local_shape_and_global_offset(
            torch.Size(shape), mesh, list(at), theirs
        )
        part = part_of(shape, mesh, ours, rank, tuple(local))
        assert part.offsets == tuple(offset)


def part_of(shape, mesh, placements, rank, local):
    strides = tuple(np.cumprod((1, *local[:0:-1]))[::-1].tolist())
    tensor = Tensor(None, "float32", 0, local, strides)
    spec = shard(
        "DTensorSpec",
        mesh=shard("DeviceMesh", _layout=shard("_MeshLayout", shape=mesh)),
        placements=tuple(placements),
        tensor_meta=Record("TensorMeta", (shape,)),
    )
    value = shard("DTensor", _local_tensor=tensor, _spec=spec)
    return rank_files_module._part(value, rank, int(np.prod(mesh)), "file", "key")


@pytest.mark.parametrize(
    ("placements", "said"),
    [
        ((shard("Partial"), shard("Shard", dim=0)), "placed as Partial"),
        ((shard("_Partial"), shard("Shard", dim=0)), "placed as _Partial"),
        ((shard("_StridedShard", dim=0, split_factor=3), shard("Shard", dim=0)), "3 parts before"),
        ((shard("_StridedShard", dim=0), shard("Shard", dim=0)), "None parts before"),
        ((shard("_StridedShard", dim=0, split_factor=2), shard("Shard", dim=0)), "10 rows"),
        ((shard("Shard", dim=7), shard("Shard", dim=0)), "has not"),
    ],
)
def test_placements_that_say_no_place_are_named(placements, said):
    with pytest.raises(BadInputError, match=said) as caught:
        part_of((10, 4), (2, 2), placements, 0, (3, 4))
    (finding,) = caught.value.findings
    assert (finding.code, finding.where, finding.key) == ("bad-dcp", "file", "key")
    assert "verl.model_merger" in finding.fix


def test_files_that_do_not_belong_together(tmp_path):
    run = copied(tmp_path)
    last = run / "model_world_size_4_rank_3.pt"
    data = last.read_bytes()
    last.unlink()
    with pytest.raises(BadInputError, match="no file of rank 3"):
        locate(run)
    last.write_bytes((run / "model_world_size_4_rank_2.pt").read_bytes())
    with pytest.raises(BadInputError, match=r"rank 3 has"):
        locate(run)
    last.write_bytes(data)
    (run / "model_world_size_2_rank_0.pt").write_bytes(data)
    with pytest.raises(BadInputError, match="runs of 2 and of 4 ranks"):
        locate(run)


class _Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_nothing_of_a_file_is_run(tmp_path):
    run = copied(tmp_path)
    with zipfile.ZipFile(run / "model_world_size_4_rank_0.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"w": _Evil()}, 2))
    with pytest.raises(BadInputError, match="by which a pickle runs code"):
        locate(run)


@pytest.mark.parametrize(
    ("flags", "offset"), [(1, 0), (0, 2**64 - 1)], ids=["encrypted", "nowhere"]
)
def test_archives_that_python_cannot_open(tmp_path, flags, offset):
    run = copied(tmp_path)
    path = run / "model_world_size_4_rank_0.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.filelist[0].flag_bits |= flags
        archive.filelist[0].header_offset = offset
    with pytest.raises(BadInputError) as error:
        locate(run)
    assert error.value.findings[0].code == "bad-dcp"


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_errors_or_the_same(tmp_path, seed):
    """Any byte changed outside the numbers: an error of bad input, or parts that fit."""
    random = np.random.default_rng(seed)
    run = copied(tmp_path)
    path = run / "model_world_size_4_rank_1.pt"
    data = path.read_bytes()
    for _ in range(40):
        wrong = bytearray(data)
        wrong[random.integers(len(wrong))] ^= 1 << random.integers(8)
        path.write_bytes(wrong)
        try:
            read_rank_files(rank_files(run))
        except BadInputError:
            continue


def test_meshes_of_older_releases():
    """Their ranks stand in a tensor, whose shape is that of the mesh."""
    mesh = Record("DeviceMesh")
    ranks = Tensor(None, "int32", 0, (2, 4), (4, 1))
    mesh.state = {"device_type": "cuda", "mesh": ranks, "mesh_dim_names": ("ddp", "fsdp")}
    assert _mesh_shape(mesh) == (2, 4)
    mesh.state = {**mesh.state, "_flatten_mesh_list": (0, 2, 1, 3, 4, 5, 6, 7)}
    assert _mesh_shape(mesh) is None, "ranks in another order"
