"""GPUs that people train on: what their makers publish of them, and which is in this machine. No torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Gpu:
    """Published peaks, without sparsity, TFLOP/s, and memory, GB (1e9 bytes)."""

    name: str
    half: float
    """bf16 and fp16 on tensor cores, with fp32 sums."""
    fp32: float
    """Without TF32, which torch leaves off for matrix products."""
    memory_gb: float
    has_bf16: bool = True

    def peak(self, precision: Precision) -> float | None:
        """TFLOP/s at a precision, or None if it has no units for it."""
        if precision == "fp32":
            return self.fp32
        return self.half if precision == "fp16" or self.has_bf16 else None


GPUS = (
    Gpu("B200", 2250.0, 75.0, 180.0),
    Gpu("H200", 989.0, 67.0, 141.0),
    Gpu("H100 PCIe", 756.0, 51.0, 80.0),
    Gpu("H100", 989.0, 67.0, 80.0),
    Gpu("A100 80GB", 312.0, 19.5, 80.0),
    Gpu("A100", 312.0, 19.5, 40.0),
    Gpu("L40S", 362.0, 91.6, 48.0),
    Gpu("A10", 125.0, 31.2, 24.0),
    Gpu("L4", 121.0, 30.3, 24.0),
    Gpu("RTX 4090", 165.2, 82.6, 24.0),
    Gpu("RTX 3090", 71.0, 35.6, 24.0),
    Gpu("V100 32GB", 125.0, 15.7, 32.0, has_bf16=False),
    Gpu("V100", 125.0, 15.7, 16.0, has_bf16=False),
    Gpu("T4", 65.0, 8.1, 16.0, has_bf16=False),
)
"""From NVIDIA's data sheets (SXM versions where there are several). The longer of two names that fit is meant."""

SHOWN = ("H200", "H100", "A100 80GB", "V100 32GB")
"""For whom an estimate is printed where no GPU is at hand."""

ASSUMED_SHARE = {"bf16": 0.25, "fp16": 0.25, "fp32": 0.5}
"""Share of the published peak that a training step is taken to reach, until it is measured. In half precision the best
published figure for a network of ViT-S's size is 23 % of an H100's peak (nvSubquadratic: ViT-5-Small, compiled), and
the authors of DINO reached 9 % of a V100's; small networks reach less, large ones more."""


def gpu_called(name: str) -> Gpu | None:
    """The GPU that a driver calls by this name ("NVIDIA A100-SXM4-80GB"); None if it is not in `GPUS`."""
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    fitting = [gpu for gpu in GPUS if set(gpu.name.upper().split()) <= words]
    return max(fitting, key=lambda gpu: len(gpu.name), default=None)


def gpu_here() -> str | None:
    """What the driver calls the first visible GPU of this machine; None without one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return None
