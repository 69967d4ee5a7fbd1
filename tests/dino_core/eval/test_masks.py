"""J, F and their statistics: values of the authors' code (davis2017-evaluation), arithmetic by hand, edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dino_core.eval.masks import Statistics, boundary_f, jaccard, object_labels, resize_mask, statistics, video_scores
from tests.dino_core.eval.videos import made_up_video

EMPTY, FULL = np.zeros((6, 8), dtype=bool), np.ones((6, 8), dtype=bool)


def block(top: int, left: int, height: int, width: int, size: tuple[int, int] = (6, 8)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_jaccard_by_hand() -> None:
    a, b = block(0, 0, 2, 4), block(1, 2, 2, 4)  # 8 and 8 pixels, 2 in both
    assert jaccard(a, b) == 2 / 14
    assert jaccard(np.stack([a, b, EMPTY]), b[None]).tolist() == [2 / 14, 1.0, 0.0]
    assert jaccard(EMPTY, EMPTY) == 1.0  # both without the object: nothing is wrong
    assert jaccard(a, b, valid=block(0, 0, 6, 4)) == 2 / 10
    assert jaccard(a, b, valid=EMPTY) == 1.0


def test_boundaries_by_hand() -> None:
    """The boundary of a block of 10 x 10 has 40 pixels, and one pixel of tolerance is a plus of five."""
    a = block(10, 10, 10, 10, (40, 40))
    tolerance = 0.999 / math.hypot(40, 40)
    found = [boundary_f(np.roll(a, shift, axis=1), a, tolerance=tolerance) for shift in (0, 1, 2, 15)]
    # Moved by 2: of top and bottom 10 pixels each are near, and of one side the two next to them.
    assert found == [1.0, 1.0, pytest.approx(22 / 40), 0.0]


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [(EMPTY, EMPTY, 1.0), (FULL, FULL, 1.0), (FULL, EMPTY, 1.0), (EMPTY, block(2, 2, 2, 2), 0.0)],
    ids=["both empty", "both full", "no boundary in either", "missed"],
)
def test_masks_without_boundary(predicted: np.ndarray, truth: np.ndarray, expected: float) -> None:
    assert boundary_f(predicted, truth) == boundary_f(truth, predicted) == expected


def test_void_pixels_do_not_count() -> None:
    truth, predicted = block(1, 1, 3, 3), block(1, 1, 3, 6)
    valid = ~block(0, 4, 6, 4)
    assert jaccard(predicted, truth, valid) == boundary_f(predicted, truth, valid) == 1.0
    assert boundary_f(predicted, truth) < 1.0


def test_statistics_by_hand() -> None:
    found = statistics([0.9, 0.7, 0.5, 0.3, 0.1])
    assert found.mean == pytest.approx(0.5)
    assert found.recall == 0.4  # 0.5 itself is not above 0.5
    assert found.decay == pytest.approx(0.8 - 0.2)  # quarters of two frames, which share one
    assert statistics([0.25]) == Statistics(0.25, 0.0, 0.0)
    with pytest.raises(ValueError, match="one at least"):
        statistics([])


def test_values_of_the_authors_code() -> None:
    """`db_eval_iou`, `db_eval_boundary` and `db_statistics`, of masks that are late and wander."""
    _, masks = made_up_video(12, 96, 160, (1, 2))
    predicted = [np.roll(masks[max(0, at - 2)], at % 5 - 1, axis=0) for at in range(12)]
    scores = video_scores(predicted, masks)
    expected = {
        1: [0.693892939, 1.0, 0.0629003308, 0.4478571429, 0.8, 0.169047619],
        2: [0.6352702208, 1.0, 0.0607904909, 0.2607142857, 0.4, 0.0142857143],
    }
    assert [score.label for score in scores] == [1, 2]
    for score in scores:
        found = [getattr(part, name) for part in (score.region, score.boundary) for name in ("mean", "recall", "decay")]
        np.testing.assert_allclose(found, expected[score.label], rtol=0, atol=1e-9)


def test_an_object_that_vanishes_and_one_that_appears() -> None:
    """What leaves is right to be missing; what the first mask does not hold is no object."""
    truth = [block(0, 0, 3, 3).astype(np.uint8) * 7 for _ in range(4)]
    truth[1] = truth[2] = EMPTY.astype(np.uint8)
    late = [mask.copy() for mask in truth]
    late[1][4, 4] = 9
    (score,) = video_scores(truth, late)
    assert (score.label, score.region.mean, score.boundary.mean) == (7, 1.0, 1.0)
    (score,) = video_scores([truth[0]] * 4, truth)  # still seen where it is no more
    assert (score.region.mean, score.region.recall) == (0.0, 0.0)


def test_first_and_last_frame_do_not_count() -> None:
    mask, wrong = block(1, 1, 3, 3).astype(np.uint8), np.zeros((6, 8), dtype=np.uint8)
    (score,) = video_scores([wrong, mask, wrong], [mask] * 3)
    assert score.region == score.boundary == Statistics(1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        ([EMPTY] * 2, [FULL] * 3, "2 predicted masks: must be 3"),
        ([EMPTY] * 2, [FULL] * 2, "2 frames: must be 3 at least"),
        ([EMPTY] * 3, [EMPTY] * 3, "must hold an object"),
        ([EMPTY[:, 1:]] * 3, [FULL] * 3, r"predicted \[6, 7\]: must be of the size \[6, 8\]"),
    ],
)
def test_refused(predicted: list[np.ndarray], truth: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        video_scores([mask.astype(np.uint8) for mask in predicted], [mask.astype(np.uint8) for mask in truth])


def test_background_and_void_are_no_objects() -> None:
    assert object_labels(np.array([[0, 255, 3], [1, 3, 0]], dtype=np.uint8)) == [1, 3]
    assert object_labels(np.full((2, 2), 255, dtype=np.uint8)) == []


def test_masks_are_resized_by_the_nearest_pixel() -> None:
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (resize_mask(resize_mask(mask, (9, 20)), (3, 4)) == mask).all()
