"""Who computes the features: this process, or tasks on a Ray cluster, each a share of the images."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from dino_core.config import ConfigError
from orchestrator.config import RunConfig
from orchestrator.data.images import StorageError
from orchestrator.delivery import first_line
from orchestrator.errors import RunFailed
from orchestrator.evaluate.feature_cache import Part
from orchestrator.evaluate.features import Images, Share, extract_share
from orchestrator.evaluate.views import View
from orchestrator.ray_cluster import Capacity, cluster_address, connect, disconnect

_SHARES_AHEAD = 2
"""Of each task that can run, so that none waits for the driver."""


class Compute(Protocol):
    """Computes shares of images."""

    def parts(self, backbone: nn.Module, images: Images, view: View, shares: Iterable[Share]) -> Iterator[Part]:
        """What `extract_share` gives for each share, in order.

        Raises:
            RunFailed: The images cannot be read for a reason that is not their own, or Ray failed.
        """

    def close(self) -> None:
        """Let go of the cluster."""


def choose_compute(config: RunConfig) -> Compute:
    """Ray tasks where a cluster is named or `cluster.launcher = train`; else this process. Starts nothing.

    Raises:
        ConfigError: A launcher of sweeps, or a GPU that is not there.
    """
    cluster = config.cluster
    if cluster.launcher == "trial":
        raise ConfigError("cluster.launcher = trial: is for the trials of a sweep; must be local or train to evaluate")
    if cluster.launcher == "train" or (cluster.launcher is None and cluster_address(cluster) is not None):
        return _OnRay(config)
    if cluster.use_gpu and not torch.cuda.is_available():
        raise ConfigError("cluster.use_gpu = True: this machine has no GPU; must be false")
    return _Here(config)


class _Here:
    """This process, with all threads that torch has."""

    def __init__(self, config: RunConfig) -> None:
        self._device = "cuda" if config.cluster.use_gpu else "cpu"
        self._num_threads = max(config.cluster.data_cpus, len(os.sched_getaffinity(0)))

    def parts(self, backbone: nn.Module, images: Images, view: View, shares: Iterable[Share]) -> Iterator[Part]:
        backbone = backbone.to(self._device)
        for share in shares:
            try:
                yield extract_share(backbone, images, view, share, self._num_threads)
            except StorageError as error:
                raise RunFailed(str(error)) from error

    def close(self) -> None:
        pass


class _OnRay:
    """Tasks of `cluster.cpus_per_worker` CPUs, with `cluster.use_gpu` of one GPU.

    Connects when it is first needed, unless this process is connected already.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._has_connected = False

    def parts(self, backbone: nn.Module, images: Images, view: View, shares: Iterable[Share]) -> Iterator[Part]:
        if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
            connect(self._config, dashboard=False)
            self._has_connected = True
        import ray
        from ray.exceptions import RayError, RayTaskError

        capacity = Capacity.of_connected_cluster()
        cluster = self._config.cluster
        options = {"num_cpus": cluster.cpus_per_worker, "num_gpus": int(cluster.use_gpu)}
        task = ray.remote(_extract).options(**options)
        at_once = max(1, int(capacity.gpus if cluster.use_gpu else capacity.cpus // cluster.cpus_per_worker))
        common = ray.put(backbone.cpu()), ray.put(images), ray.put(view)
        waiting: deque[Any] = deque()
        rest = iter(shares)
        try:
            while True:
                while len(waiting) < _SHARES_AHEAD * at_once and (share := next(rest, None)) is not None:
                    waiting.append(task.remote(*common, share, cluster.cpus_per_worker, cluster.use_gpu))
                if not waiting:
                    return
                rows, bad = ray.get(waiting.popleft())
                yield torch.tensor(rows), bad
        except RayTaskError as error:
            if isinstance(error.cause, StorageError):
                raise RunFailed(str(error.cause)) from error
            raise
        except RayError as error:
            raise RunFailed(f"Ray could not take features: {first_line(error)}") from error
        finally:
            for left in waiting:
                ray.cancel(left)

    def close(self) -> None:
        if self._has_connected:
            disconnect()
            self._has_connected = False


def _extract(
    backbone: nn.Module, images: Images, view: View, share: Share, num_cpus: int, use_gpu: bool
) -> tuple[Any, dict[int, str]]:
    """A Ray task."""
    torch.set_num_threads(num_cpus)
    rows, bad = extract_share(backbone.to("cuda" if use_gpu else "cpu"), images, view, share, num_cpus)
    return rows.numpy(), bad
