"""The registry of the installed transformers, with entries of its users and where it is wrong itself."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from transformers import MixtralConfig, MixtralModel, PreTrainedConfig, PreTrainedModel  # noqa: E402
from transformers import conversion_mapping as mapping  # noqa: E402
from transformers.core_model_loading import (  # noqa: E402
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

import regraft  # noqa: E402
from regraft.arrays.apply import apply_plan  # noqa: E402
from regraft.bridges.transformers import registry  # noqa: E402
from regraft.bridges.transformers.imported import import_model  # noqa: E402
from regraft.errors import BadInputError, RefusedError, RegraftError, UnmatchedKeysError  # noqa: E402
from regraft.layouts.graph import edges_to  # noqa: E402
from regraft.names.keys import group_names  # noqa: E402
from regraft.names.live import skeleton_of  # noqa: E402
from regraft.planning.build import build_plan  # noqa: E402
from regraft.planning.model import Scope  # noqa: E402
from regraft.planning.plan import Headers  # noqa: E402
from regraft.storage.safetensors import open_tensors, write_tensors  # noqa: E402

OLD, NEW = "transformers-v4", "transformers-v5"
TINY = MixtralConfig(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=4,
    num_experts_per_tok=2,
    vocab_size=10,
)


class SmallConfig(PreTrainedConfig):
    model_type = "small_of_mine"

    def __init__(self, size=4, **more):
        super().__init__(**more)
        self.size = size


class Small(PreTrainedModel):
    """A model whose parts are named by a test."""

    config_class = SmallConfig
    base_model_prefix = "base"

    def __init__(self, config, parts=None):
        super().__init__(config)
        for name in parts or {}:
            setattr(self, name, parts[name])
        self.post_init()


@pytest.fixture
def register():
    """Register entries for one test."""
    before = dict(mapping._checkpoint_conversion_mapping_cache or {})
    users = set(mapping.USER_REGISTERED_MAPPINGS)
    yield mapping.register_checkpoint_conversion_mapping
    mapping._checkpoint_conversion_mapping_cache = before or None
    mapping.USER_REGISTERED_MAPPINGS.clear()
    mapping.USER_REGISTERED_MAPPINGS.update(users)


def numbered(state):
    """Arrays that tell every element from every other."""
    made, at = {}, 0
    for name, tensor in state.items():
        count = int(np.prod(tensor.shape))
        made[name] = np.arange(at, at + count, dtype=np.float64).reshape(tuple(tensor.shape))
        at += count
    return made


def converted(model, state, to, key_mapping=None):
    imported = import_model(skeleton_of(model), key_mapping)
    told = list(state) if to == NEW else []
    book = imported.book(told, {k: tuple(v.shape) for k, v in state.items()} if told else {})
    names = list(state)
    shapes = [tuple(v.shape) for v in state.values()]
    headers = Headers(group_names(names), shapes, ["F64"] * len(names))
    plan = build_plan(headers, edges_to([book], to), scopes={book.name: Scope()})
    return apply_plan(plan, list(state.values()))


def there_and_back(model, key_mapping=None):
    state = numbered(model.state_dict())
    old = converted(model, state, OLD, key_mapping)
    again = converted(model, old, NEW, key_mapping)
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[k], state[k]) for k in state)
    return state, old


def linear(n=4):
    return nn.Linear(n, n, bias=False)


def test_a_target_that_is_inside_a_longer_name_makes_only_what_the_model_has(register):
    register(
        "small_of_mine",
        [
            WeightConverter("both", ["gate_proj", "up_proj"], operations=[Chunk(dim=0)]),
            WeightConverter(["first", "second"], "gate_up_proj", operations=[Concatenate(dim=0)]),
        ],
    )
    parts = {"gate_proj": linear(), "up_proj": linear(), "gate_up_proj": linear()}
    _, old = there_and_back(Small(SmallConfig(), parts))
    assert set(old) == {"both.weight", "first.weight", "second.weight"}


def test_a_users_entry_for_a_model_type(register):
    register("small_of_mine", [WeightRenaming("old_part", "part")])
    _, old = there_and_back(Small(SmallConfig(), {"part": linear()}))
    assert list(old) == ["old_part.weight"]


def test_a_users_entry_for_a_class_comes_before_that_for_its_type(register):
    register("small_of_mine", [WeightRenaming("by_type", "part")])
    register("Small", [WeightRenaming("by_class", "part")])
    _, old = there_and_back(Small(SmallConfig(), {"part": linear()}))
    assert list(old) == ["by_class.weight"]


def test_key_mapping_renames_before_the_registry():
    model = MixtralModel(TINY)
    state = numbered(model.state_dict())
    old = converted(model, state, OLD)
    file = {f"mine.{key}": value for key, value in old.items()}
    new = converted(model, file, NEW, {r"^mine\.": ""})
    assert new.keys() == state.keys()
    assert all(np.array_equal(new[k], state[k]) for k in state)


def test_a_subclass_is_looked_up_through_its_bases():
    class Mine(MixtralModel):
        """A user's own, without a registration."""

    _, old = there_and_back(Mine(TINY))
    assert "layers.1.block_sparse_moe.experts.3.w2.weight" in old


def test_fsdp2_renames_the_class():
    model = MixtralModel(TINY)
    model.__class__ = type("FSDPMixtralModel", (MixtralModel,), {})
    _, old = there_and_back(model)
    assert "layers.1.block_sparse_moe.experts.3.w2.weight" in old


def test_foreign_code_with_a_registered_model_type_has_its_own_names():
    class Config(SmallConfig):
        model_type = "mixtral"

    class Remote(Small):
        config_class = Config

    model = Remote(Config(), {"block_sparse_moe": linear(), "mlp": linear()})
    state, old = there_and_back(model)
    assert old.keys() == state.keys()
    assert [a.why for a in import_model(skeleton_of(model)).scopes.applied] == [
        "Remote is not a class of transformers"
    ]


def test_a_class_that_nothing_is_registered_for_keeps_its_names():
    state, old = there_and_back(Small(SmallConfig(), {"part": linear()}))
    assert old.keys() == state.keys()


def test_an_unknown_key_is_an_error_that_names_it():
    model = MixtralModel(TINY)
    old = converted(model, numbered(model.state_dict()), OLD)
    old["layers.0.nobody.weight"] = np.zeros(2)
    with pytest.raises(UnmatchedKeysError, match=r"layers\.0\.nobody\.weight"):
        converted(model, old, NEW)


def test_an_incomplete_stack_of_experts_is_refused():
    model = MixtralModel(TINY)
    old = converted(model, numbered(model.state_dict()), OLD)
    del old["layers.1.block_sparse_moe.experts.2.w1.weight"]
    with pytest.raises(BadInputError, match=r"experts\.2\.w1"):
        converted(model, old, NEW)


def test_the_match_itself_is_replaced_and_not_the_same_text_before_it(register):
    register("small_of_mine", [WeightRenaming(r"(?<=core\.)a", "b")])
    inner = nn.ModuleDict({"b": linear()})
    model = Small(SmallConfig(), {"alpha": nn.ModuleDict({"core": inner})})
    state = numbered(model.state_dict())
    new = converted(model, {"alpha.core.a.weight": state["alpha.core.b.weight"]}, NEW)
    assert list(new) == ["alpha.core.b.weight"]


def test_a_second_group_is_written_and_not_left_as_it_is(register):
    register("small_of_mine", [WeightRenaming(r"(left|right)\.(w)\.", r"\1_\2.")])
    model = Small(SmallConfig(), {"left_w": linear(), "right_w": linear()})
    state = numbered(model.state_dict())
    old = {key.replace("_w.", ".w."): value for key, value in state.items()}
    new = converted(model, old, NEW)
    assert all(np.array_equal(new[k], state[k]) for k in state)


def test_siblings_with_one_pattern_keep_their_own_operations(register):
    class One(Small):
        """Its pieces are stacked one after the other."""

    class Two(Small):
        """Its pieces are laid side by side."""

    patterns = ["p.weight", "q.weight"], "pq.weight"
    register("One", [WeightConverter(*patterns, operations=[Concatenate(dim=0)])])
    register("Two", [WeightConverter(*patterns, operations=[Concatenate(dim=1)])])
    one = One(SmallConfig(), {"pq": nn.Linear(4, 8, bias=False)})
    two = Two(SmallConfig(), {"pq": nn.Linear(8, 4, bias=False)})
    model = Small(SmallConfig(), {"one": one, "two": two})
    state, old = there_and_back(model)
    assert {k: v.shape for k, v in old.items()} == dict.fromkeys(
        ("one.p.weight", "one.q.weight", "two.p.weight", "two.q.weight"), (4, 4)
    )
    assert np.array_equal(old["two.q.weight"], state["two.pq.weight"][:, 4:])


def test_a_chunk_that_would_lose_a_target_is_refused_with_the_reason(register):
    register(
        "small_of_mine",
        [WeightConverter("qkv.weight", ["q.weight", "k.weight", "v.weight"], [Chunk(dim=0)])],
    )
    model = Small(SmallConfig(), {"q": linear(), "k": linear()})
    with pytest.raises(RegraftError, match=r"v\.weight, which is made with it, is not there"):
        converted(model, {"qkv.weight": np.zeros((12, 4))}, NEW)


def test_parts_of_unequal_size_are_refused_where_the_chunk_is_equal(register):
    register(
        "small_of_mine", [WeightConverter("qk.weight", ["q.weight", "k.weight"], [Chunk(dim=0)])]
    )
    model = Small(SmallConfig(), {"q": linear(), "k": nn.Linear(4, 2, bias=False)})
    with pytest.raises(RegraftError, match="equal parts have targets of different sizes"):
        converted(model, {"qk.weight": np.zeros((6, 4))}, NEW)


def test_an_entry_that_is_registered_again_is_read_again(register):
    """Its list may stand where the one before stood, and have as many transforms."""
    for name in map(str, range(40)):
        register("small_of_mine", [WeightRenaming(f"old{name}", "part")])
        (read,) = registry.look_up("small_of_mine")
        assert f"old{name}" in str(read.forward.sources)
        del mapping._checkpoint_conversion_mapping_cache["small_of_mine"]


class Secret(MergeModulelist):
    """Of somebody else."""


class Around(ConversionOps):
    """The parts of one tensor around another one."""

    def __init__(self, inverse=False):
        self.inverse = inverse

    def convert(self, input_dict, source_patterns, target_patterns, **options):
        held = [t[0] if isinstance(t, list) else t for t in input_dict.values()]
        if self.inverse:
            (all_of_it,) = held
            first, last = all_of_it[:, [0, 3]], all_of_it[:, 1:3]
            return {target_patterns[0]: first.flatten(0, 1), target_patterns[1]: last.flatten(0, 1)}
        one, two = (t.unflatten(0, (-1, 2)) for t in held)
        return {target_patterns[0]: torch.cat([one[:, :1], two, one[:, 1:]], 1)}

    @property
    def reverse_op(self):
        return Around(not self.inverse)


class Halved(ConversionOps):
    """An operation that has a way back, and changes values."""

    def __init__(self, factor=0.5):
        self.factor = factor

    def convert(self, input_dict, source_patterns, target_patterns, **options):
        return {target_patterns[0]: next(iter(input_dict.values()))[0] * self.factor}

    @property
    def reverse_op(self):
        return Halved(1 / self.factor)


class Holder(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.all = nn.Parameter(torch.zeros(*shape))


def test_an_operation_that_nobody_knows_is_watched(register):
    register("small_of_mine", [WeightConverter("e.*.weight", "part.all", [Secret(dim=0)])])
    model = Small(SmallConfig(), {"part": Holder(3, 4, 2)})
    state, old = there_and_back(model)
    assert [*old] == ["e.0.weight", "e.1.weight", "e.2.weight"]
    assert np.array_equal(old["e.1.weight"], state["part.all"][1])


def test_a_watched_operation_may_be_one_that_no_known_one_is_like(register):
    register("small_of_mine", [WeightConverter(["one", "two"], "part.all", [Around()])])
    model = Small(SmallConfig(), {"part": Holder(3, 4, 5)})
    state, old = there_and_back(model)
    assert np.array_equal(old["one"], state["part.all"][:, [0, 3]].reshape(6, 5))
    with pytest.raises(RegraftError):
        converted(model, {"one": np.zeros((8, 5)), "two": np.zeros((8, 5))}, NEW)


def test_a_watched_operation_that_changes_values_is_said_to(register):
    register("small_of_mine", [WeightConverter("old", "part.all", [Halved()])])
    model = Small(SmallConfig(), {"part": Holder(3, 4)})
    with pytest.raises(RegraftError, match="Halved was watched, and no rule was found"):
        converted(model, {"old": np.zeros((3, 4))}, NEW)


class Pairs(WeightRenaming):
    """A rename with a function of its own: two old layers are one."""

    def __init__(self):
        super().__init__("layers", "layers")

    def rename_source_key(self, source_key):
        head, mixer, rest = source_key.partition(".mixer")
        if not mixer:
            return source_key, None
        name, number = head.split(".")
        part = ("attention", "mlp")[int(number) % 2]
        return f"{name}.{int(number) // 2}.{part}{rest}", "layers"

    def reverse_transform(self):
        return self


def test_a_rename_by_a_function_is_called(register):
    register("small_of_mine", [Pairs()])
    layers = [nn.ModuleDict({"attention": linear(), "mlp": linear(6)}) for _ in range(12)]
    model = Small(SmallConfig(), {"layers": nn.ModuleList(layers)})
    state = numbered(model.state_dict())
    place = {"attention": 0, "mlp": 1}
    old = {}
    for key, value in state.items():
        _, number, part, leaf = key.split(".")
        old[f"layers.{2 * int(number) + place[part]}.mixer.{leaf}"] = value
    made = converted(model, old, NEW)
    assert made.keys() == state.keys()
    assert all(np.array_equal(made[k], state[k]) for k in state)


def test_what_the_model_computes_and_ignores_is_kept():
    config = transformers.SwinConfig(
        depths=[1], num_heads=[2], embed_dim=8, image_size=16, patch_size=4
    )
    imported = import_model(skeleton_of(transformers.SwinModel(config)))
    buffer = "encoder.layers.0.blocks.0.attention.self.relative_position_index"
    book = imported.book([buffer])
    headers = Headers(group_names([buffer]), [(4, 4)], ["I64"])
    for layout in (NEW, OLD):
        plan = build_plan(headers, edges_to([book], layout), scopes={book.name: Scope()})
        ((carried),) = plan.carried
        assert carried.group.names() == [buffer]
        assert "the model computes it itself" in carried.carry.why
    with pytest.raises(UnmatchedKeysError):
        other = Headers(group_names(["encoder.mystery"]), [(4,)], ["F32"])
        build_plan(other, edges_to([book], NEW), scopes={book.name: Scope()})


def test_what_the_model_computes_and_does_not_ignore_is_dropped_and_told():
    config = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    imported = import_model(skeleton_of(transformers.CLIPVisionModel(config)))
    buffer = "vision_model.embeddings.position_ids"
    book = imported.book([buffer])
    headers = Headers(group_names([buffer]), [(1, 50)], ["I64"])
    plan = build_plan(headers, edges_to([book], NEW), scopes={book.name: Scope()})
    assert [(d.group.names(), d.drop.why) for d in plan.dropped] == [
        ([buffer], "the model computes it itself")
    ]
    assert "dropped" in str(plan)
    back = build_plan(Headers([], [], []), edges_to([book], OLD), scopes={book.name: Scope()})
    assert len(back.lacking()) == 1


def test_what_a_class_had_and_did_not_use_is_kept():
    vlm = transformers.Qwen2VLConfig(
        text_config={"num_hidden_layers": 0}, vision_config={"depth": 0}
    )
    with torch.device("meta"):
        model = transformers.ColQwen2ForRetrieval(transformers.ColQwen2Config(vlm_config=vlm))
    why, computed = import_model(skeleton_of(model)).unwanted("vlm.lm_head.weight")
    assert "did not use it" in why and not computed


def test_rows_of_single_tokens_go_with_their_embedding(tmp_path):
    """Whatever the embedding is called; no book has to know how PEFT names its rows."""
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [1, 2],
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
        },
    }
    model = tmp_path / "config.json"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 12, "vocab_size": 16}
    model.write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes})
    )
    start = "base_model.model.model."
    tokens = f"{start}embed_tokens.token_adapter.trainable_tokens_delta"
    tensors = {
        f"{start}layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 8), np.float32),
        f"{start}layers.0.self_attn.q_proj.lora_B.weight": np.ones((8, 2), np.float32),
        tokens: np.arange(16, dtype=np.float32).reshape(2, 8),
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(adapter / "adapter_model.safetensors", tensors, {"format": "pt"})
    regraft.convert(adapter, tmp_path / "out", to="transformers-v5", model=model)
    made = open_tensors(tmp_path / "out" / "adapter_model.safetensors")
    assert made.keys() == tensors.keys()
    np.testing.assert_array_equal(made[tokens], tensors[tokens])


def test_reading_the_registry_leaves_it_as_it_is():
    def told(transform):
        return [*transform.source_patterns], [*transform.target_patterns]

    raw = mapping.get_checkpoint_conversion_mapping("mixtral")
    before = [told(transform) for transform in raw]
    import_model(skeleton_of(MixtralModel(TINY))).book()
    registry.look_up("mixtral")
    assert [told(t) for t in mapping.get_checkpoint_conversion_mapping("mixtral")] == before


@pytest.mark.parametrize("damaged", [r"layers.(\d+).mlp", r"^layers.\1.mlp", r"layers\.\1.mlp$"])
def test_a_target_that_saving_in_5_4_made_a_pattern_is_read(damaged):
    assert registry._plain(damaged) == r"layers.\1.mlp"


def test_numbers_that_a_rule_spells_out_do_not_hide_how_a_file_spells_a_key(register):
    register("small_of_mine", [WeightRenaming(r"proj\.(\d+)", r"stage.\1.layers.0")])
    stages = nn.ModuleList(nn.ModuleDict({"layers": nn.ModuleList([linear()])}) for _ in range(2))
    model = Small(SmallConfig(), {"base": nn.ModuleDict({"stage": stages})})
    state = numbered(model.state_dict())
    old = {f"base.proj.{n}.weight": state[f"base.stage.{n}.layers.0.weight"] for n in range(2)}
    for prefix in ("base.", ""):
        file = {prefix + key.removeprefix("base."): value for key, value in old.items()}
        new = converted(model, file, NEW)
        assert all(np.array_equal(new[k], state[k]) for k in state)


def test_a_bare_qwen2_vl_has_the_names_that_transformers_4_wrote():
    model = transformers.Qwen2VLModel(
        transformers.Qwen2VLConfig(
            text_config={
                "hidden_size": 16,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 10,
            },
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
        )
    )
    _, old = there_and_back(model)
    assert {key.partition(".")[0] for key in old} == {"model", "visual"}


class Doubled(WeightRenaming):
    """A rename that also changes values."""

    def convert(self, *arguments, **options):
        return {name: value * 2 for name, value in super().convert(*arguments, **options).items()}


class Renamed(WeightRenaming):
    """A rename by another name."""


@pytest.mark.parametrize(("kind", "own"), [(Doubled, "convert")])
def test_a_rename_with_methods_of_its_own_is_refused_and_not_read_as_identity(register, kind, own):
    register("small_of_mine", [kind("part", "part")])
    model = Small(SmallConfig(), {"part": linear()})
    with pytest.raises(RefusedError) as caught:
        import_model(skeleton_of(model))
    (finding,) = caught.value.findings
    assert finding.code == "unknown-transform"
    assert f"{kind.__name__} has its own {own}" in finding.message
    assert "5.4 to 5.24" in finding.fix
    with pytest.raises(RefusedError):
        regraft.convert_state_dict(model.state_dict(), to=OLD, model=model)


class Unpad(ConversionOps):
    """An operation that nobody here knows: the names stay, and rows go."""

    def convert(self, input_dict, source_patterns, target_patterns, **options):
        return {target_patterns[0]: next(iter(input_dict.values()))[0][:4]}

    @property
    def reverse_op(self):
        return Unpad()


def test_an_unknown_operation_is_no_identity_for_tensors_of_other_sizes(register):
    register("small_of_mine", [WeightConverter("part.weight", "part.weight", [Unpad()])])
    model = Small(SmallConfig(), {"part": nn.Linear(3, 4, bias=False)})
    there_and_back(model)
    with pytest.raises(RegraftError, match="4"):
        converted(model, {"part.weight": np.zeros((6, 3))}, NEW)


def test_a_rename_of_a_subclass_that_changes_nothing_is_read_like_its_base(register):
    register("small_of_mine", [Renamed("old_part", "part")])
    _, old = there_and_back(Small(SmallConfig(), {"part": linear()}))
    assert list(old) == ["old_part.weight"]


@pytest.mark.parametrize(("version", "newer"), [("5.24.4", False), ("5.25.0", True)])
def test_a_release_above_the_tested_ones_is_said(monkeypatch, version, newer):
    registry.check_version.cache_clear()
    monkeypatch.setattr(registry.transformers, "__version__", version)
    try:
        said = registry.newer_than_tested()
    finally:
        registry.check_version.cache_clear()
    assert (said is not None) == newer
    if said is not None:
        assert "5.25.0" in said and "5.24" in said
