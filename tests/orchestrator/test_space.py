from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.space import IntUniform, LogUniform, Space, Uniform, check_space, parse_range, to_json

LR, WIDTH, LAYERS = "pretrain.optim.lr", "pretrain.head.hidden_dim", "pretrain.head.num_layers"
CROPS, SEED = "pretrain.crops.num_local_crops", "pretrain.seed"


def space(given: dict[str, Any], conditions: dict[str, Any] | None = None) -> Space:
    checked, problems = check_space(given, conditions or {}, {})
    assert problems == []
    return checked


def problems(given: dict[str, Any], conditions: dict[str, Any] | None = None) -> list[str]:
    return check_space(given, conditions or {}, {"cluster.": "is shared"})[1]


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_a_range_is_typed_by_its_key() -> None:
    written = {"low": "1e-4", "high": 1e-2, "log": True}
    checked = space({LR: written, CROPS: {"low": 2, "high": "8", "step": 2}, "pretrain.optim.clip_grad": Uniform(1, 3)})
    assert checked.values == {
        LR: LogUniform(1e-4, 1e-2),
        CROPS: IntUniform(2, 8, step=2),
        "pretrain.optim.clip_grad": Uniform(1.0, 3.0),
    }
    assert [str(values) for values in checked.values.values()] == ["0.0001..0.01:log", "2..8:step=2", "1..3"]


@pytest.mark.parametrize(
    "values",
    [[1, 2], Uniform(0.5, 2), LogUniform(0.1, 1), IntUniform(1, 9), IntUniform(1, 9, True), IntUniform(2, 8, step=3)],
)  # fmt: skip
def test_values_on_disk_are_read_back_as_they_were(values: Any) -> None:
    key = CROPS if isinstance(values, list | IntUniform) else LR
    assert space({key: to_json(values)}).values == {key: values}


@pytest.mark.parametrize(
    ("key", "given", "line"),
    [
        (LR, Uniform(0.0, 1.0), f"{LR} = 0.0: must be a number > 0"),
        (LR, {"low": 1e-3}, f"{LR} = {{'low': 0.001}}: has no high; a range is low and high"),
        (LR, {"low": 1e-3, "high": 1e-2, "lg": True}, f"{LR}.lg: unknown key; did you mean log?"),
        (LR, {"low": 1e-3, "high": 1e-2, "log": "yes"}, f"{LR}.log = yes: must be true or false"),
        (LR, Uniform(1.0, 1.0), f"{LR} = 1..1: the low end must be less than the high one"),
        (LR, {"low": 1, "high": 3, "step": 2}, f"{LR}.step = 2: is for whole numbers only"),
        ("pretrain.optim.min_lr", LogUniform(0, 1e-3), "pretrain.optim.min_lr = 0..0.001:log: must begin above 0"),
        (CROPS, Uniform(1, 4), f"{CROPS} = 1..4: must be a range of whole numbers, IntUniform(low, high)"),
        (CROPS, {"low": 1.5, "high": 4}, f"{CROPS} = 1.5: must be a whole number >= 0"),
        (CROPS, {"low": -1, "high": 4}, f"{CROPS} = -1: must be a whole number >= 0"),
        (CROPS, IntUniform(1, 4, step=2), f"{CROPS}.step = 2: must divide the distance from 1 to 4"),
        (CROPS, IntUniform(1, 5, True, 2), f"{CROPS}.step = 2: does not go with log"),
        (CROPS, {"low": 1, "high": 5, "step": 0}, f"{CROPS}.step = 0: must be a whole number >= 1"),
        ("pretrain.optim.clip_grad", {"low": "none", "high": 2}, "pretrain.optim.clip_grad = {'low': 'none'"),
        ("pretrain.optim.name", Uniform(1, 2), "pretrain.optim.name = 1..2: must be a list of values"),
        ("pretrain.head.batch_norm", {"low": 0, "high": 1}, "pretrain.head.batch_norm = {'low': 0, 'high': 1}: must"),
        ("pretrain.crops.global_scale", Uniform(0.1, 1), "pretrain.crops.global_scale = 0.1..1: must be a list of"),
        ("pretrain.optim.ler", Uniform(1, 2), "pretrain.optim.ler: unknown key; did you mean pretrain.optim.lr"),
        ("cluster.num_workers", IntUniform(1, 2), "cluster.num_workers: is shared"),
    ],
)  # fmt: skip
def test_a_range_that_is_none(key: str, given: Any, line: str) -> None:
    found = problems({key: given})
    assert len(found) == 1
    assert found[0].startswith(line)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1e-4..1e-2", {"low": "1e-4", "high": "1e-2"}),
        ("1e-4..1e-2:log", {"low": "1e-4", "high": "1e-2", "log": True}),
        (" 2..8:step=2", {"low": "2", "high": "8", "step": "2"}),
        ("-.5..0.5", {"low": "-.5", "high": "0.5"}),
        *((text, None) for text in ("1...5", "1..2..3", "1..", "..2", "1,2..3", "a..b")),
        *((text, None) for text in ("1..2:lg", "1..2:log=1", "1..2:step=", "1..2:")),
    ],
)  # fmt: skip
def test_ranges_on_the_command_line(text: str, parts: dict[str, Any] | None) -> None:
    assert parse_range(text) == parts


def test_quarters_of_the_ranges_by_hand() -> None:
    quarters = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert [Uniform(1.0, 3.0).at(share) for share in quarters] == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert [LogUniform(1e-4, 1.0).at(share) for share in quarters] == [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert [IntUniform(2, 8, step=2).at(share) for share in quarters] == [2, 4, 6, 8, 8]
    assert [IntUniform(1, 4).at(share) for share in (0.24, 0.26, 0.49, 0.51, 0.99)] == [1, 2, 2, 3, 4]
    # 1 to 15 by logarithms: from 0.5 to 15.5, a factor of 31; its root is 5.57 and 0.5 x 5.57 is 2.8
    assert IntUniform(1, 15, log=True).at(0.5) == 3


@given(st.floats(1e-6, 1e3), st.floats(1.001, 1e6), st.floats(0, 1))
def test_what_is_drawn_lies_in_its_range_and_is_near_its_share(low: float, factor: float, share: float) -> None:
    high = low * factor
    linear, log = Uniform(low, high).at(share), LogUniform(low, high).at(share)
    assert low <= linear <= high
    assert low <= log <= high
    assert linear == pytest.approx(low + share * (high - low), abs=(high - low) / 1000)
    assert math.log(log) == pytest.approx(math.log(low) + share * math.log(factor), abs=1e-3)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 5), st.booleans(), st.floats(0, 1))
def test_whole_numbers_are_drawn_from_all_of_their_range(
    low: int, steps: int, step: int, log: bool, share: float
) -> None:
    values = IntUniform(low, low + steps * step, log=log, step=1 if log else step)
    drawn = values.at(share)
    assert isinstance(drawn, int)
    assert values.low <= drawn <= values.high
    assert (drawn - low) % values.step == 0
    assert (values.at(0.0), values.at(1.0)) == (values.low, values.high)


# --- conditions -------------------------------------------------------------------------------------------------------


def test_a_key_varies_only_where_its_condition_holds() -> None:
    checked = space({WIDTH: [64, 128], LAYERS: [1, 2, 3]}, {WIDTH: {LAYERS: [2, "3"]}})
    assert checked.order == (LAYERS, WIDTH)
    assert list(checked.grid({})) == [
        {LAYERS: 1},
        {WIDTH: 64, LAYERS: 2},
        {WIDTH: 128, LAYERS: 2},
        {WIDTH: 64, LAYERS: 3},
        {WIDTH: 128, LAYERS: 3},
    ]


def test_conditions_chain_and_may_ask_what_does_not_vary() -> None:
    norm = "pretrain.head.bottleneck_norm"
    checked = space(
        {LAYERS: [1, 2], WIDTH: [64, 128], norm: [True, False]},
        {WIDTH: {LAYERS: [2]}, norm: {WIDTH: [128], "pretrain.head.activation": ["gelu"]}},
    )
    with_gelu = list(checked.grid({"pretrain.head.activation": "gelu"}))
    assert with_gelu == [
        {LAYERS: 1},
        {LAYERS: 2, WIDTH: 64},
        {LAYERS: 2, WIDTH: 128, norm: True},
        {LAYERS: 2, WIDTH: 128, norm: False},
    ]
    assert list(checked.grid({"pretrain.head.activation": "relu"})) == [*with_gelu[:2], {LAYERS: 2, WIDTH: 128}]


def test_wrong_conditions() -> None:
    given = {WIDTH: [64, 128], LAYERS: [1, 2]}
    assert problems(given, {"pretrain.head.hiden_dim": {LAYERS: [1]}})[0].startswith(
        "sweep.conditions.pretrain.head.hiden_dim: does not vary; did you mean pretrain.head.hidden_dim"
    )
    assert problems(given, {WIDTH: {LAYERS: [3]}}) == [
        f"sweep.conditions.{WIDTH}: {LAYERS} = 3: is none of its values, 1, 2"
    ]
    assert problems(given, {WIDTH: {LAYERS: ["x"]}}) == [
        f"sweep.conditions.{WIDTH}: {LAYERS} = x: must be a whole number >= 1"
    ]
    assert problems(given, {WIDTH: {"pretrain.head.num_layer": [1]}})[0].startswith(
        f"sweep.conditions.{WIDTH}: pretrain.head.num_layer: unknown key; did you mean {LAYERS}"
    )
    assert problems(given, {WIDTH: {}}) == [
        f"sweep.conditions.{WIDTH} = {{}}: must hold lists of values by the key that decides"
    ]
    assert problems(given, {WIDTH: {LAYERS: [1]}, LAYERS: {WIDTH: [64]}}) == [
        f"sweep.conditions: {WIDTH}, {LAYERS} decide about one another in a circle"
    ]
    assert problems({LR: Uniform(0.1, 1.0), WIDTH: [1, 2]}, {WIDTH: {LR: [0.5]}}) == [
        f"sweep.conditions.{WIDTH}: {LR} = 0.5: is none of its values, 0.1..1"
    ]
