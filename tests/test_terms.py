"""The terms beside Factor Transfer, each against its paper; and the methods that the settings make of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.task import LogitDistillationTask
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401
from factor_transfer import distill
from factor_transfer.config import Config
from factor_transfer.doctor import diagnose
from factor_transfer.method.factor_transfer import Paraphraser
from factor_transfer.method.losses import (
    AttentionTransfer,
    FactorTransfer,
    Hint,
    SoftTargets,
    attention,
)
from factor_transfer.method.presets import METHODS, settings_of
from factor_transfer.method.term import Given, Group, StudentOutputs, Term
from factor_transfer.networks.layers import find_groups
from factor_transfer.networks.load import load_network
from factor_transfer.networks.pair import Pair, load_side
from factor_transfer.report.findings import findings
from factor_transfer.report.html import write_report
from factor_transfer.training.objective import Objective, groups_of
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.checks import Weight, flag
from factor_transfer.util.errors import ConfigError, Interrupted, ModelError
from factor_transfer.util.seeds import part_seed, seeded

pytestmark = pytest.mark.usefixtures("unexported")
ROOT = Path(__file__).parent.parent
LABELS = torch.zeros(4, dtype=torch.long)
LOGITS = torch.zeros(4, 5, dtype=torch.float64)


def maps(channels: int, side: int, seed: int) -> Tensor:
    return torch.randn(4, channels, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- each term, against its paper


def test_soft_targets__is_timms_distillation() -> None:
    """timm's own task is the oracle, for the loss and for the gradient in the student."""
    torch.manual_seed(0)
    student, teacher = (timm.create_model("cifar_resnet20", layers=(1, 1, 1), channels=(4, 4, 8)) for _ in range(2))
    for network in (student, teacher):
        network.eval().pretrained_cfg = {**network.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    oracle = LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), task_loss_weight=0.0, distill_loss_weight=0.9, temperature=4.0,
        verbose=False,
    )  # fmt: skip
    wanted = oracle(images, labels)["loss"]
    weights = list(student.parameters())
    theirs = torch.autograd.grad(wanted, weights, allow_unused=True)
    with torch.no_grad():
        logits = teacher(images)
    term = SoftTargets(0.9, 4.0)
    found = term(StudentOutputs(student(images), images), {"logits": logits}, labels)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(torch.autograd.grad(found, weights, allow_unused=True), theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_attention__is_the_normalised_sum_of_squares() -> None:
    feature = torch.tensor([[[[3.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 1.0]]]])
    energy = torch.tensor([25.0, 0.0, 0.0, 2.0])  # the mean over channels has the same direction
    torch.testing.assert_close(attention(feature, (2, 2)).flatten(), energy / energy.norm())
    assert attention(7 * feature, (2, 2)).allclose(attention(feature, (2, 2)))
    assert attention(torch.zeros(1, 2, 2, 2), (2, 2)).abs().max() == 0


def program_at(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The authors' program in numpy: at(x) = normalize(x.pow(2).mean(1).view(B, -1)), (at(x) - at(y)).pow(2).mean()."""
    found = []
    for feature in (ours, theirs):
        flat = np.square(feature).mean(1).reshape(len(feature), -1)
        found.append(flat / np.sqrt(np.square(flat).sum(1, keepdims=True)))
    return float(np.square(found[0] - found[1]).mean())


def test_attention_transfer__is_the_authors_programs_loss_and_gradient() -> None:
    """In float64 against numpy; the gradient against numpy's central differences."""
    groups = [Group("a", "c", (6, 3), (4, 4)), Group("b", "d", (8, 5), (2, 2))]
    ours = {"c": maps(3, 4, 0).requires_grad_(), "d": maps(5, 2, 1).requires_grad_()}
    theirs = {"a": maps(6, 4, 2), "b": maps(8, 2, 3)}
    term = AttentionTransfer(groups)
    assert term.taps == ("c", "d")
    teacher = {name: reader(theirs[reader.layer]) for name, reader in term.readers().items()}
    assert set(teacher) == term.needs
    assert {name: tuple(value.shape[1:]) for name, value in teacher.items()} == {
        name: reader.shape for name, reader in term.readers().items()
    }

    def loss() -> Tensor:
        return term(StudentOutputs(LOGITS, ours["d"], ours), teacher, LABELS)

    def wanted(c: np.ndarray, d: np.ndarray) -> float:
        return 1000 * (program_at(c, theirs["a"].numpy()) + program_at(d, theirs["b"].numpy()))

    c, d = (value.detach().numpy().copy() for value in ours.values())
    assert loss().item() == pytest.approx(wanted(c, d), rel=1e-6)
    gradient = torch.autograd.grad(loss(), ours["c"])[0]
    for place in [(0, 0, 0, 0), (2, 1, 3, 2), (3, 2, 1, 1)]:
        values = []
        for step in (1e-5, -1e-5):
            moved = c.copy()
            moved[place] += step
            values.append(wanted(moved, d))
        assert gradient[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


def test_attention_transfer__pools_squares_where_sizes_differ() -> None:
    """Energy is what is pooled: two opposite halves of a channel do not cancel out."""
    theirs = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]]).repeat(1, 1, 1, 2)  # (1, 1, 2, 4)
    assert attention(theirs, (1, 2)).flatten().tolist() == pytest.approx([0.5**0.5] * 2)
    term = AttentionTransfer([Group("a", "c", (6, 3), (2, 2))], 1.0)
    teacher = {name: reader(maps(6, 8, 0)) for name, reader in term.readers().items()}
    student = {"c": maps(3, 2, 1)}
    assert 0 < term(StudentOutputs(LOGITS, student["c"], student), teacher, LABELS) < 2 / 4


def test_hint__is_a_regression_in_numpy() -> None:
    term = Hint(Group("a", "c", (6, 3), (4, 4)), 0.5).double()
    ours, theirs = maps(3, 4, 0).requires_grad_(), maps(6, 8, 1)
    teacher = {name: reader(theirs) for name, reader in term.readers().items()}
    student = StudentOutputs(LOGITS, ours, {"c": ours})
    loss = term(student, teacher, LABELS)
    weight, bias = (value.detach().numpy() for value in term.regressor.parameters())
    x, y = ours.detach().numpy(), theirs.numpy().reshape(4, 6, 4, 2, 4, 2).mean((3, 5))
    error = np.einsum("kc,bchw->bkhw", weight[:, :, 0, 0], x) + bias[None, :, None, None] - y
    assert loss.item() == pytest.approx(0.5 * np.square(error).mean(), rel=1e-6)
    wanted = np.einsum("kc,bkhw->bchw", weight[:, :, 0, 0], error) / error.size
    np.testing.assert_allclose(torch.autograd.grad(loss, ours)[0].numpy(), wanted, rtol=1e-5, atol=1e-9)


# -- where they look


@pytest.mark.parametrize(("name", "side", "wanted"), [
    ("cifar_resnet20", 32, ["layer1", "layer2", "layer3"]),
    ("cifar_wrn_16_2", 32, ["layer1", "layer2", "relu"]),  # pre-activation: the last activation stands alone
    ("resnet18", 64, ["layer1", "layer2", "layer3", "layer4"]),  # the stem's 32x32 is no group
    ("resnet50", 64, ["layer1", "layer2", "layer3", "layer4"]),  # layer2's first 1x1 still has layer1's size
    ("mobilenetv3_small_050", 64, ["blocks.0", "blocks.1", "blocks.3", "blocks"]),
    ("convnext_atto", 64, ["stages.0", "stages.1", "stages.2", "stages"]),
    ("swin_tiny_patch4_window7_224", 224, ["layers.0", "layers.1", "layers.2", "norm"]),
    ("vit_tiny_patch16_224", 64, ["norm"]),  # one resolution, one group
    ("pvt_v2_b0", 64, ["stages.0", "stages.1", "stages.2", "stages"]),  # its attention makes smaller maps on the way
    ("regnetx_002", 64, ["s1", "s2", "s3", "s4"]),
    ("densenet121", 64, ["features.denseblock1", "features.denseblock2", "features.denseblock3", "features"]),
    ("torchvision/resnet18", 64, ["layer1", "layer2", "layer3", "layer4"]),
    ("cifar_vgg13", 32, ["layer1", "layer2", "layer3", "layer4", "layer5"]),
])  # fmt: skip
def test_find_groups__names_what_a_person_would(name: str, side: int, wanted: list[str]) -> None:
    args = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)} if name.startswith("swin") else {}
    network = load_network(name, role="teacher", num_classes=10, img_size=side, seed=0, args=args)
    found = find_groups(network.module, torch.zeros(2, 3, side, side))
    sizes = [shape[1:] for _, shape in found]
    assert sizes == sorted(set(sizes), reverse=True)
    assert [layer for layer, _ in found] == wanted


def test_groups_of__refuses_what_cannot_be_paired() -> None:
    names = {"teacher": "cifar_resnet20", "student": "cifar_resnet20_b"}

    def pair(side: int = 16, **settings: Any) -> tuple[Config, Pair]:
        config = Config(data="digits", at_weight="auto", beta=0, **names, **settings)
        return config, Pair(load_side("teacher", config, 10, side), load_side("student", config, 10, side))

    config, networks = pair(32)
    assert Objective(config, networks, [], 10).record["at_weight"] == pytest.approx(1000)  # the authors' program
    assert Objective(*pair(8), [], 10).record["at_weight"] == pytest.approx(62.5)  # 8x8, 4x4 and 2x2: the same bound
    assert [group[:2] for group in groups_of(*pair())] == [(f"layer{n}", f"layer{n}") for n in (1, 2, 3)]
    (group,) = groups_of(*pair(teacher_groups="layer1", student_groups="layer2"))
    assert group == Group("layer1", "layer2", (16, 32), (8, 8))
    with pytest.raises(ConfigError, match="2 of the teacher, 3 of the student"):
        groups_of(*pair(teacher_groups="layer1,layer2"))
    config, networks = pair(4)
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.LazyLinear(10))  # its map has one place
    tiny(torch.zeros(2, 3, 4, 4))
    with pytest.raises(
        ConfigError, match=r"--student-groups \(none found\)\n  found: 2 of the teacher, 0 of the student"
    ):
        groups_of(
            config,
            Pair(networks.teacher, replace(networks.student, network=replace(networks.student.network, module=tiny))),
        )
    with pytest.raises(ModelError, match=r"--teacher-groups layer9\n  found: no submodule of that name"):
        groups_of(*pair(teacher_groups="layer9", student_groups="layer1"))
    with pytest.raises(ModelError, match=r"--teacher-groups global_pool\n  found: an output of shape \(2, 64\)"):
        groups_of(*pair(teacher_groups="global_pool", student_groups="layer1"))
    with pytest.raises(ConfigError, match=r"--student-groups layer1\n  found: no term that reads it"):
        Config(data="digits", student_groups="layer1", kd_weight=1, **names)
    with pytest.raises(ConfigError, match="maps of 1x1 and 4x4, which meet at one place"):
        groups_of(*pair(4, teacher_groups="layer3", student_groups="layer1"))


# -- the methods, run


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a short run on digits, with a teacher that was trained beforehand."""
    folder = tmp_path_factory.mktemp("taught")
    settings: dict[str, Any] = {
        "teacher_args": {"layers": (1, 1, 1), "channels": (8, 16, 32)},
        "student_args": {"layers": (1, 1, 1), "channels": (4, 8, 8)},
        "paraphraser_epochs": 1, "epochs": 2, "threads": 1, "log_with": "none", "train_images": 320,
        "batch_size": 32,
    }  # fmt: skip
    distill("cifar_resnet20", "cifar_resnet20_b", "digits", teacher_epochs=6, out=folder, beta=0, **settings)
    return {**settings, "teacher_weights": str(folder / "teacher.safetensors")}


def run(settings: dict[str, Any], out: Path, **more: Any) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(hash of the student's weights, summary, metrics) of a run."""
    result = distill("cifar_resnet20", "cifar_resnet20_b", "digits", out=out, **{**settings, **more})
    weights = hashlib.sha256()
    for name, value in sorted(load_file(out / "student.safetensors").items()):
        weights.update(name.encode() + value.numpy().tobytes())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return weights.hexdigest(), result.summary, rows


TERMS = {
    "baseline": ("baseline", {"cross_entropy"}),
    "kd": ("knowledge distillation", {"cross_entropy", "soft_targets"}),
    "ft": ("Factor Transfer", {"cross_entropy", "factor_transfer"}),
    "at": ("attention transfer", {"cross_entropy", "attention_transfer"}),
    "fitnet": ("hints + knowledge distillation", {"cross_entropy", "soft_targets"}),
    "ft+kd": ("Factor Transfer + knowledge distillation", {"cross_entropy", "soft_targets", "factor_transfer"}),
    "at+kd": ("attention transfer + knowledge distillation", {"cross_entropy", "soft_targets", "attention_transfer"}),
}
KNOWN = {"hint"}.union(*(terms for _, terms in TERMS.values()))


def test_methods__each_trains_by_its_own_terms(taught: dict[str, Any], tmp_path: Path) -> None:
    assert list(METHODS) == list(TERMS)[:5]
    weights = {}
    for name, (label, terms) in TERMS.items():
        settings = {**taught, **settings_of(name, {}), "baseline": name == "baseline"}
        out = tmp_path / name
        weights[name], summary, rows = run(settings, out)
        last = rows[-2 if name == "baseline" else -1]
        assert set(last) & KNOWN == terms, name
        assert {term["name"] for term in summary["terms"]} == terms
        assert summary["method"] == label
        if name in {"at", "fitnet", "ft+kd"}:  # their parts are those of all methods
            page = write_report(out).read_text()
            assert summary["method"] in page.replace("Labels", "labels")
        assert (
            (summary["paraphraser"] is not None) == (out / "paraphraser.safetensors").exists() == name.startswith("ft")
        )
        assert [row["stage"] for row in rows].count("hint") == (name == "fitnet")
        assert ("hint" in summary["seconds"]) == (name == "fitnet")
        if name == "baseline":
            same = (load_file(out / f"{role}.safetensors") for role in ("student", "baseline"))
            torch.testing.assert_close(*same, rtol=0, atol=0)
    assert len(set(weights.values())) == len(TERMS)


def test_hint__is_learned_first_by_the_lower_half_alone(
    taught: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The regression improves, what lies above the guided layer stays, and a stopped run ends the same."""
    settings = {**taught, "beta": 0, "hint_epochs": 3, "epochs": 1}
    whole, _, rows = run(settings, tmp_path / "whole")
    losses = [row["hint"] for row in rows if row["stage"] == "hint"]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    config = Config(data="digits", teacher="cifar_resnet20", student="cifar_resnet20_b", **taught)
    first = load_side("student", config, 10, 8).network.module.state_dict()
    after = load_file(tmp_path / "whole" / "hint.safetensors")
    moved = {name.partition(".")[0] for name in first if not torch.equal(first[name], after[name])}
    assert moved == {"conv1", "bn1", "layer1", "layer2"}

    leave = Trainer._leave

    def stop(self: Trainer, signum: int) -> None:
        leave(self, 15 if (self.plan.stage, self.progress.epoch) == ("hint", 2) else signum)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_leave", stop)
        with pytest.raises(Interrupted):
            run(settings, tmp_path / "stopped")
    fit = Trainer.fit

    def stop_between(self: Trainer) -> Any:
        if self.plan.stage == "student":
            raise Interrupted(15)
        return fit(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", stop_between)
        with pytest.raises(Interrupted):
            run(settings, tmp_path / "stopped")
    again, _, rows = run(settings, tmp_path / "stopped")
    assert [row["hint"] for row in rows if row["stage"] == "hint"] == losses
    assert again == whole


def test_terms__are_cached_where_they_can_be(
    taught: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Attention maps come back from disk; a hint keeps the teacher live, and the run says so."""
    caching = {**taught, **settings_of("at+kd", {}), "views": 1, "cache_dir": str(tmp_path / "cache"), "epochs": 3}
    once, _, rows = run(caching, tmp_path / "once")
    (meta,) = (tmp_path / "cache").rglob("meta.json")
    outputs = json.loads(meta.read_text())["outputs"]
    assert outputs == {"logits": [10], "attention_0": [1, 8, 8], "attention_1": [1, 4, 4], "attention_2": [1, 2, 2]}
    twice, _, _ = run(caching, tmp_path / "twice")
    assert once == twice
    _, _, live = run({**caching, "views": 0}, tmp_path / "live", data_seed=0)
    assert rows[0]["attention_transfer"] == pytest.approx(live[0]["attention_transfer"], rel=1e-2)
    capsys.readouterr()
    run({**caching, "hint_weight": 1.0}, tmp_path / "hint")
    assert "no factor cache: hint is too large; the teacher stays live" in " ".join(capsys.readouterr().err.split())


def test_config__refuses_a_student_that_would_learn_nothing() -> None:
    with pytest.raises(ConfigError, match="a student that would learn nothing"):
        Config(data="digits", teacher="a", student="b", beta=0, label_weight=0)
    with pytest.raises(ConfigError, match="--at-weight -1"):
        Config(data="digits", teacher="a", student="b", at_weight=-1)


# -- several layers, and the paper's ablations


def test_layers__have_a_paraphraser_and_a_translator_each(
    taught: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = {**taught, "teacher_layer": "layer3,layer2", "student_layer": "layer3,layer1"}
    live, summary, rows = run(two, tmp_path / "live")
    said = " ".join(capsys.readouterr().err.split())
    assert "of layer2 for layer1: 8 channels of 4x4 (128 elements); beta 125 (auto)" in said
    assert [pair["beta"] for pair in summary["pairs"]] == pytest.approx([125 / 2**0.5, 125])  # 64 and 128 elements
    assert [(pair["teacher"], pair["student"], pair["factor"]) for pair in summary["pairs"]] == [
        ("layer3", "layer3", [16, 2, 2]), ("layer2", "layer1", [8, 4, 4])
    ]  # fmt: skip
    assert [pair["weight"] for pair in summary["pairs"]] == [pair["beta"] / 2 for pair in summary["pairs"]]
    last = rows[-1]
    assert last["loss"] == pytest.approx(last["cross_entropy"] + last["factor_transfer"] + last["factor_transfer_1"])
    assert {row["stage"] for row in rows} == {"paraphraser", "paraphraser_1", "student"}
    sizes = {name: tuple(load_file(tmp_path / "live" / f"{name}.safetensors")["conv0.weight"].shape[:2])
             for name in ("paraphraser", "paraphraser_1", "translator", "translator_1")}  # fmt: skip
    assert sizes == {"paraphraser": (32, 32), "paraphraser_1": (16, 16), "translator": (8, 8), "translator_1": (4, 4)}

    single, _, only = run({**taught, "teacher_layer": "layer3", "student_layer": "layer3"}, tmp_path / "single")
    assert only[0]["loss"] == rows[0]["loss"]  # the first paraphraser is the one of a single pair
    assert single != live

    caching = {**two, "views": 1, "cache_dir": str(tmp_path / "cache")}
    once, twice = (run(caching, tmp_path / name) for name in ("once", "twice"))
    (meta,) = (tmp_path / "cache").rglob("meta.json")
    assert json.loads(meta.read_text())["outputs"] == {"factor": [16, 2, 2], "factor_1": [8, 4, 4]}
    assert once[0] == twice[0]
    given = ",".join(str(tmp_path / "live" / f"{name}.safetensors") for name in ("paraphraser", "paraphraser_1"))
    same, _, _ = run({**two, "paraphraser": given}, tmp_path / "given")
    assert same == live


def test_layers__share_the_factor_term() -> None:
    """Each has the beta of its own elements, and the term is their mean."""
    config = Config(
        data="digits", teacher="cifar_resnet20", student="cifar_resnet20_b",
        teacher_layer="layer3,layer2", student_layer="layer3,layer2",
    )  # fmt: skip
    pair = Pair(load_side("teacher", config, 10, 32), load_side("student", config, 10, 32))
    objective = Objective(config, pair, [32, 16], 10)
    weights = [term.beta for term in objective.terms if isinstance(term, FactorTransfer)]
    assert weights == pytest.approx([500 / 2, 500 * 2**0.5 / 2])  # 32x8x8 elements, and 16x16x16
    assert [pair["weight"] for pair in objective.layers()["pairs"]] == weights
    assert objective.outputs == {"factor": (32, 8, 8), "factor_1": (16, 16, 16)}


def test_layers__that_cannot_be_paired_are_told(taught: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 of the teacher, 0 of the student"):
        run({**taught, "teacher_layer": "layer2,layer3"}, tmp_path / "a")
    two = {**taught, "teacher_layer": "layer2,layer3", "student_layer": "layer2,linear"}
    with pytest.raises(ModelError, match=r"(?s)--student-layer linear\n.*of shape.*layer1 4x8x8, layer2 8x4x4"):
        run(two, tmp_path / "b")
    with pytest.raises(ConfigError, match="1 for 2 pairs of layers"):
        run({**two, "student_layer": "layer2,layer3", "paraphraser": "one.safetensors"}, tmp_path / "c")


def test_ablations__change_what_they_say(
    taught: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No paraphraser, one that is not trained, and no translator."""
    straight, summary, rows = run({**taught, "paraphraser": "none"}, tmp_path / "straight")
    assert {row["stage"] for row in rows} == {"student"}
    assert summary["pairs"][0]["factor"] == [32, 2, 2]
    assert summary["paraphraser"] is None
    assert not (tmp_path / "straight" / "paraphraser.safetensors").exists()
    assert write_report(tmp_path / "straight").exists()

    drawn, _, rows = run({**taught, "paraphraser_epochs": 0}, tmp_path / "drawn")
    assert {row["stage"] for row in rows} == {"student"}
    with seeded(part_seed(0, "paraphraser")):
        fresh = Paraphraser(32, 16).state_dict()
    torch.testing.assert_close(load_file(tmp_path / "drawn" / "paraphraser.safetensors"), dict(fresh), rtol=0, atol=0)

    bare, _, rows = run({**taught, "k": 0.25, "translator": "none"}, tmp_path / "bare")
    assert not any(load_file(tmp_path / "bare" / "translator.safetensors"))
    assert "similarity" in findings(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"(?s)8 channels of the student's layer3, 16 of the factor.*--k 0.25"):
        run({**taught, "translator": "none"}, tmp_path / "wrong")
    with pytest.raises(ConfigError, match=r"8 channels .* 32 of the factor\n  valid: a student's layer of 32 channels"):
        run({**taught, "translator": "none", "paraphraser": "none"}, tmp_path / "wrong")
    both = {"student_args": {"layers": (1, 1, 1), "channels": (4, 8, 32)}, "translator": "none", "paraphraser": "none"}
    feature, _, _ = run({**taught, **both}, tmp_path / "both")
    assert len({straight, drawn, bare, feature}) == 4


# -- a term of the user's own


def test_term__of_the_users_own_is_added_and_cached(
    taught: dict[str, Any], tmp_path: Path, factor_transfer: Any
) -> None:
    """The worked example, by the command that its docstring gives, twice: its teacher output comes back from disk."""
    settings = {**taught, "views": 1, "cache_dir": tmp_path / "cache"}
    arguments = ["--data", "digits", "--teacher", "cifar_resnet20", "--student", "cifar_resnet20_b"]
    for name, value in settings.items():
        arguments += [flag(name), json.dumps(value) if isinstance(value, dict) else str(value)]
    example = ROOT / "examples"
    arguments += ["--beta", "0", "--term", "new_method:Distances"]
    for out in ("a", "b"):
        done = factor_transfer("distill", *arguments, "--out", tmp_path / out, cwd=example, exports=False)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["cross_entropy"] + rows[-1]["distances"])
    assert rows[-1]["distances"] < rows[0]["distances"]
    (meta,) = (tmp_path / "cache").rglob("meta.json")
    assert json.loads(meta.read_text())["outputs"] == {"pooled": [32, 1, 1]}
    torch.testing.assert_close(*(load_file(tmp_path / out / "student.safetensors") for out in "ab"), rtol=0, atol=0)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["method"] == "relational distances"
    assert summary["terms"][-1] == {"name": "distances", "label": "relational distances", "weight": 25.0}
    assert "relational distances: weight 25" in done.stderr
    told = factor_transfer("distill", *arguments[:-1], "json:loads", "--out", tmp_path / "c", cwd=example)
    assert told.returncode == 2
    assert "error: --term json:loads" in told.stderr
    settings_file = tmp_path / "job.yaml"
    settings_file.write_text("term: new_method:Distances\n")
    told = factor_transfer("distill", *arguments[:-2], "--config", settings_file, "--out", tmp_path / "d", cwd=example)
    assert "term: new_method:Distances, which is code that would be run" in told.stderr


class Near(Term):
    """A loss like those of the package, but for where it lies."""

    name, label = "near", "nearness"

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    @classmethod
    def made(cls, given: Given) -> list[Term]:
        return [cls(vars(given.config)["near_weight"])]

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        return self.weight * student.feature.square().mean()


@dataclass(frozen=True, kw_only=True)
class NearConfig(Config):
    near_weight: Annotated[float, Weight("test_terms:Near", near={"near_weight": 2.0})] = 0.0


def test_term__is_a_class_and_a_setting_that_names_it() -> None:
    config = NearConfig(data="digits", teacher="cifar_resnet20", student="cifar_resnet20", beta=0, near_weight=2.0)
    pair = Pair(load_side("teacher", config, 10, 8), load_side("student", config, 10, 8))
    objective = Objective(config, pair, [], 10)
    assert [term.name for term in objective.terms] == ["cross_entropy", "near"]
    assert list(objective.lines()) == ["student: nearness", "nearness: weight 2"]
    assert objective.layers()["terms"][-1] == {"name": "near", "label": "nearness", "weight": 2.0}
    NearConfig(data="digits", teacher="a", student="b", beta=0, label_weight=0, near_weight=1.0)
    with pytest.raises(ConfigError, match="a student that would learn nothing"):
        NearConfig(data="digits", teacher="a", student="b", beta=0, label_weight=0)


def test_methods_page__shows_the_example_and_every_method() -> None:
    page, example = ((ROOT / name).read_text() for name in ("docs/methods.md", "examples/new_method.py"))
    assert example[example.index("import") :] in page
    assert all(f"`{name}`" in page for name in TERMS)
    assert len(example.splitlines()) < 50


def test_doctor__looks_at_every_term(taught: dict[str, Any]) -> None:
    """With no factor, with two, and with terms that read other layers."""
    names: dict[str, Any] = {"data": "digits", "teacher": "cifar_resnet20", "student": "cifar_resnet20_b"}

    def tables(**settings: Any) -> dict[str, dict[str, str]]:
        found = diagnose(Config(**{**names, **taught, **settings}))
        assert found.code < 2, found.findings
        return {title: {str(row[0]): str(row[1]) for row in rows} for title, _, rows in found.tables}

    shown = tables(**{**settings_of("at+kd", {}), "hint_weight": 1.0})
    assert set(shown["losses on one batch"]) == {"cross entropy", "soft targets", "attention transfer", "hint"}
    assert "hints + attention transfer + knowledge distillation" in shown
    shown = tables(teacher_layer="layer3,layer2", student_layer="layer3,layer1", paraphraser="none")
    assert set(shown["losses on one batch"]) == {"cross entropy", "factor transfer", "factor transfer 1"}
    assert shown["factor transfer"]["shapes"] == "16x4x4 -> 16x4x4 <- translator <- 4x8x8"
    tokens = {"student": "test_vit", "student_args": {"patch_size": 2}}
    assert set(tables(**tokens)["losses on one batch"]) == {"cross entropy", "factor transfer"}  # the map is a view
