"""A stand-in for a GPU, so that the package's own code runs on device "cuda" where there is none.

A tensor of the stand-in says that it is on `cuda:0` and keeps its values on the CPU. Of every operation torch's own
fake tensors say first whether it could be done there, and on which device its result would be: a tensor that was left
on the other device raises, as it would on a GPU. Then the operation is done on the values. So a whole job runs, with
real numbers, checkpoints and reports.

Not seen are CUDA's kernels themselves: their precision, their memory, and what they refuse by type or size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import repeat
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
HALF = frozenset({torch.conv2d, torch.conv_transpose2d, torch._C._nn.linear, torch.matmul, torch.bmm, torch.addmm,
                  torch._C._nn.scaled_dot_product_attention, Tensor.matmul, Tensor.__matmul__})  # fmt: skip
"""What autocast computes in half precision on CUDA."""

FULL = frozenset({torch.nn.functional.mse_loss, torch._C._nn.mse_loss, torch.nn.functional.kl_div, torch.kl_div,
                  torch.log_softmax, Tensor.log_softmax, torch.softmax, Tensor.softmax, torch._C._nn.cross_entropy_loss,
                  torch._C._linalg.linalg_vector_norm, torch.norm, Tensor.norm, Tensor.sum, torch.sum, Tensor.pow,
                  torch.layer_norm, torch.group_norm})  # fmt: skip
"""What it computes in float32."""


class OnCuda(Tensor):
    """A tensor on `cuda:0`, as far as anyone can tell without looking into its memory."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnCuda:
        """Of what it holds, a plain tensor on the CPU.

        To torch's C++ it is on `meta`: autograd's engine wants a driver for what is on CUDA.
        """
        assert type(values) is Tensor
        assert values.device.type == "cpu"
        made: OnCuda = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",
        )
        made.values = values
        return made

    def __init__(self, values: Tensor) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says that it is."""
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """True."""
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """False."""
        return False

    def tolist(self) -> Any:
        """Its values, by way of the CPU as on a GPU."""
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As it comes back from a file with `map_location="cpu"`."""
        return self.values.__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({self.values})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


_fake = FakeTensorMode(allow_fallback_kernels=False)
_known: dict[Any, tuple[bool, ...]] = {}
"""Whether results are on CUDA, by operation and by where its tensors are."""


def _as_fake(tensor: Tensor) -> FakeTensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(_fake, meta, tensor.device)


def _judged(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each tensor of the result would be on CUDA, or all of them; raises where it could not be made."""
    fake_args, fake_kwargs = tree_map_only(Tensor, _as_fake, (args, kwargs))
    try:
        with _fake:
            found = func(*fake_args, **fake_kwargs)
        where = tuple(leaf.device.type == "cuda" for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
        where = ()
    if not where:  # of what returns nothing, as the optimizers' kernels, nothing was said
        device, _ = FakeTensor._find_common_device(func, tree_leaves((fake_args, fake_kwargs)))
        where = (device.type == "cuda",)
    return where[:1] if len(set(where)) == 1 else where


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    places: list[Any] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            places.append((value.device, value.dim() == 0))
            return value.values if isinstance(value, OnCuda) else value
        if isinstance(value, (list, tuple)):
            return type(value)(map(plain, value))
        if isinstance(value, torch.device):
            places.append(value)
            return torch.device("cpu")
        return value

    plain_args, plain_kwargs = plain(tuple(args)), {name: plain(value) for name, value in kwargs.items()}
    key = (func, *places)
    if key not in _known:
        _known[key] = _judged(func, args, kwargs)
    flags = _known[key]
    where = iter(flags) if len(flags) > 1 else repeat(*flags)
    result = func(*plain_args, **plain_kwargs)

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return OnCuda(value) if next(where) else value
        return type(value)(map(placed, value)) if isinstance(value, (list, tuple)) else value

    made = placed(result)
    changes = any(returned.alias_info is not None for returned in func._schema.returns)  # views, and what is in place
    return return_and_correct_aliasing(func, args, dict(kwargs), made) if changes else made


class _Dispatch(TorchDispatchMode):
    """Has what makes a tensor on CUDA out of none make one of the stand-in."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and device.type == "meta":  # where torch's own backward makes one for where another is
            kwargs = {**kwargs, "device": CUDA}
        elif OnCuda not in types and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        return _run(func, args, kwargs)


class _Autocast(TorchFunctionMode):
    """What `torch.autocast("cuda")` does: torch's own looks where a tensor is to its C++."""

    enabled = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = torch.bfloat16 if func in HALF else torch.float32 if func in FULL else None
        if self.enabled and dtype is not None:
            args, kwargs = tree_map_only(OnCuda, lambda each: _cast(each, dtype), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cast(tensor: OnCuda, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


class _CudaAutocast:
    """`torch.autocast` for device type "cuda"; of other devices torch's own."""

    plain = torch.autocast

    def __new__(cls, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **more: Any) -> Any:
        if device_type != "cuda":
            return cls.plain(device_type, dtype, enabled, **more)
        assert dtype in (None, torch.bfloat16)
        return cls._entered(enabled)

    @staticmethod
    @contextmanager
    def _entered(enabled: bool) -> Iterator[None]:
        before, _Autocast.enabled = _Autocast.enabled, enabled
        try:
            with _Autocast() if enabled else nullcontext():
                yield
        finally:
            _Autocast.enabled = before


def _nothing(*_: Any, **__: Any) -> None:
    """Of what needs a driver."""


_ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: "stand-in",
    "is_bf16_supported": lambda *_, **__: True,
    "is_current_stream_capturing": lambda: False,
    "max_memory_allocated": lambda *_: 10**9,
    **dict.fromkeys(("_lazy_init", "set_device", "manual_seed", "manual_seed_all", "synchronize", "init"), _nothing),
}


@contextmanager
def on_cuda(*, fresh: bool = False) -> Iterator[None]:
    """Inside the block this machine has one GPU, the stand-in; with `fresh` Accelerate has not begun yet."""
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch._C._ensureCUDADeviceGuardSet()
    with ExitStack() as stack:
        for name, answer in _ANSWERS.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch("torch._subclasses.fake_tensor.init_gpu_context", _nothing))
        stack.enter_context(patch.object(torch, "autocast", _CudaAutocast))
        plain = torch.Generator
        stack.enter_context(patch.object(torch, "Generator", lambda device="cpu": plain()))
        # A moved parameter stays the same object, as on a GPU.
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapped)
        torch.__future__.set_swap_module_params_on_conversion(True)
        for state in (PartialState, AcceleratorState):  # where tests after this one find what they knew
            stack.enter_context(patch.dict(state._shared_state, clear=fresh))
        for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):  # which the engine sets
            stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
        stack.enter_context(_Dispatch())
        yield
