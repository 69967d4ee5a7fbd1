"""A process that trains does not import torch's compiler, unless something is compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys

from orchestrator.lean_imports import _disable, without_compiler

with without_compiler(), without_compiler():
    from dino_core.train import TrainState

import torch

from orchestrator.catalog import load_recipe

COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}


def step(optimizer):
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    return parameter.tolist()


def optimizers():
    for made in (torch.optim.AdamW, torch.optim.SGD):
        yield made([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    yield torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=torch.tensor(0.1))


lean = [step(optimizer) for optimizer in optimizers()]
state = TrainState.create(load_recipe("quickstart").pretrain, 1000)
assert not COMPILER & set(sys.modules)
assert torch.compiler.disable.__module__ == "torch.compiler"
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu") in (True, False)
assert "torch._dynamo" in sys.modules
assert torch._dynamo.__file__, "the real one"

# Marks made without the compiler hold with it.
@torch.compile(backend="eager")
def double(x):
    return 2 * left_alone(x)


@_disable
def left_alone(x):
    return x + torch.compiler.is_compiling()


assert double(torch.ones(2)).tolist() == [2.0, 2.0]
assert [step(optimizer) for optimizer in optimizers()] == lean, "the same numbers with the compiler there"
with without_compiler():
    assert torch.compiler.disable.__module__ == "torch.compiler", "it is there: nothing to keep away"
"""


def test_nothing_that_trains_needs_the_compiler_and_its_marks_hold_when_it_comes() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
