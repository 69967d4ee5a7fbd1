"""The suites that learn from labels, on the embedded digits: options, numbers, files, refusals."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_core.config import ConfigError, CropsConfig
from dino_core.eval import (
    LinearProbes,
    Probe,
    agreement,
    choose_per_class,
    hold_out,
    kmeans,
    knn_accuracies,
    logistic_regression,
    neighbours,
    pooled_tokens,
    shuffled_batches,
)
from dino_core.eval.features import eval_transform
from orchestrator.config import DataConfig
from orchestrator.data.sources import open_source
from orchestrator.errors import RunFailed
from orchestrator.evaluate import compute
from orchestrator.evaluate.driver import evaluate
from orchestrator.evaluate.record import Evaluation
from orchestrator.evaluate.views_linear import AugmentedTokens, crop_and_flip
from orchestrator.evaluation import fixed_choice

VIT = "random:vit_tiny_patch16_224"
DATA = {"data.source": "digits", "features.num_train": 300, "features.num_test": 90, "features.image_size": 16}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluations")


@pytest.fixture(autouse=True)
def _inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here}/mlflow.db")


def run(suite: str, target: str = "pixels", **options: Any) -> Evaluation:
    given = {f"{suite}.{key}": value for key, value in options.items()}
    (found,) = evaluate([suite], target, DATA | given, local=True, tell=lambda line: None)
    return found


def metrics(found: Evaluation) -> dict[str, float]:
    return {name.rpartition("/")[2]: value for name, value in found.metrics.items()}


def table(found: Evaluation, name: str) -> list[dict[str, str]]:
    with (found.folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels [n, 768] and labels of the training and test images that are evaluated."""
    source, crops = open_source(DataConfig(source="digits")), CropsConfig()
    found = []
    for split, num in ((source.train, 300), (source.test, 90)):
        assert split is not None and split.labels is not None
        ids = fixed_choice(len(split), num).tolist()
        views = [eval_transform(split.read(i), 16, 0.875, crops.mean, crops.std) for i in ids]  # type: ignore[arg-type]
        found += [torch.stack(views).flatten(1), torch.from_numpy(split.labels[ids])]
    rows, labels, queries, truth = found
    return rows, labels, queries, truth


Digits = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def test_knn_of_few_labels_and_of_a_small_gallery(digits: Digits) -> None:
    rows, labels, queries, truth = digits
    few = choose_per_class(labels, num=5, seed=3)
    expected = knn_accuracies(rows[few], labels[few], queries, truth, (5, 100), large_k="clamp")
    found = run("knn", k="5,100", labels_per_class=5, label_seed=3)
    assert metrics(found) == {"top1_k5": expected[5], "top1_k100": expected[100]}
    assert found.content["notes"] == ["of a gallery of 50 images all vote for k = 100"]
    tenth = choose_per_class(labels, share=0.1)
    expected = knn_accuracies(rows[tenth], labels[tenth], queries, truth, (5,))
    assert metrics(run("knn", k="5", label_share=0.1)) == {"top1_k5": expected[5]}


def test_knn_by_faiss(digits: Digits) -> None:
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    exact = knn_accuracies(*digits, ks=(5,))
    assert metrics(run("knn", k="5", search="faiss", num_lists=8, num_probes=8))["top1_k5"] == exact[5]
    found = run("knn", k="5", search="faiss", num_probes=1)
    assert found.content["notes"] == ["neighbours are approximate: 1 of 69 cells were searched"]
    assert 10 < metrics(found)["top1_k5"] <= exact[5] + 10


def test_linear_probes_of_pixels_are_chosen_by_held_out_images(digits: Digits) -> None:
    rows, labels, queries, truth = digits
    found = run("linear", lr="1e-6,0.01,0.001", epochs=3, batch_size=64, validation_share=0.2)
    fitted, held = hold_out(labels, 0.2)
    probes = {lr: Probe(lr / 4) for lr in (1e-6, 0.01, 0.001)}
    trained = LinearProbes(list(probes.values()), labels.unique())
    tokens = pooled_tokens(rows)
    trained.fit(shuffled_batches(tokens[fitted], labels[fitted], 64), 3, -(-len(fitted) // 64))
    on_held, on_test = (
        trained.accuracies([(pooled_tokens(x), y)]) for x, y in ((rows[held], labels[held]), (queries, truth))
    )
    chosen = max(probes.values(), key=lambda probe: on_held[probe])
    assert metrics(found) == pytest.approx({"top1": on_test[chosen], "top1_best_on_test": max(on_test.values())})
    listed = table(found, "probes")
    assert [float(row["lr"]) for row in listed] == list(probes)
    assert [float(row["validation_top1"]) for row in listed] == pytest.approx(list(on_held.values()))
    assert [row["chosen"] for row in listed].count("True") == 1
    assert found.content["notes"] == ["pixels has no class token: the probes see its pooled features"]
    assert metrics(found)["top1"] > 60


def test_linear_probes_of_blocks() -> None:
    found = run("linear", VIT, lr="0.01,0.1", blocks="1,2", epochs=2, select="test", lr_by="epoch", scale_lr=False)
    listed = table(found, "probes")
    assert [(row["lr"], row["blocks"], row["avgpool"]) for row in listed] == [
        (lr, blocks, pool) for blocks in "12" for pool in ("False", "True") for lr in ("0.01", "0.1")
    ]
    assert "validation_top1" not in listed[0]
    assert (
        metrics(found)["top1"] == metrics(found)["top1_best_on_test"] == max(float(row["test_top1"]) for row in listed)
    )
    (note,) = found.content["notes"]
    assert "best of 8 probes on the test images" in note


def test_linear_probes_of_augmented_images() -> None:
    """What flips and crops do to raw digits: a probe that has seen them knows less of the whole image."""
    plain, augmented = (
        metrics(run("linear", lr="0.01", epochs=4, batch_size=64, **more))
        for more in ({}, {"augment": True, "crop_scale": "0.3,1"})
    )
    assert 15 < augmented["top1"] < plain["top1"]
    assert augmented == metrics(run("linear", lr="0.01", epochs=4, batch_size=64, augment=True, crop_scale="0.3,1"))


def test_augmented_views_are_crops_by_epoch() -> None:
    image = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    crops = crop_and_flip(CropsConfig(global_size=8), (1.0, 1.0))
    first, again, later = (AugmentedTokens(crops, epoch, 0, 0).make(image, 5) for epoch in (0, 0, 1))
    assert first.shape == (3, 8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    seen = AugmentedTokens(crops, 0, 0, 0).features(torch.nn.Flatten(), first[None])
    by_hand = (first / 255 - torch.tensor(crops.mean).view(3, 1, 1)) / torch.tensor(crops.std).view(3, 1, 1)
    torch.testing.assert_close(seen, by_hand.flatten()[None])


def test_logistic_regression(digits: Digits) -> None:
    found = run("logistic", c_low=1e-4, c_high=1.0, num_c=3, labels_per_class=12)
    rows, labels, queries, truth = digits
    few = choose_per_class(labels, num=12)
    expected = logistic_regression(rows[few], labels[few], queries, truth, (1e-4, 1e-2, 1.0))
    assert metrics(found) == pytest.approx({"top1": expected.top1, "c": expected.strength})
    assert [float(row["validation_top1"]) for row in table(found, "validation")] == list(expected.validation.values())
    at_end = [note for note in found.content["notes"] if "end of its range" in note]
    assert bool(at_end) == (expected.strength in (1e-4, 1.0))
    short = run("logistic", c_low=1.0, num_c=1, max_iterations=1)
    assert short.content["notes"] == ["the classifier has not converged in logistic.max_iterations = 1"]


def test_clustering(digits: Digits) -> None:
    found = run("clustering", num_starts=2, tsne_steps=250, tsne_image_steps=250, num_points=50)
    _, _, queries, truth = digits
    expected = agreement(kmeans(queries, 10, num_starts=2), truth)
    assert metrics(found) == pytest.approx(vars(expected))
    assert sum(int(value) for row in table(found, "clusters") for name, value in row.items() if name != "cluster") == 90
    pages = {path.name for path in found.folder.glob("*.html")}
    assert pages == {"pca.html", "tsne.html", "pca_class_means.html", "tsne_class_means.html"}
    assert "Plotly.newPlot" in (found.folder / "pca.html").read_text()
    many = run("clustering", num_clusters=20, num_starts=1, maps="pca")
    assert metrics(many)["purity"] > metrics(found)["purity"]
    assert many.content["notes"] == ["accuracy matches 20 clusters with 10 classes one to one"]


@pytest.mark.parametrize(
    ("suite", "target", "options", "message"),
    [
        ("knn", "pixels", {"k": "400", "large_k": "refuse"}, r"knn.k = 400: must be <= 300"),
        ("knn", "pixels", {"num_lists": 301, "search": "faiss"}, "knn.num_lists = 301: must be <= 300"),
        (
            "knn",
            "pixels",
            {"labels_per_class": 200},
            r"knn.labels_per_class = 200: must be <= \d+, the training images of",
        ),
        ("knn", "pixels", {"labels_per_class": 2, "label_share": 0.5}, "label_share = 0.5: must be none"),
        ("linear", VIT, {"blocks": "1,13"}, r"linear.blocks = 13: must be >= 1 and <= 12"),
        ("linear", "pixels", {"lr": "0.1,0.1"}, "linear.lr = "),
        ("linear", "pixels", {"crop_scale": "0.5,0.1"}, "linear.crop_scale"),
        ("logistic", "pixels", {"c_low": 2.0, "c_high": 1.0}, "logistic.c_low = 2.0: must not exceed"),
        ("clustering", "pixels", {"num_clusters": 91}, "clustering.num_clusters = 91: must be <= 90"),
    ],
)
def test_what_cannot_be_done_is_refused_before_features(
    suite: str, target: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "extract_share", None)
    with pytest.raises(ConfigError, match=message):
        run(suite, target, **options)


def test_unlabelled_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "extract_share", None)
    for name in ("a", "b"):
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    for suite in ("knn", "linear", "logistic", "clustering"):
        with pytest.raises(ConfigError, match=r"data\.source = .*: has no"):
            evaluate([suite], "pixels", {"data.source": str(tmp_path)}, local=True)


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "faiss_is_installed", lambda: False)
    with pytest.raises(ConfigError, match="install the extra `faiss`"):
        run("knn", search="faiss")


def test_too_few_images_to_hold_any_out_is_told() -> None:
    for suite in ("linear", "logistic"):
        with pytest.raises(RunFailed, match="holds out none of 10 images"):
            run(suite, labels_per_class=1)
