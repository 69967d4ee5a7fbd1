"""Damage of every kind to files of every format: refused with a reason or decoded, in no time, without a crash.

The mutants are decoded in a process of their own (this file, run as a script), so that a crash in a library fails the
test and not the session.
"""

from __future__ import annotations

import collections
import faulthandler
import io
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from orchestrator.data.images import BadImage, decode

MUTANTS = 200  # of each file
SECONDS = 5.0  # for one mutant, where milliseconds are usual
LIMIT = 1_000_000
KINDS = ("flipped bits", "cut", "inserted", "deleted", "overwritten header")


def originals() -> dict[str, bytes]:
    y, x = np.mgrid[0:32, 0:40]
    rgb = Image.fromarray(np.stack([255 * x / 40, 255 * y / 32, (x * 7 + y * 13) % 256], axis=2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "JPEG, baseline": (rgb, "JPEG", {}),
        "JPEG, progressive": (rgb, "JPEG", {"progressive": True}),
        "JPEG, grey": (rgb.convert("L"), "JPEG", {}),
        "JPEG, CMYK": (rgb.convert("CMYK"), "JPEG", {}),
        "JPEG, turned": (rgb, "JPEG", {"exif": exif}),
        "PNG": (rgb, "PNG", {}),
        "PNG, palette": (rgb.convert("P"), "PNG", {}),
        "PNG, 16 bits": (Image.fromarray((x * 1000 + y).astype(np.uint16)), "PNG", {}),
        "GIF": (rgb, "GIF", {}),
        "WebP": (rgb, "WEBP", {}),
        "WebP, lossless": (rgb, "WEBP", {"lossless": True}),
        "TIFF": (rgb, "TIFF", {}),
        "TIFF, LZW": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "TIFF, deflate": (rgb, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "BMP": (rgb, "BMP", {}),
        "PPM": (rgb, "PPM", {}),
        "AVIF": (rgb, "AVIF", {}),
        "JPEG 2000": (rgb, "JPEG2000", {}),
        "TGA": (rgb, "TGA", {"compression": "tga_rle"}),
    }
    encoded = {}
    for name, (image, kind, options) in files.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded[name] = buffer.getvalue()
    return encoded


def mutants(data: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    for number in range(MUTANTS):
        mutant, kind = bytearray(data), KINDS[number % len(KINDS)]
        place, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
        if kind == "flipped bits":
            for where in rng.integers(0, len(data), int(rng.integers(1, 5))):
                mutant[where] ^= 1 << int(rng.integers(8))
        elif kind == "cut":
            del mutant[place:]
        elif kind == "inserted":
            mutant[place:place] = rng.bytes(length)
        elif kind == "deleted":
            del mutant[place : place + length]
        else:
            start = int(rng.integers(2, 64))
            mutant[start : start + length] = rng.bytes(length)
        yield kind, bytes(mutant)


def main() -> None:
    """Print the outcomes by file and kind of damage: [decoded, refused], and the slowest of all in seconds."""
    warnings.simplefilter("ignore")
    outcomes: dict[str, dict[str, list[int]]] = {}
    reasons: set[str] = set()
    slowest = 0.0
    for name, data in originals().items():
        whole = decode(data, LIMIT)
        counts = collections.defaultdict(lambda: [0, 0])
        for kind, mutant in mutants(data, np.random.default_rng(0)):
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            started = time.perf_counter()
            try:
                pixels = decode(mutant, LIMIT)
            except BadImage as error:
                reasons.add(str(error))
                counts[kind][1] += 1
            else:
                assert pixels.dtype == np.uint8
                assert pixels.ndim == 3
                assert pixels.shape[2] == 3
                assert 0 < pixels.size <= 3 * LIMIT
                assert pixels.flags.c_contiguous
                assert pixels.flags.writeable
                if name.startswith("JPEG,"):  # what libjpeg finds whole, Pillow does, and has the same pixels
                    image = ImageOps.exif_transpose(Image.open(io.BytesIO(mutant))).convert("RGB")
                    assert np.abs(pixels.astype(int) - np.array(image)).max() <= 2, (name, kind)
                assert kind != "cut" or np.array_equal(pixels, whole), f"{name}: cut short and filled in"
                counts[kind][0] += 1
            slowest = max(slowest, time.perf_counter() - started)
            faulthandler.cancel_dump_traceback_later()
        outcomes[name] = counts
    assert all(reasons)
    print(json.dumps({"outcomes": outcomes, "slowest": slowest}))


def test_no_damage_crashes_hangs_or_is_filled_in() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    ended = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=250, env=environment)
    assert ended.returncode == 0, f"exit code {ended.returncode}\n{ended.stderr[-4000:]}"
    found = json.loads(ended.stdout)
    assert found["slowest"] < SECONDS
    for name, counts in found["outcomes"].items():
        assert sum(map(sum, counts.values())) == MUTANTS, name
        assert sum(refused for _, refused in counts.values()) > MUTANTS // 10, name


def every_cut(data: bytes, step: int) -> Iterator[bytes]:
    yield from (data[:length] for length in range(1, len(data), step))


def test_whatever_the_length_a_cut_file_is_refused_or_whole() -> None:
    """Only what follows the last pixel may be missing."""
    for name, data in originals().items():
        if name.startswith("TIFF"):
            continue  # its directory stands last, and libtiff writes of each failure to stderr
        whole = decode(data, LIMIT)
        for cut in every_cut(data, 1 + len(data) // 500):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    pixels = decode(cut, LIMIT)
                except BadImage:
                    continue
            assert np.array_equal(pixels, whole), f"{name} cut to {len(cut)} of {len(data)} bytes"


if __name__ == "__main__":
    main()
