"""Images with masks: videos in the layout of DAVIS, or two folders of files with the same stems. No torch.

::

    DAVIS, as a folder or a tar archive, at its top or in a folder of its own
        JPEGImages/480p/<sequence>/00000.jpg ...
        Annotations/480p/<sequence>/00000.png ...     palette or grey: 0 background, 255 void, else an object
        ImageSets/2017/val.txt                        names of sequences, a line each
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dino_core.config import ConfigError
from orchestrator.data.loaders import Decoder
from orchestrator.data.readers.folder import Files
from orchestrator.data.split import DIGEST_LENGTH, Split
from orchestrator.data.storage import Folder, find, is_url
from orchestrator.data.tar_folder import open_archive
from orchestrator.evaluate.image_files import is_image
from orchestrator.overrides import did_you_mean

if TYPE_CHECKING:
    from orchestrator.evaluate.features import Images

_IMAGES, _MASKS, _SETS = "JPEGImages", "Annotations", "ImageSets"
_YEARS = ("2017", "2016")
"""Of lists of sequences, the one that is taken first if none is asked for."""
_SIDEWAYS = (5, 6, 7, 8)
_ORIENTATION = 0x0112
_LISTED = 3
_REMOTE_READS = 16


@dataclass(frozen=True)
class Masked:
    """Images and their masks, in order."""

    name: str
    """Of the sequence; empty for images that are none."""
    folder: Folder
    images: tuple[str, ...]
    masks_folder: Folder
    masks: tuple[str, ...]
    stems: tuple[str, ...]
    """What an image and its mask are called, for tables and files."""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, places: Sequence[int]) -> Masked:
        """Some of them."""
        images, masks, stems = (tuple(all_[n] for n in places) for all_ in (self.images, self.masks, self.stems))
        return Masked(self.name, self.folder, images, self.masks_folder, masks, stems)

    def as_images(self, max_pixels: int, places: Sequence[int] | None = None) -> Images:
        """Them, or some of them, for `Job.features`."""
        from orchestrator.evaluate.features import Images

        files = Files(self.folder, self.images)
        digest = hashlib.sha256(files.fingerprint()).hexdigest()[:DIGEST_LENGTH]
        split = Split(files, None, _REMOTE_READS if is_url(self.folder.address) else 1)
        ids = np.arange(len(self)) if places is None else np.asarray(places)
        return Images(split, ids, digest, Decoder(max_pixels), self.name or "images")

    def image_size(self, place: int) -> tuple[int, int]:
        """Height and width as decoded, read from the header.

        Raises:
            ConfigError: not an image.
        """
        name = self.images[place]
        with _opened(self.folder, name, "an image") as image:
            sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
            return (image.width, image.height) if sideways else (image.height, image.width)

    def mask_size(self, place: int) -> tuple[int, int]:
        """Height and width, read from the header.

        Raises:
            ConfigError: not a mask.
        """
        with _opened(self.masks_folder, self.masks[place], "a mask") as image:
            _check_mode(image, f"{self.masks_folder.address}/{self.masks[place]}")
            return image.height, image.width

    def mask(self, place: int) -> NDArray[np.uint8]:
        """Labels [H, W].

        Raises:
            ConfigError: not a mask.
        """
        return self._mask(place)[0]

    def palette(self, place: int) -> list[int] | None:
        """Of the mask: red, green, blue of each label in turn; None for a grey one."""
        return self._mask(place)[1]

    def _mask(self, place: int) -> tuple[NDArray[np.uint8], list[int] | None]:
        path = f"{self.masks_folder.address}/{self.masks[place]}"
        with _opened(self.masks_folder, self.masks[place], "a mask") as image:
            _check_mode(image, path)
            try:
                labels = np.array(image).astype(np.uint8)
            except (OSError, SyntaxError, ValueError) as error:
                raise ConfigError(f"{path}: cannot be decoded: {error}") from error
            palette = image.getpalette() if image.mode == "P" else None
        if palette is None and set(np.unique(labels)) <= {0, 255}:
            labels = labels // 255  # a grey mask of black and white only is of one object
        return labels, palette

    def check_sizes(self, key: str) -> None:
        """Raise ConfigError if an image is of another size than its mask."""
        for place in range(len(self)):
            seen, masked = self.image_size(place), self.mask_size(place)
            if seen != masked:
                raise ConfigError(
                    f"{key}: the mask {self.masks[place]} is {masked[1]} x {masked[0]} pixels; must be "
                    f"{seen[1]} x {seen[0]}, as the image {self.images[place]}"
                )


def write_mask(path: Path, mask: NDArray[np.uint8], palette: Sequence[int] | None) -> None:
    """A palette PNG of labels [H, W], without loss.

    Args:
        palette: red, green, blue of each label in turn; None: that of PASCAL VOC, which DAVIS has too.
    """
    image = Image.fromarray(mask)
    colours = list(palette) if palette is not None else voc_palette()
    image.putpalette((colours + [0] * 768)[:768])
    image.save(path, "PNG")


def voc_palette() -> list[int]:
    """Red, green, blue of 256 labels: bits 0, 3, 6 of a label, from the lowest on, are the highest ones of red, bits
    1, 4, 7 those of green, 2 and 5 those of blue."""
    labels = np.arange(256)
    channels = [sum(((labels >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(channels, axis=1).flatten().tolist()


def find_files(key: str, address: str) -> Folder:
    """The folder or tar archive that `address` names.

    Raises:
        ConfigError: There is none. Names `key`.
    """
    place = find(key, address)
    return open_archive(key, place) if place.is_file else place.folder


def davis_sequences(
    key: str,
    address: str,
    *,
    subset: str = "val",
    year: str | None = None,
    resolution: str = "480p",
    chosen: Sequence[str] = (),
    num_frames: int | None = None,
) -> list[Masked]:
    """Sequences in the layout of DAVIS.

    Args:
        key: Of the setting that holds `address`; its siblings are named in messages.
        year: Of the list; None: 2017 or, if it has none, 2016.
        chosen: Sequences; empty: all of the list.
        num_frames: The first ones of each sequence; None: all.

    Raises:
        ConfigError: Another layout, an unknown sequence (names the nearest), or frames without masks.
    """
    group = key.rpartition(".")[0]
    top, files = _top(key, address, find_files(key, address))
    listed = _listed(key, address, top, files, subset, year)
    images, masks = (_by_sequence(files, f"{part}/{resolution}/") for part in (_IMAGES, _MASKS))
    if not images:
        there = sorted({name.split("/")[1] for name in files if name.startswith(f"{_IMAGES}/") and name.count("/") > 1})
        raise ConfigError(
            f"{group}.resolution = {resolution}: {address} has no {_IMAGES}/{resolution}; there is "
            f"{', '.join(there) or 'none'}{did_you_mean(resolution, there)}"
        )
    unknown = [name for name in chosen if name not in images]
    if unknown:
        raise ConfigError(
            f"{group}.sequences = {','.join(chosen)}: {address} has no sequence {unknown[0]}"
            f"{did_you_mean(unknown[0], images) or f'; there is {_some(sorted(images))}'}"
        )
    missing = [name for name in listed if name not in images] if not chosen else []
    if missing:
        raise ConfigError(f"{key} = {address}: no frames of {_some(missing)}, which {_SETS} lists for {subset}")
    found = []
    for name in chosen or listed:
        frames = dict(list(images[name].items())[:num_frames])
        annotated = masks.get(name, {})
        without = [stem for stem in frames if stem not in annotated]
        if without:
            raise ConfigError(
                f"{key} = {address}: {len(without)} of {len(frames)} frames of {name} have no mask in "
                f"{_MASKS}/{resolution}/{name}: {_some(without)}"
            )
        stems = tuple(frames)
        found.append(Masked(name, top, tuple(frames.values()), top, tuple(annotated[stem] for stem in stems), stems))
    return found


def image_mask_pairs(key: str, images: str, masks: str, names: str | None) -> Masked:
    """Images and masks of the same stems, from two folders.

    Args:
        key: Group of the settings `source`, `masks` and `names`.
        names: A text file with the stems that are meant, a line each; None: all images.

    Raises:
        ConfigError: An image without mask, no images, or a name that is not there (names the nearest).
    """
    places = [find_files(f"{key}.source", images), find_files(f"{key}.masks", masks)]
    found, masked = (_by_stem(place.files()) for place in places)
    if not found:
        raise ConfigError(f"{key}.source = {images}: holds no images")
    wanted = list(found)
    if names is not None:
        place = find(f"{key}.names", names)
        if not place.is_file:
            raise ConfigError(f"{key}.names = {names}: must be a text file with a name per line")
        (file,) = place.files
        wanted = [line.strip() for line in place.folder.read(file).decode("utf-8", "replace").splitlines()]
        wanted = [line for line in wanted if line]
        unknown = [stem for stem in wanted if stem not in found]
        if unknown or not wanted:
            what = f"{images} has no image {_some(unknown)}" if unknown else "holds no name"
            raise ConfigError(f"{key}.names = {names}: {what}{did_you_mean(unknown[0], found) if unknown else ''}")
    without = [stem for stem in wanted if stem not in masked]
    if without:
        raise ConfigError(
            f"{key}.masks = {masks}: {len(without)} of {len(wanted)} images have no mask: {_some(without)}; "
            f"{key}.names can name those that have one"
        )
    stems = tuple(wanted)
    return Masked("", places[0], tuple(found[s] for s in stems), places[1], tuple(masked[s] for s in stems), stems)


def _top(key: str, address: str, folder: Folder) -> tuple[Folder, list[str]]:
    """The folder that holds `JPEGImages`, and its files."""
    files = folder.files()
    tops = {
        name[: name.index(f"{_IMAGES}/")] for name in files if name.startswith(f"{_IMAGES}/") or f"/{_IMAGES}/" in name
    }
    if len(tops) != 1:
        inside = sorted({name.split("/", 1)[0] for name in files})
        problem = f"several folders {_IMAGES}" if tops else f"no folder {_IMAGES} but {_some(inside) or 'nothing'}"
        raise ConfigError(
            f"{key} = {address}: has {problem}; must be in the layout of DAVIS, which docs/evaluation.md shows"
        )
    (prefix,) = tops
    if not prefix:
        return folder, files
    return folder.below(prefix.rstrip("/")), [name.removeprefix(prefix) for name in files if name.startswith(prefix)]


def _listed(key: str, address: str, top: Folder, files: Sequence[str], subset: str, year: str | None) -> list[str]:
    """Names of a subset's sequences."""
    group = key.rpartition(".")[0]
    lists = [name for name in files if name.startswith(f"{_SETS}/") and name.endswith(".txt")]
    wanted = [f"{_SETS}/{each}/{subset}.txt" for each in ([year] if year else _YEARS)]
    there = [name for name in wanted if name in lists]
    if not there:
        setting = f"{group}.year = {year}" if year else f"{group}.subset = {subset}"
        raise ConfigError(
            f"{setting}: {address} has no {' or '.join(wanted)}; there is {_some(lists) or 'no list'}"
            f"{did_you_mean(subset, {PurePosixPath(name).stem for name in lists})}"
        )
    lines = top.read(there[0]).decode("utf-8", "replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ConfigError(f"{key} = {address}: {there[0]} is empty")
    if any("/" in name for name in names):
        raise ConfigError(f"{key} = {address}: {there[0]} must hold the name of a sequence per line, not {names[0]!r}")
    return names


def _by_sequence(files: Sequence[str], prefix: str) -> dict[str, dict[str, str]]:
    """Files below `prefix` by sequence and stem, in order of the stems."""
    found: dict[str, dict[str, str]] = {}
    for name in files:
        if name.startswith(prefix) and name.count("/") == prefix.count("/") + 1 and is_image(name):
            sequence = name.removeprefix(prefix).split("/")[0]
            found.setdefault(sequence, {})[PurePosixPath(name).stem] = name
    return {sequence: dict(sorted(stems.items())) for sequence, stems in sorted(found.items())}


def _by_stem(names: Sequence[str]) -> dict[str, str]:
    """Images among files, by path without suffix, in order."""
    return {str(PurePosixPath(name).with_suffix("")): name for name in names if is_image(name)}


def _opened(folder: Folder, name: str, what: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(folder.read(name)))
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"{folder.address}/{name}: must be {what}: {error}") from error


def _check_mode(image: Image.Image, path: str) -> None:
    if image.mode not in ("P", "L", "1"):
        raise ConfigError(f"{path}: is of mode {image.mode}; a mask must be of palette or 8-bit grey levels")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
