"""Which weights of a file are taken, and what is said of files that hold none."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _hub
from torch import Tensor, nn

from factor_transfer import distill
from factor_transfer.export.formats import export_pt2
from factor_transfer.method.factor_transfer import Paraphraser
from factor_transfer.networks.load import Network, load_network
from factor_transfer.networks.weightfiles import TIMMS, identify, split_key
from factor_transfer.networks.weights import load_paraphraser, load_weights, paraphraser_metadata
from factor_transfer.util.errors import ModelError
from factor_transfer.util.files import read_json, state_fingerprint

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
State = dict[str, Tensor]


def fresh(seed: int = 0, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = timm.create_model("cifar_resnet20", **SMALL, num_classes=classes)
    return made


def load(weights: Path | str, **more: Any) -> Network:
    settings: dict[str, Any] = {"role": "teacher", "num_classes": 10, "img_size": 16, "args": SMALL}
    return load_network("cifar_resnet20", weights=str(weights), **{**settings, **more})


def behind(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def is_one(network: Network, module: nn.Module) -> bool:
    return state_fingerprint(network.module.state_dict()) == state_fingerprint(module.state_dict())


def test_timms__are_the_files_that_timm_looks_for() -> None:
    assert TIMMS == _hub._PREFERRED_FILES


# -- containers and prefixes


def profiled(state: State) -> State:
    return {
        **state,
        "total_ops": torch.zeros(1),
        "layer1.total_params": torch.zeros(1),
        "conv1.total_ops": torch.ones(1),
    }


FORMS: dict[str, tuple[Callable[[State], Any], str]] = {
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, "under state_dict, the only ones"),
    "model": (lambda s: {"model": s, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}}, "under model,"),
    "only the average": (lambda s: {"state_dict_ema": s}, "under state_dict_ema, the only ones"),
    "model_state_dict": (lambda s: {"model_state_dict": s, "loss": 0.1}, "under model_state_dict,"),
    "net": (lambda s: {"net": behind("module.", s), "acc": 95}, "under net.module,"),
    "weights": (lambda s: {"weights": s}, "under weights,"),
    "teacher": (lambda s: {"teacher": behind("backbone.", s), "step": 1}, "under teacher.backbone,"),
    "compiled": (lambda s: behind("_orig_mod.", s), "under _orig_mod,"),
    "both wrappers": (lambda s: behind("_orig_mod.module.", s), "under _orig_mod.module,"),
    "Lightning": (
        lambda s: {"state_dict": {**behind("model.", s), "criterion.weight": torch.ones(10)}, "global_step": 7},
        "under state_dict.model, the only ones in the file that fit; left out: 1 other tensors there "
        "(state_dict.criterion.weight)",
    ),
    "SWA": (
        lambda s: {"n_averaged": torch.tensor(4), **behind("module.", s)},
        "under module, the only ones in the file that fit; left out: 1 other tensors there (n_averaged)",
    ),
    "profiled": (profiled, "left out: 3 other tensors there (conv1.total_ops, layer1.total_params, total_ops)"),
    "the same twice": (
        lambda s: {"model": s, "model_ema": {k: v.clone() for k, v in s.items()}},
        "under model, the same as model_ema",
    ),
    "parallel inside": (
        lambda s: {"state_dict": {name.replace("layer1.", "layer1.module."): value for name, value in s.items()}},
        "under state_dict, the only ones in the file that fit; without the wrappers in the middle of their names (mod",
    ),
    "parallel inside, beside others": (
        lambda s: {"state_dict": {"criterion.weight": torch.ones(10)} | behind(
            "model.", {name.replace("layer1.", "layer1.module."): value for name, value in s.items()})},
        "of their names (module); left out: 1 other tensors there (state_dict.criterion.weight)",
    ),
    "in a list": (lambda s: [1, OrderedDict(s)], "under 1,"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_load_network__takes_what_fits_and_says_what_was_done(tmp_path: Path, form: str) -> None:
    trained = fresh()
    wrap, said = FORMS[form]
    torch.save(wrap(trained.state_dict()), tmp_path / "w.pth")
    network = load(tmp_path / "w.pth")
    assert is_one(network, trained)
    assert said in network.origin
    assert network.notes == (network.origin,)
    assert not network.new_head


def test_load_network__has_nothing_to_say_of_plain_weights(tmp_path: Path) -> None:
    torch.save(fresh().state_dict(), tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").notes == ()


@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "model_ema.module"), ("a", "b.c")])
def test_load_network__asks_which_of_two_that_differ(tmp_path: Path, names: tuple[str, str]) -> None:
    one, other = fresh(0), fresh(1)
    outer, _, inner = names[1].partition(".")
    average: Any = behind(f"{inner}." if inner else "", other.state_dict())
    file = tmp_path / "w.pth"
    torch.save({names[0]: one.state_dict(), outer: {**average, "n_averaged": torch.tensor(1)}, "epoch": 1}, file)
    with pytest.raises(ModelError) as caught:
        load(file)
    said = str(caught.value)
    assert f"2 sets of weights that fit this network, and differ: {names[0]}, {names[1]}" in said
    assert f"--teacher-weights {file}:{names[0]} or --teacher-weights {file}:{names[1]}" in said
    assert ("(" + names[1] + ": an average, by its name)" in said) == ("ema" in names[1])
    assert is_one(load(f"{file}:{names[0]}"), one)
    chosen = load(f"{file}:{names[1]}")
    assert is_one(chosen, other)
    assert f"under {names[1]}, as was asked for" in chosen.origin
    assert is_one(load(f"{file}:{outer}"), other)
    with pytest.raises(
        ModelError, match=rf"(?s)--teacher-weights {file}:modle.*no tensors under modle.*valid: .*{names[0]}"
    ):
        load(f"{file}:modle")


def test_load_network__counters_alone_are_no_difference(tmp_path: Path) -> None:
    state = fresh().state_dict()
    other = {name: value + 1 if name.endswith("num_batches_tracked") else value for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": other}, tmp_path / "w.pth")
    assert is_one(load(tmp_path / "w.pth"), fresh())


def test_load_network__a_head_of_another_size_is_a_choice_behind_a_prefix_too(tmp_path: Path) -> None:
    state = fresh(classes=7).state_dict()
    torch.save({"state_dict": behind("net.", state)}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").new_head
    body = {name: value for name, value in state.items() if not name.startswith("linear")}
    torch.save({"state_dict": behind("net.", body)}, tmp_path / "bare.pth")
    bare = load(tmp_path / "bare.pth")
    assert bare.new_head
    assert "under state_dict.net" in bare.origin


def test_load_network__weights_that_do_not_fit_are_named_behind_their_prefix(tmp_path: Path) -> None:
    state = fresh().state_dict()
    del state["layer2.0.conv1.weight"]
    torch.save({"state_dict": behind("module.", state), "other": {"x": torch.ones(1)}}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"1 missing \(layer2\.0\.conv1\.weight\)\n"):
        load(tmp_path / "w.pth")
    torch.save({"state_dict": {"encoder.w": torch.ones(2)}, "lr": torch.ones(1)}, tmp_path / "foreign.pth")
    with pytest.raises(ModelError, match=r"(?s)missing.*1 unexpected \(encoder\.w\)"):
        load(tmp_path / "foreign.pth")


def test_load_network__refuses_integers_where_floats_belong(tmp_path: Path) -> None:
    state = fresh().state_dict()
    state["conv1.weight"] = (100 * state["conv1.weight"]).to(torch.int8)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"1 of wrong type \(conv1\.weight torch\.int8 instead of torch\.float32\)"):
        load(tmp_path / "w.pth")


def test_load_network__stops_a_file_that_unfolds_without_end(tmp_path: Path) -> None:
    deep: Any = [torch.ones(1)] * 10
    for _ in range(12):
        deep = [deep] * 10
    torch.save(deep, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="more than 200,000 entries"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["plain.pth", "with:colon.pth", "C:", "C:back\\slash.pth"])
def test_split_key__a_colon_in_the_files_name_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"x")
    assert split_key(name) == (Path(name), "")
    assert split_key(f"{name}:state_dict.model") == (Path(name), "state_dict.model")
    assert split_key(tmp_path / name) == (tmp_path / name, "")
    assert split_key("C:\\none.pth") == (Path("C:\\none.pth"), "")


def test_split_key__the_longest_name_that_exists_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("w.pth", "w.pth:a"):
        Path(name).write_bytes(b"x")
    assert split_key("w.pth:a") == (Path("w.pth:a"), "")
    assert split_key("w.pth:a:b") == (Path("w.pth:a"), "b")
    assert split_key("w.pth:b:a") == (Path("w.pth"), "b:a")


# -- values


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_network__refuses_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    state = fresh().state_dict()
    state["layer1.0.conv1.weight"][0, 0] = value
    state["layer2.0.bn1.running_var"][1] = value
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    wanted = r"(?s)--teacher-weights.*2 of \d+ tensors.*\(NaN or infinite values\): layer1.0.conv1.weight, layer2"
    with pytest.raises(ModelError, match=wanted):
        load(tmp_path / "w.pth")
    broken = fresh()
    broken.load_state_dict(state)
    with pytest.raises(ModelError, match=r"--teacher CifarResNet\n.*2 of "):
        load_network(broken, role="teacher", num_classes=10, img_size=16)


def test_check_finite__masks_may_be_infinite(tmp_path: Path) -> None:
    module = fresh()
    module.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    assert load_network(module, role="teacher", num_classes=10, img_size=16).pretrained


# -- files that are something else


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def numbers() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.ones(3))
    return buffer.getvalue()


def onnx_model() -> bytes:
    import onnx

    nodes = [onnx.helper.make_node("Relu", ["x"], ["y"])]
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:])
    made: bytes = onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()
    return made


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("w.pth"), io.BytesIO())
    return buffer.getvalue()


def safe() -> bytes:
    from safetensors.torch import save

    return save(fresh().state_dict())


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 94344456\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in\n to continue</title></head>" + 5000 * b"<p>x</p>"
OTHERS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "lfs": (lambda: LFS, "a Git LFS pointer, which stands for a file of 94,344,456 bytes", "git lfs pull"),
    "page": (lambda: PAGE, "a web page (Sign in to continue), saved in the file's place", "download the file itself"),
    "xml": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "AccessDenied", "fetch it again"),
    "text": (lambda: b"Entry not found", "a text file: Entry not found", "fetch it again"),
    "index": (lambda: b'{"metadata": {}, "weight_map": {"a": "b"}}', "lie in several files", "in Python"),
    "empty": (lambda: b"", "an empty file", "fetch it again"),
    "script": (scripted, "a TorchScript archive", "torch.jit.load"),
    "onnx": (onnx_model, "an ONNX model", "as a torch or safetensors file"),
    "npz": (numbers, "a numpy archive (.npz)", "as a torch or safetensors file"),
    "keras": (lambda: zipped(**{"model.weights.h5": b"", "config.json": b""}), "a Keras model", "torch or safetensors"),
    "h5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file", "torch or safetensors"),
    "zip": (lambda: zipped(**{"best/w.pth": b"x"}), "a zip archive of best/w.pth", "unpack it"),
    "tar": (tarred, "a tar archive", "unpack it"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(50), "a gzip archive", "unpack it"),
    "cut safetensors": (lambda: truncated(safe()), "a safetensors file that was cut short: ", "fetch it again"),
    "cut header": (lambda: safe()[:100], "a safetensors file that was cut short: 100 of", "fetch it again"),
    "cut torch": (lambda: truncated(saved(fresh().state_dict())), "cut short: its end is missing", "fetch it again"),
    "cut old torch": (
        lambda: truncated(saved(fresh().state_dict(), _use_new_zipfile_serialization=False)), "cut short", "fetch it"
    ),
    "binary": (lambda: bytes(range(200, 240)), "no kind of file that is known here", "fetch it again"),
    "no tensors": (lambda: saved({"epoch": 3}), "no tensors in it", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_identify__says_what_a_file_is_and_what_to_do(tmp_path: Path, kind: str, name: str) -> None:
    content, found, hint = OTHERS[kind]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ModelError) as caught:
        load(tmp_path / name)
    assert str(caught.value).startswith(f"--teacher-weights {tmp_path / name}\n")
    assert found in str(caught.value.found)
    assert hint in (caught.value.hint or "")
    assert "weights_only=False" not in str(caught.value)
    with pytest.raises(ModelError) as caught:
        load_paraphraser(tmp_path / name, channels=8, k=0.5)
    assert str(caught.value).startswith(f"--paraphraser {tmp_path / name}\n")
    assert found in str(caught.value.found)


def test_identify__an_exported_program(tmp_path: Path) -> None:
    file = tmp_path / "student.pt2"
    export_pt2(nn.Linear(2, 2), torch.zeros(2, 2), file, {})
    with pytest.raises(ModelError, match=r"(?s)an exported program.*student\.safetensors of the run"):
        load(file)


@pytest.mark.parametrize("old", [False, True])
def test_read_tensors__goes_by_content_and_not_by_name(tmp_path: Path, old: bool) -> None:
    save_file(fresh().state_dict(), tmp_path / "w.pth")
    assert is_one(load(tmp_path / "w.pth"), fresh())
    torch.save(fresh().state_dict(), tmp_path / "w.safetensors", _use_new_zipfile_serialization=not old)
    assert is_one(load(tmp_path / "w.safetensors"), fresh())
    paraphraser = Paraphraser(8, 4)
    save_file(paraphraser.state_dict(), tmp_path / "p.pth", paraphraser_metadata(paraphraser))
    assert load_paraphraser(tmp_path / "p.pth", channels=8, k=0.5).factor_channels == 4
    torch.save({"state_dict": paraphraser.state_dict()}, tmp_path / "p.safetensors")
    assert load_paraphraser(tmp_path / "p.safetensors", channels=8, k=0.5).factor_channels == 4


@pytest.mark.parametrize(
    ("content", "found", "hint"),
    [
        (lambda: {"state_dict": fresh().state_dict(), "best": np.float64(0.9)}, "needs code.*numpy", "state_dict with"),
        (fresh, "a whole network, pickled: .*torch.nn.modules", r"torch\.save\(network\.state_dict"),
    ],
)
def test_read_tensors__names_the_code_that_a_file_needs(tmp_path: Path, content: Any, found: str, hint: str) -> None:
    torch.save(content(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=f"(?s){found}.*next:.*{hint}"):
        load(tmp_path / "w.pth")


# -- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A timm folder."""
    timm.models.save_for_hf(fresh(), tmp_path / "folder", safe_serialization=True)
    return tmp_path / "folder"


def test_load_network__a_folder_says_how_it_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=rf"(?s)found: a folder, of a timm model.*next:.*local-dir:{folder}"):
        load(folder)
    with pytest.raises(ModelError, match=rf"(?s)--teacher {folder}.*next:.*local-dir:{folder}"):
        load_network(str(folder), role="teacher", num_classes=10, img_size=16)
    with pytest.raises(ModelError, match="(?s)a path, which names no network.*--teacher-weights"):
        load_network(str(folder / "model.safetensors"), role="teacher", num_classes=10, img_size=16)
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet", "architectures": ["ResNet"]}))
    for given in (load, local):
        with pytest.raises(ModelError, match=r"(?s)a transformers model.*package\.module:callable.*model\.safetensors"):
            given(folder)


def local(folder: Path, **more: Any) -> Network:
    settings: dict[str, Any] = {"role": "teacher", "num_classes": 10, "img_size": 16}
    return load_network(f"local-dir:{folder}", **{**settings, **more})


def test_local_dir__its_files_are_known_by_their_content(folder: Path) -> None:
    assert local(folder).notes == ()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for wrong, found in ((LFS, "a Git LFS pointer"), (truncated(content), "cut short"), (PAGE, "a web page")):
        file.write_bytes(wrong)
        with pytest.raises(
            ModelError, match=f"(?s)--teacher local-dir:{folder}\n.*found: model.safetensors: .*{found}"
        ):
            local(folder)
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(
        ModelError, match=r"(?s)pytorch_model\.bin: a safetensors file.*rename it to model\.safetensors"
    ):
        local(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no file of weights in it"):
        local(folder)
    file.write_bytes(content)
    (folder / "config.json").write_bytes(LFS)
    with pytest.raises(ModelError, match=r"(?s)config\.json: a Git LFS pointer.*git lfs pull"):
        local(folder)
    with pytest.raises(ModelError, match="(?s)local-dir:none.*no folder none"):
        local(Path("none"))


def test_local_dir__says_which_file_and_which_average_timm_takes(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": fresh(1).state_dict(), "state_dict_ema": fresh(2).state_dict()}, folder / "b.pth")
    torch.save(fresh(3).state_dict(), folder / "c.pth")
    network = local(folder)
    assert "timm takes b.pth" in network.notes[0]
    assert "state_dict_ema in b.pth" in network.notes[0]
    assert is_one(network, fresh(2))


def test_local_dir__is_strict_where_its_head_is_for_other_classes(folder: Path) -> None:
    state = fresh().state_dict()
    assert local(folder, num_classes=7).new_head
    del state["layer2.0.conv1.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"(?s)--teacher local-dir.*Missing key.*layer2\.0\.conv1\.weight"):
        local(folder, num_classes=7)


# -- the run says it too


@pytest.mark.usefixtures("unexported")
def test_distill__writes_down_which_weights_were_taken(
    image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "w.pth"
    torch.save({"state_dict": fresh(1, 0).state_dict(), "state_dict_ema": fresh(2, 0).state_dict()}, file)
    images = image_folder(tmp_path / "images", train=4, validation=4)
    torch.save({"model": fresh(3, 3).state_dict()}, tmp_path / "student.pth")
    settings: dict[str, Any] = {
        "epochs": 1, "paraphraser_epochs": 1, "batch_size": 6, "threads": 1, "device": "cpu", "student_args": SMALL,
        "teacher_args": {**SMALL, "num_classes": 0}, "student_weights": tmp_path / "student.pth",
    }  # fmt: skip
    found = distill("cifar_resnet20", "cifar_resnet20", images, **settings, teacher_weights=f"{file}:state_dict",
                    out=tmp_path / "run")  # fmt: skip
    said = capsys.readouterr().err
    for text in ("teacher: its weights are those under state_dict, as was asked for", "student: its weights are those"):
        assert text in said
    summary = read_json(found.folder / "summary.json")
    assert summary["teacher"]["weights"].startswith("its weights are those under state_dict")
    assert "under model" in summary["student"]["weights"]


def test_load_weights__of_a_run_stay_strict(tmp_path: Path) -> None:
    save_file(fresh(classes=7).state_dict(), tmp_path / "student.safetensors")
    with pytest.raises(ModelError, match="of wrong shape"):
        load_weights(fresh(), tmp_path / "student.safetensors", "student")


def test_load_network__reads_safetensors_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    for pad in range(0, 640, 8):
        save_file({"a": torch.ones(1)}, file, {"pad": "x" * pad})
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert identify(file, "w").reader == "safetensors"
