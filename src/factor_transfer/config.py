"""Every setting, written once: field, default and help; the command line, YAML, the API and the run folder follow.

The docstring under a field is its help. Names are timm's where timm has the setting. Nothing here imports torch,
so that `--help` answers at once.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from factor_transfer.regime import Regime, check_regime
from factor_transfer.util.arguments import MODEL_ARGS, SIZE, ModelArgs, Size, brief, names_in
from factor_transfer.util.checks import ActsOn, Weight, check, flag, refused, weights
from factor_transfer.util.errors import ConfigError
from factor_transfer.util.limits import BELOW_1 as _BELOW_1
from factor_transfer.util.limits import GROUPS as _GROUPS
from factor_transfer.util.limits import MOST_THREADS
from factor_transfer.util.limits import NOT_NEGATIVE as _NOT_NEGATIVE
from factor_transfer.util.limits import POSITIVE as _POSITIVE
from factor_transfer.util.limits import PROBABILITY as _PROBABILITY
from factor_transfer.util.limits import within as _in

Rgb = tuple[float, float, float]

_A_YEAR = 366 * 24 * 60

_NOTHING = ActsOn()
_MACHINE = ActsOn(machine=True)
_PLACE = ActsOn(named=True, machine=True)
_STUDENT = ActsOn("student")
_AFTER_TEACHER = ActsOn("paraphraser", "student")
_PROTOCOL = ActsOn("teacher", "paraphraser", "student", swept=False)
_OF_FACTORS = ActsOn("paraphraser", "student", read_by=["beta"])
_OF_TRANSLATOR = ActsOn("student", read_by=["beta"])
_OF_GROUPS = ActsOn("student", read_by=["at_weight", "hint_epochs", "hint_weight"], refused=True)
_LABEL_FREE = ["beta", "kd_weight", "at_weight", "hint_epochs", "hint_weight", "term"]

_TERMS = "factor_transfer.method.losses"
_KD = {"label_weight": 0.1, "kd_weight": 0.9, "kd_temperature": 4.0}


@Parameter(name="*", group=_GROUPS["Data"], negative_iterable=())
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are shown."""

    data: Annotated[str, _PLACE]
    """Images: `digits` or `fashion` (built in), a folder or tar with train/ and validation/, a timm dataset such as
    torch/cifar10, or your own package.module:callable."""
    data_dir: Annotated[str | None, _PLACE] = None
    """Where a timm dataset (torch/..., hfds/..., wds/...) lies or is kept."""
    label_column: Annotated[str | None, _PLACE] = None
    """Column of an hfds/ dataset that holds the classes. Default: the only one that can."""
    image_column: Annotated[str | None, _PLACE] = None
    """Column of an hfds/ dataset that holds the images. Default: the only one that does."""
    ignore_index: Annotated[int | None, Number(gte=0, lte=255)] = None
    """Value of mask pixels that are neither trained nor measured (--task segmentation). Default: 255."""
    class_map: str | None = None
    """Text file with one class name a line, in index order. Default: the training folder's classes, sorted."""
    img_size: Annotated[int | Size | None, _POSITIVE, Parameter(**SIZE)] = None
    """Size of the image that both networks see, in pixels: one number for a square, or height and width. Default: the
    images' own size up to 96, else the student's."""
    crop_mode: Annotated[Literal["squash", "border", "center"] | None, Parameter(alias="--resize-mode")] = None
    """How images of another aspect are brought to that size (timm's words): squash resizes both sides, border fits the
    longer one and fills the rest, center fits the shorter one and cuts the centre out. Training views keep the same
    aspect. Default: squash up to 96 pixels, center above."""
    crop_pct: Annotated[float | None, Number(gt=0, lte=1)] = None
    """Share of the resized side that evaluation keeps, as timm's. Default: 0.875 with center above 96 pixels, else 1:
    nothing is cut off."""
    bit_depth: Annotated[int | None, Number(gte=9, lte=32)] = None
    """Bits in use in grey images of more than 8 bits, such as 12 for a 12-bit camera. Default: what a TIFF or PGM file
    declares, else 16."""
    validation_share: Annotated[float, _BELOW_1] = 0.1
    """Share of each training class that is set aside where the data has no validation set, or for --validate-on
    train-holdout."""
    validate_on: Annotated[Literal["validation", "train-holdout"], _PROTOCOL] = "validation"
    """Images that are measured on. train-holdout: a share of the training images, which is not trained on, so that
    settings can be chosen and the validation images stay unseen."""
    train_images: Annotated[int | None, _POSITIVE] = None
    """Train on so many images: as many of each class (as far as it has them), chosen by --data-seed. Default: all."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, and count them, instead of stopping."""
    hflip: Annotated[float | None, _PROBABILITY] = None
    """Probability of a horizontal flip. Default: 0.5; 0 for images of writing (digits, torch/mnist)."""
    crop_padding: Annotated[int | None, _NOT_NEGATIVE] = None
    """Pixels of padding before the random crop of small images. Default: an eighth of the image."""
    scale: Annotated[tuple[float, float], Number(gt=0, lte=1)] = (0.35, 1.0)
    """Share of a large image's area that a random resized crop keeps."""
    color_jitter: Annotated[float, _NOT_NEGATIVE] = 0.0
    """Strength of the colour jitter of large images."""
    transform: str | None = None
    """Your own augmentation instead of all these: package.module:callable, from one PIL image (RGB) to an image, or
    uint8 tensor (3, H, W), of the size that the networks see."""
    label_weight: Annotated[float, _NOT_NEGATIVE, Weight(f"{_TERMS}:Labels", off=1.0)] = 1.0
    """Weight of the images' own labels. 0: none are read, and --data may be a flat folder of images; --class-map then
    names the classes of the head, if it shall have one (--kd-weight)."""
    data_seed: Annotated[int, _NOT_NEGATIVE] = 0
    """Owns the split, the order, the views and the paraphraser. Another --seed with the same --data-seed sees the
    same images."""
    workers: Annotated[int | None, Number(gte=0, lte=MOST_THREADS), _MACHINE] = None
    """Processes that decode large images. Default: one a core, at most 8. Small images are decoded once and need
    none."""
    pixel_cache_gb: Annotated[float, _NOT_NEGATIVE, _MACHINE] = 4.0
    """Small images (up to 96 pixels) are decoded once, and kept for later runs, up to this size."""
    cache_dir: Annotated[str | None, _MACHINE] = None
    """Where decoded images and the teacher's factors are kept for later runs. Default: ~/.cache/factor-transfer."""

    def __post_init__(self) -> None:
        """Check each value by itself: its type, its limits, and what one field alone can contradict."""
        check(self)
        if self.img_size is not None:
            object.__setattr__(self, "img_size", brief(self.img_size))  # a square is one number
        if self.scale[0] > self.scale[1]:
            raise ConfigError(f"--scale {self.scale[0]} {self.scale[1]}", valid="two shares, 0 < low <= high <= 1")


@dataclass(frozen=True, kw_only=True)
class SuggestConfig(DataConfig):
    """All of `factor-transfer suggest`."""

    teacher: Annotated[str, _in("Teacher")]
    """The teacher that the commands shall name."""
    teacher_weights: Annotated[str | None, _in("Teacher")] = None
    """Its weights, for the commands."""
    max_latency_ms: Annotated[float | None, _in("Student"), _POSITIVE] = None
    """Most milliseconds of one image, on this machine's CPU, in float32."""
    max_params: Annotated[float | None, _in("Student"), _POSITIVE] = None
    """Most parameters: 300000 or 3e5."""
    max_size_mb: Annotated[float | None, _in("Student"), _POSITIVE] = None
    """Most megabytes of weights, in float32."""
    threads: Annotated[int | None, _in("Machine"), Number(gte=1, lte=MOST_THREADS)] = None
    """CPU threads of torch. Default: torch's own choice."""


@dataclass(frozen=True, kw_only=True)
class Config(Regime, DataConfig):
    """All of `factor-transfer distill`, and the arguments of `factor_transfer.distill`."""

    task: Annotated[str, _in("Data")] = "classification"
    """What the student is for: classification; segmentation (the class of each pixel, from masks beside the images); or
    your own: package.module:callable, which returns a `factor_transfer.tasks.base.Task`."""

    unlabelled: Annotated[
        str | None, _in("Data"), ActsOn(named=True, machine=True, read_by=_LABEL_FREE, refused=True)
    ] = None
    """A folder or .tar of images without labels, beside those of --data: factors, kd, attention and hints are learned
    from both, the labels' loss from its own. Images that --data has, too, are left out and counted. A pass is still one
    over the labelled images; the others are shown in turn, in rounds of several passes."""
    unlabelled_share: Annotated[
        float | None, _in("Data"), _BELOW_1, ActsOn("student", read_by=_LABEL_FREE, refused=True)
    ] = None
    """Share of unlabelled images in a pass and in each batch, as near as whole passes show all of them. Default: 0.5,
    or all of them where they are fewer than the labelled ones."""

    # -- teacher
    teacher: Annotated[str, _in("Teacher")]
    """The trained network: a timm name, local-dir:FOLDER, hf-hub:NAME, torchvision/NAME or
    package.module:callable. For segmentation also lraspp/NAME or deeplab/NAME: a head on a timm encoder."""
    teacher_weights: Annotated[str | None, _in("Teacher")] = None
    """Its weights: a safetensors or torch file, or `pretrained` for timm's or torchvision's own. Where a
    file holds several sets, FILE:KEY says which: checkpoint.pth:state_dict_ema."""
    teacher_args: Annotated[ModelArgs | None, _in("Teacher", **MODEL_ARGS)] = None
    """Constructor arguments, as timm's --model-kwargs: drop_rate=0.1 act_layer=gelu; or a JSON object."""
    teacher_layer: Annotated[str | None, _in("Teacher"), _OF_FACTORS] = None
    """Submodule whose output is paraphrased; or several, with commas: each then has a paraphraser and, with the
    student's layer at its place, a translator, and the factor term is their mean. Default: the last feature map before
    pooling."""
    teacher_output: Annotated[str | None, _in("Teacher")] = None
    """Which of its outputs the logits are, where it gives several: a key, a field or an index, with dots inside another
    (exits.2). Default: the one called logits, or the only one of the classes' number."""
    teacher_epochs: Annotated[int, _in("Teacher"), _NOT_NEGATIVE] = 0
    """Passes of training, or of fine-tuning where it has weights, before it teaches."""
    teacher_lr: Annotated[float | None, _in("Teacher"), _POSITIVE] = None
    """Learning rate of those passes. Default: --lr, or a tenth of it for fine-tuning."""
    teacher_size: Annotated[int | Size | None, _in("Teacher", **SIZE), _POSITIVE] = None
    """Size of the images that the teacher sees, in pixels, as --img-size: the same views, resized. Default: --img-size;
    where that is not given and the images are large, the size it was made for."""
    teacher_mean: Annotated[Rgb | None, _in("Teacher")] = None
    """Channel means that the teacher was trained with, for pixels in 0..1. Default: the model's own."""
    teacher_std: Annotated[Rgb | None, _in("Teacher"), _POSITIVE] = None
    """Channel standard deviations that the teacher was trained with. Default: the model's own."""

    # -- student
    student: Annotated[str, _in("Student")]
    """The network to train: a timm name, local-dir:FOLDER, hf-hub:NAME, torchvision/NAME or
    package.module:callable. For segmentation also lraspp/NAME or deeplab/NAME: a head on a timm encoder."""
    student_weights: Annotated[str | None, _in("Student"), _AFTER_TEACHER] = None
    """Weights to start from: FILE, or FILE:KEY as for the teacher. Default: fresh ones, drawn from --seed."""
    student_args: Annotated[ModelArgs | None, _in("Student", **MODEL_ARGS)] = None
    """Constructor arguments: 'layers=(3,3,3)' 'channels=(16,32,64)'; or a JSON object."""
    student_layer: Annotated[str | None, _in("Student"), _OF_FACTORS] = None
    """Submodule whose output is translated; or several, with commas, as many as of the teacher. Default: the last
    feature map before pooling."""

    student_output: Annotated[str | None, _in("Student"), _AFTER_TEACHER] = None
    """Which of its outputs is trained, measured and exported, where it gives several; named as the teacher's."""

    # -- factor transfer
    factor_form: Annotated[Literal["auto", "paper", "slim"], _in("Factor transfer"), _OF_FACTORS] = "auto"
    """Layers of paraphraser and translator. paper: the published ones, as wide as the maps. slim: the same on maps that
    are reduced to --factor-width channels, for networks that end wide. auto: the paper's where they cost little (a step
    with cached factors at most 1.25 times the student's own, and no more parameters than the networks), else slim."""
    factor_width: Annotated[int | None, _in("Factor transfer"), Number(gte=2), _OF_FACTORS] = None
    """Channels that the slim form reduces a wider map to; an even number. Default: 64."""
    k: Annotated[float, _in("Factor transfer"), Number(gt=0, lte=100), _OF_FACTORS] = 0.5
    """Paraphrase rate: factor channels = round(channels x k), of the teacher's map or, in the slim form, of the reduced
    one. May exceed 1 in the paper's form."""
    p: Annotated[float, _in("Factor transfer"), Number(gte=1), _OF_TRANSLATOR] = 1.0
    """Norm of the factor difference. The paper's choice is 1; 2 is nearly the same."""
    # Hinton, Vinyals, Dean, arXiv 1503.02531, section 2: (1 - a) x cross-entropy + a x T^2 x KL at temperature T. T = 4
    # and a = 0.9 are the field's usual values: those of the attention transfer program (`--alpha 0.9 --temperature 4`)
    # and of RepDistiller (`-r 0.1 -a 0.9`, Tian, Krishnan, Isola, ICLR 2020).
    kd_weight: Annotated[float, _in("Other terms"), _NOT_NEGATIVE, Weight(f"{_TERMS}:SoftTargets", kd=_KD)] = 0.0
    """Weight of the teacher's softened predictions (knowledge distillation, Hinton et al. 2015), times the
    temperature's square. 0: none."""
    kd_temperature: Annotated[float, _in("Other terms"), _POSITIVE, ActsOn("student", read_by=["kd_weight"])] = 4.0
    """Temperature that softens them."""
    # Kim, Park, Kwak, NeurIPS 2018, equations 2 to 4.
    beta: Annotated[
        float | Literal["auto"],
        _in("Factor transfer"),
        _NOT_NEGATIVE,
        Weight(f"{_TERMS}:FactorTransfer", ft={"beta": "auto"}),
    ] = "auto"
    """Weight of the factor loss. auto: its bound, and for p of 1 and 2 its gradient in the normalised factor, is as
    large as in the authors' CIFAR-10 program (beta 500 at 2048 elements). 0: no factor transfer, and no paraphraser."""
    # Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2; beta 1000 as in their program.
    at_weight: Annotated[
        float | Literal["auto"],
        _in("Other terms"),
        _NOT_NEGATIVE,
        Weight(f"{_TERMS}:AttentionTransfer", at={"at_weight": "auto"}),
    ] = 0.0
    """Weight of attention transfer (Zagoruyko & Komodakis 2017), summed over groups, each a mean over places as in
    their program. auto: the bound of their CIFAR-10 program (1000 at 32x32, 16x16 and 8x8). 0: none."""
    # Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, algorithm 1: stage 1 by the hint (equation 3),
    # stage 2 by KD (equation 2). Deviation: the KD of `kd`, so that `fitnet` less `kd` is what the hint brings (theirs
    # has temperature 3 and a weight that falls from 4 to 1). An eighth of the passes: RepDistiller's 30 of 240.
    hint_epochs: Annotated[
        int | Literal["auto"],
        _in("Other terms"),
        _NOT_NEGATIVE,
        Weight(None, off=0, fitnet={**_KD, "hint_epochs": "auto"}),
    ] = 0
    """Passes of a first stage in which the student's lower half regresses the teacher's hint (FitNets, Romero et al.
    2015). auto: an eighth of --epochs. 0: none."""
    hint_weight: Annotated[float, _in("Other terms"), _NOT_NEGATIVE, Weight(f"{_TERMS}:Hint")] = 0.0
    """Weight of the same regression as a term beside the others. It is a whole map, so the teacher stays live."""
    term: Annotated[str | None, _in("Other terms"), Weight(f"{_TERMS}:Own", off=None)] = None
    """Your own term beside the others: package.module:callable, which is given the pair of networks (`pairs.Pair`) and
    returns a `terms.Term`."""
    teacher_groups: Annotated[str | None, _in("Other terms"), _OF_GROUPS] = None
    """Teacher's layers, with commas, for attention (all) and hint (the middle one). Default: the end of each group
    (stage) of another size."""
    student_groups: Annotated[str | None, _in("Other terms"), _OF_GROUPS] = None
    """The student's layers, as many. Default: its groups, the last beside the teacher's last."""
    reconstruction: Annotated[Literal["l1", "l2"], _in("Factor transfer"), _OF_FACTORS] = "l1"
    """Paraphraser's loss: l1 (mean, the authors' program) or l2 (squared, the paper's text)."""
    factor_batch_norm: Annotated[bool, _in("Factor transfer"), _OF_FACTORS] = False
    """Batch norm in paraphraser and translator. The paper has none."""
    paraphraser: Annotated[str | None, _in("Factor transfer"), _OF_FACTORS] = None
    """A trained paraphraser to use: paraphraser.safetensors of another run, or the authors' .pth; with commas one for
    each layer. none: no paraphraser, the factor is the teacher's feature map itself."""
    paraphraser_epochs: Annotated[int | Literal["auto"], _in("Factor transfer"), _NOT_NEGATIVE, _OF_FACTORS] = "auto"
    """Training of the paraphraser, without labels. auto: on the maps of up to 1,024 images, which the teacher makes
    once, until the error falls no more. A number: the authors' program, so many passes over all images with a live
    teacher (theirs has 6); 0 leaves its layers as they were drawn."""
    paraphraser_lr: Annotated[float, _in("Factor transfer"), _POSITIVE, _OF_FACTORS] = 0.1
    """Its learning rate, held constant."""

    translator: Annotated[Literal["conv", "none"], _in("Factor transfer"), _OF_TRANSLATOR] = "conv"
    """conv: the paper's. none: the student's own map is compared, which needs the factor's number of channels."""

    views: Annotated[int | Literal["auto"], _in("Factor transfer"), _NOT_NEGATIVE, _AFTER_TEACHER] = 0
    """Views of each image that are shown in turn, so that their factors can be kept on disk and the teacher leaves
    most passes. 0: a new view each pass and a live teacher. auto: as many as disk, memory and --epochs allow."""

    # -- training
    epochs: Annotated[int, _in("Training"), _POSITIVE, _AFTER_TEACHER] = 30
    """Passes over the training images, for the student and for the baseline."""
    batch_size: Annotated[int, _in("Training"), _POSITIVE] = 128
    """Images a step, over all processes together."""
    baseline: Annotated[bool, _in("Training"), _PROTOCOL] = False
    """Also train the baseline: the same student on labels only, with the same initial weights, order, views and
    schedule."""
    opt: Annotated[str, _in("Training")] = "momentum"
    """timm's optimizer name. (timm's `sgd` is Nesterov; the authors' program is `momentum`.)"""
    lr: Annotated[float, _in("Training"), _POSITIVE, ActsOn("teacher", "student")] = 0.1
    """Learning rate."""
    momentum: Annotated[float, _in("Training"), Number(gte=0, lt=1)] = 0.9
    """Momentum of the optimizers that have one."""
    weight_decay: Annotated[float, _in("Training"), _NOT_NEGATIVE] = 5e-4
    """Weight decay."""
    filter_bias_and_bn: Annotated[bool, _in("Training")] = False
    """Keep biases and norms from weight decay, as timm does. The authors' program decays everything."""
    sched: Annotated[str, _in("Training")] = "cosine"
    """timm's schedule name: cosine, multistep, step, constant, ..."""
    sched_on_updates: Annotated[bool, _in("Training")] = True
    """Step the schedule with every update, not with every pass. (step and multistep always go by passes.)"""
    warmup_epochs: Annotated[int, _in("Training"), _NOT_NEGATIVE] = 0
    """Passes of linear warm-up."""
    warmup_lr: Annotated[float, _in("Training"), _NOT_NEGATIVE] = 1e-5
    """Learning rate at the start of warm-up."""
    min_lr: Annotated[float, _in("Training"), _NOT_NEGATIVE] = 0.0
    """Lowest learning rate of the schedules that have one."""
    decay_epochs: Annotated[float | None, _in("Training"), Number(gt=0, lte=1e6)] = None
    """Passes between drops (step), or length of the decay phase (wsd)."""
    decay_milestones: Annotated[tuple[int, ...], _in("Training", consume_multiple=True), _POSITIVE] = (83, 124)
    """Where multistep drops, in timm's count: 83 drops after 82 passes."""
    decay_rate: Annotated[float, _in("Training"), Number(gt=0, lte=1)] = 0.1
    """Factor of each drop."""
    clip_grad: Annotated[float | None, _in("Training"), _POSITIVE] = None
    """Largest norm of the whole gradient. Default: no clipping."""
    max_skipped: Annotated[int, _in("Training"), _NOT_NEGATIVE, _NOTHING] = 10
    """Steps in a row that are skipped, and counted, because loss or gradient is not finite; one more stops the run."""
    model_ema: Annotated[bool, _in("Training"), _STUDENT] = False
    """Average the student's weights over steps; the average is evaluated and exported."""
    model_ema_decay: Annotated[float, _in("Training"), _BELOW_1, _STUDENT] = 0.998
    """Decay of that average, reached by timm's warm-up: short runs forget their first steps."""

    val_interval: Annotated[int, _in("Training"), _POSITIVE, _NOTHING] = 1
    """Passes from one measurement on the validation images to the next; the last pass is always measured."""

    # -- machine
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], _in("Machine"), _PROTOCOL] = "auto"
    """Where to compute. auto: what Accelerate finds."""
    precision: Annotated[Literal["auto", "fp32", "bf16"], _in("Machine")] = "auto"
    """fp32 (never TF32), or bf16 autocast. auto: bf16 where the hardware has it."""
    torchcompile: Annotated[bool, _in("Machine")] = False
    """Compile teacher and student with torch.compile, for GPUs. On a CPU it needs g++ and is not known to help."""
    threads: Annotated[int | None, _in("Machine"), Number(gte=1, lte=MOST_THREADS), _MACHINE] = None
    """CPU threads of torch. Default: torch's own choice."""
    sync_bn: Annotated[bool, _in("Machine")] = False
    """Batch norm over the images of all processes instead of each one's own part. On GPUs only."""
    timeout_minutes: Annotated[float, _in("Machine"), Number(gt=0, lte=_A_YEAR), _NOTHING] = 10.0
    """Longest that one process waits for another before it gives the run up. What is saved stays."""

    # -- run
    seed: Annotated[int, _in("Run"), _NOT_NEGATIVE, ActsOn("student", swept=False)] = 0
    """Owns the initial weights of student and translator, and the noise inside layers."""
    out: Annotated[str | None, _in("Run"), _MACHINE] = None
    """Run folder. Default: runs/DATA-TEACHER-STUDENT-sSEED. The same command again continues it."""
    overwrite: Annotated[bool, _in("Run"), _NOTHING] = False
    """Delete the run that is there and start anew."""
    verbose: Annotated[bool, _in("Run"), _NOTHING] = False
    """On a terminal, print a line for every pass, not only for the last one of each stage. (A file has them all.)"""
    log_with: Annotated[str, _in("Run"), _NOTHING] = "auto"
    """Trackers that are told of every pass: tensorboard, wandb, mlflow, ... (Accelerate's), with commas between
    several; `none`. auto: TensorBoard, in the run folder, where it is installed."""
    checkpoint_minutes: Annotated[float, _in("Run"), _POSITIVE, _NOTHING] = 5.0
    """Longest time between checkpoints inside a pass; one is always written at its end."""

    def __post_init__(self) -> None:
        """Check values beside each other; what depends on networks or data is checked where those are known."""
        for name in ("teacher_output", "student_output"):
            if type(getattr(self, name)) is int:
                object.__setattr__(self, name, str(getattr(self, name)))  # an index, from YAML or Python
        super().__post_init__()
        if self.teacher_size is not None:
            object.__setattr__(self, "teacher_size", brief(self.teacher_size))
        _check_schedule(self)
        counts = [len(names_in(value)) for value in (self.teacher_layer, self.student_layer)]
        if max(counts) > 1 and counts[0] != counts[1]:
            raise ConfigError(
                f"--teacher-layer {self.teacher_layer} --student-layer {self.student_layer}",
                found=f"{counts[0]} of the teacher, {counts[1]} of the student",
                valid="as many of one as of the other: they are paired in order",
            )
        if self.baseline and not self.label_weight:
            raise ConfigError("--baseline with --label-weight 0", found="a baseline that would learn nothing")
        if not any(getattr(self, name) for name, weight in weights(type(self)).items() if weight.term):
            raise ConfigError(
                "--label-weight 0 with --beta 0",
                found="a student that would learn nothing",
                valid="labels, factors, or another term: --kd-weight, --at-weight or --hint-weight above 0",
            )
        check_regime(self, self.label_weight, self.views, self.unlabelled)
        if self.unlabelled is not None and not self.label_weight:
            found, hint = "a run that reads no labels, so that all its images are alike", "put all of them into --data"
            raise ConfigError(f"--unlabelled {self.unlabelled} with --label-weight 0", found=found, hint=hint)
        if self.unlabelled is None and self.unlabelled_share is not None:
            raise ConfigError(f"--unlabelled-share {self.unlabelled_share:g}", found="no --unlabelled beside it")
        self._check_form()
        self._check_read()

    def _check_form(self) -> None:
        """The settings of the slim form fit each other, and are given where they do something."""
        if self.factor_form == "slim" and self.paraphraser == "none":
            found = "a form of the paraphraser, and no paraphraser"
            raise ConfigError("--factor-form slim with --paraphraser none", found=found, hint="leave one of them out")
        if self.factor_form == "slim" and self.k > 1:
            found = "more factor channels than the maps are reduced to"
            width = "" if self.factor_width is None else f" --factor-width {self.factor_width}"
            given = f"--factor-form slim{width} with --k {self.k:g}"
            raise ConfigError(given, found=found, valid="--k of at most 1, or --factor-form paper")
        if self.factor_width is None:
            return
        if self.factor_form != "slim":
            given = f"--factor-width {self.factor_width} with --factor-form {self.factor_form}"
            raise ConfigError(given, found="a width of the slim form alone", hint="give --factor-form slim beside it")
        if self.factor_width % 2:
            found = "an odd number: each component of a map takes two channels"
            raise ConfigError(f"--factor-width {self.factor_width}", found=found, valid=f"{self.factor_width + 1}")

    def _check_read(self) -> None:
        """What would do nothing without a term that reads it has one."""
        for name, readers in refused(type(self)).items():
            if getattr(self, name) and not any(getattr(self, weight) for weight in readers):
                raise ConfigError(
                    f"{flag(name)} {getattr(self, name)}",
                    found="no term that reads it",
                    valid=f"{', '.join(map(flag, readers))}: one of them above 0",
                    hint="leave it out"
                    + " (layers of the factor are named by --teacher-layer and --student-layer)"
                    * name.endswith("groups"),
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and YAML hold them (tuples become lists)."""
        values: dict[str, Any] = plain(asdict(self))
        return values


def plain(values: Any) -> Any:
    """As JSON holds it; what JSON does not know (a path) by its text.

    >>> plain({"layers": (3, 3, 3)})
    {'layers': [3, 3, 3]}
    """
    return json.loads(json.dumps(values, default=str))


FIELDS = tuple(f.name for f in fields(Config))


def part_of(config: DataConfig, kind: type[DataConfig]) -> dict[str, Any]:
    """The settings of `config` that `kind` has too."""
    return {f.name: getattr(config, f.name) for f in fields(kind)}


def _check_schedule(config: Config) -> None:
    """The schedule does something within the passes there are."""
    if config.warmup_epochs >= config.epochs:
        raise ConfigError(f"--warmup-epochs {config.warmup_epochs}", valid=f"fewer than --epochs {config.epochs}")
    if config.sched == "multistep" and min(config.decay_milestones, default=math.inf) > config.epochs:
        found = f"the first drop, in pass {min(config.decay_milestones, default=0)}, is after --epochs {config.epochs}"
        raise ConfigError("--sched multistep", found=found, hint="give --decay-milestones within --epochs")
