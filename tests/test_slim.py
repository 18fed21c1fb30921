"""The slim form, the rule that chooses a form, and the paraphraser's training on kept maps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from bits import bits
from factor_transfer import distill
from factor_transfer.config import Config
from factor_transfer.distillation import evaluate_run
from factor_transfer.method.factor_transfer import Paraphraser, Translator
from factor_transfer.method.losses import drawn_translator
from factor_transfer.method.slim import Reduction, SlimParaphraser, SlimTranslator, start_as_identity
from factor_transfer.networks.pair import Pair, load_side
from factor_transfer.networks.weights import load_paraphraser, paraphraser_metadata
from factor_transfer.report.findings import findings
from factor_transfer.training.form import with_form
from factor_transfer.training.run_folder import FORM, Run, form_of, saved_config
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.errors import ConfigError, Interrupted, ModelError, RunError, TrainingError

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
JOB: dict[str, Any] = {
    "teacher": "cifar_resnet20", "student": "cifar_resnet20", "teacher_args": SMALL, "student_args": SMALL,
    "teacher_epochs": 8, "teacher_lr": 0.1, "epochs": 2, "views": 2, "batch_size": 12, "lr": 0.05, "threads": 1,
    "device": "cpu", "workers": 0, "log_with": "none", "factor_form": "slim", "factor_width": 4,
}  # fmt: skip


# -- the layers


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 5))
def test_reduction__keeps_all_of_maps_that_have_so_few_components(channels: int, components: int, seed: int) -> None:
    torch.manual_seed(seed)
    few = min(channels, components)
    maps = torch.einsum("bkhw,kc->bchw", torch.randn(50, few, 2, 2), torch.randn(few, channels)) + torch.randn(
        channels, 1, 1
    )
    reduction = Reduction(channels, 2 * few).fit(maps)
    reduced = reduction(maps)
    assert reduced.min() >= 0
    assert torch.equal(reduced[:, ::2] * reduced[:, 1::2], torch.zeros_like(reduced[:, ::2]))  # one of each two parts
    assert reduced.square().mean() == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(reduction.expand(reduced), maps, rtol=1e-3, atol=1e-3)


def test_reduction__takes_the_components_of_the_largest_variance_with_one_sign_on_every_machine() -> None:
    torch.manual_seed(0)
    maps = torch.randn(4000, 3, 1, 1) * torch.tensor([1.0, 9.0, 3.0]).view(3, 1, 1) + 5
    reduction = Reduction(3, 4).fit(maps)
    torch.testing.assert_close(reduction.components.abs(), torch.tensor([[0.0, 1, 0], [0, 0, 1]]), atol=0.05, rtol=0)
    assert (reduction.components.sum(1) > 0).all()
    torch.testing.assert_close(reduction.mean, torch.full((3,), 5.0), atol=0.5, rtol=0)


def test_reduction__is_computed_in_float32_whatever_the_precision() -> None:
    torch.manual_seed(0)
    maps = 100 + torch.randn(64, 8, 2, 2)
    reduction = Reduction(8, 4).fit(maps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reduction(maps), reduction(maps.clone()))
        found = reduction(maps)
    assert torch.equal(found, reduction(maps))


@pytest.mark.parametrize(("maps", "said"), [(torch.ones(4, 2, 1, 1), "all alike"),
                                            (torch.full((4, 2, 1, 1), torch.nan), "not finite")])  # fmt: skip
def test_reduction__refuses_maps_that_say_nothing(maps: torch.Tensor, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        Reduction(2, 2).fit(maps)


def test_slim_paraphraser__begins_with_the_principal_components() -> None:
    """The identity start gives back what a linear projection to K / 2 components keeps."""
    torch.manual_seed(0)
    maps = torch.einsum("bkhw,kc->bchw", torch.randn(200, 2, 3, 3), torch.randn(2, 32)) + 0.01 * torch.randn(
        200, 32, 3, 3
    )
    paraphraser = SlimParaphraser(32, 4, width=8)
    paraphraser.reduction.fit(maps)
    start_as_identity(paraphraser.inner, noise=0)
    for layer in paraphraser.inner.children():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    error = (paraphraser(maps) - maps).square().mean() / (maps - maps.mean((0, 2, 3), keepdim=True)).square().mean()
    assert error < 1e-3


def test_forms__differ_only_where_a_map_is_wider() -> None:
    config = Config(data="digits", teacher="a", student="b", factor_form="slim", factor_width=16)
    assert type(drawn_translator(config, 16, 8)) is Translator
    slim = drawn_translator(config, 17, 8)
    assert isinstance(slim, SlimTranslator)
    assert slim[0].weight.shape == (16, 17, 1, 1)
    assert slim[1].conv0.weight.shape == (16, 16, 3, 3)


def test_load_paraphraser__of_the_other_form_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for name, made in (("slim", SlimParaphraser(16, 4, width=8)), ("paper", Paraphraser(16, 8))):
        run.save_weights(name, made.state_dict(), paraphraser_metadata(made))
    again = load_paraphraser(tmp_path / "slim.safetensors", channels=16, k=0.5, width=8)
    assert isinstance(again, SlimParaphraser)
    with pytest.raises(ModelError, match="reduces the map to 8 channels") as error:
        load_paraphraser(tmp_path / "slim.safetensors", channels=16, k=0.5)
    assert "--factor-form slim --factor-width 8" in str(error.value)
    with pytest.raises(ModelError, match="the paper's form"):
        load_paraphraser(tmp_path / "paper.safetensors", channels=16, k=0.5, width=8)


# -- the settings


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        ({"factor_form": "slim", "factor_width": 64, "k": 2.0}, "--factor-form slim --factor-width 64 with --k 2"),
        ({"factor_form": "slim", "paraphraser": "none"}, "--factor-form slim with --paraphraser none"),
        ({"factor_form": "paper", "factor_width": 64}, "--factor-width 64 with --factor-form paper"),
        ({"factor_width": 64}, "--factor-width 64 with --factor-form auto"),
        ({"factor_form": "slim", "factor_width": 7}, "--factor-width 7"),
    ],
)
def test_config__forms_that_contradict_are_refused_with_both_named(given_: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config(data="digits", teacher="a", student="b", **given_)
    assert str(error.value).startswith(named)


PAIRS = [
    ("cifar_resnet56", "cifar_resnet20", 32, {}, "paper"),
    ("tf_efficientnet_lite0", "mobilenetv3_small_050", 64, {}, "slim"),
    ("tf_efficientnet_lite0", "mobilenetv3_small_050", 64, {"k": 1.5}, "paper"),
    ("tf_efficientnet_lite0", "mobilenetv3_small_050", 64, {"beta": 0.0, "kd_weight": 1.0}, "paper"),
    ("cifar_resnet56", "cifar_resnet20", 32, {"factor_form": "slim"}, "slim"),
    ("convnext_tiny", "convnext_atto", 64, {}, "slim"),  # by the price of a step alone
]


@pytest.mark.parametrize(("teacher", "student", "size", "more", "form"), PAIRS)
def test_with_form__takes_the_papers_where_it_costs_little(
    teacher: str, student: str, size: int, more: dict[str, Any], form: str
) -> None:
    config = Config(data="digits", teacher=teacher, student=student, img_size=size, **more)
    pair = Pair(load_side("teacher", config, 10, size), load_side("student", config, 10, size))
    chosen, why = with_form(config, pair)
    assert chosen.factor_form == form
    assert why


def test_with_form__keeps_what_a_run_chose_when_it_began() -> None:
    config = Config(data="digits", teacher="cifar_resnet56", student="cifar_resnet20")
    pair = Pair(load_side("teacher", config, 10, 32), load_side("student", config, 10, 32))
    assert with_form(config, pair, before="slim")[0].factor_form == "slim"


def test_with_form__of_a_file_is_the_files(tmp_path: Path) -> None:
    made = SlimParaphraser(64, 8, width=16)
    Run(tmp_path).save_weights("p", made.state_dict(), paraphraser_metadata(made))
    file = str(tmp_path / "p.safetensors")
    config = Config(data="digits", teacher="cifar_resnet56", student="cifar_resnet20", paraphraser=file)
    pair = Pair(load_side("teacher", config, 10, 32), load_side("student", config, 10, 32))
    chosen, _ = with_form(config, pair)
    assert chosen.factor_form == "paper", "no map is wide: the file of a width of 16 is refused when it is loaded"
    wide = Config(data="digits", teacher="tf_efficientnet_lite0", student="mobilenetv3_small_050", paraphraser=file)
    pair = Pair(load_side("teacher", wide, 10, 64), load_side("student", wide, 10, 64))
    chosen, _ = with_form(wide, pair)
    assert (chosen.factor_form, chosen.factor_width) == ("slim", 16)


def test_with_form__of_a_teacher_that_is_narrow_is_the_same_with_a_file(tmp_path: Path) -> None:
    """A paraphraser of 64 channels has the paper's layers in both forms, so its file does not decide."""
    made = Paraphraser(64, 32)
    Run(tmp_path).save_weights("p", made.state_dict(), paraphraser_metadata(made))
    forms = []
    for file in (None, str(tmp_path / "p.safetensors")):
        config = Config(data="digits", teacher="cifar_resnet56", student="mobilenetv2_100", paraphraser=file)
        pair = Pair(load_side("teacher", config, 10, 32), load_side("student", config, 10, 32))
        forms.append(with_form(config, pair)[0].factor_form)
    assert forms == ["slim", "slim"]


# -- whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    """A slim run with a report; and the same one stopped in its paraphraser's and in its student's training."""
    folder = tmp_path_factory.mktemp("slim")
    image_folder(folder / "images", train=8, validation=2)
    job = {**JOB, "data": folder / "images", "cache_dir": folder / "cache"}
    leave = Trainer._leave
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factor_transfer.distillation.export_pt2", lambda *_: 0.0)
        distill(**job, out=folder / "straight")
        for stage, epoch in (("paraphraser", 3), ("student", 1)):

            def stop(self: Trainer, signum: int, at: tuple[str, int] = (stage, epoch)) -> None:
                leave(self, 15 if (self.plan.stage, self.progress.epoch) == at else signum)

            patch.setattr(Trainer, "_leave", stop)
            with pytest.raises(Interrupted):
                distill(**job, out=folder / f"stopped-{stage}")
    return folder


@pytest.mark.usefixtures("unexported")
@pytest.mark.parametrize("stage", ["paraphraser", "student"])
def test_distill__a_slim_run_is_continued_to_the_same_bits(
    runs: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(runs / f"stopped-{stage}", tmp_path / "run"))
    monkeypatch.setattr(Reduction, "fit", lambda *_: pytest.fail("the components of the checkpoint are taken"))
    distill(**JOB, data=runs / "images", cache_dir=tmp_path / "cache", out=out)
    assert f"{stage}: continued after" in capsys.readouterr().err
    assert bits(out) == bits(runs / "straight")
    losses = [[row["loss"] for row in Run(folder).metrics()] for folder in (out, runs / "straight")]
    assert losses[0] == losses[1]


def test_distill__the_paraphraser_ends_when_its_error_falls_no_more(runs: Path) -> None:
    losses = [row["loss"] for row in Run(runs / "straight").metrics("paraphraser")]
    assert len(losses) <= 1000 // 50  # 24 maps are shown 34 times in a pass: 51 steps
    assert losses[-1] > 0.95 * losses[-3]
    assert all(now <= 0.95 * before for before, now in zip(losses, losses[2:-1], strict=False))
    found = Run(runs / "straight").recorded("paraphraser")
    assert found is not None
    assert found["images"] == {"trained": 34 * 24 * len(losses), "teacher": 24, "teacher_alone": 24}


@pytest.mark.usefixtures("unexported")
def test_distill__a_paraphraser_that_diverges_on_kept_maps_ends_with_a_message(runs: Path, tmp_path: Path) -> None:
    job = {**JOB, "data": runs / "images", "cache_dir": tmp_path / "cache", "max_skipped": 120}
    with pytest.raises(TrainingError, match="paraphraser: not finite"):
        distill(**job, paraphraser_lr=1e30, out=tmp_path / "run")


@pytest.mark.usefixtures("unexported")
def test_distill__takes_the_form_and_width_of_a_file_and_reads_them_back(runs: Path, tmp_path: Path) -> None:
    file = str(runs / "straight" / "paraphraser.safetensors")
    job = {**JOB, "data": runs / "images", "cache_dir": tmp_path / "cache", "paraphraser": file, "epochs": 1}
    with pytest.raises(ModelError, match="--factor-form slim --factor-width 4"):
        distill(**{**job, "factor_form": "paper", "factor_width": None}, out=tmp_path / "run")


def test_distill__a_slim_run_is_read_by_every_command(runs: Path) -> None:
    folder = runs / "straight"
    assert saved_config(folder).factor_form == "slim"
    assert evaluate_run(folder)["student"]["top1"] >= 0
    found = findings(folder)
    assert not found["missing"]
    assert {"reconstruction", "cosine"} <= found.keys()
    weights = load_file(folder / "paraphraser.safetensors")
    assert weights["reduction.components"].shape == (2, 8)
    assert not any("translator" in name for name in load_file(folder / "student.safetensors"))


@pytest.mark.usefixtures("unexported")
def test_distill__slim_factors_of_two_layers_without_labels_have_a_cache_of_their_own(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = dict.fromkeys(("teacher_layer", "student_layer"), "layer1,layer3")
    job = {**JOB, **layers, "data": runs / "images", "cache_dir": tmp_path / "cache", "label_weight": 0.0}
    first = distill(**job, out=tmp_path / "one")
    assert [pair["factor"] for pair in first.summary["pairs"]] == [[2, 16, 16], [2, 4, 4]]
    narrow = distill(**job | {"factor_width": 2}, out=tmp_path / "two")
    assert [pair["factor"][0] for pair in narrow.summary["pairs"]] == [1, 1]
    assert "the nearest of 1 other caches differs in" in capsys.readouterr().err


@pytest.mark.usefixtures("unexported")
def test_distill__a_run_of_before_there_were_forms_is_read_and_has_the_papers(runs: Path, tmp_path: Path) -> None:
    usual = {"factor_form", "factor_width", "views"}
    job = {name: value for name, value in JOB.items() if name not in usual} | {"epochs": 1}
    job |= {"data": runs / "images", "out": tmp_path / "run"}
    made = distill(**job, factor_form="paper", paraphraser_epochs=6).summary
    for name, gone in (("config.json", {"factor_form", "factor_width"}), ("fingerprints.json", {"factor form"})):
        path = tmp_path / "run" / name
        values = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in values.items() if key not in gone}))
    assert saved_config(tmp_path / "run").factor_form == "paper"
    assert distill(**job).summary == made  # finished: nothing is computed
    assert not findings(tmp_path / "run")["missing"]
    with pytest.raises(RunError, match="--paraphraser-epochs 6 there, 5 here"):
        distill(**job, paraphraser_epochs=5)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(RunError, match="--factor-form paper there, auto here"):  # to its own bits, or not at all
        distill(**job)


def test_saved_config__has_the_form_that_was_chosen(tmp_path: Path) -> None:
    config = Config(data="digits", teacher="a", student="b")
    run = Run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert saved_config(tmp_path).factor_form == "auto"
    run.pin(FORM, form_of(replace(config, factor_form="slim", factor_width=16)), "--factor-form changed")
    assert (saved_config(tmp_path).factor_form, saved_config(tmp_path).factor_width) == ("slim", 16)
