"""Crops are made where the trainer is while it has CPUs free, and on other machines when it has none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dino_core.config import CropsConfig
from dino_core.crops import MultiCrop
from orchestrator.data import stream
from orchestrator.data.loaders import Decoder
from orchestrator.data.plan import IndexPlan
from orchestrator.data.split import Split
from orchestrator.data.stream import Batches, ray_batches

pytestmark = pytest.mark.ray


class Recorder:
    """Images that leave the number of the machine that read them in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return 40

    def read(self, index: int) -> NDArray[np.uint8]:
        import ray

        (self._folder / f"{index}-{ray.get_runtime_context().get_node_id()}").touch()
        return np.full((8, 8, 3), index, dtype=np.uint8)

    def name(self, index: int) -> str:
        return str(index)

    def units(self) -> None:
        return None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    yield ray
    ray.shutdown()
    cluster.shutdown()
    gc.collect()


def machines(folder: Path) -> set[str]:
    return {path.name.split("-")[1] for path in folder.iterdir()}


def test_crops_stay_here_or_go_where_cpus_are(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = cluster
    monkeypatch.setattr(stream, "_CHEAP_SHARE", 0.0)
    monkeypatch.setattr(stream, "_HEAD_SECONDS", 1e-9)
    here = ray.get_runtime_context().get_node_id()
    (there,) = {node["NodeID"] for node in ray.nodes()} - {here}

    def make(folder: Path) -> int:
        folder.mkdir()
        crops = MultiCrop(CropsConfig(global_size=8, num_local_crops=0), seed=0)
        split = Split(Recorder(folder), None)
        plan = IndexPlan(40, 0, 4)
        batches = Batches(split=split, crops=crops, plan=plan, loader=Decoder(100), start_step=0, stop_step=10)
        made = len(list(ray_batches(batches, data_cpus=1)))
        for path in folder.iterdir():  # the first batch is this process's own
            if int(path.name.split("-")[0]) in plan.locate(plan.positions(0))[1]:
                path.unlink()
        return made

    assert make(tmp_path / "free") == 10
    assert machines(tmp_path / "free") == {here}

    class Trainer:
        def ready(self) -> bool:
            return True

    trainer = ray.remote(Trainer).options(num_cpus=1, label_selector={"ray.io/node-id": here}).remote()
    assert ray.get(trainer.ready.remote(), timeout=200)
    assert make(tmp_path / "taken") == 10
    assert machines(tmp_path / "taken") == {there}
    ray.kill(trainer)
