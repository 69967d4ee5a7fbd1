from __future__ import annotations

import pytest
import torch

from dino_core.eval import choose_per_class

LABELS = torch.tensor([3] * 10 + [0] * 4 + [7] + [3] * 5)


def counts(chosen):
    return {label: int((LABELS[chosen] == label).sum()) for label in (0, 3, 7)}


def test_shares_and_numbers_of_each_class():
    assert counts(choose_per_class(LABELS, share=1.0)) == {0: 4, 3: 15, 7: 1}
    assert counts(choose_per_class(LABELS, share=0.1)) == {0: 1, 3: 2, 7: 1}  # 1.5 is 2, and none is 1
    assert counts(choose_per_class(LABELS, num=1)) == {0: 1, 3: 1, 7: 1}
    ten = choose_per_class(LABELS[:14], num=4)
    assert ten.tolist() == sorted(set(ten.tolist()))


def test_choices_are_seeded_nested_and_of_each_class_alone():
    first = choose_per_class(LABELS, share=0.3, seed=1)
    assert torch.equal(first, choose_per_class(LABELS, share=0.3, seed=1))
    assert any(not torch.equal(first, choose_per_class(LABELS, share=0.3, seed=seed)) for seed in range(2, 6))
    assert set(first.tolist()) < set(choose_per_class(LABELS, share=0.6, seed=1).tolist())
    alone = choose_per_class(torch.where(LABELS == 3, 3, 99), share=0.3, seed=1)
    assert [place for place in first.tolist() if LABELS[place] == 3] == [p for p in alone.tolist() if LABELS[p] == 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 2}, "num = 2: class 7 has 1 images"),
        ({"num": 0}, "num = 0: must be >= 1"),
        ({"share": 0.0}, "share = 0.0: must be > 0 and <= 1"),
        ({"share": 1.1}, "share = 1.1"),
        ({}, "one of them must be given"),
        ({"num": 1, "share": 0.5}, "one of them must be given"),
    ],
)
def test_what_cannot_be_chosen_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_per_class(LABELS, **arguments)


def test_no_labels_are_an_error():
    with pytest.raises(ValueError, match=r"labels \[0\]"):
        choose_per_class(LABELS[:0], num=1)
