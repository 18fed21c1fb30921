"""Batch norm as torch's compiler can fuse it computes what torch's own does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factor_transfer.fusible import BACKWARD, FORWARD, decompositions, gradients, normalised

EPS, MOMENTUM = 1e-5, 0.1


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12))


def channels_last(shape: tuple[int, ...], seed: int, mean: float = 0.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return x.contiguous(memory_format=torch.channels_last)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    shape=st.tuples(st.integers(2, 5), st.integers(1, 19), st.integers(1, 5), st.integers(2, 5)),
    mean=st.sampled_from([0.0, -3.0, 1000.0]),
    known=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_batch_norm__is_torchs_in_float64(
    shape: tuple[int, int, int, int], mean: float, known: bool, affine: bool, seed: int
) -> None:
    """Output, averages and all gradients; also of maps with a far mean, once the average knows of it."""
    if mean == 1000.0:
        known = True  # squares of such distances from the running average would drown the variance in float32
    channels = shape[1]
    x, given_back = channels_last(shape, seed, mean), channels_last(shape, seed + 1)
    weight, bias = (torch.randn(channels, generator=torch.Generator().manual_seed(seed)) + 1 for _ in range(2))
    average, spread = torch.full((channels,), mean if known else 0.0), torch.full((channels,), 2.0)
    parts = (weight, bias) if affine else (None, None)

    exact = [None if part is None else part.double().requires_grad_() for part in (x, *parts)]
    averages = average.double(), spread.double()
    wanted = F.batch_norm(exact[0], *averages, *exact[1:], True, MOMENTUM, EPS)  # type: ignore[arg-type]
    wanted.backward(given_back.double())

    out, centre, scale, *after = normalised(x, *parts, average, spread, True, MOMENTUM, EPS)
    found = gradients(given_back, x, parts[0], average, spread, centre, scale, True, EPS, [True, affine, affine])
    off = 2e-3 if mean == 1000.0 else 2e-5  # float32 knows a value near 1000 to 3e-5
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert distance(out, wanted.detach()) < off
    for ours, theirs in zip(after, averages, strict=True):
        assert distance(ours, theirs) < off
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours is None) is (theirs is None)
        if ours is not None and theirs is not None and theirs.grad is not None:
            # Sums that cancel are as exact as their summands.
            assert float((ours - theirs.grad).norm()) < 10 * off * float(theirs.grad.norm() + given_back.norm())


def test_batch_norm__of_bf16_is_nearer_to_float32_than_torchs() -> None:
    x = channels_last((8, 16, 8, 8), 0, mean=0.5).bfloat16()
    weight, bias, mean, var = torch.ones(16), torch.zeros(16), torch.zeros(16), torch.ones(16)
    exact = F.batch_norm(x.float(), mean.clone(), var.clone(), weight, bias, True)
    out, centre, _, *after = normalised(x, weight, bias, mean, var, True, MOMENTUM, EPS)
    theirs = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, True)
    assert out.dtype == theirs.dtype == torch.bfloat16
    assert centre.dtype == after[0].dtype == after[1].dtype == torch.float32
    assert distance(out, exact) <= 1.1 * distance(theirs, exact)


@pytest.mark.parametrize(
    ("x", "training", "ours"),
    [
        (channels_last((4, 6, 5, 5), 0), True, True),
        (channels_last((4, 6, 5, 5), 0).bfloat16(), True, True),
        (channels_last((4, 6, 5, 5), 0), False, False),
        (channels_last((4, 6, 5, 5), 0).double(), True, False),
        (torch.randn(4, 6, 5, 5), True, False),
        (channels_last((4, 6, 5, 5), 0).half(), True, True),
        (torch.randn(4, 6), True, False),
        (torch.randn(4, 6, 5), True, False),
    ],
)
def test_decompositions__replace_those_of_channels_last_maps_in_training(
    x: Tensor, training: bool, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way they say what torch's own operators say."""
    calls: list[str] = []
    for function in (normalised, gradients):

        def counted(*inputs: Any, _function: Any = function) -> Any:
            calls.append(_function.__name__)
            return _function(*inputs)

        monkeypatch.setattr(f"factor_transfer.fusible.{function.__name__}", counted)
    table = decompositions()
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias, mean, var = (torch.full((6,), value, dtype=kind) for value in (1.5, 0.5, 0.1, 2.0))
    inputs = x, weight, bias, mean, var, training, MOMENTUM, EPS
    found, wanted = table[FORWARD](*inputs), FORWARD(*inputs)
    off = 1e-2 if x.dtype == torch.bfloat16 else 1e-5
    assert distance(found[0], wanted[0]) < off
    assert max(distance(one, two) for one, two in zip(found[3:], wanted[3:], strict=True)) < off
    given_back = torch.randn_like(x)
    backwards = table[BACKWARD](given_back, x, weight, mean, var, *found[1:3], training, EPS, [True] * 3)
    theirs = BACKWARD(given_back, x, weight, mean, var, *wanted[1:3], training, EPS, [True] * 3)
    assert max(distance(one, two) for one, two in zip(backwards, theirs, strict=True)) < off
    assert calls == (["normalised", "gradients"] if ours else [])
