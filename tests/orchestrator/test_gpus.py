from __future__ import annotations

import pytest

from orchestrator.gpus import GPUS, gpu_called


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_gpus_are_known_by_what_drivers_call_them(driver: str, name: str | None) -> None:
    found = gpu_called(driver)
    assert (found and found.name) == name


def test_older_gpus_have_no_bf16_and_all_are_slower_in_fp32() -> None:
    for gpu in GPUS:
        half, single = gpu.peak("fp16"), gpu.peak("fp32")
        assert half is not None and single is not None and half > 1.9 * single
        assert (gpu.peak("bf16") is None) == (gpu.name.split()[0] in ("V100", "T4"))
