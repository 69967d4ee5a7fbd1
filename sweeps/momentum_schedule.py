"""Momentum of the teacher over the run: where it begins, where it ends, and the shape of the way.

    python -m orchestrator sweep momentum_schedule
    python -m orchestrator sweep momentum_schedule --base dino_vits16 data.source=/path/to/imagenet pretrain.epochs=100

Paper: arXiv 2104.14294 has a cosine from 0.996 to 1, the row `cosine_0.996_to_1`, as BYOL does (arXiv 2006.07733);
neither prints numbers for another shape or end.
Cost there: not given.
On a base as short as quickstart (500 steps) a momentum near 1 leaves the teacher near its random weights.
"""

from __future__ import annotations

from orchestrator.sweep import Row, Sweep


def _row(shape: str, base: float, final: float | None = None) -> tuple[str, Row]:
    """A row and its name. A constant stays at its base, and is given that as its end so that its record says so."""
    end = base if final is None else final
    changes = {
        "pretrain.teacher.momentum": base,
        "pretrain.teacher.final_momentum": end,
        "pretrain.teacher.momentum_schedule": shape,
    }
    return f"{shape}_{base:g}" if final is None else f"{shape}_{base:g}_to_{end:g}", Row(changes=changes)


SWEEP = Sweep(
    base="quickstart",
    rows=dict(
        [
            _row("constant", 0.9),
            _row("constant", 0.99),
            _row("constant", 0.996),
            _row("cosine", 0.9, 1.0),
            _row("linear", 0.9, 1.0),
            _row("cosine", 0.99, 0.996),
            _row("linear", 0.99, 0.996),
            _row("cosine", 0.996, 1.0),
            _row("linear", 0.996, 1.0),
        ]
    ),
)
