from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_core.config import ConfigError
from dino_core.eval.retrieval import PROTOCOLS, RevisitedQuery, revisited_scores
from orchestrator.config import RunConfig
from orchestrator.data.sources import open_source
from orchestrator.evaluate.revisited_layout import read_revisited_layout
from orchestrator.evaluate.settings import FeaturesConfig
from orchestrator.evaluate.suite import SuiteResult
from orchestrator.evaluate.targets import find_target
from orchestrator.evaluation import fixed_choice
from tests.orchestrator.evaluate.suite_jobs import run_suite

VIT = "random:test_vit"  # patches of 16 pixels
DIGITS = {"data.source": "digits", "features.num_train": 80, "features.num_test": 50}
PIXELS = {"features.image_size": 8, "features.crop_fraction": 1}


def run(target: str, folder: Path, changes: dict[str, Any]) -> SuiteResult:
    return run_suite("retrieval", target, folder, changes)


# --- labelled images --------------------------------------------------------------------------------------------------


def digits(part: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    source = open_source(RunConfig().data)
    split = source.train if part == "train" else source.test
    assert split is not None and split.labels is not None
    ids = fixed_choice(len(split), limit)
    crops = RunConfig().pretrain.crops
    pixels = np.stack([np.asarray(split.read(i)) for i in ids.tolist()]) / 255
    rows = ((pixels - np.array(crops.mean)) / np.array(crops.std)).reshape(len(ids), -1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), split.labels[ids]


def by_hand(similarity: np.ndarray, relevant: np.ndarray, ignored: np.ndarray) -> tuple[float, float]:
    """mAP by the trapezoid and plain precision at 5, per cent."""
    areas, at_5 = [], []
    for row, wanted, left_out in zip(similarity, relevant, ignored, strict=True):
        order = [i for i in np.argsort(-row) if not left_out[i]]
        hits = wanted[order].astype(float)
        if hits.any():
            precision = hits.cumsum() / np.arange(1, len(hits) + 1)
            before = np.concatenate([[1], precision[:-1]])
            areas.append((hits * (precision + before) / 2).sum() / hits.sum())
            at_5.append(hits[:5].sum() / 5)
    return 100 * float(np.mean(areas)), 100 * float(np.mean(at_5))


@pytest.mark.parametrize("gallery", ["others", "train"])
def test_digits_give_what_they_give_by_hand(tmp_path: Path, gallery: str) -> None:
    options = {"retrieval.gallery": gallery, "retrieval.precision": "plain", "retrieval.k": "5"}
    found = run("pixels", tmp_path, DIGITS | PIXELS | options)
    queries, labels = digits("test", 50)
    rows, their_labels = (queries, labels) if gallery == "others" else digits("train", 80)
    itself = np.eye(50, dtype=bool) if gallery == "others" else np.zeros((50, 80), dtype=bool)
    relevant = (labels[:, None] == their_labels) & ~itself
    expected = by_hand(queries @ rows.T, relevant, itself)
    assert found.metrics == pytest.approx({"map": expected[0], "p5": expected[1]}, abs=1e-3)
    table = found.tables["per_class"]
    assert sum(row["queries"] for row in table) == relevant.any(axis=1).sum()
    mean = sum(row["map"] * row["queries"] for row in table) / sum(row["queries"] for row in table)
    assert mean == pytest.approx(found.metrics["map"], abs=1e-3)


def test_training_images_and_several_scales(tmp_path: Path) -> None:
    one, several = (
        run(
            VIT,
            tmp_path,
            DIGITS | {"retrieval.queries": "train", "features.image_size": 32, "retrieval.multi_scale": str(multi)},
        )
        for multi in (False, True)
    )
    assert set(one.metrics) == {"map", "p1", "p5", "p10"}
    assert one.metrics["map"] != several.metrics["map"]
    assert 15 < several.metrics["map"] < 100  # chance is about 10


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("pixels", {"retrieval.multi_scale": "true"}, "pixels are compared at one size only"),
        ("pixels", {"retrieval.resize": "whole"}, "retrieval.resize=crop"),
        ("pixels", {"features.num_test": 1}, "no query has an image of its label among the other queries"),
        ("pixels", {"retrieval.crop_queries": "true"}, "crop_queries = True: must be false without retrieval.source"),
        (
            "pixels",
            {"retrieval.queries": "train", "retrieval.gallery": "train"},
            "retrieval.gallery = train: must be others",
        ),
        (
            VIT,
            {"retrieval.image_size": 24, "retrieval.multi_scale": "true"},
            "retrieval.image_size = 24: test_vit",
        ),
        ("pixels", {"retrieval.gallery": "trains"}, "retrieval.gallery = trains"),
        ("pixels", {"retrieval.k": "0"}, "retrieval.k"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, target: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(target, tmp_path, DIGITS | changes)


def test_images_without_labels_or_test_split(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(tmp_path / f"photos/{index}.png")
    source = {"data.source": str(tmp_path / "photos")}
    with pytest.raises(ConfigError, match=r"has no split test .*retrieval.queries=train"):
        run("pixels", tmp_path, source)
    with pytest.raises(ConfigError, match="has no labels of its training images"):
        run("pixels", tmp_path, source | {"retrieval.queries": "train"})


# --- the layout of revisited Oxford and Paris -------------------------------------------------------------------------

GALLERY = [f"place_{index:06d}" for index in range(9)]
QUERIES = ["place_000100", "place_000101", "place_000102"]
TRUTH: list[dict[str, Any]] = [
    {"bbx": [10.2, 5.0, 50.0, 40.0], "easy": [0, 1], "hard": [2], "junk": [3]},
    {"bbx": [0.0, 0.0, 30.0, 90.0], "easy": [], "hard": [4, 5], "junk": []},
    {"bbx": [5.0, 5.0, 60.0, 60.0], "easy": [6], "hard": [], "junk": [7, 8]},
]
CONTENT: dict[str, Any] = {"imlist": GALLERY, "qimlist": QUERIES, "gnd": TRUTH}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photos of several shapes, all larger than 48 pixels."""
    home = tmp_path_factory.mktemp("images") / "jpg"
    home.mkdir()
    for index, name in enumerate([*GALLERY, *QUERIES]):
        colours = np.random.default_rng(index).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        size = [(64, 96), (96, 64), (80, 80)][index % 3]
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(home / f"{name}.jpg", quality=95)
    return home


def layout(images: Path, home: Path, content: Any = CONTENT, protocol: int | None = None) -> Path:
    home.mkdir()
    (home / "jpg").symlink_to(images)
    if protocol is None:
        (home / "gnd_places.json").write_text(json.dumps(content))
    else:
        (home / "gnd_places.pkl").write_bytes(pickle.dumps(content, protocol))
    return home


def expected(tmp_path: Path, images: Path, boxes: bool, protocol: str) -> dict[str, float]:
    """By timm's model on the photos made smaller by hand, cut to whole patches."""
    target = find_target(VIT, FeaturesConfig(image_size=48), str(tmp_path))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (target.image.mean, target.image.std))
    rows = {}
    for names in (GALLERY, QUERIES):
        for index, name in enumerate(names):
            image = Image.open(images / f"{name}.jpg").convert("RGB")
            if boxes and names is QUERIES:
                image = image.crop(tuple(round(side) for side in TRUTH[index]["bbx"]))
            image.thumbnail((48, 48), Image.Resampling.LANCZOS)
            pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
            height, width = (side // 16 * 16 for side in pixels.shape[1:])
            with torch.no_grad():
                rows[name] = target.backbone(pixels[None, :, :height, :width])[0]
    scores = revisited_scores(
        torch.stack([rows[name] for name in QUERIES]),
        torch.stack([rows[name] for name in GALLERY]),
        [RevisitedQuery(easy=query["easy"], hard=query["hard"], junk=query["junk"]) for query in TRUTH],
        protocol,  # type: ignore[arg-type]
    )
    return {f"map_{protocol}": scores.mean_average_precision, f"p1_{protocol}": scores.mean_precision[1]}


@pytest.mark.parametrize("boxes", [False, True])
def test_protocols_on_whole_images(images: Path, tmp_path: Path, boxes: bool) -> None:
    home = layout(images, tmp_path / "places")
    changes = {"retrieval.source": str(home), "features.image_size": 48, "retrieval.crop_queries": str(boxes)}
    found = run(VIT, tmp_path, changes | {"retrieval.k": "1"})
    by_protocol = {name: expected(tmp_path, images, boxes, name) for name in PROTOCOLS}
    assert found.metrics == pytest.approx({k: v for each in by_protocol.values() for k, v in each.items()}, abs=1e-3)
    assert [row["query"] for row in found.tables["per_query"]] == [f"jpg/{name}.jpg" for name in QUERIES]
    assert found.tables["per_query"][1]["ap_easy"] == ""
    lines = tuple(f"{name}: queries without a positive image, left out: 1 of 3" for name in ("easy", "hard"))
    assert found.notes == lines


def test_several_scales_and_squares(images: Path, tmp_path: Path) -> None:
    home = layout(images, tmp_path / "places")
    base = {"retrieval.source": str(home), "features.image_size": 64, "retrieval.k": "1"}
    found = [
        run(VIT, tmp_path, base | more).metrics["map_medium"]
        for more in ({}, {"retrieval.multi_scale": "true"}, {"retrieval.resize": "crop"})
    ]
    assert len(set(found)) == 3
    squares = run("pixels", tmp_path, base | {"retrieval.resize": "crop", "features.image_size": 8})
    assert 0 < squares.metrics["map_easy"] <= 100


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickled_ground_truth_is_the_same(images: Path, tmp_path: Path, protocol: int) -> None:
    as_json = read_revisited_layout("retrieval.source", str(layout(images, tmp_path / "a")))
    pickled = read_revisited_layout("retrieval.source", str(layout(images, tmp_path / "b", protocol=protocol)))
    assert (pickled.truth, pickled.boxes) == (as_json.truth, as_json.boxes)
    assert pickled.gallery == as_json.gallery == tuple(f"jpg/{name}.jpg" for name in GALLERY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imlist": [*GALLERY[:-1], "plaze_000008"]}, r"jpg/plaze_000008.jpg \(imlist\); did you mean .*place_000008"),
        ({"qimlist": QUERIES[:2]}, "gnd must be a list of 2 dicts"),
        ({"imlist": []}, "imlist must be a list of names"),
        ({"gnd": [{**TRUTH[0], "hard": [9]}, *TRUTH[1:]]}, "gnd 0: hard holds 9; must be >= 0 and < 9"),
        ({"gnd": [TRUTH[0], {"easy": [1]}, TRUTH[2]]}, "gnd 1: hard must be a list of numbers"),
        ({"gnd": [{**TRUTH[0], "bbx": [9, 0, 3, 4]}, *TRUTH[1:]]}, "gnd 0: bbx = .*: must have left < right"),
    ],
)
def test_ground_truths_that_are_wrong(images: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    home = layout(images, tmp_path / "places", CONTENT | change)
    with pytest.raises(ConfigError, match=message):
        read_revisited_layout("retrieval.source", str(home))


def test_folders_of_another_layout(images: Path, tmp_path: Path) -> None:
    home = layout(images, tmp_path / "places", CONTENT | {"gnd": np.arange(3)}, protocol=2)
    with pytest.raises(ConfigError, match=r"gnd_places.pkl: holds more than .* write it as JSON"):
        read_revisited_layout("retrieval.source", str(home))
    (home / "gnd_others.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has gnd_others.json, gnd_places.pkl; must be a folder with jpg/ and one"):
        read_revisited_layout("retrieval.source", str(home))
    with pytest.raises(ConfigError, match=r"has no jpg/; .*; did you mean .*/places\?"):
        read_revisited_layout("retrieval.source", str(tmp_path))
    with pytest.raises(ConfigError, match=r"retrieval.gallery: is of data.source"):
        run(VIT, tmp_path, {"retrieval.source": str(home), "retrieval.gallery": "train"})
