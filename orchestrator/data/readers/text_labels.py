"""Labels that are stored as text."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.split import Labels

_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")


def are_numbers(texts: Collection[str]) -> bool:
    """Whether every text is a whole number as Python writes it. `007` is none: it and `7` would become one class."""
    return all(_WHOLE.fullmatch(text) for text in texts)


def choose_labels(names: Sequence[str], codes: NDArray[np.int64], *, numbers: bool) -> Labels:
    """The labels of some images.

    Args:
        names: The labels that there are, as text.
        codes: [num_images] place in `names`; -1 for an image without a label.
        numbers: Whether the names are whole numbers, to be ordered as such; negative ones then mean no label.

    Returns:
        One label per image, None for one that has none.
    """
    if not numbers:
        texts = [*names, None]  # code -1 is the last
        return [texts[code] for code in codes.tolist()]
    values = [*(number if (number := int(name)) >= 0 else None for name in names), None]
    return [values[code] for code in codes.tolist()]
