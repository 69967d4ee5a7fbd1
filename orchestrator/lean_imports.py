"""Importing what trains without torch's compiler, which nothing needs before something is compiled.

`torch._dynamo` brings sympy and the inductor: 870 modules, half of the CPU time that a process needs before it can
train, and a fifth of its memory. torch itself imports it when something is compiled. timm, torchvision and torch's
optimisers import it at once, but only to mark functions that a compiler must leave alone. Here these marks are
made when the compiler is there to see them.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_importing = threading.Lock()


@contextmanager
def without_compiler() -> Iterator[None]:
    """Imports inside do not import torch's compiler. Does nothing where it is imported already, or by another thread
    at the same time.

    What is marked inside as not to be compiled stays so: the mark takes effect when the compiler is imported.
    """
    if not _importing.acquire(blocking=False):
        yield
        return
    try:
        import torch

        if _COMPILER in sys.modules:
            yield
            return
        disable, stand_ins = torch.compiler.disable, _stand_ins()
        sys.modules.update(stand_ins)
        torch.compiler.disable = _disable
        try:
            import torchvision  # noqa: F401  # asks by a name that it imports from the compiler
        except ImportError:
            pass  # timm says so better
        finally:
            for name, stand_in in stand_ins.items():
                if sys.modules.get(name) is stand_in:
                    del sys.modules[name]
        try:
            _mark_optimizers_later()
            yield
        finally:
            torch.compiler.disable = disable
    finally:
        _importing.release()


def _stand_ins() -> dict[str, ModuleType]:
    """Modules for the moment in which torchvision is imported, with the one function that it takes from there."""
    package, utils = ModuleType(_COMPILER), ModuleType(f"{_COMPILER}.utils")
    package.__path__ = []
    package.disable = _disable  # type: ignore[attr-defined]

    def is_compile_supported(device_type: Any) -> Any:
        import torch._dynamo.utils

        return torch._dynamo.utils.is_compile_supported(device_type)

    utils.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
    return {package.__name__: package, utils.__name__: utils}


def _disable(fn: Callable[..., Any] | None = None, recursive: bool = True, **more: Any) -> Callable[..., Any]:
    """As `torch.compiler.disable`, whose arguments these are; only that nothing is imported."""
    if fn is None:
        return functools.partial(_disable, recursive=recursive, **more)
    marked: list[Callable[..., Any]] = []

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not marked:
            compiler = sys.modules.get(_COMPILER)
            if compiler is None:
                return fn(*args, **kwargs)
            marked.append(compiler.disable(fn, recursive, **more))
        return marked[0](*args, **kwargs)

    return call


def _mark_optimizers_later() -> None:
    from torch.optim import SGD, Adam, Optimizer

    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(Optimizer, name)
        if hasattr(method, "__wrapped__"):  # else this torch does not mark it
            setattr(Optimizer, name, _disable(method.__wrapped__))
    for optimizer in (Adam, SGD):
        if hasattr(optimizer.step, "__wrapped__"):
            optimizer.step = _step_of(optimizer.step)  # type: ignore[method-assign]


def _step_of(marked: Any) -> Callable[..., Any]:
    """An optimiser's step, which torch surrounds with breaks in the compiler's graph."""
    import torch

    @functools.wraps(marked)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _COMPILER in sys.modules or self.defaults.get("differentiable"):
            return marked(self, *args, **kwargs)
        with torch.no_grad():
            return marked.__wrapped__(self, *args, **kwargs)

    return step
