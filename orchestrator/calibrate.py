"""A few real steps of a run in this process, to measure what its estimate would otherwise assume."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.estimate import Rate
from orchestrator.overrides import override

if TYPE_CHECKING:
    from orchestrator.data.split import Source

NUM_WARM_UP, NUM_MEASURED = 2, 5
PATIENCE_S = 30.0
"""After this long no more steps are taken than the two that are needed."""
_NUM_BATCHES = 2
_EVAL_IMAGES = 64


def check_can_calibrate(config: RunConfig) -> None:
    """Raise ConfigError if the run is for GPUs and this machine has none: its CPU would say nothing about them."""
    import torch

    if config.cluster.use_gpu and not torch.cuda.is_available():
        raise ConfigError("--calibrate: cluster.use_gpu = True, but this machine has no GPU to measure; leave it out")


def calibrate(config: RunConfig, source: Source) -> Rate:
    """Measure one worker: its share of a batch from the run's own images, steps of the real model, and an evaluation.

    Two steps warm up and up to five are measured, of which the median counts; where steps are long (`PATIENCE_S`), one
    and one. Batches are made outside these times. Nothing is written, and torch's number of threads is set back.

    Raises:
        ConfigError: as `check_can_calibrate` and building the model do.
    """
    import torch

    check_can_calibrate(config)
    share = config.pretrain.batch_size // config.cluster.num_workers
    alone: dict[str, Any] = {"pretrain.batch_size": share, "cluster.num_workers": 1, "cluster.decoded_cache_gb": 0.0}
    alone |= {"cluster.data_cpus": 1, "pretrain.steps": 1000}
    threads = torch.get_num_threads()
    try:
        return _calibrate(override(config, alone), source)
    finally:
        torch.set_num_threads(threads)


def _calibrate(config: RunConfig, source: Source) -> Rate:
    import torch

    from dino_core.crops import MultiCrop
    from dino_core.eval.features import extract_features
    from dino_core.train import TrainState, train_step
    from orchestrator.data.loaders import make_loader
    from orchestrator.data.plan import index_plan
    from orchestrator.data.stream import Batches, as_tensors

    pretrain = config.pretrain
    device = torch.device("cuda:0" if config.cluster.use_gpu else "cpu")
    crops = MultiCrop(pretrain.crops, pretrain.seed)
    batches = Batches(
        split=source.train,
        loader=make_loader(config, source, "train", None),
        crops=crops,
        plan=index_plan(config, source.train),
        start_step=0,
        stop_step=_NUM_BATCHES,
    )
    torch.set_num_threads(1)  # as the tasks that make the batches
    made, batch_cpu_s = [], []
    for step in range(_NUM_BATCHES):
        began = time.process_time()
        made.append(as_tensors(batches.make(step)))
        batch_cpu_s.append(time.process_time() - began)

    torch.set_num_threads(config.cluster.cpus_per_worker)
    state = TrainState.create(pretrain, len(source.train), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def one_step() -> None:
        train_step(state, crops.finish(made[state.step % _NUM_BATCHES], device), diagnose=False)

    step_s = _median_s(one_step, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    size = pretrain.crops.global_size
    num_images = min(_EVAL_IMAGES, pretrain.eval.batch_size)
    images = torch.zeros(num_images, 3, size, size)
    eval_s = _median_s(lambda: extract_features(state.teacher.backbone, [images]), device) / num_images
    # The first batch also pays for what is opened and imported.
    return Rate(step_s, min(batch_cpu_s), eval_s, peak)


def _median_s(run: Callable[[], object], device: Any) -> float:
    """Seconds of one call: two to warm up, then the median of up to five."""
    import torch

    seconds: list[float] = []
    began = time.perf_counter()
    for call in range(NUM_WARM_UP + NUM_MEASURED):
        if call >= 2 and time.perf_counter() - began > PATIENCE_S:
            break
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[min(NUM_WARM_UP, len(seconds) - 1) :])
