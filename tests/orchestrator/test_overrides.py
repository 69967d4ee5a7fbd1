from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dino_core.config import ConfigError, StageConfig, StageCropsConfig
from orchestrator.config import RunConfig
from orchestrator.config_file import MAX_BYTES, load_file
from orchestrator.dry_run import show_value
from orchestrator.overrides import (
    Key,
    complete_keys,
    config_keys,
    did_you_mean,
    flatten,
    merge_changes,
    override,
    parse_assignments,
)
from sweeps.recipes import RECIPES

BASE = RunConfig()


def problems(changes: dict[str, Any], config: RunConfig = BASE) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        override(config, changes)
    return str(caught.value).splitlines()


def only_problem(changes: dict[str, Any], config: RunConfig = BASE) -> str:
    (line,) = problems(changes, config)
    return line


def test_the_names_that_other_programs_use_are_keys() -> None:
    fixed = """
        data.source pretrain.seed pretrain.steps pretrain.epochs pretrain.batch_size pretrain.model.backbone
        pretrain.head.num_prototypes pretrain.teacher.temp pretrain.teacher.warmup_temp pretrain.teacher.momentum
        pretrain.teacher.final_momentum pretrain.student.temp pretrain.crops.num_local_crops pretrain.crops.device
        pretrain.optim.lr pretrain.optim.weight_decay cluster.num_workers cluster.use_gpu tracking.uri
        tracking.experiment
    """
    assert set(fixed.split()) <= set(flatten(BASE))
    assert list(flatten(BASE)) == list(config_keys())


# --- override is the inverse of flatten ---------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_override_is_the_inverse_of_flatten(recipe: str) -> None:
    config = RECIPES[recipe]()
    assert override(BASE, flatten(config)) == config
    assert override(BASE, json.loads(json.dumps(flatten(config)))) == config
    assert override(config, {}) is config


_TEXT = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=8).filter(
    lambda text: text.strip().casefold() not in ("none", "null")
)


STAGE_VALUES = {
    "crops.global_size": st.integers(1, 512),
    "crops.local_scale": st.just([0.1, 0.25]),
    "teacher.temp": st.floats(0.01, 1),
    "optim.lr": st.floats(1e-9, 1),
}


def values_of(key: Key) -> st.SearchStrategy[Any]:
    limits = dict(key.item.metadata)
    low = limits.get("ge", limits.get("gt", -1e3))
    high = limits.get("le", max(1e3, low + 1))

    def of(kind: Any) -> st.SearchStrategy[Any]:
        if kind is bool:
            return st.booleans()
        if kind is int:
            return st.integers(int(low) + ("gt" in limits), min(int(high), 10**6))
        if kind is float:
            return st.floats(low, high, exclude_min="gt" in limits, allow_nan=False, width=64)
        if kind is str:
            return _TEXT
        if kind is type(None):
            return st.none()
        if get_origin(kind) is Literal:
            return st.sampled_from(get_args(kind))
        if get_args(kind)[:1] == (StageConfig,):
            return st.lists(st.fixed_dictionaries({"steps": st.integers(1, 9)}, optional=STAGE_VALUES), max_size=2)
        if get_origin(kind) is tuple:
            return st.tuples(*map(of, get_args(kind)))
        return st.one_of(*map(of, get_args(kind)))

    return of(key.kind)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    keys = draw(st.lists(st.sampled_from(list(config_keys())), unique=True, max_size=12))
    changes = {key: draw(values_of(config_keys()[key]), label=key) for key in keys}
    ranges = [key for key in keys if key.endswith(("_scale", "blur_sigma", "mask.ratio"))]
    changes |= {key: tuple(sorted(changes[key])) for key in ranges if isinstance(changes[key], tuple)}
    try:
        return override(draw(st.sampled_from([BASE, *(make() for make in RECIPES.values())])), changes)
    except ConfigError:
        assume(False)
        raise


def as_text(value: Any) -> str:
    return show_value(value) if isinstance(value, list) else _as_text(value)


def _as_text(value: Any) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)


@settings(max_examples=100, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)
@given(config=configs(), base=st.sampled_from([BASE, *(make() for make in RECIPES.values())]))
def test_override_is_the_inverse_of_flatten_for_any_config(config: RunConfig, base: RunConfig) -> None:
    flat = flatten(config)
    assert override(base, flat) == config
    assert override(base, json.loads(json.dumps(flat))) == config
    assert override(base, {key: as_text(value) for key, value in flat.items()}) == config


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("pretrain.optim.lr", "1e-4", 1e-4),
        ("pretrain.optim.lr", 1, 1.0),
        ("pretrain.batch_size", "64", 64),
        ("pretrain.batch_size", 64.0, 64),
        ("pretrain.optim.clip_grad", "none", None),
        ("pretrain.optim.clip_grad", "NULL", None),
        ("tracking.uri", "none", None),
        ("tracking.uri", "sqlite:///x=y.db", "sqlite:///x=y.db"),
        ("pretrain.teacher.centering", "none", "none"),
        ("data.source", "none", "none"),
        ("cluster.use_gpu", "true", True),
        ("cluster.use_gpu", "0", False),
        ("pretrain.crops.global_scale", "[0.2,1.0]", (0.2, 1.0)),
        ("pretrain.crops.global_scale", "(0.2, 1)", (0.2, 1.0)),
        ("pretrain.crops.global_scale", "0.2,1.0", (0.2, 1.0)),
        ("pretrain.crops.global_scale", [0.2, 1], (0.2, 1.0)),
    ],
)
def test_values_take_the_type_of_their_field(key: str, given: Any, expected: Any) -> None:
    value = flatten(override(BASE, {key: given}))[key]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"pretrain.optim.lr": "yes"}, "pretrain.optim.lr = yes: must be a number > 0"),
        ({"pretrain.optim.lr": True}, "pretrain.optim.lr = True: must be a number > 0"),
        ({"pretrain.optim.lr": ""}, "pretrain.optim.lr = '': must be a number > 0"),
        ({"pretrain.optim.lr": None}, "pretrain.optim.lr = None: must be a number > 0"),
        ({"pretrain.teacher.temp": "0"}, "pretrain.teacher.temp = 0: must be a number > 0"),
        ({"pretrain.teacher.temp": "nan"}, "pretrain.teacher.temp = nan: must be a number > 0"),
        ({"pretrain.teacher.temp": "inf"}, "pretrain.teacher.temp = inf: must be a number > 0"),
        ({"pretrain.teacher.momentum": 1.5}, "pretrain.teacher.momentum = 1.5: must be a number >= 0 and <= 1"),
        ({"pretrain.batch_size": 1.5}, "pretrain.batch_size = 1.5: must be a whole number >= 1"),
        ({"pretrain.batch_size": "9" * 30}, f"pretrain.batch_size = {'9' * 30}: must be a whole number >= 1"),
        ({"pretrain.optim.clip_grad": "x"}, "pretrain.optim.clip_grad = x: must be a number > 0, or none"),
        ({"cluster.use_gpu": "maybe"}, "cluster.use_gpu = maybe: must be true or false"),
        ({"data.source": 5}, "data.source = 5: must be text"),
        (
            {"pretrain.optim.name": "adam"},
            "pretrain.optim.name = adam: must be one of adamw, sgd, lars; did you mean adamw?",
        ),
        (
            {"pretrain.crops.global_scale": "1"},
            "pretrain.crops.global_scale = 1: must be 2 numbers such as [0.1, 0.2], each > 0 and <= 1",
        ),
        (
            {"pretrain.crops.mean": "nan,0,0"},
            "pretrain.crops.mean = nan,0,0: must be 3 numbers such as [0.1, 0.2, 0.3]",
        ),
        (
            {"pretrain.crops.global_scale": [1, 0.5]},
            "pretrain.crops.global_scale = [1.0, 0.5]: the first value must not exceed the second",
        ),
        ({"pretrain.teacher.tmp": 1}, "pretrain.teacher.tmp: unknown key; did you mean pretrain.teacher.temp?"),
        (
            {"pretrain.teacher_momentum": 1},
            "pretrain.teacher_momentum: unknown key; did you mean pretrain.teacher.momentum?",
        ),
        ({"num_wrkers": 1}, "num_wrkers: unknown key; did you mean cluster.num_workers?"),
        ({"xyzzy": 1}, "xyzzy: unknown key; there is pretrain.*, data.*, cluster.*, tracking.*"),
        (
            {"pretrain.student": {"temp": 1}},
            "pretrain.student: is a group of settings, set one of pretrain.student.temp",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(changes: dict[str, Any], line: str) -> None:
    assert only_problem(changes) == line


@pytest.mark.parametrize(
    "given",
    [
        "[{steps: 5, crops: {global_size: 32, local_scale: [0.1, 0.2]}}]",
        '[{"steps": 5, "crops.global_size": 32, "crops.local_scale": [0.1, 0.2]}]',
        [{"steps": "5", "crops.global_size": 32.0, "crops": {"local_scale": "0.1,0.2"}}],
        (StageConfig(steps=5, crops=StageCropsConfig(global_size=32, local_scale=(0.1, 0.2))),),
    ],
)
def test_stages_in_all_their_spellings(given: Any, tmp_path: Path) -> None:
    config = override(BASE, {"pretrain.stages": given})
    assert config.pretrain.stages == (
        StageConfig(steps=5, crops=StageCropsConfig(global_size=32, local_scale=(0.1, 0.2))),
    )
    plain = {"steps": 5, "crops.global_size": 32, "crops.local_scale": [0.1, 0.2]}
    assert flatten(config)["pretrain.stages"] == [plain]
    file = tmp_path / "stages.yaml"
    file.write_text("pretrain:\n  stages:\n  - steps: 5\n    crops: {global_size: 32, local_scale: [0.1, 0.2]}\n")
    assert override(BASE, load_file(file)) == config
    assert override(config, {"pretrain.stages": "none"}) == override(config, {"pretrain.stages": "[]"}) == BASE


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("5", "pretrain.stages = 5: must be a list with the settings of each stage, such as [{steps: 10000, "),
        ("[{steps: 5", "pretrain.stages = [{steps: 5: must be a list"),
        ("[{crops.global_size: 32}]", "pretrain.stages[0].steps: is missing, must be a whole number >= 1"),
        ("[{steps: 5}, {steps: 0}]", "pretrain.stages[1].steps = 0: must be a whole number >= 1"),
        ("[{steps: 5, optim.rl: 1}]", "pretrain.stages[0].optim.rl: unknown key; did you mean pretrain.stages[0].opti"),
        ("[{steps: 5, batch_size: 8}]", "pretrain.stages[0].batch_size: unknown key"),
        ([{"steps": 5, "crops.local_size": 8, "crops": {"local_size": 9}}], "pretrain.stages[0].crops.local_size: giv"),
        ("[{steps: 5, accumulate_steps: 3}]", "pretrain.stages[0]: pretrain.accumulate_steps = 3: must divide"),
    ],
)
def test_a_wrong_stage_is_named(given: Any, line: str) -> None:
    assert only_problem({"pretrain.stages": given}).startswith(line)


def test_a_long_or_unprintable_value_is_shown_in_short() -> None:
    line = only_problem({"pretrain.optim.lr": "\x1b[31m" + "x" * 10_000})
    assert line.isprintable()
    assert len(line) < 200


def test_all_problems_are_reported_at_once() -> None:
    lines = problems(
        {
            "pretrain.teacher.temp": 0,
            "pretrain.crops.num_local_crops": -1,
            "pretrain.crops.global_scale": "1,0.5",
            "pretrain.model.embed_dim": 10,
            "pretrain.model.num_heads": 3,
            "pretrain.sed": 1,
            "cluster.num_workers": 3,
        }
    )
    assert [line.split(" = ")[0].split(":")[0] for line in lines] == [
        "pretrain.teacher.temp",
        "pretrain.crops.num_local_crops",
        "pretrain.sed",
        "pretrain.model.embed_dim",
        "pretrain.crops.global_scale",
        "pretrain.batch_size",  # 1024 images for 3 workers
    ]


def test_nothing_is_said_about_values_that_nobody_asked_for() -> None:
    # 63 images suit 3 workers; only the base's 1024 would not.
    lines = problems({"pretrain.batch_size": 63, "cluster.num_workers": 3, "pretrain.steps": 5, "pretrain.epochs": 5})
    assert lines == ["pretrain.steps = 5, pretrain.epochs = 5.0: set exactly one of the two"]
    assert problems({"pretrain.batch_size": 0, "cluster.num_workers": 3}) == [
        "pretrain.batch_size = 0: must be a whole number >= 1"
    ]


# --- the two lengths of a run -----------------------------------------------------------------------------------------


def test_steps_and_epochs_replace_each_other() -> None:
    by_steps = override(BASE, {"pretrain.steps": "10"})
    assert (by_steps.pretrain.steps, by_steps.pretrain.epochs) == (10, None)
    by_epochs = override(by_steps, {"pretrain.epochs": "2.5"})
    assert (by_epochs.pretrain.steps, by_epochs.pretrain.epochs) == (None, 2.5)
    assert only_problem({"pretrain.epochs": "none"}).startswith("pretrain.steps = None, pretrain.epochs = None")


def test_a_later_layer_of_changes_wins_and_its_length_clears_an_earlier_one() -> None:
    merged = merge_changes({"pretrain.epochs": 3, "pretrain.seed": 1}, {"pretrain.steps": "7", "pretrain.seed": 2})
    assert override(BASE, merged) == override(BASE, {"pretrain.steps": 7, "pretrain.seed": 2})
    kept = merge_changes({"pretrain.epochs": 3}, {"pretrain.steps": "none"})
    assert override(BASE, kept).pretrain.epochs == 3


# --- assignments, completion, suggestions -----------------------------------------------------------------------------


def test_assignments() -> None:
    assert parse_assignments(["a.b=1", "c==d", "e="]) == {"a.b": "1", "c": "=d", "e": ""}
    with pytest.raises(ConfigError) as caught:
        parse_assignments(["a", "=1", "b=1", "b=2"])
    assert str(caught.value).splitlines() == [
        "a: settings are given as key=value",
        "=1: settings are given as key=value",
        "b: given twice, as 1 and 2",
    ]


def test_completion_gives_keys_and_what_they_accept() -> None:
    assert complete_keys("pretrain.student") == [("pretrain.student.temp", "a number > 0")]
    everything = complete_keys("")
    assert [key for key, _ in everything] == list(flatten(BASE))
    assert all(allowed for _, allowed in everything)


def test_nearest_names() -> None:
    assert did_you_mean("dino_vit", ["quickstart", "dino_vits16"]) == "; did you mean dino_vits16?"
    assert did_you_mean("dino", ["quickstart", "dino_vits16"]) == "; did you mean dino_vits16?"
    assert did_you_mean("zzz", ["quickstart"]) == ""


# --- files ------------------------------------------------------------------------------------------------------------


def write(tmp_path: Path, content: str | bytes, name: str = "my.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(tmp_path: Path, content: str | bytes, name: str = "my.yaml") -> str:
    path = write(tmp_path, content, name)
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    (line,) = str(caught.value).splitlines()
    return line.removeprefix(str(path))


def test_yaml_and_json_hold_nested_or_dotted_keys(tmp_path: Path) -> None:
    yaml_file = write(
        tmp_path, "pretrain.seed: 010\npretrain:\n  optim: {lr: 1e-4}\n  crops:\n    global_scale: [.3, 1]\n"
    )
    expected = {"pretrain.seed": 10, "pretrain.optim.lr": 1e-4, "pretrain.crops.global_scale": [0.3, 1]}
    assert load_file(yaml_file) == expected
    assert isinstance(load_file(yaml_file)["pretrain.optim.lr"], float)
    json_file = write(
        tmp_path,
        '{"pretrain.seed": 10, "pretrain": {"optim": {"lr": 1e-4}, "crops": {"global_scale": [0.3, 1]}}}',
        "my.json",
    )
    assert load_file(json_file) == expected
    assert override(BASE, expected).pretrain.optim.lr == 1e-4
    assert load_file(write(tmp_path, "# nothing\n")) == {}


def test_a_whole_config_survives_a_file(tmp_path: Path) -> None:
    import yaml

    config = RECIPES["quickstart"]()
    flat = json.loads(json.dumps(flatten(config)))
    assert override(BASE, load_file(write(tmp_path, yaml.safe_dump(flat)))) == config


def test_yaml_words_mean_what_they_say(tmp_path: Path) -> None:
    path = write(tmp_path, "a: no\nb: true\nc: none\nd: ~\ne: 1:30\nf: .inf\ng: 2020-01-01\nbase: &x {h: 1}\ni: *x\n")
    assert load_file(path) == {
        "a": "no", "b": True, "c": "none", "d": None, "e": "1:30", "f": float("inf"), "g": "2020-01-01",
        "base.h": 1, "i.h": 1,
    }  # fmt: skip
    assert load_file(write(tmp_path, "x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  a: 3\n")) == {
        "x.a": 1, "x.b": 2, "y.a": 3, "y.b": 2,
    }  # fmt: skip


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", ", line 4, column 3: c: given twice"),
        ("a: {b: 1}\na.b: 2\n", ": a.b: given twice"),
        ("a: 1\n b: 2\n", ", line 2, column 3: mapping values are not allowed"),
        ("- 1\n", ": must hold settings such as `pretrain.seed: 1`, not list"),
        ("just text", ": must hold settings such as `pretrain.seed: 1`, not str"),
        ("1: 2\n", ", line 1, column 1: keys must be text"),
        ("a: &a [*a]\n", ", line 1, column 4: *a refers to itself"),
        (LAUGHS, "unfolds into more than 10000 values"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
        ("a: !!int x\n", ": invalid literal for int()"),
        ("a: 1\n---\nb: 2\n", ", line 2, column 1: but found another document"),
        ("[" * 100_000, ": is nested too deeply"),
        (b"a: \xff\xfe\n", ": is not UTF-8 text (byte 3)"),
        (b"a: \x00\n", "special characters are not allowed"),
        ("a: " + "x" * MAX_BYTES, f": is larger than {MAX_BYTES} bytes"),
    ],
)
def test_a_bad_yaml_file_is_refused(tmp_path: Path, content: str | bytes, line: str) -> None:
    assert line in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"a": 1, "a": 2}', ": a: given twice"),
        ('{"a": 1,\n "b" 2}', ", line 2, column 6: Expecting ':' delimiter"),
        ("[" * 100_000, ": is nested too deeply"),
        ("3", ": must hold settings such as `pretrain.seed: 1`, not int"),
    ],
)
def test_a_bad_json_file_is_refused(tmp_path: Path, content: str, line: str) -> None:
    assert line in refusal(tmp_path, content, "my.json")


def test_a_file_that_is_not_there_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: cannot be read: No such file"):
        load_file(tmp_path / "nope.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_file(tmp_path / "folder.yaml")
    assert "must end in .yaml, .yml, .json" in refusal(tmp_path, "a = 1", "my.toml")
