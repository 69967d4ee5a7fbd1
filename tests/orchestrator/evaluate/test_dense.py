"""The suites `video` and `segmentation` on made-up videos: layouts, numbers, files, and what is refused in time."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_core.config import ConfigError
from dino_core.eval.attention import attention_maps, enlarge, mass_masks, mean_best_jaccard, object_jaccards
from dino_core.eval.masks import video_scores
from dino_core.eval.video import frame_labels, patch_labels, pixel_features, prepare_frame, propagate_labels
from orchestrator.config import RunConfig
from orchestrator.evaluate import mask_layouts
from orchestrator.evaluate.compute import choose_compute
from orchestrator.evaluate.features import Extractor
from orchestrator.evaluate.job import Data, Job
from orchestrator.evaluate.settings import FeaturesConfig, read_settings
from orchestrator.evaluate.suite import Suite, SuiteResult, load_suite
from orchestrator.evaluate.targets import Target, find_target
from tests.dino_core.eval.videos import made_up_video, made_up_vit

HEIGHT, WIDTH, PATCH = 64, 128, 8
FRAMES, MASKS = made_up_video(4)
PALETTE = [7 * n % 256 for n in range(768)]


@pytest.fixture(scope="module")
def targets() -> dict[str, Target]:
    known = find_target("random:vit_tiny_patch16_224", FeaturesConfig(), "runs")
    vit = replace(known, name="vit", backbone=made_up_vit(dynamic_img_size=True), digest="made up")
    convnet = find_target("random:resnet10t", FeaturesConfig(), "runs")
    return {"vit": vit, "pixels": find_target("pixels", FeaturesConfig(), "runs"), "convnet": convnet}


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """Two sequences in the layout of DAVIS, of two objects and of one."""
    root = tmp_path / "DAVIS"
    for name, labels in (("two", (1, 2)), ("one", (5,))):
        write_sequence(root, name, *made_up_video(4, labels=labels))
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("two\none\n")
    return root


def write_sequence(root: Path, name: str, frames: list[np.ndarray], masks: list[np.ndarray]) -> None:
    for part, arrays in (("JPEGImages", frames), ("Annotations", masks)):
        folder = root / part / "480p" / name
        folder.mkdir(parents=True)
        for number, array in enumerate(arrays):
            image = Image.fromarray(array)
            if part == "Annotations":
                image.putpalette(PALETTE)
            image.save(folder / f"{number:05d}.png")  # without loss, as the frames of the expectations are


def write_mask(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(path)


def prepare(suite: Suite, target: Target, settings: Mapping[str, Any]) -> tuple[Job, Any]:
    config = RunConfig()
    config = replace(config, cluster=replace(config.cluster, launcher="local"))
    features = FeaturesConfig()
    extractor = Extractor(target, choose_compute(config), batch_size=2)
    options = read_settings([suite], {f"{suite.name}.{key}": value for key, value in settings.items()}).options
    return Job(target, Data(config, target, is_given=False), features, extractor), options[suite.name]


def evaluate(name: str, target: Target, folder: Path, **settings: Any) -> SuiteResult:
    suite = load_suite(name)
    job, options = prepare(suite, target, settings)
    suite.check(job, options)
    folder.mkdir()
    return suite.run(job, options, folder)


def small(**settings: Any) -> dict[str, Any]:
    return {"size": HEIGHT, "radius": 3} | settings


# --- video ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "pixels"])
def test_video_is_what_the_functions_say(kind: str, targets: dict[str, Target], davis: Path, tmp_path: Path) -> None:
    target, out = targets[kind], tmp_path / "out"
    found = evaluate("video", target, out, **small(source=str(davis), pixels_patch=PATCH))
    rows = found.tables["objects"]
    assert [(row["sequence"], row["object"]) for row in rows] == [("two", 1), ("two", 2), ("one", 5)]

    images = torch.stack([prepare_frame(f, (HEIGHT, WIDTH), target.image.mean, target.image.std) for f in FRAMES])
    if kind == "vit":
        with torch.no_grad():
            tokens = target.backbone.forward_features(images)[:, 1:]  # type: ignore[operator]
        features = tokens.unflatten(1, (HEIGHT // PATCH, WIDTH // PATCH))
    else:
        features = pixel_features(images, PATCH)
    first = patch_labels(MASKS[0], (1, 2), (HEIGHT // PATCH, WIDTH // PATCH))
    size = (HEIGHT, WIDTH)
    predicted = [frame_labels(shares, (1, 2), size, size) for shares in propagate_labels(features, first, radius=3)]
    for row, score in zip(rows[:2], video_scores([MASKS[0], *predicted], MASKS), strict=True):
        assert row["j_mean"] == pytest.approx(100 * score.region.mean, abs=0.5)
        assert row["f_decay"] == pytest.approx(100 * score.boundary.decay, abs=2)
        assert row["j_and_f"] == pytest.approx((row["j_mean"] + row["f_mean"]) / 2)
    assert found.metrics["j_and_f"] == pytest.approx(np.mean([row["j_and_f"] for row in rows]))
    floor = video_scores([MASKS[0]] * 4, MASKS)[1]
    assert rows[1]["first_mask_j_and_f"] == pytest.approx(50 * (floor.region.mean + floor.boundary.mean))

    for number, expected in enumerate([MASKS[0], *predicted]):
        with Image.open(out / "predictions/two" / f"{number:05d}.png") as image:
            assert (image.mode, image.getpalette()) == ("P", PALETTE)
            assert (np.array(image) != expected).mean() < 0.002  # batches of another size round otherwise
    assert {path.name for path in (out / "pictures").iterdir()} == {"two.png", "one.png"}


def test_video_from_an_archive_is_the_same(targets: dict[str, Target], davis: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "davis.tar", "w") as archive:
        archive.add(davis, "DAVIS")
    settings = small(sequences="one", num_frames="3", pictures="false")
    folder = evaluate("video", targets["vit"], tmp_path / "a", source=str(davis), **settings)
    packed = evaluate("video", targets["vit"], tmp_path / "b", source=str(tmp_path / "davis.tar"), **settings)
    assert folder.tables == packed.tables
    assert [row["frames"] for row in folder.tables["objects"]] == [3]
    assert not (tmp_path / "a/pictures").exists()


def test_video_of_a_convnet_and_of_frames_that_are_resized(
    targets: dict[str, Target], davis: Path, tmp_path: Path
) -> None:
    found = evaluate("video", targets["convnet"], tmp_path / "out", source=str(davis), size=96, first_mask="area")
    assert 0 <= found.metrics["j_mean"] <= 100
    with Image.open(tmp_path / "out/predictions/one/00003.png") as image:
        assert image.size == (WIDTH, HEIGHT)
        assert set(np.unique(np.array(image))) <= {0, 5}


# --- segmentation -----------------------------------------------------------------------------------------------------


def test_segmentation_is_what_the_functions_say(targets: dict[str, Target], davis: Path, tmp_path: Path) -> None:
    target = targets["vit"]
    settings = {"source": str(davis), "size": HEIGHT, "sequences": "two", "num_pictures": 1}
    found = evaluate("segmentation", target, tmp_path / "out", **settings)
    images = torch.stack([prepare_frame(f, (HEIGHT, WIDTH), target.image.mean, target.image.std) for f in FRAMES])
    maps = attention_maps(target.backbone, images)
    assert maps is not None
    for mass in (0.6, 0.8):
        kept = enlarge(mass_masks(maps, mass), PATCH)
        fits = [object_jaccards(masks, truth) for masks, truth in zip(kept, MASKS, strict=True)]
        assert found.metrics[f"jaccard_{100 * mass:g}"] == pytest.approx(100 * mean_best_jaccard(fits))
        heads = [row["jaccard"] for row in found.tables["heads"] if row["mass"] == mass]
        np.testing.assert_allclose(heads, 100 * np.mean([fit.mean(axis=0) for fit in fits], axis=0))
        assert found.metrics[f"one_head_jaccard_{100 * mass:g}"] == max(heads)
        mean = enlarge(mass_masks(maps.mean(dim=1, keepdim=True), mass), PATCH)
        fits = [object_jaccards(masks, truth) for masks, truth in zip(mean, MASKS, strict=True)]
        assert found.metrics[f"mean_map_jaccard_{100 * mass:g}"] == pytest.approx(100 * mean_best_jaccard(fits))
    shares = [np.mean([(mask == label).mean() for label in (1, 2)]) for mask in MASKS]
    assert found.metrics["whole_image_jaccard"] == pytest.approx(100 * np.mean(shares))
    assert [row["image"] for row in found.tables["images"]] == [f"two/{n:05d}" for n in range(4)]
    drawn = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert drawn == ["pictures/two/00000-attention.png", "pictures/two/00000-features.png"]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Images of several sizes, one without an object, and one that has no mask."""
    for part in ("images", "masks"):
        (tmp_path / part / "sub").mkdir(parents=True)
    for name, height, width in (("a", 70, 100), ("sub/b", 100, 70), ("c", 64, 64)):
        frames, masks = made_up_video(1, height, width)
        Image.fromarray(frames[0]).save(tmp_path / "images" / f"{name}.jpg")
        write_mask(tmp_path / "masks" / f"{name}.png", masks[0] * (name != "c"))
    Image.fromarray(FRAMES[0]).save(tmp_path / "images/d.jpg")
    (tmp_path / "names.txt").write_text("a\nsub/b\n\nc\n")
    return tmp_path


def of_pairs(pairs: Path, **settings: Any) -> dict[str, Any]:
    return {
        "source": str(pairs / "images"),
        "masks": str(pairs / "masks"),
        "size": HEIGHT,
        "num_pictures": 0,
    } | settings


def test_images_with_masks_of_the_same_stems(targets: dict[str, Target], pairs: Path, tmp_path: Path) -> None:
    settings = of_pairs(pairs, names=str(pairs / "names.txt"), mass="0.5")
    found = evaluate("segmentation", targets["vit"], tmp_path / "out", **settings)
    assert sorted(row["image"] for row in found.tables["images"]) == ["a", "sub/b"]
    assert any("1 images without an object" in note for note in found.notes)
    square = evaluate("segmentation", targets["vit"], tmp_path / "square", shape="square", **settings)
    assert square.metrics.keys() == found.metrics.keys()
    assert square.metrics != found.metrics
    few = evaluate("segmentation", targets["vit"], tmp_path / "few", num_images=2, **settings)
    assert len(few.tables["images"]) + len(few.notes) - 1 == 2  # a picture, or a note of one without object


def test_kinds_of_masks(tmp_path: Path) -> None:
    """Palette and grey levels are labels, black and white are one object, colours are refused."""
    files = mask_layouts.find_files("key", str(tmp_path))
    labels = np.array([[0, 1], [3, 255]], dtype=np.uint8)
    Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8)).save(tmp_path / "colour.png")
    write_mask(tmp_path / "grey.png", labels)
    write_mask(tmp_path / "white.png", labels // 255 * 255)
    Image.fromarray(labels > 1).save(tmp_path / "bits.png")
    palette = Image.fromarray(labels // 255 * 255)
    palette.putpalette(PALETTE)
    palette.save(tmp_path / "palette.png")
    names = tuple(f"{name}.png" for name in ("grey", "white", "bits", "palette", "colour"))
    found = mask_layouts.Masked("", files, names, files, names, names)
    expected = [labels, labels // 255, labels > 1, labels // 255 * 255]
    for place, mask in enumerate(expected):
        assert (found.mask(place) == mask).all()
    assert found.palette(0) is None
    assert found.palette(3) == PALETTE
    with pytest.raises(ConfigError, match=r"colour\.png: is of mode RGB; a mask must be of palette or 8-bit grey"):
        found.mask(4)


def test_palettes_are_kept_and_made(tmp_path: Path) -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    mask_layouts.write_mask(tmp_path / "mask.png", mask, None)
    with Image.open(tmp_path / "mask.png") as image:
        assert (np.array(image) == mask).all()
        palette = image.getpalette()
    assert palette is not None
    # as the palette files of DAVIS and PASCAL VOC begin and end
    assert palette[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
    assert palette[-3:] == [224, 224, 192]


# --- what is refused before anything is computed ----------------------------------------------------------------------


def refuse(name: str, target: Target, settings: Mapping[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check(name, target, settings)
    return str(caught.value)


def check(name: str, target: Target, settings: Mapping[str, Any]) -> None:
    suite = load_suite(name)
    suite.check(*prepare(suite, target, settings))


def without(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def resized(path: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        with Image.open(root / path) as image:
            smaller = image.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.NEAREST)
        smaller.save(root / path)

    return change


def empty(path: str) -> Callable[[Path], None]:
    return lambda root: write_mask(root / path, np.zeros((HEIGHT, WIDTH), dtype=np.uint8))


def listing(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "ImageSets/2017/val.txt").write_text(text)


@pytest.mark.parametrize(
    ("change", "settings", "parts"),
    [
        (without("Annotations/480p/two/00002.png"), {}, ["1 of 4 frames of two have no mask", "00002"]),
        (resized("Annotations/480p/two/00001.png"), {}, ["00001.png is 64 x 32 pixels; must be 128 x 64"]),
        (empty("Annotations/480p/one/00000.png"), {}, ["one: the first mask", "holds no object"]),
        (without("ImageSets/2017/val.txt"), {}, ["video.subset = val", "ImageSets/2017/val.txt"]),
        (listing("two\nthree\n"), {}, ["no frames of three"]),
        (listing(""), {}, ["val.txt is empty"]),
        (listing("/JPEGImages/480p/two/00000.jpg /Annotations/480p/two/00000.png"), {}, ["a sequence per line"]),
        (None, {"sequences": "onne"}, ["no sequence onne; did you mean one?"]),
        (None, {"resolution": "480"}, ["video.resolution = 480", "did you mean 480p?"]),
        (None, {"subset": "vall"}, ["did you mean val?"]),
        (None, {"year": "2016"}, ["video.year = 2016"]),
        (None, {"size": 60}, ["video.size = 60: must be a multiple of the patch size 8, such as 56 or 64"]),
        (None, {"multiple": 4}, ["video.multiple = 4", "such as 8"]),
        (None, {"num_frames": 2}, ["video.num_frames = 2: must be a whole number >= 3"]),
        (None, {"temperature": 0}, ["video.temperature = 0"]),
        (None, {"topkk": 3}, ["did you mean video.topk?"]),
    ],
)
def test_videos_that_are_refused(
    change: Callable[[Path], object] | None,
    settings: dict[str, Any],
    parts: list[str],
    targets: dict[str, Target],
    davis: Path,
) -> None:
    if change is not None:
        change(davis)
    message = refuse("video", targets["vit"], small(source=str(davis)) | settings)
    for part in parts:
        assert part in message


def test_sources_of_another_layout(targets: dict[str, Target], davis: Path, tmp_path: Path) -> None:
    vit = targets["vit"]
    assert "video.source: must be given" in refuse("video", vit, {})
    assert "no such file or folder" in refuse("video", vit, {"source": str(tmp_path / "gone")})
    message = refuse("video", vit, {"source": str(davis / "JPEGImages")})
    assert "has no folder JPEGImages but 480p; must be in the layout of DAVIS" in message
    (tmp_path / "davis.zip").write_bytes(b"PK\3\4" + bytes(600))
    assert "must be a folder or a tar archive" in refuse("video", vit, {"source": str(tmp_path / "davis.zip")})
    for name in ("one", "two"):
        for number in (2, 3):
            (davis / "JPEGImages/480p" / name / f"{number:05d}.png").unlink()
    assert "two has 2 frames; must be 3 at least" in refuse("video", vit, {"source": str(davis)})


def test_images_that_are_refused(targets: dict[str, Target], pairs: Path) -> None:
    vit = targets["vit"]
    assert "segmentation.source: must be given" in refuse("segmentation", vit, {})
    message = refuse("segmentation", vit, of_pairs(pairs))
    assert "1 of 4 images have no mask: d; segmentation.names can name" in message
    message = refuse("segmentation", vit, {"source": str(pairs / "images")})
    assert "layout of DAVIS" in message
    assert "segmentation.masks must name the masks" in message
    (pairs / "names.txt").write_text("sub/bb\n")
    message = refuse("segmentation", vit, of_pairs(pairs, names=str(pairs / "names.txt")))
    assert "has no image sub/bb; did you mean sub/b?" in message
    (pairs / "names.txt").write_text("c\n")
    assert "no mask holds an object" in refuse("segmentation", vit, of_pairs(pairs, names=str(pairs / "names.txt")))
    (pairs / "names.txt").write_text("a\nc\n")
    message = refuse("segmentation", vit, of_pairs(pairs, names=str(pairs / "names.txt"), size=4))
    assert "segmentation.size = 4: a.jpg: 5 x 4 pixels: must be 8 x 8 at least" in message
    assert "segmentation.mass = 0.5,1.2: must be" in refuse("segmentation", vit, of_pairs(pairs, mass="0.5,1.2"))
    (pairs / "masks/c.png").write_bytes(b"no image")
    message = refuse("segmentation", vit, of_pairs(pairs, names=str(pairs / "names.txt")))
    assert "masks/c.png: must be a mask" in message


def test_backbones_without_attention_are_refused(targets: dict[str, Target], davis: Path) -> None:
    for kind in ("convnet", "pixels"):
        assert "needs a ViT of plain attention" in refuse("segmentation", targets[kind], {"source": str(davis)})


def test_backbones_without_patches_are_refused(targets: dict[str, Target], davis: Path) -> None:
    flat = replace(targets["vit"], backbone=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4)))
    assert "gives no features of patches" in refuse("video", flat, small(source=str(davis)))


# --- real videos ------------------------------------------------------------------------------------------------------


def test_davis(shared_data: Path, tmp_path: Path) -> None:
    """Masks of real videos written and read again; a mask kept where it was is no good in fast videos."""
    target = find_target("pixels", FeaturesConfig(), "runs")
    source = str(shared_data / "davis_mini.tar")
    settings = {"size": 64, "pixels_patch": 8, "num_frames": 3, "sequences": "dog,blackswan", "pictures": False}
    found = evaluate("video", target, tmp_path / "out", source=source, **settings)
    assert [row["sequence"] for row in found.tables["objects"]] == ["dog", "blackswan"]
    (first,) = mask_layouts.davis_sequences("video.source", source, chosen=["dog"], num_frames=1)
    with Image.open(tmp_path / "out/predictions/dog/00000.png") as image:
        assert (np.array(image) == first.mask(0)).all()
        assert image.getpalette() == first.palette(0)
    assert found.metrics["j_mean"] > 30
