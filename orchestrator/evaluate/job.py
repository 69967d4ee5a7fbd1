"""What a suite works with: the target, the images and their features."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.data.loaders import make_loader
from orchestrator.data.sources import open_source
from orchestrator.data.split import Source
from orchestrator.evaluate.features import Extractor, Features, Images
from orchestrator.evaluate.settings import FeaturesConfig
from orchestrator.evaluate.targets import Target
from orchestrator.evaluate.views import CentreCrop, View
from orchestrator.evaluation import fixed_choice


class Job:
    """One target on one set of data, for all suites of a command.

    Args:
        config: Of which `data`, `cluster` and `tracking` are used.
        has_data: Whether `data.source` was given, or is that of the run.
    """

    def __init__(
        self, target: Target, config: RunConfig, settings: FeaturesConfig, extractor: Extractor, *, has_data: bool
    ) -> None:
        self.target, self.config, self.settings = target, config, settings
        self._extractor, self._has_data = extractor, has_data
        self._images: dict[str, Images] = {}

    @cached_property
    def source(self) -> Source:
        """What `data.source` names.

        Raises:
            ConfigError: It cannot be opened, or was not given for a target that was trained on nothing here.
        """
        if not self._has_data:
            raise ConfigError(f"data.source: must be given; {self.target.name} is no run, whose images could be taken")
        return open_source(self.config.data)

    @property
    def has_opened_source(self) -> bool:
        """Whether a suite has asked for the images of `data.source`."""
        return "source" in self.__dict__

    @cached_property
    def data_digest(self) -> str:
        """Of `source`, which may have to look at every file."""
        return self.source.digest()

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

    def images(self, part: Literal["train", "test"]) -> Images:
        """The images of a split of `source`, those that `features.num_train` and `features.num_test` leave.

        Raises:
            ConfigError: There is no such split.
        """
        if part not in self._images:
            split = self.source.train if part == "train" else self.source.test
            if split is None:
                raise ConfigError(
                    f"data.source = {self.config.data.source}: has no split {self.config.data.test_split} "
                    "(data.test_split)"
                )
            limit = self.settings.num_train if part == "train" else self.settings.num_test
            loader = make_loader(self.config, self.source, part, self.data_digest)
            ids = fixed_choice(len(split), limit)
            self._images[part] = Images(split, ids, f"{self.data_digest} {part}", loader, part)
        return self._images[part]

    def centre_crop(self) -> CentreCrop:
        """The view that pooled features are taken from."""
        image = self.target.image
        return CentreCrop(image.size, image.crop_fraction, image.mean, image.std)

    def features(self, images: Images, view: View | None = None) -> Features:
        """Features of images, computed once for each view; by default pooled ones of the centre crop.

        Raises:
            RunFailed: No image can be read, or features are not finite.
        """
        return self._extractor.extract(images, view or self.centre_crop())

    def num_unreadable(self) -> int:
        """Images left out of all features that were asked for so far, each counted once."""
        return self._extractor.num_unreadable
