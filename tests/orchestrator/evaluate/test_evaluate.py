"""The command `evaluate` end to end in this process: targets, numbers, what is kept and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dino_core.checkpoint import save_checkpoint
from dino_core.config import CropsConfig, HeadConfig, ModelConfig, PretrainConfig
from dino_core.eval import extract_features, knn_accuracy, rankme
from dino_core.eval.features import eval_transform
from dino_core.train import TrainState
from orchestrator import cli
from orchestrator.config import RunConfig
from orchestrator.data.sources import open_source
from orchestrator.evaluate import compute, features
from orchestrator.evaluate.driver import evaluate
from orchestrator.evaluate.record import Evaluation
from orchestrator.evaluate.settings import FeaturesConfig
from orchestrator.evaluate.targets import find_target
from orchestrator.evaluation import fixed_choice
from orchestrator.overrides import flatten
from orchestrator.records import CHECKPOINTS_DIR, Ledger, RunRecord
from orchestrator.trials import load_from_disk

RUN = "tiny-20260101-120000-ab12"
STEP = 5
CONFIG = PretrainConfig(
    batch_size=4,
    model=ModelConfig(backbone="vit_tiny_patch16_224", patch_size=8, embed_dim=12, depth=1, num_heads=2),
    head=HeadConfig(num_prototypes=8, hidden_dim=8, bottleneck_dim=4),
    crops=CropsConfig(num_local_crops=0, global_size=16, mean=(0.5, 0.5, 0.5)),
)
SMALL = {"features.num_train": 150, "features.num_test": 60}
KNN = {"knn.k": "5,20"}
OPTIONS = [f"{key}={value}" for key, value in (SMALL | KNN).items()]


@pytest.fixture(scope="module")
def state() -> TrainState:
    state = TrainState.create(CONFIG, 16)
    torch.nn.init.constant_(state.student.backbone.norm.bias, 3.0)
    state.step = STEP
    return state


@pytest.fixture(scope="module")
def template(state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/: one run with a checkpoint, whose record goes to a store beside it."""
    here = tmp_path_factory.mktemp("template")
    storage = here / "runs"
    config = replace(RunConfig(), pretrain=CONFIG)
    RunRecord(run_id=RUN, experiment="tests", recipe="r", seed=0, config=flatten(config)).write(storage / RUN)
    ledger = Ledger(storage / RUN)
    ledger.record(RUN, "started")
    ledger.record(RUN, "finished")
    ledger.close()
    save_checkpoint(state, storage / RUN / CHECKPOINTS_DIR)
    return here


@pytest.fixture(scope="module")
def here(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that the tests of a module share, with one MLflow store."""
    return Path(shutil.copytree(template, tmp_path_factory.mktemp("here") / "copy"))


@pytest.fixture(autouse=True)
def _inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What features were really taken of."""
    names: list[str] = []
    original = compute.extract_share

    def counted(backbone: Any, images: Any, view: Any, share: Any, num_threads: int) -> Any:
        names.append(f"{images.name} {type(view).__name__} {share.start}")
        return original(backbone, images, view, share, num_threads)

    monkeypatch.setattr(compute, "extract_share", counted)
    return names


def run(suites: list[str] | str, target: str, **more: Any) -> Evaluation:
    suites = [suites] if isinstance(suites, str) else suites
    given = {key.replace("__", "."): value for key, value in more.items()}
    return evaluate(suites, target, SMALL | (KNN if "knn" in suites else {}) | given, local=True)[-1]


def expected_knn(backbone: torch.nn.Module, k: int) -> float:
    source = open_source(RunConfig().data)
    assert source.test is not None
    sides = []
    for split, limit in ((source.train, 150), (source.test, 60)):
        ids = fixed_choice(len(split), limit)
        crops = [eval_transform(split.read(i), 16, 0.875, (0.5, 0.5, 0.5), CONFIG.crops.std) for i in ids]  # type: ignore[arg-type]
        assert split.labels is not None
        sides += [extract_features(backbone, [torch.stack(crops)]), torch.from_numpy(split.labels[ids])]
    return knn_accuracy(*sides, k=k)


def test_a_run_is_evaluated_and_the_results_belong_to_it(
    here: Path, state: TrainState, computed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "knn", "label_free", RUN, "--local", *OPTIONS, "label_free.num_views=2"]
    assert cli.main([*command, "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    metrics = printed["metrics"]
    teacher = state.teacher.backbone
    assert metrics["evaluate/knn/top1_k5"] == pytest.approx(expected_knn(teacher, 5))
    assert metrics["evaluate/knn/top1_k20"] == pytest.approx(expected_knn(teacher, 20))
    assert set(metrics) >= {f"evaluate/label_free/{name}" for name in ("rankme", "lidar", "uniformity", "alignment")}
    assert computed == ["train CentreCrop 0", "test CentreCrop 0", "train AugmentedViews 0"]  # once for both suites

    for result in printed["results"]:
        folder = Path(result["folder"])
        assert folder.parent == here / "runs" / RUN / "evaluations"
        assert json.loads((folder / "result.json").read_text()) == {k: v for k, v in result.items() if k != "folder"}
        assert result["target"]["step"] == STEP
    (trial,) = load_from_disk(here / "runs" / RUN)
    assert trial.curves["evaluate/knn/top1_k5"] == [(STEP, metrics["evaluate/knn/top1_k5"])]

    # Asked again, in another form: the same numbers, from the same features, and nothing twice.
    capsys.readouterr()
    assert cli.main(command) == 0
    assert f"evaluate/knn/top1_k5 {metrics['evaluate/knn/top1_k5']:.4g}" in " ".join(capsys.readouterr().out.split())
    assert len(computed) == 3
    assert len(list((here / "runs" / RUN / "evaluations").glob("*/"))) == 2

    client = mlflow.MlflowClient(f"sqlite:///{here}/mlruns/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert found.info.run_name == RUN
    for name, value in metrics.items():
        assert [(p.step, p.value) for p in client.get_metric_history(found.info.run_id, name)] == [(STEP, value)]
    folders = [Path(result["folder"]).name for result in printed["results"]]
    there = [entry.path for entry in client.list_artifacts(found.info.run_id, "evaluations")]
    assert sorted(there) == sorted(f"evaluations/{folder}" for folder in folders)


def test_a_target_that_is_no_run_has_a_run_of_its_own(here: Path) -> None:
    found = run("knn", "pixels", data__source="digits", features__image_size=8, features__crop_fraction=1)
    source = open_source(RunConfig().data)
    assert source.test is not None and source.train.labels is not None and source.test.labels is not None
    ids = [fixed_choice(len(split), limit) for split, limit in ((source.train, 150), (source.test, 60))]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CropsConfig().mean, CropsConfig().std))
    rows = [
        torch.stack([((torch.from_numpy(split.read(i)).permute(2, 0, 1) / 255 - mean) / std).flatten() for i in some])  # type: ignore[arg-type]
        for split, some in zip((source.train, source.test), ids, strict=True)
    ]
    labels = [torch.from_numpy(s.labels[i]) for s, i in zip((source.train, source.test), ids, strict=True)]  # type: ignore[index]
    assert found.metrics["evaluate/knn/top1_k5"] == knn_accuracy(rows[0], labels[0], rows[1], labels[1], k=5)
    home = found.folder.parent.parent
    assert home.name.startswith("evaluate-pixels-")
    client = mlflow.MlflowClient(f"sqlite:///{here}/mlruns/mlflow.db")
    (there,) = client.search_runs([client.get_experiment_by_name("evaluate").experiment_id])
    assert (there.info.run_name, there.info.status, there.data.tags["target"]) == (home.name, "FINISHED", "pixels")
    assert there.data.metrics == found.metrics
    assert cli.main(["deliver", home.name]) == 0


def test_neighbours_more_than_the_gallery_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["evaluate", "knn", RUN, "--local", "features.num_train=7", "features.num_test=9", "knn.k=7,200"]) == 0
    )
    printed = capsys.readouterr().out
    assert "of a gallery of 7 images all vote for k = 200" in printed
    values = [line.split()[1] for line in printed.splitlines() if line.startswith("evaluate/")]
    assert values[0] == values[1]


def test_a_label_keeps_results_apart(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "knn", RUN, "--local", *OPTIONS, "features.network=student"]
    assert cli.main([*command, "--as", "of_student"]) == 0
    assert "evaluate/of_student/knn/top1_k5 " in capsys.readouterr().out
    curves = load_from_disk(Path("runs", RUN))[0].curves
    assert curves["evaluate/of_student/knn/top1_k5"] == [
        (STEP, run("knn", RUN, features__network="student").metrics["evaluate/knn/top1_k5"])
    ]
    assert cli.main([*command, "--as", "of/student"]) == 2
    assert "name 'of/student': must be" in capsys.readouterr().err


# --- targets ----------------------------------------------------------------------------------------------------------


def target(name: str, **settings: Any) -> Any:
    return find_target(name, FeaturesConfig(**settings), "./runs")


def test_networks_checkpoints_and_random_weights(state: TrainState, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 16, 16)
    teacher, student = state.teacher.backbone.eval(), state.student.backbone.eval()
    with torch.no_grad():
        assert torch.equal(target(RUN).backbone(images), teacher(images))
        assert torch.equal(target(RUN, network="student").backbone(images), student(images))
        copied = shutil.copytree(f"runs/{RUN}/checkpoints/step_{STEP:08d}", tmp_path / "copied")
        found = target(str(copied))
        assert torch.equal(found.backbone(images), teacher(images))
        assert (found.kind, found.run_dir, found.step, found.image.size) == ("checkpoint", None, STEP, 16)
        fresh = TrainState.create(CONFIG, 16)
        assert torch.equal(target(f"random:{RUN}").backbone(images), fresh.student.backbone.eval()(images))
    assert target(RUN).digest == found.digest != target(f"random:{RUN}", seed=1).digest
    assert target(RUN).run_dir == Path("runs", RUN).resolve()


def test_a_timm_name_with_random_weights_and_another_size() -> None:
    found = target("random:test_vit", image_size=32)
    again = target("random:test_vit", image_size=32)
    assert (found.digest, found.architecture, found.image.size) == (again.digest, "test_vit", 32)
    assert found.image.mean == tuple(timm.create_model("test_vit").pretrained_cfg["mean"])  # type: ignore[index]


def test_weights_out_of_a_folder_in_timms_layout(tmp_path: Path) -> None:
    assert cli.main(["export", RUN, "--to", "hf", str(tmp_path / "out")]) == 0
    found = target(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(found.backbone(torch.ones(1, 3, 16, 16)), target(RUN).backbone(torch.ones(1, 3, 16, 16)))
    assert (found.image.size, found.image.mean) == (16, (0.5, 0.5, 0.5))


def test_released_weights(tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch16_224", num_classes=0, depth=1, patch_size=32, embed_dim=64, num_heads=1)
    save_file(model.state_dict(), tmp_path / "dino.safetensors")
    found = target(str(tmp_path / "dino.safetensors"))
    assert (found.kind, found.num_features) == ("released", 64)


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, train and test, with one broken image in each split."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 6), ("test", 3)):
        for label in ("a", "b"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for index in range(num):
                pixels = rng.integers(0, 128, (20, 24, 3), dtype=np.uint8) + (100 if label == "b" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        (tmp_path / "photos" / split / "a" / "1.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_images_that_cannot_be_read_are_counted_and_left_out(
    photos: Path, caplog: pytest.LogCaptureFixture, computed: list[str]
) -> None:
    more = {"data__source": str(photos), "knn__k": "3", "features__batch_size": 4}
    for _ in range(2):
        caplog.clear()
        found = run("knn", RUN, **more)
        assert found.metrics == {"evaluate/knn/top1_k3": 100.0}
        assert found.content["unreadable_images"] == 2
        for record, split in zip(caplog.records, ("train", "test"), strict=True):
            assert record.message.startswith(f"{RUN}: the {split} image a/1.png is left out: not an image")
    assert len(computed) == 2


def test_features_are_kept_in_shares_that_are_checked(
    computed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(features, "_SHARE_IMAGES", 64)
    shutil.rmtree("runs/.features", ignore_errors=True)
    first = run("knn", RUN).metrics
    shares = ["train CentreCrop 0", "train CentreCrop 64", "train CentreCrop 128", "test CentreCrop 0"]
    assert computed == shares
    kept = sorted(Path("runs/.features").glob("*/*"))
    assert len(kept) == 4
    changed = load_file(kept[0])["rows"]
    name = next(path for path in kept if path.name == "00000064.safetensors")
    save_file({"rows": changed}, name, metadata={"rows": json.dumps({"checksum": "another", "bad": {}})})
    next(path for path in kept if path.name == "00000128.safetensors").unlink()
    computed.clear()
    assert run("knn", RUN).metrics == first
    assert sorted(computed) == ["train CentreCrop 128", "train CentreCrop 64"]
    assert "its content has changed" in caplog.text


def test_features_that_are_not_kept_are_taken_once_for_each_command(computed: list[str]) -> None:
    shutil.rmtree("runs/.features", ignore_errors=True)
    more: dict[str, Any] = {"label_free__num_views": 2, "label_free__num_view_images": 4, "features__cache_gb": 0}
    run(["knn", "label_free"], RUN, **more)
    assert computed == ["train CentreCrop 0", "test CentreCrop 0", "train AugmentedViews 0"]
    assert not Path("runs/.features").exists()


def test_the_oldest_features_go_first(computed: list[str]) -> None:
    shutil.rmtree("runs/.features", ignore_errors=True)
    room = {"features__cache_gb": 2 * 150 * 12 * 4e-9}  # of the training images' features, two
    run("knn", RUN, **room)
    run("knn", RUN, features__network="student", **room)
    size = sum(path.stat().st_size for path in Path("runs/.features").rglob("*.safetensors"))
    assert size < 3 * 150 * 12 * 4
    computed.clear()
    run("knn", RUN, features__network="student", **room)
    assert computed == []


def test_scores_are_those_of_the_features(state: TrainState) -> None:
    found = run("label_free", RUN, label_free__num_views=2, label_free__num_images=50)
    source = open_source(RunConfig().data)
    ids = fixed_choice(len(source.train), 150)[fixed_choice(150, 50)]
    crops = [eval_transform(source.train.read(i), 16, 0.875, (0.5, 0.5, 0.5), CONFIG.crops.std) for i in ids]  # type: ignore[arg-type]
    expected = rankme(extract_features(state.teacher.backbone, [torch.stack(crops)]))
    assert found.metrics["evaluate/label_free/rankme"] == pytest.approx(expected, rel=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


def spoiled(change: Callable[[Path], None]) -> str:
    """The name of a copy of the run's checkpoint with something wrong."""
    copy = Path("spoiled")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(f"runs/{RUN}/checkpoints/step_{STEP:08d}", copy)
    change(copy)
    return str(copy)


def damage(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")


UNLABELLED = "unlabelled"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["knnn", RUN], "no suite 'knnn'; did you mean knn?"),
        (["linear_probing_x", RUN], "no suite 'linear_probing_x'; "),
        (["knn", RUN, "knn.temprature=1"], "knn.temprature: unknown key; did you mean knn.temperature?"),
        (
            ["knn", RUN, "label_free.num_views=4"],
            "label_free.num_views: is of the suite label_free, which is not asked",
        ),
        (["knn", RUN, "features.image_sze=4"], "features.image_sze: unknown key; did you mean features.image_size?"),
        (["knn", RUN, "knn.k=0,5"], "knn.k = 0,5: must be whole numbers with commas between them, each >= 1"),
        (["knn", RUN, "knn.k=5,x"], "knn.k = 5,x: must be whole numbers"),
        (["label_free", RUN, "label_free.num_views=3"], "label_free.num_views = 3: must be even"),
        (["knn", RUN, "pretrain.optim.lr=1"], "pretrain.optim.lr: is of the training, which is over"),
        (["knn", RUN, "features.network=teecher"], "must be one of teacher, student; did you mean teacher?"),
        (["knn", RUN.replace("ab12", "ab13")], f"did you mean {RUN}?"),
        (["knn", "vit_smal_patch16_224"], "did you mean vit_small_patch16_224"),
        (["knn", "random:resnet5"], "did you mean resnet50"),
        (
            ["knn", "vit_relpos_small_patch16_rpn_224"],
            "timm has no pretrained weights of it; there is random:vit_relpos",
        ),
        (["knn", "vit_small_patch16_224.dinno"], "timm has no such weights; there is "),
        (["knn", "vit_small_patch16_224.dino"], "vit_small_patch16_224.dino: timm cannot load its weights: "),
        (["knn", "nothing.pth"], "nothing.pth: no such file"),
        (["knn", "pixels"], "data.source: must be given; pixels is no run"),
        (["knn", RUN, "features.image_size=20"], "features.image_size = 20: vit_tiny_patch16_224 does not take it"),
        (["knn", RUN, f"data.source={UNLABELLED}"], "has no split test (data.test_split); knn needs labelled"),
        (["knn", RUN, "data.source=digits", "data.test_split=tests"], "data.test_split = tests: no such split"),
        (["knn", RUN, "cluster.launcher=train", "--local"], "cluster.launcher = train: must be local with --local"),
        (["knn", RUN, "cluster.launcher=trial"], "cluster.launcher = trial: is for the trials of a sweep"),
        (["knn", RUN, "cluster.use_gpu=true", "--local"], "cluster.use_gpu = True: this machine has no GPU"),
        ([RUN], "Missing argument 'TARGET'"),
    ],
)
def test_what_is_refused_before_features_are_computed(
    words: list[str],
    message: str,
    computed: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1, which is read once
    if not Path(UNLABELLED).exists():
        Path(UNLABELLED).mkdir()
        Image.new("RGB", (8, 8)).save(f"{UNLABELLED}/0.png")
    before = sorted(Path("runs").rglob("*"))
    assert cli.main(["evaluate", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert computed == []
    assert sorted(Path("runs").rglob("*")) == before


def test_images_without_labels_are_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        flat = photos.parent / "flat" / split
        flat.mkdir(parents=True)
        shutil.copy(photos / split / "a" / "0.png", flat / "0.png")
    assert cli.main(["evaluate", "knn", RUN, "--local", f"data.source={photos.parent / 'flat'}"]) == 2
    assert "has no labels of its training and test images; knn needs labelled" in capsys.readouterr().err


@pytest.mark.parametrize("change", [damage, lambda copy: (copy / "state.json").unlink()])
def test_a_damaged_checkpoint_is_refused(change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    name = spoiled(change)
    assert cli.main(["evaluate", "knn", name, "--local", "data.source=digits"]) == 2
    assert name in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 12)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.layer(images.mean(dim=(2, 3)))
            return features

    save_checkpoint(TrainState.create(CONFIG, 16, backbone=Own()), tmp_path)
    (place,) = tmp_path.iterdir()
    assert cli.main(["evaluate", "knn", str(place), "--local", "data.source=digits"]) == 2
    assert "the backbone is not the vit_tiny_patch16_224 of its configuration" in capsys.readouterr().err


def test_a_folder_that_takes_no_results_is_told_first(computed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    home = Path("runs", "evaluate-random-test_vit-" + target("random:test_vit").digest[:8])
    home.write_text("in the way")
    assert cli.main(["evaluate", "knn", "random:test_vit", "--local", "data.source=digits"]) == 2
    home.unlink()
    assert "results cannot be written there: Not a directory" in capsys.readouterr().err
    assert computed == []


def test_a_run_that_trains_is_left_to_its_driver(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(Path("runs", RUN))
    try:
        assert cli.main(["evaluate", "knn", RUN, "--local", *OPTIONS]) == 0
    finally:
        ledger.close()
    assert "is being worked on by another process" in capsys.readouterr().err
