"""Every code that a finding can have, and every exit status.

A code is one entry of `Code`: its name, where it belongs, a title, what to do about it and, if the title does not say
enough, details; and a status if it is not the usual one of its part. An entry is all that a new code needs, beside a
test that raises it; ``scripts/errors_page.py`` writes its line of ``docs/errors.md``. Details and advice are Markdown.

    >>> CODES["no-image"].title, CODES["no-image"].status
    ('no exact equivalent', <Status.REFUSED: 3>)
"""

from __future__ import annotations

from enum import Enum, IntEnum


class Status(IntEnum):
    """The exit statuses of the command, each with what it means."""

    meaning: str

    def __new__(cls, number: int, meaning: str) -> Status:  # noqa: D102 - Enum asks for it
        self = int.__new__(cls, number)
        self._value_ = number
        self.meaning = meaning
        return self

    DONE = (0, "done")
    BAD_INPUT = (
        1,
        "bad input: files, keys or configs that are wrong, ambiguous, or matched by no rule",
    )
    USAGE = (2, "usage: an unknown command, option or layout")
    REFUSED = (3, "refused: the input is sound, but there is no exact equivalent, or no safe way")
    NO = (
        4,
        "the answer is no: `verify` or `diff` found a difference, `rules lint` an error, `explain` that "
        "a key does not arrive, `check` no proof that SRC loads as it is",
    )
    BUG = (70, "a bug in regraft")
    INTERRUPTED = (130, "interrupted")
    TERMINATED = (143, "terminated")


class Part(Enum):
    """What codes belong to: the sections of ``docs/errors.md``, and the status that most of a section lead to."""

    title: str
    status: Status
    about: str

    def __init__(self, title: str, status: Status = Status.BAD_INPUT, about: str = "") -> None:
        self.title = title
        self.status = status
        self.about = about

    REFUSED = ("Refused", Status.REFUSED)
    READING = ("More than one reading, or none",)
    ADAPTER = ("The adapter",)
    BASE = ("The base model",)
    LIVE = ("Live models",)
    DESTINATION = ("Where the result is written",)
    FILES = ("Files",)
    HEADERS = ("safetensors headers",)
    CHECKPOINTS = ("Checkpoints",)
    BOOKS = ("Rule books and the notation",)
    LINT = (
        "Lint",
        Status.NO,
        "What `regraft rules lint` finds, beside what loading a book finds. An error will fail or be wrong, a "
        "warning can be, a note is good to know. A faulty regular expression can stand in another library's "
        "renames only.",
    )
    LEARN = ("Learning rule books",)
    USAGE = ("Usage", Status.USAGE)


class Code(Enum):
    """A stable name of one kind of problem, for programs."""

    part: Part
    title: str
    fix: str
    details: str
    status: Status

    def __new__(  # noqa: D102 - Enum asks for it
        cls,
        name: str,
        part: Part,
        title: str,
        fix: str,
        details: str = "",
        status: Status | None = None,
    ) -> Code:
        self = object.__new__(cls)
        self._value_ = name
        self.part = part
        self.title = title
        self.fix = fix
        self.details = details
        self.status = part.status if status is None else status
        return self

    MAX_ERROR = (
        "max-error",
        Part.REFUSED,
        "an approximation is off by more than `--max-error`",
        "allow a larger error, or ask for a higher rank or a smaller tolerance with `--via`",
        "the relative error of a target's delta, in the Frobenius norm; nothing was written",
    )
    NO_IMAGE = (
        "no-image",
        Part.REFUSED,
        "no exact equivalent",
        "allow a LoRA of another rank (`--via dense`, `--via svd:RANK`) where what is refused is a delta; or "
        "write the base with the adapter in it: `--merge`, with the base as `--model`",
        "the weight that a tensor belongs to is stored differently, and nothing carries this tensor "
        "along (DoRA's magnitudes, a LoRA's bias, another tuner's tensors); or an equation splits a "
        "matrix so that a low-rank block does not stay one",
    )
    SINGLE_EXPERT = (
        "single-expert",
        Part.REFUSED,
        "a single expert that PEFT cannot hold",
        "write the base with the adapter in it: `--merge`, with the base as `--model`",
        "PEFT cannot hold a LoRA on a parameter of one single expert that is stored this way",
    )
    PARTIAL_WEIGHTS = (
        "partial-weights",
        Part.REFUSED,
        "saved weights that become one tensor are incomplete",
        "write the base with the adapter in it: `--merge`, with the base as `--model`",
        "`modules_to_save` saved some of the weights that become one tensor",
    )
    NEEDS_BASE_WEIGHTS = (
        "needs-base-weights",
        Part.REFUSED,
        "the base's weights are needed",
        "give the base's folder with its weights as `--model`",
        "the result contains numbers that only the base has, and they are not at hand",
    )
    DIALECT = (
        "dialect",
        Part.REFUSED,
        "the format of another tool",
        "export it with that tool, in PEFT's format",
        "the adapter is in the form of Unsloth's or NeMo's packed experts, Tinker, torchtune, MLX, …, "
        "which PEFT does not read or reads wrongly",
    )
    NOT_REPRESENTABLE = (
        "not-representable",
        Part.REFUSED,
        "a number leaves the range of its dtype",
        "check `lora_alpha` and `alpha_pattern`; merge the adapter into its base",
        "parts of very unequal scale become one tensor, or an adapter is merged",
    )
    NOT_FINITE = (
        "not-finite",
        Part.REFUSED,
        "NaN or infinite values would spread",
        "take the damaged module out, or restore it from another checkpoint",
        "a factor that holds some is joined with others, or has no singular value decomposition",
    )
    MEMORY = (
        "memory",
        Part.REFUSED,
        "more memory than may be held",
        "allow more with `--memory`, or ask for a lower rank",
        "the factors of a matrix that `extract` was asked for take more than three times the largest tensor",
    )
    NOTHING_LEFT = (
        "nothing-left",
        Part.REFUSED,
        "nothing is left for PEFT to adapt",
        "write the base with the adapter in it: `--merge`, with the base as `--model`",
        "every LoRA had to be added to its base weight",
    )

    PACKING = (
        "packing",
        Part.READING,
        "the packing of stacked experts is ambiguous",
        "give `--model`, or say which: `--from transformers-v5/peft-0.19`",
        "as before PEFT 0.19 or as since; there is no `peft_version`, and the shapes fit both",
    )
    WHICH_DIALECT = (
        "which-dialect",
        Part.READING,
        "several dialects fit",
        "say which with `--from`",
        "two formats of adapters claim the file",
    )
    WHICH_MODEL = (
        "which-model",
        Part.READING,
        "several models fit",
        "give `--model`",
        "the keys fit models whose layouts differ",
    )
    MODEL_NEEDED = (
        "model-needed",
        Part.READING,
        "the model is not known",
        "give `--model`",
        "nothing in the keys shows which model they are for",
    )
    UNKNOWN_MODEL = (
        "unknown-model",
        Part.READING,
        "no rules for this model",
        "give `--model`, install transformers, or [write a rule book](rule-books.md)",
        "the model type has no built-in rules, and the installed transformers does not know it",
    )
    MODEL_CONFIG = (
        "model-config",
        Part.READING,
        "the model cannot be built",
        "give the config that belongs to the model, or install another release",
        "transformers cannot build the model from its config",
    )
    TRANSFORMERS_VERSION = (
        "transformers-version",
        Part.READING,
        "this release of transformers is not supported",
        "install 5.4 to 5.24",
        "it has no registry that regraft knows",
    )
    UNMATCHED = (
        "unmatched",
        Part.READING,
        "no rule matches this key",
        "check the prefix; give `--model`, above all if the model is inside a bigger one; or add the key "
        "to a rule book",
    )
    NO_RULE = (
        "no-rule",
        Part.READING,
        "this change could not be imported",
        "write a rule book for the model, or convert it with transformers itself",
        "the installed transformers changes this key in a way that regraft cannot read; the message has "
        "the reason",
    )
    UNKNOWN_TRANSFORM = (
        "unknown-transform",
        Part.READING,
        "an unknown kind of change",
        "use a release that regraft was tested with, or write a rule book for the model",
        "the installed transformers changes this model by a kind of rule that regraft does not know",
        Status.REFUSED,
    )
    OTHER_LAYOUTS = (
        "other-layouts",
        Part.READING,
        "a rule book for other layouts",
        "name one of its layouts, or give another book",
        "it leads neither from nor to the layout that was asked for",
    )
    WHICH_CLASS = (
        "which-class",
        Part.READING,
        "the model's class is not known",
        "name it with `--architecture CLASS` (`architecture=` in Python)",
        "the config names no class that transformers has, and the names of the file fit several, with different "
        "results, or none as they are",
    )
    UNKNOWN_CLASS = (
        "unknown-class",
        Part.READING,
        "no such class",
        "name one of those that the message lists",
        "`--architecture` names a class that transformers does not have for this model type",
    )

    NOT_FOUND = ("not-found", Part.ADAPTER, "no such file or folder", "check the path")
    NOT_AN_ADAPTER = (
        "not-an-adapter",
        Part.ADAPTER,
        "not an adapter",
        "give the folder that `save_pretrained` wrote",
        "a file that is neither `.safetensors` nor `.bin`",
    )
    OTHER_FORMAT = (
        "other-format",
        Part.FILES,
        "a form of weights that is not read",
        "make a checkpoint of it, as the message says",
        "GGUF, HDF5, flax, ONNX, numpy, DCP, DeepSpeed, Megatron, Meta's own form, ranks' files",
    )
    NO_CONFIG = (
        "no-config",
        Part.ADAPTER,
        "no config",
        "put it there, or name the right folder",
        "there is no `adapter_config.json` (or no `config.json` where a base model was named)",
    )
    NO_WEIGHTS = (
        "no-weights",
        Part.ADAPTER,
        "no weights file",
        "copy it there, or save the adapter again",
        "there is neither `adapter_model.safetensors` nor `adapter_model.bin`",
    )
    EMPTY = (
        "empty",
        Part.ADAPTER,
        "no tensors",
        "save the adapter again",
        "the weights file has no tensors",
    )
    CONFIG = (
        "config",
        Part.ADAPTER,
        "a config field has the wrong type",
        "correct it",
        "a field of `adapter_config.json`",
    )
    SLOW_PATTERN = (
        "slow-pattern",
        Part.ADAPTER,
        "a regular expression takes too long",
        "name the modules one by one, or write it without a repetition inside another",
        "more than 2 seconds, for all of one config",
    )
    PEFT_TYPE = (
        "peft-type",
        Part.ADAPTER,
        "unknown `peft_type`",
        "check the spelling",
        "PEFT has no such type",
    )
    PREFIX = (
        "prefix",
        Part.ADAPTER,
        "unexpected prefix",
        "strip or add what the message says",
        "a key does not begin with `base_model.model.`, or has a wrapper's name or a doubled `model.` in it",
    )
    ADAPTER_NAME = (
        "adapter-name",
        Part.ADAPTER,
        "the adapter's name is in a key",
        "take it out, or save with `save_pretrained`",
    )
    ODD_KEY = (
        "odd-key",
        Part.ADAPTER,
        "not a key that PEFT writes",
        "save with `save_pretrained`",
        "a factor's key has none of the endings that PEFT writes",
    )
    HALF = (
        "half",
        Part.ADAPTER,
        "one factor of a pair is missing",
        "save the adapter again",
        "a `lora_A` without its `lora_B`, or the other way round",
    )
    MISSING = (
        "missing",
        Part.ADAPTER,
        "tensors are missing",
        "save again; if left out on purpose, name the modules that are there one by one",
        "factors that `target_modules` promises are not there, or tensors that belong together are not "
        "complete",
    )
    EXTRA = (
        "extra",
        Part.ADAPTER,
        "an index beyond the base",
        "give the base that it was trained on",
        "an expert or another index that the base does not have",
    )
    NAME = ("name", Part.ADAPTER, "a name with a NUL character", "save the file again")
    NOT_TARGETED = (
        "not-targeted",
        Part.ADAPTER,
        "not targeted by the config",
        "add it, or remove the factors",
        "the config names no such module or parameter, or one of its fields leaves it out, so PEFT would ignore the "
        "factors",
    )
    VOCABULARY = (
        "vocabulary",
        Part.ADAPTER,
        "other rows than the vocabulary",
        "give the base whose embeddings were resized",
        "an embedding, a head or their factors have another number of rows than the base has tokens",
    )
    TARGETS_NOTHING = (
        "targets-nothing",
        Part.ADAPTER,
        "the config targets nothing",
        "use the config that was saved with these weights",
        "it names nothing that is in the file",
    )
    PARAMETER_ORDER = (
        "parameter-order",
        Part.ADAPTER,
        "an untold order of parameters",
        "add the book's `[[parameters]]` table that the message shows",
        "several parameters of one module are adapted, and nothing says in which order the module registers them, "
        "which is how PEFT nests their factors",
    )
    NESTING = (
        "nesting",
        Part.ADAPTER,
        "wrong number of nested factors",
        "use the config that was saved with these weights",
        "more or fewer factors around a module than `target_parameters` names",
    )
    RANK = (
        "rank",
        Part.ADAPTER,
        "the size does not fit the rank",
        "use the config that was saved with these weights",
        "the factors' size is no multiple of the rank",
    )
    SHAPE = (
        "shape",
        Part.ADAPTER,
        "shapes do not fit together",
        "use the config that was saved with these weights",
        "two factors do not fit together, contradict the rank, or differ from their siblings",
    )
    DTYPE = (
        "dtype",
        Part.ADAPTER,
        "dtypes do not fit",
        "save unquantised",
        "a factor is not a floating-point tensor",
    )
    LAYOUT = (
        "layout",
        Part.ADAPTER,
        "`--from` contradicts the file",
        "leave `--from` out",
        "the names in the file are those of another layout",
    )
    MIXED_LAYOUTS = (
        "mixed-layouts",
        Part.ADAPTER,
        "keys of both layouts in one file",
        "keep those of one",
    )
    WRONG_BASE = (
        "wrong-base",
        Part.ADAPTER,
        "not the base of this adapter",
        "give the base that it was trained on",
        "a shape, a layer or an expert does not fit the base's config",
    )
    UNKNOWN_SIZE = (
        "unknown-size",
        Part.ADAPTER,
        "a size is not known",
        "give `--model`",
        "nothing says it; the number of experts, above all",
    )
    DOUBLED_TARGET = (
        "doubled-target",
        Part.ADAPTER,
        "two rules make one key",
        "correct the rule book",
    )
    OVERLAP = (
        "overlap",
        Part.ADAPTER,
        "tensors overlap in the file",
        "get the file again",
        "the bytes of two tensors overlap",
    )
    TWO_RULES = (
        "two-rules",
        Part.ADAPTER,
        "two rules match one key",
        "make one of them spell out what tells them apart",
        "and neither is closer",
    )

    NOT_EXPLAINED = (
        "not-explained",
        Part.LEARN,
        "tensors that no equation explains",
        "accept a book without them with `--partial` (`partial=True`), and write the rest by hand",
        "the message has the reason: values that change, or an order that no equation says",
    )
    WHICH_READING = (
        "which-reading",
        Part.LEARN,
        "two readings of what a converter did fit alike",
        "say which with `--choose`, or give one more pair in which they differ",
        "tensors are equal to others and no name tells them apart, or fields or a number say the same sizes",
    )
    NOT_VERIFIED = (
        "not-verified",
        Part.LEARN,
        "a learned book that fails its own test",
        "give pairs of the same model, at two sizes",
        "carried out, it does not lead from one file to the other and back, bit for bit",
    )
    NOT_A_NUMBER = (
        "not-a-number",
        Part.LEARN,
        "values that are not numbers (NaN)",
        "learn from a probe (`regraft probe`), or from whole weights",
    )
    CONVERTER = (
        "converter",
        Part.LEARN,
        "the converter failed",
        "try its command by hand; the message has its last lines",
        "it ended with another status than 0, took longer than `--timeout`, or wrote nothing",
    )
    UNSTEADY = (
        "unsteady",
        Part.LEARN,
        "two runs of the converter differ",
        "look for randomness in it, such as weights that it initialises",
    )
    PROBE = (
        "probe",
        Part.LEARN,
        "no probe can be made",
        "give the config of a model that the installed transformers can build, or a checkpoint",
    )

    COPIES_DIFFER = (
        "copies-differ",
        Part.ADAPTER,
        "copies that are not equal",
        "make them equal, or keep the layout that has each of them",
        "a rule calls tensors copies of one (`copies t`), and one of them would be lost",
    )
    PADDING = (
        "padding",
        Part.ADAPTER,
        "padding that is something else",
        "correct the tensor or the sizes",
        "what a rule calls padding (`fill p = 0`) holds other values and would be cut off",
    )

    NO_MODEL_TYPE = (
        "no-model-type",
        Part.BASE,
        "no `model_type` in the config",
        "give the `config.json` of a transformers model",
    )
    INDEX = (
        "index",
        Part.BASE,
        "the index is wrong",
        "get the index again",
        "the `weight_map` of `model.safetensors.index.json` does not name files of its folder",
    )

    NOT_A_MODEL = (
        "not-a-model",
        Part.LIVE,
        "not a transformers model",
        "give a `PreTrainedModel`, or what holds one",
        "and nothing in it is one",
    )
    NO_HOME = (
        "no-home",
        Part.LIVE,
        "no key belongs to the model",
        "check that the file is of this model",
        "no key of the file is one of the model's, under any prefix",
    )
    TWO_MODELS = (
        "two-models",
        Part.LIVE,
        "the keys fit two models",
        "put the path of one before the keys, or give that model alone",
        "two models of a holder, as well as each other",
    )
    TWO_PREFIXES = (
        "two-prefixes",
        Part.LIVE,
        "two models in the file",
        "give the keys of one only",
        "and the holder has one",
    )
    TWO_HOMES = (
        "two-homes",
        Part.LIVE,
        "two places for one key",
        "put the model's path before its keys; keep one",
        "a key without a model's path is the holder's own key, too; or a tensor is there in both layouts",
    )
    TWO_VALUES = (
        "two-values",
        Part.LIVE,
        "two values for one tensor",
        "keep the one that is meant",
        "two keys of the file are one tensor, or tied in the model, and their values differ",
    )
    NO_MODEL = (
        "no-model",
        Part.LIVE,
        "no transformers model",
        "give one, or something that holds one",
        "in what was given",
    )
    WHICH_TARGET = (
        "which-target",
        Part.LIVE,
        "the adapter fits several models",
        "give the model itself",
    )
    WHICH_ADAPTER = (
        "which-adapter",
        Part.LIVE,
        "several adapters",
        "give the folder of one",
        "the path holds several",
    )
    NO_PLACE = (
        "no-place",
        Part.LIVE,
        "no place in the model",
        "give the model that the adapter was trained on",
        "there is no such module, or the config does not name it",
    )
    ADAPTER_EXISTS = (
        "adapter-exists",
        Part.LIVE,
        "the adapter's name is taken",
        "choose another, or pass `hotswap=True`",
        "the model has an adapter of this name",
    )
    NO_SUCH_ADAPTER = (
        "no-such-adapter",
        Part.LIVE,
        "no such adapter in the model",
        "name one that it has; to hotswap, load it without `hotswap` first",
        "hotswapping or saving, and the model has no adapter of this name",
    )
    HOTSWAP = (
        "hotswap",
        Part.LIVE,
        "the loaded adapter cannot be replaced",
        "load it under another name",
        "another family, merged, or fixed shapes that are too small",
        Status.REFUSED,
    )
    BAD_ADAPTER_NAME = (
        "bad-adapter-name",
        Part.LIVE,
        "not a name for an adapter",
        "choose another",
        "torch accepts no such name for a module's child",
    )
    NEEDS_PEFT_MODEL = (
        "needs-peft-model",
        Part.LIVE,
        "only in the model itself",
        "load it into the model itself",
        "an adapter that works around a model (prompts), shares tensors between layers, or allocates ranks "
        "(AdaLoRA), and the model is in a holder",
        Status.REFUSED,
    )
    NEEDS_NEWER_PEFT = (
        "needs-newer-peft",
        Part.LIVE,
        "a newer PEFT is wanted",
        "give the adapter's files, or install another release of PEFT or transformers",
        "something that only transformers' own functions can load, and they want a newer PEFT than there is",
        Status.REFUSED,
    )
    FLATTENED = (
        "flattened",
        Part.LIVE,
        "FSDP1 has flattened the parameters",
        "load it before the model is wrapped, or use `fully_shard`",
        "so an adapter of stacked experts has no parameters to stand on, and a checkpoint would reach copies alone",
        Status.REFUSED,
    )
    UNKNOWN_PEFT = (
        "unknown-peft",
        Part.LIVE,
        "this release of PEFT or transformers is not supported",
        "use PEFT 0.19 to 0.21",
        "it does not have the functions that regraft knows",
        Status.REFUSED,
    )
    HOOKED_OVER = (
        "hooked-over",
        Part.LIVE,
        "another library has hooked the same function",
        "undo that first",
        "since `install`",
        Status.REFUSED,
    )

    LEFT = (
        "left",
        Part.DESTINATION,
        "an interrupted run left something",
        "go on with `--resume`, or remove the folder",
        "what a checkpoint's conversion has written so far; a run that left nothing says nothing",
        Status.INTERRUPTED,
    )
    OTHER_WORK = (
        "other-work",
        Part.DESTINATION,
        "what `--resume` is to go on with is other work",
        "give the options of the run before, or leave out `--resume` to start afresh",
        "the message names what differs: an option, a file that was written to since, regraft's release",
    )
    DESTINATION_EXISTS = (
        "destination-exists",
        Part.DESTINATION,
        "the destination exists",
        "choose another, or pass `--overwrite`",
    )
    DESTINATION_IS_SOURCE = (
        "destination-is-source",
        Part.DESTINATION,
        "the destination is the source",
        "choose another",
    )
    DESTINATION_IN_SOURCE = (
        "destination-in-source",
        Part.DESTINATION,
        "the destination is inside the source",
        "choose another",
    )
    SOURCE_IN_DESTINATION = (
        "source-in-destination",
        Part.DESTINATION,
        "the source is inside the destination",
        "choose another",
    )
    DESTINATION_IN_USE = (
        "destination-in-use",
        Part.DESTINATION,
        "the destination is in use",
        "choose another",
        "it holds the home folder or the current one",
    )
    DESTINATION_IS_FILE = (
        "destination-is-file",
        Part.DESTINATION,
        "the destination is of the wrong kind",
        "choose another",
        "it is a file, or lies below one, or is named like one, and a folder is written; or the other "
        "way round",
    )
    PAGE_EXISTS = (
        "page-exists",
        Part.DESTINATION,
        "the page's place is taken",
        "choose another name",
        "something else than a page of regraft's is in the place of an `--html` page",
    )
    WORK_FOLDER = (
        "work-folder",
        Part.DESTINATION,
        "a hidden folder is in the way",
        "look at it, and remove it",
        "the hidden folder in which a result is made is there already and is not regraft's",
    )
    CANNOT_WRITE = (
        "cannot-write",
        Part.DESTINATION,
        "cannot write",
        "give permission, make room",
        "no permission, or no room",
    )
    CANNOT_COPY = (
        "cannot-copy",
        Part.DESTINATION,
        "cannot copy",
        "see the reason in the message",
        "a file beside the adapter cannot be copied",
    )

    MISSING_FILE = (
        "missing-file",
        Part.FILES,
        "no such file",
        "check the path; download it again",
        "the file does not exist, or is a link to nothing",
    )
    NOT_A_FILE = (
        "not-a-file",
        Part.FILES,
        "not a file",
        "check the path",
        "a folder, pipe or device where a file was expected",
    )
    BAD_PATH = ("bad-path", Part.FILES, "not a valid path", "check the path")
    UNREADABLE_FILE = (
        "unreadable-file",
        Part.FILES,
        "cannot read",
        "give permission; check the disk",
        "no permission, or the disk fails",
    )
    FILE_CHANGED = (
        "file-changed",
        Part.FILES,
        "the file changed",
        "try again",
        "it was written to while it was read",
    )
    STORE_FAILED = (
        "store-failed",
        Part.FILES,
        "a store gave no answer",
        "check the network and the address; run it again",
        "it was asked several times",
    )
    STORE_DENIED = (
        "store-denied",
        Part.FILES,
        "a store lets nobody in without credentials",
        "log in the way that the store's own tools do",
    )
    NO_RANGES = (
        "no-ranges",
        Part.FILES,
        "a server sends whole files only",
        "download the files; use a server that answers Range",
    )
    BAD_DCP = (
        "bad-dcp",
        Part.FILES,
        "not a distributed checkpoint of torch that can be read",
        "save it again; or join it with torch's `format_utils dcp_to_torch`",
        "its metadata is broken, names what no plain checkpoint does, or does not fit the files",
    )
    WHICH_KEY = (
        "which-key",
        Part.FILES,
        "no model, or several, in what a training run saved",
        "name the key that it is below: `--key model`",
    )
    OFFLINE = (
        "offline",
        Part.FILES,
        "beyond this machine, and the network is not to be used",
        "leave out `--offline`; `hf download ORG/NAME` where there is a network",
    )
    BAD_ADDRESS = ("bad-address", Part.FILES, "not an address of a store", "check the address")
    FILE_TOO_LARGE = (
        "file-too-large",
        Part.FILES,
        "the file is too large",
        "check that it is the right file",
        "more bytes than are read as JSON",
    )
    LFS_POINTER = (
        "lfs-pointer",
        Part.FILES,
        "a Git LFS pointer",
        "`git lfs pull`, or download it",
        "it is in the file's place",
    )
    HTML_PAGE = (
        "html-page",
        Part.FILES,
        "an HTML page",
        "download from the raw link, logged in if need be",
        "it is in the file's place",
    )
    ZIP_ARCHIVE = (
        "zip-archive",
        Part.FILES,
        "a zip archive",
        "name it `adapter_model.bin`",
        "as `torch.save` writes, under another name",
    )
    NOT_JSON = ("not-json", Part.FILES, "not JSON", "correct the file")
    NOT_UTF8 = ("not-utf8", Part.FILES, "not UTF-8", "save it as UTF-8")
    NOT_AN_OBJECT = (
        "not-an-object",
        Part.FILES,
        "not a JSON object",
        "check that it is the right file",
    )
    DUPLICATE_KEY = (
        "duplicate-key",
        Part.FILES,
        "a key occurs twice",
        "keep one",
        "in one JSON object",
    )
    TORCH_MISSING = (
        "torch-missing",
        Part.FILES,
        "torch is not installed",
        "`pip install 'regraft[torch]'`",
        "the matrices of this family are drawn by it",
    )
    PACKAGE_MISSING = (
        "package-missing",
        Part.FILES,
        "a package that reads a format is not installed",
        "install the extra that the message names",
        "GGUF files need gguf, LitGPT's settings PyYAML",
    )
    BAD_GGUF = (
        "bad-gguf",
        Part.FILES,
        "the GGUF file cannot be read",
        "check that the file is complete; convert it again",
    )
    BAD_TORCH_FILE = (
        "bad-torch-file",
        Part.FILES,
        "torch did not write the file",
        "save it again as safetensors",
        "or it is cut off",
    )
    NOT_TENSORS = (
        "not-tensors",
        Part.FILES,
        "not a dict of tensors",
        "save it again as safetensors; take it out",
        "it holds something other than named dense tensors",
    )
    SYSTEM = ("system", Part.FILES, "the operating system failed", "see the message")

    FILE_TRUNCATED = (
        "file-truncated",
        Part.HEADERS,
        "the file is truncated",
        "get it again",
        "it is shorter than its header says",
    )
    HEADER_TOO_LARGE = (
        "header-too-large",
        Part.HEADERS,
        "the header is too large",
        "most likely no safetensors file",
        "for the format, or for memory",
    )
    HEADER_NOT_UTF8 = ("header-not-utf8", Part.HEADERS, "the header is not UTF-8", "get it again")
    HEADER_NOT_JSON = ("header-not-json", Part.HEADERS, "the header is not JSON", "get it again")
    HEADER_NOT_OBJECT = (
        "header-not-object",
        Part.HEADERS,
        "the header is not a JSON object",
        "get it again",
    )
    METADATA_NOT_TEXT = (
        "metadata-not-text",
        Part.HEADERS,
        "the metadata is not text",
        "save it again",
        "it does not map text to text",
    )
    BAD_NAME = (
        "bad-name",
        Part.HEADERS,
        "a name cannot be written or read",
        "rename it",
        "a tensor's name, or the metadata",
    )
    BAD_ENTRY = (
        "bad-entry",
        Part.HEADERS,
        "an entry is not an object",
        "get it again",
        "in the header",
    )
    MISSING_FIELD = (
        "missing-field",
        Part.HEADERS,
        "a field is missing",
        "get it again",
        "in a tensor's entry",
    )
    UNKNOWN_FIELD = (
        "unknown-field",
        Part.HEADERS,
        "an unknown field",
        "get it again",
        "a tensor's entry has a field that the format does not have",
    )
    UNKNOWN_DTYPE = (
        "unknown-dtype",
        Part.HEADERS,
        "an unknown dtype",
        "save it with another dtype",
        "the format has no name for it",
    )
    BAD_SHAPE = ("bad-shape", Part.HEADERS, "not a shape", "get it again", "or too large")
    BAD_OFFSETS = (
        "bad-offsets",
        Part.HEADERS,
        "wrong offsets",
        "get it again",
        "they are not two numbers, or run backwards",
    )
    SIZE_MISMATCH = (
        "size-mismatch",
        Part.HEADERS,
        "size and offsets differ",
        "get it again",
        "shape and dtype need more or fewer bytes than the offsets give",
    )
    PACKED_ROW = (
        "packed-row",
        Part.HEADERS,
        "rows do not fill bytes",
        "save its bytes as U8",
        "rows of a dtype below one byte do not fill whole bytes",
    )
    HOLE = ("hole", Part.HEADERS, "unused bytes between tensors", "get it again")
    TRAILING_BYTES = ("trailing-bytes", Part.HEADERS, "bytes after the last tensor", "get it again")
    MORE_PROBLEMS = (
        "more-problems",
        Part.HEADERS,
        "more problems",
        "correct those first",
        "than are listed",
    )

    OPTION = (
        "option",
        Part.CHECKPOINTS,
        "options that do not go together",
        "leave it out",
        "an option that is for checkpoints only, or that does not go with another",
    )
    ADAPTER_INSIDE = (
        "adapter-inside",
        Part.CHECKPOINTS,
        "a checkpoint with an adapter inside",
        "load it into the model with its adapter, by `convert_state_dict`, and save the two apart",
        "the state dict of a model with a LoRA inside, which does not say how that is scaled",
    )
    BAD_SIZE = (
        "bad-size",
        Part.CHECKPOINTS,
        "not a size",
        "write it like `200MB` or `5GB`",
        "of a shard",
    )
    BAD_DTYPE = (
        "bad-dtype",
        Part.CHECKPOINTS,
        "cannot cast to this dtype",
        "use one of those it lists; names are those of the result",
        "or no tensor's name fits the pattern",
    )
    BAD_JOBS = (
        "bad-jobs",
        Part.CHECKPOINTS,
        "not a number of workers",
        "give a whole number from 1",
    )
    NO_INDEX = (
        "no-index",
        Part.CHECKPOINTS,
        "no index",
        "add the index, or save the model again",
        "several weights files, and nothing says what is where",
    )
    ONE_SHARD = (
        "one-shard",
        Part.CHECKPOINTS,
        "one shard of several",
        "give their folder",
        "a file of a sharded checkpoint was given by itself",
    )
    LINK_OUTSIDE = (
        "link-outside",
        Part.CHECKPOINTS,
        "a link out of the folder",
        "replace the link with the file",
    )
    WHICH_LAYOUT = (
        "which-layout",
        Part.CHECKPOINTS,
        "the layout is ambiguous",
        "say which with `--from`",
        "names and shapes fit both layouts, or neither",
    )
    COMPANION = (
        "companion",
        Part.CHECKPOINTS,
        "quantised weights cannot move exactly",
        "dequantise the checkpoint first",
        "tensors that belong to a quantised weight cannot move with it",
        Status.REFUSED,
    )
    PACKED = (
        "packed",
        Part.CHECKPOINTS,
        "packed bytes cannot be split or joined",
        "dequantise the checkpoint first",
        "several values share a byte, and the rule would separate them",
        Status.REFUSED,
    )
    MIXED_DTYPES = (
        "mixed-dtypes",
        Part.CHECKPOINTS,
        "tensors of several dtypes would become one",
        "cast them to one dtype first",
        "",
        Status.REFUSED,
    )
    NO_SPACE = (
        "no-space",
        Part.CHECKPOINTS,
        "not enough disk space",
        "make room, or write elsewhere",
    )
    IN_USE = (
        "in-use",
        Part.CHECKPOINTS,
        "another run writes here",
        "wait for it, or write elsewhere",
    )
    BAD_PART = (
        "bad-part",
        Part.CHECKPOINTS,
        "no such part",
        "give `--part I/N`, with I from 0: `0/4` to `3/4`",
        "or nothing says which part to do: neither `--part` nor a scheduler's variables",
    )
    STAGE_OTHER = (
        "stage-other",
        Part.CHECKPOINTS,
        "another conversion's stage",
        "give each conversion a stage of its own, or end that one with `--abort`",
        "`--stage` is a folder in which something else is being made, or the source changed since",
    )
    STAGE_OPTIONS = (
        "stage-options",
        Part.CHECKPOINTS,
        "a stage begun with other options",
        "give every part the same options; to change them, start over after `--abort`",
        "parts with other options, rule books or another release of regraft would make other bytes",
    )
    STAGE_INCOMPLETE = (
        "stage-incomplete",
        Part.CHECKPOINTS,
        "parts are missing",
        "run what died again, or all that is missing with `--part 0/1`; then commit",
        "`--commit` before all pieces of the result are there",
    )
    STAGE_COMMITTED = (
        "stage-committed",
        Part.CHECKPOINTS,
        "committed already",
        "look at the result; to make it once more, start over after `--abort`",
    )
    STAGE_GONE = (
        "stage-gone",
        Part.CHECKPOINTS,
        "the stage was removed meanwhile",
        "start over, if it is still wanted",
        "somebody gave `--abort`, or committed, while a part was at work",
    )
    STAGE_DAMAGED = (
        "stage-damaged",
        Part.CHECKPOINTS,
        "something else wrote to the stage",
        "start over after `--abort`",
        "a file has another size or another header than its parts gave it",
    )
    STAGE_PLACE = (
        "stage-place",
        Part.CHECKPOINTS,
        "this folder cannot be a stage",
        "give a new folder beside the result",
        "it is on another file system than the result, or holds something else",
    )
    CLUSTER = (
        "cluster",
        Part.CHECKPOINTS,
        "no cluster, or one that fails",
        "start one (`ray start --head`), or name it with `--address`",
        "regraft starts none by itself; a part that died is begun again ten times",
    )
    UNFINISHED = (
        "unfinished",
        Part.CHECKPOINTS,
        "an unfinished conversion in place",
        "convert in place again, which first puts back what was",
        "it was killed half way",
    )
    NOT_IN_PLACE = (
        "not-in-place",
        Part.CHECKPOINTS,
        "not possible in place",
        "convert into a new folder",
        "more than names would change, or the new header does not fit",
        Status.REFUSED,
    )
    NO_SUCH_KEY = (
        "no-such-key",
        Part.CHECKPOINTS,
        "no such key",
        "check the spelling",
        "`explain` or `slices` was asked about a key that is neither in the source nor in its conversion",
    )
    BAD_BOX = (
        "bad-box",
        Part.CHECKPOINTS,
        "not a part of the tensor",
        "give a pair (from, to) for each dim, or `None`",
        "a part of a tensor that does not fit its shape was asked for",
    )
    OUT_BUFFER = (
        "out-buffer",
        Part.CHECKPOINTS,
        "the memory does not fit",
        "give a writable array of the slice's shape and type",
        "a slice cannot be read into the memory that was given: too small, read-only, with gaps",
    )
    HALF_LOADED = (
        "half-loaded",
        Part.LIVE,
        "tensors of the model were being written",
        "load the model again before it is used",
        "loading failed while bytes went straight into memory that the model had: a GPU's, or a shard's",
    )
    PLACEMENT = (
        "placement",
        Part.LIVE,
        "a tensor is spread in an unknown way",
        "spread it with `Shard` and `Replicate`, in parts that divide where two mesh dims cut one dim",
    )
    PARALLEL_PLAN = (
        "parallel-plan",
        Part.CHECKPOINTS,
        "an error in a parallel plan",
        "correct it; give one with `--plan`",
        "a plan of what ranks share has a field, style or pattern that means nothing; or there is none "
        "for the model",
    )
    UNEVEN = (
        "uneven",
        Part.CHECKPOINTS,
        "not equal parts",
        "choose another number of ranks",
        "a dim cannot be cut into as many equal parts as there are ranks",
    )
    HEADS = (
        "heads",
        Part.CHECKPOINTS,
        "heads do not fit the ranks",
        "choose a `--tp` that divides the number of heads",
        "there are fewer attention heads than ranks, or they cannot be shared equally",
    )
    DIFFERS = (
        "differs",
        Part.CHECKPOINTS,
        "a tensor differs",
        "convert again",
        "`verify` found one that is not what it should be",
        Status.NO,
    )

    TOML = ("toml", Part.BOOKS, "not TOML", "see the line in the message")
    RULE_BOOK = (
        "rule-book",
        Part.BOOKS,
        "an error in a rule book",
        "see [rule books](rule-books.md)",
        "a field or table is wrong, a name is used twice, an included file is missing",
    )
    NOTATION = (
        "notation",
        Part.BOOKS,
        "an error in an equation",
        "see [the notation](notation.md)",
        "it is malformed or does not pair all elements; a mark shows where",
    )
    UNDETERMINED = (
        "undetermined",
        Part.BOOKS,
        "a size is not determined",
        "add a `where` clause",
        "in one direction nothing says it",
    )
    KIND = (
        "kind",
        Part.BOOKS,
        "a kind does not fit",
        "see [kinds](notation.md#kinds)",
        "there is no such kind, or it needs another number of dimensions",
    )
    ARRAYS = (
        "arrays",
        Part.BOOKS,
        "wrong number of arrays",
        "give one for each term",
        "`rearrange` was given another number of arrays than the equation reads",
    )

    RULES_OVERLAP = (
        "rules-overlap",
        Part.LINT,
        "rules overlap",
        "spell out what tells them apart",
        "two rules match one key when the left side is read (and make one when it is written), and "
        "neither is closer; a warning where only letters decide",
    )
    COLLISION = (
        "collision",
        Part.LINT,
        "two keys become one",
        "spell out what tells them apart",
        "two rules make one key; or two keys of a file become one",
    )
    SHADOWED = (
        "shadowed",
        Part.LINT,
        "never used",
        "put it first, or remove it",
        "another takes all its keys first",
    )
    CARRY_COLLIDES = (
        "carry-collides",
        Part.LINT,
        "an unchanged key collides with a rule's",
        "carry over only what no rule makes",
        "keys of both layouts in one file would become one",
    )
    EATS_OUTPUT = (
        "eats-output",
        Part.LINT,
        "a rule reads another's result",
        "give one another name, or spell out what tells them apart",
        "",
    )
    NOT_IDEMPOTENT = (
        "not-idempotent",
        Part.LINT,
        "converting twice differs from converting once",
        "give sizes in `where`; let a rename match the old name only",
        "in a rule book, one name is two different tensors",
    )
    NOT_INVERTIBLE = (
        "not-invertible",
        Part.LINT,
        "there is no way back",
        "keep it in a group",
        "what varies in the old name is not in the new one",
    )
    DOES_NOTHING = (
        "does-nothing",
        Part.LINT,
        "does nothing",
        "make it a `[[carry]]`",
        "both sides are the same",
    )
    INCOMPLETE_INDEX = (
        "incomplete-index",
        Part.LINT,
        "an incomplete index",
        "add what is missing; add `e = config.FIELD`",
        "an index is left out, or nothing but the keys says how many there are, or only one digit is accepted",
    )
    DEAD_RULE = (
        "dead-rule",
        Part.LINT,
        "matches nothing",
        "correct or remove it",
        "it matches none of the keys it was compared with",
    )
    DEAD_TABLE = (
        "dead-table",
        Part.LINT,
        "an unused table",
        "correct or remove it",
        "no rule and no unchanged key is about its module",
    )
    LOOSE_REGEX = (
        "loose-regex",
        Part.LINT,
        "a regular expression that is too loose",
        "write `\\.` for a dot, and say where the name ends",
        "it matches more than its own names",
    )
    RUNAWAY_REGEX = (
        "runaway-regex",
        Part.LINT,
        "a regular expression that can run away",
        "write `[^.]+` or `\\d+`",
        "it takes exponential time, or runs across segments at will",
    )
    REGEX = (
        "regex",
        Part.LINT,
        "not a regular expression",
        "correct it",
        "or it names a group that is not there",
    )

    USAGE = (
        "usage",
        Part.USAGE,
        "usage",
        "see `regraft COMMAND --help`",
        "a command line that regraft does not understand",
    )
    UNKNOWN_LAYOUT = (
        "unknown-layout",
        Part.USAGE,
        "no such layout",
        "choose one",
        "the message lists those there are",
        Status.BAD_INPUT,
    )
    INTERNAL = (
        "internal",
        Part.USAGE,
        "a bug in regraft",
        "report it, with the traceback that `REGRAFT_DEBUG=1` shows",
        "",
        Status.BUG,
    )


CODES: dict[str, Code] = {code.value: code for code in Code}
"""Codes by name."""
