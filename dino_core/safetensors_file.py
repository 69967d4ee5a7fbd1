"""safetensors files written tensor by tensor, which the library's own function needs all at once.

The format (https://github.com/huggingface/safetensors#format): the length of the header as 8 bytes, the header as JSON
with dtype, shape and place of each tensor, then the numbers. The bytes are those that the library writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the order of the library, wider ones first, so that all numbers are aligned."""


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they follow each other in a file, by kind of number and name.

    Raises:
        ValueError: the format, or this module, does not know the kind of one of them.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is of {tensor.dtype}: must be one of {', '.join(map(str, _NAMES))}")
    kinds = list(_NAMES)
    return dict(sorted(tensors.items(), key=lambda item: (kinds.index(item[1].dtype), item[0])))


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """What stands in front of the numbers of tensors that are `in_order`."""
    entries, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor, on any device."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1)
    return numbers.view(torch.uint8).numpy().data
