"""Exact counts of a step's tensor operations, reads of the device, kernels and bytes."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch._inductor.metrics
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_alrc._moments import accelerator


class Kernel(NamedTuple):
    """A launch of one of ALRC's kernels, which is not an operation of PyTorch."""

    name: str
    is_view = False


class Operations(TorchDispatchMode):
    """Notes each tensor operation that reaches a device, and each launch of ALRC's kernels.

    ``detach`` is left out: it does nothing on a device. With torch 2.5 it would be noted twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __enter__(self) -> Operations:
        self._launch = launch = accelerator._launch

        def noted(kernel: Any, *arguments: Any, **constants: Any) -> None:
            self.calls.append(Kernel(kernel.__name__))
            with _disable_current_modes():  # Triton's interpreter copies tensors
                launch(kernel, *arguments, **constants)

        accelerator._launch = noted
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        accelerator._launch = self._launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.detach.default:
            self.calls.append(func)
        return func(*args, **(kwargs or {}))

    @property
    def launches(self) -> list[Any]:
        """The operations that launch a kernel: views and empty tensors do not."""
        return [each for each in self.calls if not (each.is_view or each in EMPTY)]


EMPTY = [torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default]


def operations(step: Callable[[], object], warm_up: int = 20) -> Operations:
    """The operations of a typical step, after some steps of warm-up."""
    for _ in range(warm_up):
        step()
    with Operations() as counted:
        step()
    return counted


READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"} | {
    f"aten.{name}"
    for name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")
}


class Watch:
    """Notes operations that would wait for an accelerator and read from it.

    It notes them for tensors on a CPU, too, so no accelerator is needed.
    """

    def __init__(self) -> None:
        self.reads: list[str] = []

    def __enter__(self) -> Watch:
        watch = self

        class Functions(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                watch.note(getattr(func, "__name__", ""))
                return func(*args, **(kwargs or {}))

        class Calls(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                masks = [each for each in args[1] if each is not None] if _indexes(func) else []
                masked = any(mask.dtype == torch.bool for mask in masks)
                watch.note("aten.nonzero" if masked else str(func).rpartition(".")[0])
                return func(*args, **(kwargs or {}))

        self.modes = Functions(), Calls()
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def note(self, name: str) -> None:
        if name in READS:
            self.reads.append(name)


def _indexes(func: Any) -> bool:
    return str(func) in ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default")


COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Crossings(TorchDispatchMode):
    """Notes each operation that copies between the host and a device, in either direction.

    With fake tensors the device need not exist. ``FakeTensorMode`` supports many devices, and
    raises if a number is read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in COPIES:
            devices = {each.device.type for each in _tensors((args, kwargs, result))}
            if len(devices) > 1:
                self.calls.append(str(func))
        return result


class Capture(TorchDispatchMode):
    """Notes the operations of a step, and repeats them as a CUDA graph would.

    A replay runs no Python. Every operation reads and writes the same tensors as in the captured
    step. If the step assigned a new tensor to an attribute, a replay does not assign it again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            if not func.is_view:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(result), _tensors(again), strict=True):
                    if old is not new:  # an operation in place returns the same tensor
                        old.copy_(new)


def _tensors(nested: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(nested)
    return [each for each in leaves if isinstance(each, Tensor)]


class Generated(NamedTuple):
    """What Inductor generates for a function of a loss, forwards and backwards."""

    functions: tuple[int, int]
    """C++ functions, which a compiled step calls one after the other."""
    loops: tuple[int, int]
    """Loops in the C++ functions. On a GPU each loop is one kernel launch."""


def generated(function: Callable[[Tensor], Tensor], loss: Tensor) -> Generated:
    """Compile a function of a loss on the CPU, and count what Inductor generates."""
    torch._dynamo.reset()
    torch._inductor.metrics.reset()
    compiled = torch.compile(function, fullgraph=True)
    with torch._inductor.config.patch(
        force_disable_caches=True
    ):  # cached code would not be counted
        result, code = run_and_get_code(compiled, loss)
        loops = torch._inductor.metrics.generated_kernel_count
        _, code_backwards = run_and_get_code(torch.autograd.grad, result.sum(), loss)
    functions = (_functions(code), _functions(code_backwards))
    return Generated(functions, (loops, torch._inductor.metrics.generated_kernel_count - loops))


def _functions(code: list[str]) -> int:
    # If a graph is compiled twice, the second version runs.
    return code[-1].count("async_compile.cpp_pybinding(") if code else 0


def allocated(make: Callable[[], object]) -> int:
    """Bytes that Python and all tensors still use after a call.

    What Triton's interpreter allocates, such as the names of attributes, is not counted.
    """
    gc.collect()
    before = _tensor_bytes()
    tracemalloc.start()
    try:
        kept = make()
        gc.collect()
        snapshot = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    after = _tensor_bytes()
    del kept
    ours = snapshot.filter_traces([tracemalloc.Filter(False, "*/triton/*")])
    return sum(each.size for each in ours.traces) + after - before


def _tensor_bytes() -> int:
    alive = (each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter))
    storages = {}
    for each in alive:
        # Torch 2.5's compiled functions leave tensors without storage.
        with suppress(NotImplementedError):
            storages[each.untyped_storage()._cdata] = each.untyped_storage()
    return sum(storage.nbytes() for storage in storages.values())
