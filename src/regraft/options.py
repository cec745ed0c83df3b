"""What commands can be asked for: each option once, with its name, type, default and help.

The command line is made from these classes (`regraft.cli.options.from_class`), and the functions of the package hand
them on as they are.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from msgspec import NODEFAULT, Struct

if TYPE_CHECKING:
    from regraft.rules.book import Rules

Subject = Literal["adapters", "checkpoints"]


class Option(Struct, frozen=True):
    """What the command line says of a field."""

    help: str
    metavar: str | None = None
    kind: Literal["layout", "source", "tool", "place", "file", "text"] = "text"
    """What its values are completed with, and checked for."""
    only: Subject | None = None
    """What it is for, if it is not for everything."""
    flag: str | None = None
    """Its name on the command line, if that is not the field's."""
    many: bool = False
    """Whether it can be given several times."""
    least: float | None = None
    above: bool = False
    """Whether the least value itself is too small."""
    most: float | None = None
    below: bool = False
    """Whether the largest value itself is too large."""
    shown: bool = False
    """Whether the help shows the default."""
    manner: bool = False
    """Whether it says how the work is to be done, and has no say in what the result is."""


def _word(value: Any) -> str:
    """An option's value as a person would write it.

    >>> _word(True), _word(["a", "b"]), _word(4)
    ('yes', 'a, b', '4')
    """
    if value is True:
        return "yes"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_word, value))
    return str(getattr(value, "path", value))  # of a rule book, where it is from


class Described(Struct, frozen=True):
    """A field of a class of options."""

    name: str
    type: Any
    """As it is annotated, ``None`` left out."""
    default: Any
    """``msgspec.NODEFAULT`` for what has to be given."""
    option: Option

    @property
    def flag(self) -> str:
        """Its name on the command line.

        >>> [field.flag for field in described(ConvertOptions)][:3]
        ['--to', '--from', '--model']
        """
        return self.option.flag or "--" + self.name.replace("_", "-")


@cache
def described(options: type["Options"]) -> tuple[Described, ...]:
    """The fields of a class of options, in their order."""
    return tuple(_described(options))


def _described(options: type["Options"]) -> Iterator[Described]:
    hints: dict[str, Any] = {}
    for base in reversed(options.__mro__):
        hints.update(getattr(base, "__annotations__", {}))
    names, defaults = options.__struct_fields__, options.__struct_defaults__
    without = [NODEFAULT] * (len(names) - len(defaults))
    for name, default in zip(names, [*without, *defaults], strict=True):
        hint, option = get_args(hints[name])
        yield Described(name, hint, default, option)


class Options(Struct, frozen=True, kw_only=True):
    """Values of options."""

    def values(self) -> dict[str, Any]:
        """All of them by their names, as the function of the same purpose takes them.

        >>> DiffOptions(model="base").values()["model"]
        'base'
        """
        return {name: getattr(self, name) for name in self.__struct_fields__}

    def given(self) -> dict[str, str]:
        """What was asked for of the result, by the flags of the command line; not how it is to be made.

        >>> ConvertOptions(to="transformers-v5", untie=True, jobs=2).given()
        {'--to': 'transformers-v5', '--untie': 'yes'}
        """
        values = {
            field.flag: getattr(self, field.name)
            for field in described(type(self))
            if not field.option.manner and getattr(self, field.name) != field.default
        }
        return {flag: _word(value) for flag, value in values.items() if value not in (None, ())}


Model = Annotated[
    str | PathLike[str] | None,
    Option(
        "The base model's folder or its config.json, of either version. Needed if the adapter itself doesn't name its "
        "base, or the number of experts is unknown.",
        "PATH",
        "place",
    ),
]
Architecture = Annotated[
    str | None,
    Option(
        "The model's class in transformers, if its config.json names none that exists.", "CLASS"
    ),
]
RuleBooks = Annotated[
    "Rules",
    Option(
        "Use this rule book (a TOML file, or the name of a built-in one) and no others. Repeatable; the word built-in "
        "means all built-in ones, so that --rules MINE --rules built-in adds one to them. If omitted, the books that "
        "REGRAFT_RULES lists (separated as in PATH).",
        "BOOK",
        many=True,
    ),
]
Source = Annotated[
    str | None,
    Option(
        "The layout of SRC, its dialect, or the family of its model. Detected if omitted.",
        "LAYOUT",
        "source",
        flag="--from",
    ),
]
Budget = Annotated[
    float,
    Option(
        "Compare every entry for so long, then the remaining targets by 16 random vectors; the result names them.",
        "SECONDS",
        only="adapters",
        least=0,
        shown=True,
        manner=True,
    ),
]


class ConvertOptions(Options, frozen=True, kw_only=True):
    """What `regraft.convert` is asked for, beside its two places."""

    to: Annotated[
        str,
        Option(
            "The layout to convert to (transformers-v5, transformers-v4), a dialect of adapters, or both "
            "(LAYOUT:DIALECT); 'regraft layouts' lists them.",
            "LAYOUT",
            "layout",
        ),
    ]
    source: Source = None
    model: Model = None
    architecture: Architecture = None
    rules: RuleBooks = ()
    dry_run: Annotated[bool, Option("Run without writing.", manner=True)] = False
    overwrite: Annotated[bool, Option("Replace DST if it exists.", manner=True)] = False
    shard_size: Annotated[
        str | int | None,
        Option(
            "The size of a weights file, such as 200MB or 5GB. As SRC is sharded if omitted.",
            "SIZE",
            only="checkpoints",
        ),
    ] = None
    dtype: Annotated[
        str | Sequence[str],
        Option(
            "Cast floating-point tensors (bfloat16), or those whose names match a pattern (*.norm.weight=float32). "
            "Repeatable.",
            "[PATTERN=]DTYPE",
            many=True,
            only="checkpoints",
        ),
    ] = ()
    jobs: Annotated[
        int | None,
        Option(
            "How many workers, by default one per core. Several SRC: how many at once, by default one.",
            "N",
            only="checkpoints",
            least=1,
            manner=True,
        ),
    ] = None
    resume: Annotated[
        bool,
        Option(
            "Continue what an interrupted run had begun: a checkpoint, or several SRC. With other options than then it "
            "is an error.",
            only="checkpoints",
            manner=True,
        ),
    ] = False
    stage: Annotated[
        str | PathLike[str] | None,
        Option(
            "Do one part of the work, in a folder that the processes of all parts share; DST appears with --commit. "
            "An address in S3 where DST is one.",
            "DIR",
            "file",
            only="checkpoints",
            manner=True,
        ),
    ] = None
    part: Annotated[
        str | None,
        Option(
            "Which part: 0/4, 1/4, 2/4 or 3/4; /4 for the one that JOB_COMPLETION_INDEX says. If omitted, as "
            "SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT say.",
            "I/N",
            only="checkpoints",
            manner=True,
        ),
    ] = None
    commit: Annotated[
        bool,
        Option(
            "When all parts are done: check them, and let DST appear.",
            only="checkpoints",
            manner=True,
        ),
    ] = False
    abort: Annotated[bool, Option("End what is staged in --stage, and remove it.", manner=True)] = (
        False
    )
    push: Annotated[
        str | None,
        Option(
            "Upload the result to a repository of Hugging Face's hub, too.", "ORG/NAME", manner=True
        ),
    ] = None
    runner: Annotated[
        Literal["ray"] | None,
        Option(
            "Hand out the parts to a running cluster, and commit: ray. --part /N says how many.",
            "ray",
            only="checkpoints",
            manner=True,
        ),
    ] = None
    address: Annotated[
        str,
        Option(
            "Where the cluster is (auto: this machine's).",
            "ADDRESS",
            only="checkpoints",
            manner=True,
        ),
    ] = "auto"
    in_place: Annotated[
        bool,
        Option("Rename the tensors in SRC itself, by rewriting headers only.", only="checkpoints"),
    ] = False
    untie: Annotated[
        bool,
        Option(
            "If tied weights have different values, keep both, and write tie_word_embeddings: false.",
            only="checkpoints",
        ),
    ] = False
    drop: Annotated[
        Sequence[str],
        Option(
            "Leave out the tensors whose names match it (model.mtp.*), or one of two tied weights with different "
            "values. Repeatable.",
            "PATTERN",
            many=True,
            only="checkpoints",
        ),
    ] = ()
    keep: Annotated[
        Sequence[str],
        Option(
            "Copy the tensors whose names match it unchanged, although no rule matches them. Repeatable.",
            "PATTERN",
            many=True,
            only="checkpoints",
        ),
    ] = ()
    dequantize: Annotated[
        bool,
        Option(
            "Turn quantised weights (FP8, MXFP4, NVFP4) into bfloat16. This changes numbers.",
            only="checkpoints",
        ),
    ] = False
    verify: Annotated[
        bool,
        Option(
            "Compare what every target adds before and after, before anything is written.",
            only="adapters",
            manner=True,
        ),
    ] = False
    verify_budget: Budget = 300.0
    compact: Annotated[
        bool, Option("Leave out components that add nothing, to rounding.", only="adapters")
    ] = False
    uniform_rank: Annotated[
        bool,
        Option("One rank for all targets, padded with zeros; no rank_pattern.", only="adapters"),
    ] = False
    max_error: Annotated[
        float | None,
        Option(
            "Refuse an approximation (--via) whose relative error is larger; nothing is written.",
            "ERROR",
            only="adapters",
            least=0,
        ),
    ] = None
    merge: Annotated[
        bool,
        Option(
            "Write the base of --model in the layout, with the adapter added to its weights.",
            only="adapters",
        ),
    ] = False
    via: Annotated[
        str | None,
        Option(
            "Allow what is done only on request. dense: a LoRA of full rank; svd:RANK (svd:16) or svd:TOLERANCE "
            "(svd:1e-3): the best one of a lower rank, with its error; merge: the base of --model with the adapter in "
            "its weights, if the result cannot hold the adapter.",
            "WAY",
            only="adapters",
        ),
    ] = None
    alpha: Annotated[
        float | None,
        Option(
            "The alpha of a LoRA whose files do not contain it (Megatron-Bridge's export).",
            "ALPHA",
            only="adapters",
            least=0,
            above=True,
        ),
    ] = None
    rank: Annotated[
        int | None,
        Option(
            "The rank that --alpha is divided by, if the factors have several.",
            "RANK",
            only="adapters",
            least=1,
        ),
    ] = None


class CheckOptions(Options, frozen=True, kw_only=True):
    """What `regraft.check` is asked for."""

    source: Annotated[
        str | None,
        Option(
            "The family of SRC's model (sd3), for a LoRA of an image or video model whose names fit several.",
            "FAMILY",
            "source",
            flag="--from",
            only="adapters",
        ),
    ] = None
    model: Model = None
    architecture: Architecture = None
    rules: RuleBooks = ()
    to: Annotated[
        str,
        Option(
            "What is to load it: transformers-v5 or transformers-v4 (the installed one is tried; for the other, names, "
            "shapes and the config are compared), or a tool, with @VERSION if a certain one is meant (vllm, sglang, "
            "…): what it would do with the files as they are.",
            "LAYOUT",
            "tool",
            flag="--for",
            shown=True,
        ),
    ] = "transformers-v5"


class InspectOptions(Options, frozen=True, kw_only=True):
    """What `regraft.inspect` is asked for."""

    source: Source = None
    model: Model = None
    architecture: Architecture = None
    rules: RuleBooks = ()


class VerifyOptions(Options, frozen=True, kw_only=True):
    """What `regraft.verify` is asked for."""

    source: Source = None
    model: Model = None
    architecture: Architecture = None
    rules: RuleBooks = ()
    tolerance: Annotated[
        float,
        Option(
            "Adapters: the relative error up to which two deltas are equal.",
            "ERROR",
            least=0,
            shown=True,
        ),
    ] = 1e-5
    budget: Annotated[
        float,
        Option(
            "Adapters: compare every entry for so long, then the remaining targets by 16 random vectors; the result "
            "names them.",
            "SECONDS",
            flag="--verify-budget",
            least=0,
            shown=True,
        ),
    ] = 300.0


class DiffOptions(Options, frozen=True, kw_only=True):
    """What `regraft.diff` is asked for."""

    model: Model = None
    architecture: Architecture = None
    rules: RuleBooks = ()


class ExplainOptions(Options, frozen=True, kw_only=True):
    """What `regraft.explain` is asked for."""

    to: Annotated[
        str,
        Option(
            "The layout to explain the way to: transformers-v5 or transformers-v4.",
            "LAYOUT",
            "layout",
        ),
    ]
    source: Source = None
    model: Model = None
    architecture: Architecture = None
    rules: RuleBooks = ()


class MergeOptions(Options, frozen=True, kw_only=True):
    """What `regraft.merge` is asked for."""

    dtype: Annotated[
        str | Sequence[str],
        Option(
            "Cast floating-point tensors (bfloat16), or those whose names fit a pattern. A sum is rounded once, to "
            "this type. Repeatable.",
            "[PATTERN=]DTYPE",
            many=True,
        ),
    ] = ()
    clip_weight: Annotated[
        float | None,
        Option("Image models: the weight for text encoders, in place of each LoRA's own.", "W"),
    ] = None
    source: Source = None
    architecture: Architecture = None
    rules: RuleBooks = ()
    shard_size: Annotated[
        str | int | None,
        Option(
            "The size of a weights file, such as 200MB or 5GB. As BASE is sharded if omitted.",
            "SIZE",
        ),
    ] = None
    jobs: Annotated[
        int | None, Option("How many workers, by default one per core.", "N", least=1)
    ] = None
    dry_run: Annotated[bool, Option("Check everything that fits or not, and write nothing.")] = (
        False
    )
    overwrite: Annotated[bool, Option("Replace OUT if it exists.")] = False


class ExtractOptions(Options, frozen=True, kw_only=True):
    """What `regraft.extract` is asked for."""

    rank: Annotated[int | None, Option("The rank of the factors.", "R", least=1)] = None
    error: Annotated[
        float | None,
        Option(
            "Instead of a rank: the lowest one for each matrix that is off by no more than this, relative to its "
            "change (0.1).",
            "E",
            least=0,
            most=1,
            below=True,
        ),
    ] = None
    to: Annotated[
        str | None,
        Option(
            "The dialect, or the layout, to write; PEFT for language models, diffusers for others if omitted.",
            "LAYOUT",
            "layout",
        ),
    ] = None
    full: Annotated[
        bool,
        Option(
            "Keep as a whole what is no matrix of a module (norms, biases) where it changed. Refused otherwise."
        ),
    ] = False
    skip: Annotated[
        Sequence[str],
        Option(
            "Leave out what changed in tensors whose names it matches (first_stage_model.*), and say so. Repeatable.",
            "PATTERN",
            many=True,
        ),
    ] = ()
    dtype: Annotated[str, Option("The type of the factors.", "DTYPE", shown=True)] = "float32"
    memory: Annotated[
        str | None,
        Option(
            "How much may be held at a time, such as 4GB; three times the largest tensor if omitted.",
            "SIZE",
        ),
    ] = None
    source: Annotated[
        str | None,
        Option("The family of the models, where names don't tell it.", "FAMILY", flag="--from"),
    ] = None
    architecture: Architecture = None
    rules: RuleBooks = ()
    dry_run: Annotated[bool, Option("Run without writing.")] = False
    overwrite: Annotated[bool, Option("Replace OUT if it exists.")] = False


class LearnOptions(Options, frozen=True, kw_only=True):
    """What `regraft.learn` is asked for, beside the layouts' and the book's names."""

    choose: Annotated[
        Sequence[str],
        Option(
            "Where two readings fit: AFTER=BEFORE for tensors that are equal to others, config.FIELD for a size. "
            "Repeatable.",
            "ANSWER",
            many=True,
        ),
    ] = ()
    partial: Annotated[bool, Option("Write a book even if it does not explain everything.")] = False


class ProbeOptions(Options, frozen=True, kw_only=True):
    """What the probes of `regraft probe` and `regraft learn --config` are made of."""

    layout: Annotated[
        str | None,
        Option(
            "The layout of the probes' names: transformers-v4 or transformers-v5. As files usually are if omitted.",
            "LAYOUT",
        ),
    ] = None
    headers: Annotated[
        str | PathLike[str] | None,
        Option(
            "A checkpoint of the model, for a type that transformers does not know: its names are taken, and its sizes "
            "changed as the config says them. Not needed where it lies beside the config.",
            "CHECKPOINT",
        ),
    ] = None
    settings: Annotated[
        Sequence[str],
        Option(
            "A field of the config that keeps this value at every size. Repeatable.",
            "FIELD=VALUE",
            flag="--set",
            many=True,
        ),
    ] = ()


class SlicesOptions(Options, frozen=True, kw_only=True):
    """What `regraft.slices` is asked for."""

    to: Annotated[str, Option("The layout that the ranks want.", "LAYOUT", "layout")]
    model: Model = None
    source: Source = None
    rules: RuleBooks = ()
