"""The paper's file against the authors' own numbers, and against the ways in which it can go wrong."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import factor_transfer
from factor_transfer.method.factor_transfer import (
    NORM_FLOOR,
    Paraphraser,
    Translator,
    factor_channels,
    factor_loss_bound,
    factor_transfer_loss,
    load_reference_paraphraser,
    normalize_factor,
    portable_beta,
    reconstruction_loss,
)
from factor_transfer.util.errors import ConfigError, ModelError

Golden = dict[str, Tensor]


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def published(shared: Path) -> Paraphraser:
    return load_reference_paraphraser(shared / "checkpoints" / "reference-paraphraser-cifar10.pth").eval()


@pytest.fixture
def translator(golden: Golden) -> Translator:
    translator = Translator(64, 32)
    prefix = "translator."
    translator.load_state_dict({name.removeprefix(prefix): t for name, t in golden.items() if name.startswith(prefix)})
    return translator


def test_paraphraser__meets_the_authors_three_modes(golden: Golden, published: Paraphraser) -> None:
    feature = golden["teacher_feature"]
    factor = published.encode(feature)
    for found, mode in ((published(feature), 0), (factor, 1), (published.decode(factor), 2)):
        torch.testing.assert_close(found, golden[f"paraphraser_mode{mode}"], rtol=1e-5, atol=1e-6)
        assert distance(found, golden[f"paraphraser_mode{mode}"]) <= 1e-5


def test_reconstruction_loss__meets_the_authors(golden: Golden, published: Paraphraser) -> None:
    feature = golden["teacher_feature"]
    found = reconstruction_loss(published(feature), feature)
    assert math.isclose(found.item(), golden["reconstruction_l1"].item(), rel_tol=1e-5)


def test_factor_loss__and_every_gradient_meet_the_authors(
    golden: Golden, published: Paraphraser, translator: Translator
) -> None:
    feature = golden["student_feature"].clone().requires_grad_()
    factor = translator(feature)
    assert distance(factor, golden["student_factor"]) <= 1e-5
    loss = factor_transfer_loss(factor, published.encode(golden["teacher_feature"]))
    assert math.isclose(loss.item(), golden["factor_loss"].item(), rel_tol=1e-5)
    loss.backward()
    gradients = {"student_feature": feature.grad} | {
        f"translator.{n}": p.grad for n, p in translator.named_parameters()
    }
    assert {f"grad.{name}" for name in gradients} == {name for name in golden if name.startswith("grad.")}
    for name, gradient in gradients.items():
        assert gradient is not None
        assert distance(gradient, golden[f"grad.{name}"]) <= 1e-5, name
    assert all(parameter.grad is None for parameter in published.parameters()), "the teacher's side got a gradient"


def test_factor_loss__compares_every_channel_and_place() -> None:
    """Ports that first collapse the factor's channels into an attention map cannot tell these apart."""
    teacher = torch.rand(2, 4, 3, 3)
    swapped = teacher[:, [1, 0, 2, 3]]
    assert factor_transfer_loss(swapped, teacher) > 0.01


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_factor_loss__is_the_p_norm_scaled_to_a_mean(p: float) -> None:
    student, teacher = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    by_hand = [
        sum(abs(a / s.norm() - b / t.norm()) ** p for a, b in zip(s.flatten(), t.flatten(), strict=True)) ** (1 / p)
        for s, t in zip(student, teacher, strict=True)
    ]
    wanted = sum(by_hand) / 3 / 120 ** (1 / p)
    assert math.isclose(factor_transfer_loss(student, teacher, p).item(), float(wanted), rel_tol=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*(st.integers(1, 4) for _ in range(4))),
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-3, 1e3),
    p=st.sampled_from([1.0, 1.5, 2.0, 4.0]),
)
def test_factor_loss__is_bounded_and_blind_to_scale(
    shape: tuple[int, int, int, int], seed: int, scale: float, p: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2))
    loss = factor_transfer_loss(student, teacher, p).item()
    assert 0 <= loss <= factor_loss_bound(math.prod(shape[1:]), p) * (1 + 1e-9)
    assert math.isclose(factor_transfer_loss(scale * student, teacher, p).item(), loss, rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize("elements", [2, 128])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_factor_loss_bound__is_reached(elements: int, p: float) -> None:
    factor = torch.ones(1, elements, 1, 1) if p <= 2 else torch.eye(elements)[:1].view(1, elements, 1, 1)
    assert math.isclose(factor_transfer_loss(-factor, factor, p).item(), factor_loss_bound(elements, p), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, NORM_FLOOR / 1e4, 6e4])
def test_factor_loss__is_safe_for_zero_and_huge_factors_in_half_precision(dtype: torch.dtype, value: float) -> None:
    student = torch.full((2, 32, 8, 8), value, dtype=dtype, requires_grad=True)
    teacher = torch.rand(2, 32, 8, 8).to(dtype)
    loss = factor_transfer_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("p", [1, 2])
def test_factor_loss__gives_its_gradient_in_the_layout_of_the_map(p: float) -> None:
    factor = torch.randn(4, 8, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    teacher = torch.randn(4, 8, 6, 5)
    layouts: list[tuple[int, ...]] = []
    translated = factor * 1
    translated.register_hook(lambda gradient: layouts.append(gradient.stride()))  # type: ignore[no-untyped-call]
    loss = factor_transfer_loss(translated, teacher, p)
    torch.testing.assert_close(loss, factor_transfer_loss(factor.detach().contiguous(), teacher, p))
    loss.backward()
    assert layouts == [factor.stride()]


def test_normalize_factor__flattens_each_sample_to_length_one() -> None:
    factor = torch.randn(5, 4, 3, 2) * torch.tensor([1.0, 10, 100, 1e-3, 0]).view(5, 1, 1, 1)
    lengths = normalize_factor(factor).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1, 1, 1, 0]))


def test_reconstruction_loss__squared_is_the_papers() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(reconstruction_loss(a, b, "l2"), torch.nn.functional.mse_loss(a, b))


def test_paraphraser__has_the_papers_layers() -> None:
    paraphraser = Paraphraser(64, 32)
    shapes = {name: tuple(p.shape) for name, p in paraphraser.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv0.weight": (64, 64, 3, 3), "conv1.weight": (32, 64, 3, 3), "conv2.weight": (32, 32, 3, 3),
        "deconv0.weight": (32, 32, 3, 3), "deconv1.weight": (32, 64, 3, 3), "deconv2.weight": (64, 64, 3, 3),
    }  # fmt: skip
    assert not [m for m in paraphraser.modules() if isinstance(m, torch.nn.BatchNorm2d)], "no batch norm by default"
    assert not [m for m in Translator(64, 32).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len([m for m in Paraphraser(64, 32, batch_norm=True).modules() if isinstance(m, torch.nn.BatchNorm2d)]) == 6


def test_factor_channels__rounds_and_may_exceed_the_teachers() -> None:
    assert [factor_channels(64, k) for k in (0.5, 0.75, 1, 2)] == [32, 48, 64, 128]
    with pytest.raises(ConfigError, match=r"--k 0\.001"):
        factor_channels(64, 0.001)


def test_portable_beta__keeps_the_authors_bound() -> None:
    assert portable_beta(2048) == 500
    for elements in (8, 512, 25088):
        for p in (1, 2, 4):
            assert math.isclose(portable_beta(elements, p) * factor_loss_bound(elements, p), 500 * 2 / math.sqrt(2048))


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("shape", [(32, 8, 8), (128, 8, 8), (16, 2, 2), (5, 7, 7)])
def test_portable_beta__pulls_as_hard_at_any_size(p: float, shape: tuple[int, int, int]) -> None:
    """Its gradient for an image is at most what it is in the authors' program, and for p of 1 and 2 it is that.

    The norm of a factor receives no gradient, so it is all seen only where none lies along the factor: between a flat
    one and one that is larger in every other place.
    """
    authors = 500 / math.sqrt(2048)
    elements = math.prod(shape)

    def pull(ours: Tensor, theirs: Tensor) -> float:
        unit = normalize_factor(ours).view(ours.shape).requires_grad_()
        loss = portable_beta(elements, p) * factor_transfer_loss(unit, theirs, p)
        (gradient,) = torch.autograd.grad(loss, unit)
        return float(gradient.norm())

    for scale in (1e-2, 1.0, 1e3):
        ours, theirs = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(0)) * scale
        assert pull(ours, theirs) <= authors * (1 + 1e-5)
    uneven = torch.full((elements,), 1.2)
    uneven[::2] = 0.8
    if p in (1, 2):
        assert pull(torch.ones(1, *shape), uneven.view(1, *shape)) == pytest.approx(authors, rel=0.03)


class Canary:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["CANARY"],)


def test_load_reference_paraphraser__runs_nothing_and_takes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    torch.save({"state_dict": Canary()}, tmp_path / "hostile.pth")
    torch.save({"state_dict": Paraphraser(8, 4).state_dict() | {"more": torch.ones(1)}}, tmp_path / "more.pth")
    for name, found in (
        ("hostile.pth", "weights_only|Weights only"),
        ("more.pth", "more"),
        ("none.pth", "No such file"),
    ):
        with pytest.raises(ModelError, match=found):
            load_reference_paraphraser(tmp_path / name)
    assert not (tmp_path / "canary").exists()


def test_package__has_the_method_at_its_top() -> None:
    for name in ("Paraphraser", "Translator", "normalize_factor", "reconstruction_loss", "factor_transfer_loss",
                 "load_reference_paraphraser", "distill"):  # fmt: skip
        assert name in dir(factor_transfer)
    assert factor_transfer.Paraphraser is Paraphraser
