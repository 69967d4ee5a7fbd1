"""Pictures of the trials side by side, inside the page."""

from __future__ import annotations

import base64
from html import escape

from orchestrator.compare import Comparison
from orchestrator.trials import Pictures, TrialSummary

MAX_TRIALS = 12
"""Of the best: more pictures are not looked at side by side."""
MAX_BYTES = 8_000_000
"""Of all pictures of a page, before base64 makes a third more of them."""
_TITLES = {"attention": "Attention maps", "features": "Features", "crops": "Crops"}


def gallery(comparison: Comparison) -> str:
    """A group of pictures for each kind, best trial first; "" where there are none.

    What is beyond `MAX_TRIALS` or `MAX_BYTES` is left out, and the page says so.
    """
    found: list[tuple[int, TrialSummary, Pictures]] = []
    for place, row in enumerate(comparison.rows):
        if len(found) < MAX_TRIALS and (pictures := row.trial.pictures) is not None:
            found.append((place, row.trial, pictures))
    kinds = dict.fromkeys([*_TITLES, *(kind for _, _, pictures in found for kind in sorted(pictures.files))])
    parts, left, left_out = [], MAX_BYTES, 0
    for kind in kinds:
        figures = []
        for place, trial, pictures in found:
            content = pictures.files.get(kind)
            if content is None:
                continue
            if len(content) > left:
                left_out += 1
                continue
            left -= len(content)
            figures.append(_figure(place, trial, pictures.step, content))
        if figures:
            parts.append(f'<h3>{escape(_TITLES.get(kind, kind))}</h3><div class="pictures">{"".join(figures)}</div>')
    if not parts:
        return ""
    notes = [f"Of the {MAX_TRIALS} best trials that have any."] if len(comparison.rows) > MAX_TRIALS else []
    notes += [f"{left_out} pictures are left out: a page holds {MAX_BYTES / 1e6:.0f} MB of them."] if left_out else []
    words = f"<p>{' '.join(notes)}</p>" if notes else ""
    return f'<section id="pictures"><h2>Pictures</h2>{words}{"".join(parts)}</section>'


def _figure(place: int, trial: TrialSummary, step: int, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    words = f"{place + 1}. {escape(trial.name)}, step {step:,}"
    return f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
