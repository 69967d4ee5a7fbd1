"""`RunConfig`: what to train on what, where, and where the record goes. Imports neither torch, ray nor mlflow.

`pretrain` and `data` say what is computed; nothing in `cluster` or `tracking` may change a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dino_core.config import CheckedConfig, ConfigError, PretrainConfig, number
from dino_core.config_problems import depth_group_problems
from orchestrator.data.urls import refuse_secrets

_TRACKING_CREDENTIALS = (
    "the environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, PGPASSWORD for PostgreSQL, "
    "or the whole address as MLFLOW_TRACKING_URI) or ~/.pgpass"
)

Launcher = Literal["local", "trial", "train"]
Shuffle = Literal["full", "windowed"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(CheckedConfig):
    """Where the images come from. Labels are optional and are only ever used to evaluate."""

    path: ClassVar[str] = "data"

    source: str = "digits"
    """`digits` (embedded); `torchvision:NAME`; or the path or URL (s3://, gs://, hdfs://, hf://, ...) of a folder of
    images, a list of files (.txt, .csv, .tsv), Parquet, Arrow or WebDataset (.tar) files or a folder of them, or a data
    set that Hugging Face `datasets` saved."""
    train_split: str = "train"
    """Split to train on: a sub-folder, or a value of `split_column`. A source without splits is all training data."""
    test_split: str = "test"
    """Split whose images are classified by k-NN among the training images, where the source has it."""
    image_column: str = "image"
    """Parquet, Arrow: column of encoded images (bytes, or a struct with a `bytes` field). WebDataset: extension of the
    images; the default takes any that is an image's. Lists of files with columns: the one with the paths."""
    label_column: str = "label"
    """Column (WebDataset: field of the .json) of integer or text labels."""
    split_column: str = "split"
    """Column that names each row's split."""
    root: str = "./data"
    """torchvision: the folder that holds its data sets."""
    download: bool = False
    """torchvision: fetch what is not there."""
    shuffle: Shuffle = "full"
    """Order of an epoch. `full`: any image may follow any other. `windowed`: units of storage (row groups, record
    batches, tars) in random order, images mixed within a window of them; reads stay sequential."""
    shuffle_window: int = number(8192, ge=1)
    """Windowed order: images that are mixed with each other."""
    max_bad_fraction: float = number(0.01, ge=0, le=1)
    """Unreadable images, as a share of the training split, past which the run stops."""
    max_pixels: int = number(50_000_000, ge=1, le=178_956_970)
    """An image of more pixels than this is not decoded and counts as unreadable. At most what Pillow opens."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(CheckedConfig):
    """How a run is spread over machines."""

    path: ClassVar[str] = "cluster"

    launcher: Launcher | None = None
    """`local`: this process, no Ray. `trial`: the Tune trial's own actor. `train`: a Ray TorchTrainer.
    None: `trial` for the one-worker trials of a sweep, else `train`."""
    num_workers: int = number(1, ge=1)
    """Training processes; with `use_gpu` one GPU each. Must divide `pretrain.batch_size`."""
    use_gpu: bool = False
    """Train on GPUs."""
    cpus_per_worker: int = number(1, ge=1)
    """CPU cores of each training process, and its torch threads."""
    data_cpus: int = number(2, ge=1)
    """CPU cores that decode and crop images at the same time, for each run; every worker has an equal whole share of
    them, at least one."""
    decoded_cache_gb: float = number(0.0, ge=0)
    """Decoded images kept on each machine, up to this size, so that the next epoch or trial need not decode them; 0:
    none."""
    decoded_cache_dir: str | None = None
    """Folder of each machine for them; None: the machine's folder for temporary files."""
    share_crops: bool = False
    """Let the trials of a sweep whose crops are the same share what one of them has made."""
    max_concurrent_trials: int | None = number(None, ge=1)
    """Trials of a sweep that run at once; None: as many as fit."""
    max_failures: int = number(2, ge=0)
    """Restarts of a run from its last checkpoint after a lost process or node."""
    start_timeout_s: float = number(600.0, gt=0)
    """A run that has not taken its first step by then is given up with the state of the cluster in the message."""
    address: str | None = None
    """Ray cluster to use; None: that of RAY_ADDRESS (set inside `ray job submit`), else one started here for the
    run."""
    storage: str = "./runs"
    """Folder of runs and sweeps; on several machines one that all of them share."""
    keep_checkpoints: int = number(2, ge=1)
    """Newest checkpoints kept of each run."""

    @property
    def num_devices(self) -> int:
        """GPUs of a run or, where it has none, CPU cores of its training processes."""
        return self.num_workers * (1 if self.use_gpu else self.cpus_per_worker)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(CheckedConfig):
    """Where MLflow keeps the record."""

    path: ClassVar[str] = "tracking"

    uri: str | None = None
    """MLflow tracking URI; None: MLFLOW_TRACKING_URI, else the SQLite file ./mlruns/mlflow.db."""
    experiment: str | None = None
    """MLflow experiment; None: the name of the recipe or sweep."""
    checkpoints: Literal["none", "last"] = "none"
    """`last`: upload each run's last checkpoint, the whole state of the training, when it has ended. `none`: they stay
    in `cluster.storage`, and MLflow is told where."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uri is not None:
            refuse_secrets("tracking.uri", self.uri, _TRACKING_CREDENTIALS)


@dataclass(frozen=True, kw_only=True)
class RunConfig(CheckedConfig):
    """A complete run."""

    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        size, workers = self.pretrain.batch_size, self.cluster.num_workers
        if size % workers:
            near = sorted({size - size % workers, size + workers - size % workers} - {0})
            raise ConfigError(
                f"pretrain.batch_size = {size}: must be a multiple of cluster.num_workers = {workers}, "
                f"such as {' or '.join(map(str, near))}"
            )
        if problems := depth_group_problems(self.pretrain, workers):
            raise ConfigError(f"pretrain.{problems[0]}")
        if self.cluster.launcher == "trial" and workers > 1:
            raise ConfigError(
                f"cluster.launcher = trial: trains in the trial's own process, so cluster.num_workers = {workers} "
                "must be 1; use train"
            )
