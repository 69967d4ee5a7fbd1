"""The whole state of a run on disk, as safetensors and JSON.

::

    <folder>/step_00000200/
        model.safetensors       student.*, teacher.*, objective.* (with the centre), buffers included
        optimizer.safetensors   <parameter>.<moment>
        state.json              step, data position, config, hyper-parameters, every RNG of every rank, versions, extra
        MANIFEST.json           size and SHA-256 of the others and of itself; written last

A checkpoint is written under a temporary name, flushed to the disk and renamed, so whatever carries its name is
complete; bit rot is found by the sums when it is read. On CPU a run continues bit for bit for the same number of
workers, threads and versions. No file format used here can hold code.

The files hold whole tensors, however many ranks there are and whether these share the weights out
(`dino_core.sharding`). Sharded ones are put together and written one by one, and a rank reads its own rows of each, so
no process ever holds all of them.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import logging
import os
import platform
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from dino_core import distributed
from dino_core.safetensors_file import header, in_order, raw_bytes
from dino_core.sharding import is_sharded, part_like, whole_tensor
from dino_core.stages import stage_of_state
from dino_core.train import TrainState

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "MANIFEST.json"

_NAME = re.compile(r"step_(\d{8,})(\.old)?")
_TEMPORARY = ".partial-"  # being written or deleted
_SHAPE_KEYS = (
    "pretrain.model.",
    "pretrain.head.",
    *(f"pretrain.ibot.{name}" for name in ("weight", "head", "num_prototypes", "bottleneck_dim")),
    "pretrain.crops.global_size",
    *(f"pretrain.optim.{name}" for name in ("name", "layer_decay", "patch_embed_lr_mult", "decay_tokens")),
    "pretrain.optim.freeze_last_layer_by",
)
_RESERVE_BYTES = 1 << 20  # manifest, JSON, file system


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used. The message names the file or folder."""


# ----------------------------------------------------------------------------------------------------------- saving


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is in the folder of a run's checkpoints, if there is one."""
    return folder / f"step_{step:08d}"


def save_checkpoint(state: TrainState, folder: Path, *, extra: Mapping[str, Any] | None = None) -> Path:
    """Write `folder/step_<state.step>` and return its path. Every rank calls it; rank 0 writes.

    `extra` is anything JSON can hold, and is what `load_checkpoint` returns. A checkpoint of the same step is replaced.

    Raises:
        TypeError: JSON cannot hold `extra`.
        CheckpointError: on every rank, if a tensor is not finite, the disk is too full, or writing fails. What was in
            the folder before is as it was.
    """
    path = checkpoint_path(folder, state.step)
    text = json.dumps(_rng_state(state.device))
    extra = json.loads(json.dumps(dict(extra or {})))  # on every rank, so that all raise if it cannot be written
    rng = [json.loads(item) for item in _gather(text.encode(), state.device)]
    problem = ""
    tensors = _tensors_by_file(state)
    wholes = chain.from_iterable(_whole_tensors(part) for part in tensors.values())
    if distributed.rank() == 0:
        try:
            _write(state, path, {"rng": rng, "extra": extra}, tensors, wholes)
        except OSError as error:
            problem = f"cannot write {path}: {error}"
        except CheckpointError as error:
            problem = str(error)
    for _ in wholes:  # sharded tensors are put together by all ranks, also behind one that could not be written
        pass
    # Also the barrier behind which every rank may rely on the checkpoint.
    problem = b"".join(_gather(problem.encode(), state.device)).decode()
    if problem:
        raise CheckpointError(problem)
    return path


def _tensors_by_file(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """What the files of tensors hold, in the order in which it stands there; of sharded tensors this rank's part."""
    moments, _ = _optimizer_state(state.optimizer)
    try:
        return {MODEL_FILE: in_order(_model_tensors(state)), OPTIMIZER_FILE: in_order(moments)}
    except ValueError as error:
        raise CheckpointError(f"cannot be written: {error}") from error


def _whole_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """By name, one at a time; every rank must take all of them."""
    for name, tensor in tensors.items():
        yield name, whole_tensor(tensor)


def _write(
    state: TrainState,
    path: Path,
    parts: dict[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    wholes: Iterator[tuple[str, Tensor]],
) -> None:
    """Write the checkpoint; `wholes` are the tensors of all files in turn."""
    _, scalars = _optimizer_state(state.optimizer)
    text = json.dumps(_describe(state) | {"optimizer": scalars} | parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(stale)
    heads = {name: header(part) for name, part in tensors.items()}
    numbers = sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values())
    needed = numbers + sum(map(len, heads.values())) + len(text) + _RESERVE_BYTES
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise CheckpointError(f"{path}: the disk is too full, {needed} bytes are needed and {free} are free")

    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    try:
        temporary.mkdir()
        for file_name, part in tensors.items():
            with (temporary / file_name).open("wb") as file:
                file.write(heads[file_name])
                for name, tensor in islice(wholes, len(part)):
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise CheckpointError(f"{path}: not written, for {name} holds values that are not finite")
                    file.write(raw_bytes(tensor))
        (temporary / STATE_FILE).write_text(text)
        (temporary / MANIFEST_FILE).write_bytes(_manifest(temporary))
        for entry in (*temporary.iterdir(), temporary):
            _flush(entry)
        _put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename; a checkpoint that is already there stays readable under its name or with .old until the new one is."""
    old = path.with_name(f"{path.name}.old")
    if path.exists():
        if old.exists():
            _delete(old)
        path.rename(old)
    temporary.rename(path)
    _flush(path.parent)
    if old.exists():
        _delete(old)


def _delete(path: Path) -> None:
    """Rename first, so that a half deleted checkpoint never carries the name of a whole one."""
    shutil.rmtree(path.rename(path.with_name(f"{_TEMPORARY}deleted-{path.name}-{os.getpid()}")))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _model_tensors(state: TrainState) -> dict[str, Tensor]:
    parts = {"student": state.student, "teacher": state.teacher, "objective": state.objective}
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the optimiser's state by "<parameter>.<name>", and all the rest for JSON."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, values in whole["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value
            else:
                scalars.setdefault(str(parameter), {})[name] = value
    return tensors, {"param_groups": whole["param_groups"], "scalars": scalars}


def _describe(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "data_position": state.step * state.config.batch_size,
        "config": dataclasses.asdict(state.config),
        "scaler": state.scaler.state_dict(),
        "frozen_teacher": state.frozen_digest,
        "circumstances": _circumstances(state),
    }


def _circumstances(state: TrainState) -> dict[str, Any]:
    """What must be the same for the run to continue bit for bit."""
    return {
        "world_size": distributed.world_size(),
        "num_threads": torch.get_num_threads(),
        "device": state.device.type,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "timm": metadata.version("timm"),
        "torch": torch.__version__,
    }


def _rng_state(device: torch.device) -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    key = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state | {"state": numpy_state["state"] | {"key": key}},
        "torch": _to_text(torch.get_rng_state()),
        "cuda": _to_text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def _to_text(tensor: Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _gather(data: bytes, device: torch.device) -> list[bytes]:
    """The bytes of every rank, rank 0 first; also a barrier."""
    if not distributed.has_process_group():
        return [data]
    device = device if dist.get_backend() == "nccl" else torch.device("cpu")
    sizes = distributed.all_gather_rows(torch.tensor([len(data)], device=device)).tolist()
    row = torch.zeros(1, max(sizes) + 1, dtype=torch.uint8)
    row[0, : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    rows = distributed.all_gather_rows(row.to(device)).cpu().numpy()
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


# --------------------------------------------------------------------------------------------------------- manifest


def _manifest(folder: Path) -> bytes:
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return _seal({"format_version": FORMAT_VERSION, "files": files})


def _seal(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, indent=1, sort_keys=True)
    return (json.dumps(content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The files by name, with what the manifest says of them."""
    file = path / MANIFEST_FILE
    try:
        found = file.read_bytes()
        content = json.loads(found)
        version = content["format_version"]
        whole = found == _seal({"format_version": version, "files": content["files"]})
        whole = whole and content["files"].keys() == {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE}
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file, so this is no complete checkpoint") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file}: damaged") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file}: format version {version}; this release reads {FORMAT_VERSION}")
    if not whole:
        raise CheckpointError(f"{file}: damaged")
    files: dict[str, Any] = content["files"]
    return files


def verify_checkpoint(path: Path, *, sums: bool = True) -> None:
    """Check that every file is there, as long as the manifest says and, with `sums`, holds the very bytes written.

    Raises:
        CheckpointError: naming the first file that is not.
    """
    for name, expected in _read_manifest(path).items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{file}: damaged, {size} bytes long instead of {expected['bytes']}")
        if sums and _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: damaged, its SHA-256 is not that of the manifest")


def _newest_first(folder: Path) -> Iterator[Path]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), not match[2], path))
    return (path for _, _, path in sorted(found, reverse=True))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is complete and undamaged; warns about each newer one that is not."""
    for path in _newest_first(folder):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("skipping a checkpoint: %s", error)
        else:
            return path
    return None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. One that is visibly broken does not count as kept. Rank 0 only.

    Raises:
        ValueError: `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: must be >= 1")
    if distributed.rank() != 0:
        return
    kept = 0
    for path in _newest_first(folder):
        if kept >= keep:
            _delete(path)
            continue
        try:
            verify_checkpoint(path, sums=False)
        except CheckpointError:
            continue
        kept += 1


# ---------------------------------------------------------------------------------------------------------- loading


def load_checkpoint(state: TrainState, path: Path) -> dict[str, Any]:
    """Bring `state`, freshly created from a fitting configuration, to where the checkpoint was; returns its `extra`.

    The state enters the stage of the run that the checkpoint was written in; one of a stage's end is still in that.
    Restores weights, centre, moments, step and this rank's global RNGs, all in place. Logs a warning if something
    differs that may change numbers: other settings, world size, thread count, device or versions.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit `state`, which is then left as it was but for its
            stage.
    """
    verify_checkpoint(path)
    saved = json.loads((path / STATE_FILE).read_text())
    state.enter_stage(stage_of_state(state.stages, saved["step"]).index)
    changed = _changed_keys(saved["config"], state)
    if saved.get("frozen_teacher") != state.frozen_digest:
        raise CheckpointError(
            f"{path}: pretrain.teacher.checkpoint = {state.config.teacher.checkpoint} has other weights than when the "
            "run began"
        )
    with safe_open(path / MODEL_FILE, "pt") as model, safe_open(path / OPTIMIZER_FILE, "pt") as moments:
        expected = _model_tensors(state)
        _check_fit(state, path, expected, model, saved["optimizer"], changed)
        optimizer = _read_optimizer(state, moments, saved["optimizer"])
        for part, module in (("student", state.student), ("teacher", state.teacher), ("objective", state.objective)):
            prefix = f"{part}."
            module.load_state_dict(
                {
                    name.removeprefix(prefix): _read(model, name, like, state.device)
                    for name, like in expected.items()
                    if name.startswith(prefix)
                }
            )
    state.optimizer.load_state_dict(optimizer)
    if saved["scaler"]:  # empty where the precision did not need it
        state.scaler.load_state_dict(saved["scaler"])
    state.step = saved["step"]
    _restore_rng(saved["rng"], state.device)

    here = _circumstances(state)
    different = [
        f"{key} was {was}, is {here.get(key)}" for key, was in saved["circumstances"].items() if here.get(key) != was
    ]
    if different:
        logger.warning("%s: equality bit for bit with the unbroken run is not promised: %s", path, "; ".join(different))
    if changed:
        logger.warning("%s: continues with changed settings: %s", path, "; ".join(changed.values()))
    extra: dict[str, Any] = saved["extra"]
    return extra


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, part in value.items() for key, leaf in _flatten(f"{prefix}.{name}", part).items()}


def _changed_keys(saved: dict[str, Any], state: TrainState) -> dict[str, str]:
    """Dotted keys whose values differ, each with what to say about it."""
    there = _flatten("pretrain", saved)
    here = _flatten("pretrain", json.loads(json.dumps(dataclasses.asdict(state.config))))
    return {
        key: f"{key} was {there.get(key)}, is {here.get(key)}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    }


def _check_fit(
    state: TrainState,
    path: Path,
    tensors: dict[str, Tensor],
    model: Any,
    saved: dict[str, Any],
    changed: dict[str, str],
) -> None:
    """Raise CheckpointError unless every tensor of the file `model` and every moment has its place."""
    expected = {name: list(tensor.shape) for name, tensor in tensors.items()}
    found: dict[str, list[int]] = {name: model.get_slice(name).get_shape() for name in model.keys()}  # noqa: SIM118
    problems = [
        f"{name} is {_shape(found.get(name))} there and {_shape(expected.get(name))} here"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    here = state.optimizer.state_dict()
    groups = [(group["params"], sorted(group)) for group in here["param_groups"]]
    if groups != [(group["params"], sorted(group)) for group in saved["param_groups"]]:
        problems.append("the optimiser's parameter groups are others")
    if problems:
        reasons = [line for key, line in changed.items() if key.startswith(_SHAPE_KEYS)]
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        why = f"{'; '.join(reasons)} ({shown})" if reasons else shown
        raise CheckpointError(f"{path}: does not fit this configuration: {why}")


def _read_optimizer(state: TrainState, moments: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """The optimiser's state dict."""
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    values: dict[int, dict[str, Any]] = {int(key): dict(scalars) for key, scalars in saved["scalars"].items()}
    for key in moments.keys():  # noqa: SIM118
        number, name = key.split(".", 1)
        value = _read(moments, key, parameters[int(number)], state.device)
        values.setdefault(int(number), {})[name] = value
    # what the groups hold besides parameters follows from the configuration, which may have changed
    return {"state": values, "param_groups": state.optimizer.state_dict()["param_groups"]}


def _read(file: Any, name: str, like: Tensor, device: torch.device) -> Tensor:
    """A tensor of a safetensors file; this rank's part of it where `like`, of the same shape, is sharded."""
    rows = file.get_slice(name)
    if not is_sharded(like) or rows.get_shape() != list(like.shape):  # what counts steps has no shape
        tensor: Tensor = file.get_tensor(name)
        return tensor
    return part_like(like, lambda first, stop: rows[first:stop], device)


def _shape(shape: list[int] | None) -> str:
    return "absent" if shape is None else str(shape)


def _restore_rng(saved: list[dict[str, Any]], device: torch.device) -> None:
    if distributed.rank() >= len(saved):
        return  # a rank that was not there before; the warning about the world size covers it
    rng = saved[distributed.rank()]
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    key = np.array(rng["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(rng["numpy"] | {"state": rng["numpy"]["state"] | {"key": key}})
    torch.set_rng_state(_from_text(rng["torch"]))
    if rng["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_from_text(rng["cuda"]), device)
