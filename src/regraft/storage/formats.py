"""Forms of weights that are not read, told by what is in a file or a folder: what it is, and what to do.

Only first bytes and names of files are looked at. Sources: the formats' own headers (GGUF's and HDF5's magic numbers,
numpy's ``format``, zip's central directory, the magic numbers of gzip, xz, zstd, lz4, bzip2, 7z and RAR), and what
their writers call files: DeepSpeed, torch's DCP, verl, Megatron, NeMo, flax, orbax.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from msgspec import Struct

from regraft.errors import Finding

_ZIP = b"PK\x03\x04"
_MOST = 2000
"""How many names of a folder are looked at."""


class Form(Struct, frozen=True):
    """A form of weights that regraft does not read."""

    what: str
    fix: str

    def finding(self, where: str) -> Finding:
        """The finding for it."""
        return Finding(
            "other-format", f"this is {self.what}, which is not read", where=where, fix=self.fix
        )


GGUF = Form(
    "a GGUF file (llama.cpp)",
    "give the checkpoint that it was made of; transformers makes one of most: "
    "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(DIR), with rounded numbers",
)
GGML = Form("a file of llama.cpp's before GGUF (GGML)", "give the checkpoint that it was made of")
HDF5 = Form(
    "an HDF5 file (weights of TensorFlow or Keras)",
    "load it with from_tf=True in transformers 4 and save it with save_pretrained",
)
MSGPACK = Form(
    "flax's msgpack",
    "load it with from_flax=True in transformers 4 and save it with save_pretrained",
)
ONNX = Form(
    "an ONNX model: a graph with weights in it", "give the checkpoint that it was exported from"
)
NUMPY = Form(
    "an array of numpy",
    "save it as safetensors with its tensor's name: safetensors.numpy.save_file({NAME: array}, FILE)",
)
NPZ = Form(
    "a numpy archive",
    "save it as safetensors: safetensors.numpy.save_file(dict(numpy.load(FILE)), 'model.safetensors')",
)
TORCHSCRIPT = Form(
    "a TorchScript program", "save its weights: save_file(torch.jit.load(FILE).state_dict(), FILE)"
)
COMPRESSED = Form("compressed (gzip, xz, zstd and the like)", "unpack it, and give what is in it")
TAR = Form("a tar archive (NeMo packs models so)", "unpack it, and give the weights in it")
DCP = Form(
    "a distributed checkpoint of torch (DCP)",
    "join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.bin (accelerate "
    "merge-weights for FSDP), and give the file",
)
ZERO = Form(
    "a checkpoint of DeepSpeed's: parts of weights and optimizer states of each rank",
    "join it with the zero_to_fp32.py that lies in it: python zero_to_fp32.py . OUT --safe_serialization",
)
RANKS = Form(
    "one file for each rank of a training run (verl writes them so)",
    "join them: python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir OUT",
)
MEGATRON = Form(
    "a checkpoint of Megatron-LM's",
    "export it to Hugging Face's form with Megatron Bridge or the tool that trained it",
)
META = Form(
    "the form in which Meta publishes Llama (consolidated.NN.pth with params.json)",
    "convert it with transformers: python -m transformers.models.llama.convert_llama_weights_to_hf "
    "--input_dir FOLDER --output_dir OUT, or download the repository's -hf form",
)
MISTRAL = Form(
    "the form in which Mistral publishes its models (consolidated.safetensors with params.json)",
    "take the same repository's model.safetensors or its shards: they are the form of Hugging Face",
)
TENSORFLOW = Form(
    "a checkpoint of TensorFlow's",
    "give the model's PyTorch weights; transformers 4 loads most with from_tf=True, and save_pretrained writes them",
)
SAVED_MODEL = Form(
    "a SavedModel of TensorFlow's: a graph with weights in it",
    "give the checkpoint that it was exported from",
)
KERAS = Form("a model of Keras", "give the model's PyTorch weights: keras-hub exports some of them")
TFLITE = Form(
    "a model of TensorFlow Lite: a graph with weights in it",
    "give the checkpoint that it was exported from",
)
OPENVINO = Form(
    "a model of OpenVINO: a graph with weights in it",
    "give the checkpoint that it was exported from",
)
PADDLE = Form("weights of PaddlePaddle", "give the model's PyTorch weights")
ORBAX = Form("a checkpoint of orbax (JAX)", "export it with the library that wrote it")
JSON = Form("a JSON file beside the weights", "give the folder that it is in")
OPTIMIZER = Form(
    "an optimizer's state, without the model's weights",
    "give the folder that holds model.safetensors",
)

_STARTS: tuple[tuple[bytes, Form], ...] = (
    (b"GGUF", GGUF),
    (b"lmgg", GGML),
    (b"fmgg", GGML),
    (b"tjgg", GGML),
    (b"\x89HDF\r\n\x1a\n", HDF5),
    (b"\x93NUMPY", NUMPY),
    (b"\x1f\x8b\x08", COMPRESSED),
    (b"\xfd7zXZ\0", COMPRESSED),
    (b"\x28\xb5\x2f\xfd", COMPRESSED),
    (b"\x04\x22\x4d\x18", COMPRESSED),
    (b"BZh", COMPRESSED),
    (b"7z\xbc\xaf\x27\x1c", COMPRESSED),
    (b"Rar!\x1a\x07", COMPRESSED),
)
_NAMES: tuple[tuple[str, Form], ...] = (
    (r"(.*/)?(mp_rank_\d+_model_states|.*_optim_states|zero_pp_rank_\d+_.*)\.pt", ZERO),
    (r"(.*/)?zero_to_fp32\.py", ZERO),
    (r"(.*/)?(model|optim|extra_state)_world_size_\d+_rank_\d+\.pt", RANKS),
    (r"(.*/)?(__\d+_\d+\.distcp|\.metadata)", DCP),
    (
        r"(.*/)?(mp_rank_\d+(_\d+)?/.*\.pt|latest_checkpointed_iteration\.txt|model_optim_rng\.pt)",
        MEGATRON,
    ),
    (r"(.*/)?consolidated\.\d+\.pth", META),
    (r"(.*/)?saved_model\.pb", SAVED_MODEL),
    (r"(.*/)?openvino_model\.(xml|bin)", OPENVINO),
    (r"(.*/)?.+\.ckpt(-\d+)?\.(index|meta|data-\d+-of-\d+)", TENSORFLOW),
    (r"(.*/)?(manifest\.ocdbt|_CHECKPOINT_METADATA)", ORBAX),
    (r"(.*/)?flax_model.*\.msgpack", MSGPACK),
)
_SUFFIXES = {".onnx": ONNX, ".msgpack": MSGPACK, ".keras": KERAS, ".pdparams": PADDLE}
_MISTRAL = re.compile(r"(.*/)?consolidated(-\d+-of-\d+)?\.safetensors")
_OPTIMIZERS = re.compile(r"(.*/)?(optimizer|scheduler|rng_state.*|training_args)\.(pt|bin|pth)")


def find_form(path: Path) -> Finding | None:
    """What a file or a folder is, if it is a form of weights that is known and not read."""
    with suppress(OSError):
        if path.is_dir():
            form, place = _of_folder(path)
        else:
            form, place = JSON if path.suffix == ".json" else _of_file(path, path.name), path
        return form.finding(str(place)) if form is not None else None
    return None


def is_run(folder: Path) -> bool:
    """Whether a folder is one checkpoint of a form that is known and not read, whatever files are in it."""
    with suppress(OSError):
        names = [each.relative_to(folder).as_posix() for each in islice(folder.glob("*"), _MOST)]
        names += [each.relative_to(folder).as_posix() for each in islice(folder.glob("*/*"), _MOST)]
        return any(_by_name(name) is not None for name in names)
    return False


def form_of_start(start: bytes) -> Form | None:
    """What a file is by its first bytes, if it is no form that is read."""
    if len(start) > 262 and start[257:262] == b"ustar":
        return TAR
    return next((form for magic, form in _STARTS if start.startswith(magic)), None)


def is_torch(path: Path) -> bool:
    """Whether a file is one that ``torch.save`` wrote, as far as its first bytes and its directory tell."""
    if _by_name(path.name) is not None or _OPTIMIZERS.fullmatch(path.name):
        return False
    with suppress(OSError):
        with path.open("rb") as file:
            start = file.read(4)
        if start != _ZIP:
            return start[:1] == b"\x80"
        names = _zipped(path)
        return any(n.endswith("/data.pkl") for n in names) and not _is_program(names)
    return False


def _of_file(path: Path, name: str) -> Form | None:
    named = _by_name(name)
    if named is not None:
        return named
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(512)
    found = form_of_start(start)
    if found is not None:
        return found
    if start.startswith(_ZIP):
        names = _zipped(path)
        if names and all(n.endswith(".npy") for n in names):
            return NPZ
        if _is_program(names):
            return TORCHSCRIPT
    if start[4:8] == b"TFL3":
        return TFLITE
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    if _MISTRAL.fullmatch(name) and _names_parts_as_meta(path):
        return MISTRAL
    if _OPTIMIZERS.fullmatch(name):
        return OPTIMIZER
    return None


def _names_parts_as_meta(path: Path) -> bool:
    """Whether a safetensors file's header names parts of layers as Meta's and Mistral's own code does."""
    with path.open("rb") as file:
        return re.search(rb"attention\.w[qkvo]\b", file.read(1 << 16)) is not None


def _of_folder(path: Path) -> tuple[Form | None, Path]:
    """What a folder is, and the file in it that is of a form where the folder itself is not."""
    names = sorted(islice(_files(path), _MOST))
    for pattern, named in _NAMES:
        hit = next((name for name in names if re.fullmatch(pattern, name)), None)
        if hit is not None:
            return named, path / hit if named is MSGPACK else path
    found = ((form, path / name) for name in names if (form := _of_file(path / name, name)))
    return next(found, (None, path))


def _files(path: Path) -> Iterator[str]:
    for file in path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            yield file.relative_to(path).as_posix()


def _by_name(name: str) -> Form | None:
    return next((form for pattern, form in _NAMES if re.fullmatch(pattern, name)), None)


def _zipped(path: Path) -> list[str]:
    """The names in an archive; none where its directory is broken."""
    import zipfile  # slow to import, and few files are archives

    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[:_MOST]
    except zipfile.BadZipFile:
        return []


def _is_program(names: list[str]) -> bool:
    return any("/code/" in name or name.endswith("constants.pkl") for name in names)
