"""The environment that every test and every process that it starts runs in."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Set before anything imports ray, mlflow or torch, and inherited by the processes that tests start.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",  # else it depends on whether ~/.ray/auth_token exists
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",  # torch's threads: several small processes at once are faster so
}
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)

# Processes that tests start by the method "forkserver" are forked from one that has imported these once for all.
multiprocessing.set_forkserver_preload(
    [
        "torch",
        "timm",
        "pytest",
        "dino_core.train",
        "orchestrator.data.bad_samples",
        "mlflow.store.tracking.sqlalchemy_store",
    ]
)

settings.register_profile("no deadline", deadline=None)  # on a busy machine any example can take long
settings.load_profile("no deadline")


@pytest.hookimpl(trylast=True)  # after deselection
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several processes the files with Ray come first: they take minutes, and short files fill the end evenly."""
    if hasattr(config, "workerinput"):
        with_ray = {item.path for item in items if item.get_closest_marker("ray")}
        items.sort(key=lambda item: item.path not in with_ray)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Small real data sets that lie beside the checkout on some machines and are no part of the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder ../shared/data beside the checkout")
    return folder
