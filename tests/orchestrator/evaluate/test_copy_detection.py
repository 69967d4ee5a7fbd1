from __future__ import annotations

import csv
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from dino_core.config import ConfigError
from dino_core.eval.copy_detection import learn_whitening
from orchestrator import cli
from orchestrator.evaluate.copy_layout import read_copy_layout
from orchestrator.evaluate.settings import FeaturesConfig
from orchestrator.evaluate.suite import SuiteResult
from orchestrator.evaluate.targets import find_target
from tests.orchestrator.evaluate.suite_jobs import run_suite

NUM = 10
VIT = "random:test_vit"
SIZE = {"features.image_size": 32}


def photo(seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((50, 40), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photos, of which the first four are copied as they are, turned and mixed with the next; and a stranger."""
    home = tmp_path_factory.mktemp("copies") / "set"
    for folder in ("database", "queries"):
        (home / folder).mkdir(parents=True)
    rows = []
    for index in range(NUM):
        photo(index).save(home / f"database/{index}.png")
    for index in range(4):
        changed = {
            "same": photo(index),
            "turned": photo(index).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            "mixed": Image.blend(photo(index), photo(index + 1), 0.5),
        }
        for attack, image in changed.items():
            image.save(home / f"queries/{index}_{attack}.png")
            rows.append((f"queries/{index}_{attack}.png", f"database/{index}.png", attack))
            if attack == "mixed":
                rows.append((f"queries/{index}_{attack}.png", f"database/{index + 1}.png", attack))
    photo(99).save(home / "queries/stranger.png")
    rows.append(("queries/stranger.png", "", "stranger"))
    write(home, rows)
    return home


def write(home: Path, rows: list[tuple[str, str, str]], header: str = "query,positive,attack") -> None:
    (home / "groundtruth.csv").write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")


def run(target: str, source: Path, folder: Path, **options: Any) -> SuiteResult:
    changes = {f"copy_detection.{key}": value for key, value in options.items()}
    return run_suite("copy_detection", target, folder, SIZE | {"copy_detection.source": str(source)} | changes)


def by_hand(queries: np.ndarray, database: np.ndarray, home: Path) -> dict[str, float]:
    """Scores by scikit-learn, of features in the order of the layout."""
    with (home / "groundtruth.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["query"] for row in rows))
    files = sorted(f"database/{path.name}" for path in (home / "database").iterdir())
    relevant = np.zeros((len(names), len(files)), dtype=bool)
    for row in rows:
        if row["positive"]:
            relevant[names.index(row["query"]), files.index(row["positive"])] = True
    attacks = [next(row["attack"] for row in rows if row["query"] == name) for name in names]
    queries, database = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, database))
    similarity = queries @ database.T
    each = {
        i: 100 * average_precision_score(relevant[i], similarity[i]) for i in range(len(names)) if relevant[i].any()
    }
    scores = {"map": np.mean(list(each.values()))}
    scores["micro_ap"] = 100 * average_precision_score(relevant.ravel(), similarity.ravel())
    for attack in ("same", "turned", "mixed"):
        scores[f"map_{attack}"] = np.mean([each[i] for i in each if attacks[i] == attack])
    return scores


def files_of(home: Path) -> tuple[list[Path], list[Path]]:
    with (home / "groundtruth.csv").open() as file:
        queries = dict.fromkeys(row["query"] for row in csv.DictReader(file))
    return [home / name for name in queries], sorted((home / "database").iterdir())


def test_pixels_give_what_they_give_by_hand(copies: Path, tmp_path: Path) -> None:
    found = run("pixels", copies, tmp_path, interpolation="plain")
    mean, std = (np.array(values) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    queries, database = (
        np.stack(
            [
                ((np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BICUBIC)) / 255 - mean) / std).ravel()
                for path in paths
            ]
        )
        for paths in files_of(copies)
    )
    expected = by_hand(queries, database, copies)
    assert found.metrics == pytest.approx(expected, abs=0.02)  # torch's and Pillow's pixels differ by a level
    assert expected["map_same"] == 100 > expected["map_turned"]
    table = {row["attack"]: row for row in found.tables["per_attack"]}
    assert list(table) == ["same", "turned", "mixed", "all"]
    assert (table["mixed"]["queries"], table["all"]["queries"]) == (4, 12)
    assert table["same"]["first"] == 100
    assert found.notes == (
        "10 images are searched, 13 queries asked",
        "queries that are no copies, which count in micro_ap alone: 1",
    )


@pytest.mark.parametrize("whitening", [None, "database"])
def test_descriptors_are_class_token_and_gem_of_the_last_block(
    copies: Path, tmp_path: Path, whitening: str | None
) -> None:
    found = run(VIT, copies, tmp_path, interpolation="plain", whitening=whitening, whitening_covariance="uncentred")
    target = find_target(VIT, FeaturesConfig(image_size=32), str(tmp_path))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (target.image.mean, target.image.std))
    rows = []
    for paths in files_of(copies):
        pixels = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] for path in paths]
        small = [
            torch.nn.functional.interpolate(p, size=(32, 32), mode="bicubic", antialias=True)[0].float() / 255
            for p in pixels
        ]
        with torch.no_grad():
            tokens = target.backbone.forward_features((torch.stack(small) - mean) / std)  # type: ignore[operator]
        prefix = target.backbone.num_prefix_tokens
        pooled = tokens[:, prefix:].clamp(min=1e-6).pow(4).mean(dim=1).pow(0.25)
        rows.append(torch.cat([tokens[:, 0], pooled], dim=1))
    queries, database = rows
    if whitening is not None:
        whiten = learn_whitening(database, "uncentred")
        queries, database = whiten(queries), whiten(database)
    assert found.metrics == pytest.approx(by_hand(queries.numpy(), database.numpy(), copies), abs=1e-3)


def test_distractors_and_another_set_for_whitening(copies: Path, tmp_path: Path) -> None:
    alone = run(VIT, copies, tmp_path, descriptor="pooled", depth=1)
    more = run(VIT, copies, tmp_path, descriptor="pooled", depth=1, distractors=str(copies / "queries"))
    # Every query is among them and first for itself, so that nothing is found at the first rank.
    assert alone.metrics["map_same"] == 100
    assert more.metrics["map"] == 0
    assert more.notes[0] == "23 images are searched, 13 queries asked"
    white = run(VIT, copies, tmp_path, whitening=str(copies / "queries"), whitening_dim=4, num_whitening=9)
    assert white.metrics["map_same"] == 100
    assert white.metrics != run(VIT, copies, tmp_path, whitening="database", whitening_dim=4).metrics


def test_an_image_that_cannot_be_read_is_left_out(copies: Path, tmp_path: Path) -> None:
    home = tmp_path / "set"
    for folder in ("database", "queries"):
        (home / folder).mkdir(parents=True)
    for index in range(3):
        photo(index).save(home / f"database/{index}.png")
        photo(index).save(home / f"queries/{index}.png")
    (home / "database/0.png").write_bytes(b"no image")
    (home / "queries/1.png").write_bytes(b"no image")
    (home / "queries/beside.png").write_bytes(b"")
    write(home, [(f"queries/{index}.png", f"database/{index}.png", "same") for index in range(3)])
    found = run(VIT, home, tmp_path)
    assert found.metrics["map"] == 100  # of the last, which alone has both
    assert found.tables["per_attack"][0]["queries"] == 1
    assert found.notes[0] == "2 images are searched, 2 queries asked"
    assert found.notes[-1] == "images beside the database that groundtruth.csv does not name: 1"


# --- what is refused --------------------------------------------------------------------------------------------------

ONE = ("queries/0_same.png", "database/0.png", "same")


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (
            [ONE, ("queries/0_sam.png", *ONE[1:])],
            "",
            r"queries/0_sam.png \(query of line 3\); did you mean .*0_same.png",
        ),
        ([(ONE[0], "database/11.png", "same")], "", r"database/11.png \(positive of line 2\); did you mean database/1"),
        ([(ONE[0], "queries/1_same.png", "same")], "", r"no such images: queries/1_same.png \(positive of line 2\)"),
        ([ONE, (ONE[0], "database/1.png", "other")], "", "line 3: .* has the attack other, and same above"),
        ([(*ONE[:2], "a b")], "", "line 2: attack = 'a b': must be of letters"),
        ([("", *ONE[1:])], "", "line 2: has no query"),
        ([ONE], "query,positives,attack", "line 1: has no column positive; must have .*; did you mean positives"),
        ([(ONE[0], "", "same")], "", "no query has a positive"),
        ([], "", "has no rows"),
    ],
)
def test_tables_that_are_wrong(
    copies: Path, tmp_path: Path, rows: list[tuple[str, str, str]], header: str, message: str
) -> None:
    home = tmp_path / "set"
    home.mkdir()
    for folder in ("database", "queries"):
        (home / folder).symlink_to(copies / folder)
    write(home, rows, header or "query,positive,attack")
    with pytest.raises(ConfigError, match=message):
        read_copy_layout("copy_detection.source", str(home))


def test_folders_of_another_layout(copies: Path) -> None:
    for address, message in (
        (None, "copy_detection.source: must be given: a folder with database/, queries/ and groundtruth.csv"),
        (str(copies / "groundtruth.csv"), "is a file; .* unpack an archive first"),
        (str(copies.parent), f"has no database/ and no groundtruth.csv; .*; did you mean {copies}?"),
        (str(copies.parent / "sets"), "no such file or folder; did you mean"),
        (str(copies / "queries"), "has no database/ and no groundtruth.csv"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_copy_layout("copy_detection.source", address)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (VIT, {"image_size": 40}, "copy_detection.image_size = 40: test_vit does not take it"),
        (VIT, {"whitening_dim": 3}, "whitening_dim: must be none without copy_detection.whitening"),
        (
            VIT,
            {"whitening": "database", "whitening_dim": 129},
            "whitening_dim = 129: must be <= 128, the descriptor",
        ),
        (VIT, {"whitening": "nowhere"}, "copy_detection.whitening = nowhere: no such file or folder"),
        (VIT, {"distractors": "nowhere"}, "copy_detection.distractors = nowhere: no such file or folder"),
        (VIT, {"descriptor": "gem"}, "copy_detection.descriptor = gem"),
        ("random:test_mambaout", {}, None),
    ],
)
def test_what_does_not_go_together_is_refused_before_features(
    copies: Path, tmp_path: Path, target: str, options: dict[str, Any], message: str | None
) -> None:
    if message is None:
        assert target.removeprefix("random:") in timm.list_models()
        assert run(target, copies, tmp_path, **options).metrics["map_same"] == 100  # GeM of a convnet's map alone
        return
    with pytest.raises(ConfigError, match=message):
        run(target, copies, tmp_path, **options)


def test_raw_pixels_on_real_photos(shared_data: Path, tmp_path: Path) -> None:
    """The floor: unchanged layouts are found by their pixels, moved ones are not."""
    with tarfile.open(shared_data / "copy_detection.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    found = run("pixels", tmp_path / "copydet", tmp_path).metrics
    assert [found[f"map_{attack}"] for attack in ("jpeg10", "jpeg15_quarter", "overlay")] == [100, 100, 100]
    moved = [found[f"map_{attack}"] for attack in ("rot15_blur", "strong", "crop50", "hflip", "crop20")]
    assert moved == pytest.approx([58.2, 52.9, 52.9, 48.6, 14.2], abs=1.5)


def test_the_command_names_what_is_wrong(copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "copy_detection", "pixels", "--local"]
    assert cli.main([*command, f"copy_detection.sorce={copies}"]) != 0
    assert "did you mean copy_detection.source" in capsys.readouterr().err
    assert cli.main(command) != 0
    assert "copy_detection.source: must be given" in capsys.readouterr().err
