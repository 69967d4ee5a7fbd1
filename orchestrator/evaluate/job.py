"""What a suite works with: the target, the images and their features."""

from __future__ import annotations

import logging
from functools import cache, cached_property

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.data.loaders import Part, make_loader
from orchestrator.data.sources import open_source
from orchestrator.data.split import Source
from orchestrator.evaluate.features import Extractor, Features, Images
from orchestrator.evaluate.settings import FeaturesConfig
from orchestrator.evaluate.targets import Target
from orchestrator.evaluate.views import CentreCrop, View
from orchestrator.evaluation import fixed_choice

logger = logging.getLogger(__name__)


class Data:
    """The images of `data.source`, opened once.

    Args:
        is_given: Whether it was named, or is that of the run.
    """

    def __init__(self, config: RunConfig, target: Target, *, is_given: bool) -> None:
        self.config = config
        self._target, self._is_given = target, is_given

    @cached_property
    def source(self) -> Source:
        if not self._is_given:
            raise ConfigError(f"data.source: must be given; {self._target.name} is no run, whose images could be taken")
        return open_source(self.config.data)

    @cached_property
    def digest(self) -> str:
        return self.source.digest()

    @cache  # noqa: B019 - there is one for each command
    def images(self, part: Part, limit: int | None) -> Images:
        split = self.source.train if part == "train" else self.source.test
        if split is None:
            data = self.config.data
            raise ConfigError(f"data.source = {data.source}: has no split {data.test_split} (data.test_split)")
        loader = make_loader(self.config, self.source, part, self.digest)
        return Images(split, fixed_choice(len(split), limit), f"{self.digest} {part}", loader, part)


class Job:
    """What one suite does: a target, and the images and features that it asks for."""

    def __init__(self, target: Target, data: Data, settings: FeaturesConfig, extractor: Extractor) -> None:
        self.target, self.settings = target, settings
        self.config = data.config
        """Of which `data`, `cluster` and `tracking` are used."""
        self.uses_source = False
        """Whether the suite has asked for the images of `data.source`."""
        self._data, self._extractor = data, extractor
        self._left_out: set[tuple[str, int]] = set()

    @property
    def source(self) -> Source:
        """What `data.source` names.

        Raises:
            ConfigError: It cannot be opened, or was not given for a target that was trained on nothing here.
        """
        self.uses_source = True
        return self._data.source

    @property
    def data_digest(self) -> str:
        """Of `source`, which may have to look at every file."""
        return self._data.digest

    def check_labelled(self, suite: str) -> None:
        """Raise ConfigError unless `source` has labelled training images and labelled test images."""
        source, data = self.source, self.config.data
        problem = None
        if source.test is None:
            problem = f"has no split {data.test_split} (data.test_split)"
        elif source.train.labels is None or source.test.labels is None:
            where = [
                name for name, split in (("training", source.train), ("test", source.test)) if split.labels is None
            ]
            problem = f"has no labels of its {' and '.join(where)} images"
        if problem is not None:
            notes = "".join(f"; {note}" for note in source.notes())
            raise ConfigError(
                f"data.source = {data.source}: {problem}; {suite} needs labelled training and test images{notes}"
            )

    def images(self, part: Part) -> Images:
        """The images of a split of `source`, those that `features.num_train` and `features.num_test` leave.

        Raises:
            ConfigError: There is no such split.
        """
        self.uses_source = True
        return self._data.images(part, self.settings.num_train if part == "train" else self.settings.num_test)

    def centre_crop(self) -> CentreCrop:
        """The view that pooled features are taken from."""
        image = self.target.image
        return CentreCrop(image.size, image.crop_fraction, image.mean, image.std)

    def features(self, images: Images, view: View | None = None) -> Features:
        """Features of images, computed once for each view; by default pooled ones of the centre crop.

        Raises:
            RunFailed: No image can be read, or features are not finite.
        """
        found = self._extractor.extract(images, view or self.centre_crop())
        for sample, reason in found.left_out.items():
            self.leave_out(images, sample, reason)
        return found

    def leave_out(self, images: Images, sample: int, reason: str) -> None:
        """Count an image that cannot be read, and log it the first time."""
        if (images.digest, sample) not in self._left_out:
            name = images.split.name(sample)
            logger.warning("%s: the %s image %s is left out: %s", self.target.name, images.name, name, reason)
        self._left_out.add((images.digest, sample))

    @property
    def num_left_out(self) -> int:
        """Images that could not be read, each counted once."""
        return len(self._left_out)
