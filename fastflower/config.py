"""Every setting of a run: one typed structure is the YAML file's schema, the command line and what a run records.

The text under a field is its help on the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from fastflower.errors import UserError
from fastflower.models import NETWORKS, BottleneckStride, NormChoice, Shortcut, find_network

Split = Literal["train", "val", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
EPOCHS = 70  # where nobody says how long to train

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
RGB = tuple[Finite, Finite, Finite]


@dataclass(frozen=True)
class DataConfig:
    """Pictures: where they are and how they become batches."""

    root: tuple[Path, ...] | None = None
    """Folder of the pictures, or several that are taken together; None = the built-in synthetic flowers. A folder holds
    tfrecords-jpeg-SxS/{train,val,test}/*.tfrec, or pictures as train/CLASS/*.jpg, val/CLASS/*.jpg and test/*.jpg, or as
    CLASS/*.jpg alone."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of each class's training pictures that validates, chosen by the seed, where a folder of classes has no val
    and data.folds is none."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Number of parts that train and val together are divided into by the seed, each with its share of every class and
    no picture in two of them; None = the data's own split."""
    fold: Annotated[int, Field(ge=0)] = 0
    """The part that validates, of data.folds (from 0); the others train."""
    train_on: Literal["train", "train+val"] = "train"
    """train+val = a final fit on both, for all its epochs, with nothing left to validate on."""
    skip: Path | None = None
    """File of what `fastflower data check --json` printed: training and validation leave out the records it lists."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """uniform = each record once an epoch; balanced = as many records, drawn so that all classes come equally often."""
    sizes: Literal["auto", "all"] | tuple[PositiveInt, ...] = "auto"
    """Stored sizes to use (pixels): auto = the smallest that is at least the minimum of data.scale, else the largest;
    all = every picture at every size; or a list."""
    crop: PositiveInt = 224
    """Side of the square that the network sees (pixels)."""
    scale: tuple[PositiveInt, PositiveInt] = (256, 480)
    """Training resizes each picture's shorter side to a size drawn uniformly from this range (pixels)."""
    val_resize: PositiveInt | None = 256
    """Validation resizes the shorter side to this before the center crop (pixels); None = crop the stored picture."""
    lighting: NonNegativeFloat = 0.0
    """Standard deviation of the random color shift along each principal component of the training pixels, as a share
    of theirs (0.1 in the paper). Off, because color tells flowers apart."""
    mean: RGB | None = None
    """Mean of R, G, B in [0, 1] for normalization; None = measured on the training split, or what model.pretrained was
    trained with."""
    std: RGB | None = None
    """Standard deviation of R, G, B in [0, 1]; None = as for mean."""
    decoder: Literal["auto", "cpu", "gpu"] = "auto"
    """Where DALI decodes and augments; auto = on the GPU where there is one."""
    decode: Literal["auto", "scaled", "region", "whole"] = "auto"
    """What of a picture is decoded: region = what its crop needs, with the same pixels on a CPU; whole = all of it;
    scaled = large JPEGs at 1/2, 1/4 or 1/8 of their size, where they shrink by twice that at least, others as region;
    auto = scaled on a CPU, whole on a GPU, where the region has not been measured yet and scaled cannot be had."""
    threads: PositiveInt | None = None
    """CPU threads per process that decode and augment; None = its share of the cores that it may use, of which there
    may be fewer beside its GPU (NUMA) or in a container, and at most 32, or 16 where DALI works on a GPU."""
    cache: Literal["off", "ram", "gpu", "auto"] = "off"
    """Decode each picture once, before the first epoch, and keep its pixels: ram = in host memory, which a machine's
    processes share; gpu = in each GPU's; auto = the GPU's if half of what is free there takes them, else the host's.
    What does not fit is decoded anew each epoch. The batches are the same; on a GPU bit for bit if whole pictures are
    decoded (data.decode) and not by the hardware decoder (data.hw_decoder_load 0)."""
    prefetch: PositiveInt = 2
    """Batches that DALI keeps in work (on a CPU: pieces of them, where pictures are large), and as many finished ones
    that wait for the training step."""
    hw_decoder_load: Share | None = None
    """Share of the JPEGs given to the hardware decoder of GPUs that have one (A100, H100 and later), whose levels may
    differ from the other decoder's by one; a picture's place in its batch says which it is given to. None = 0.65, or 0
    with train.deterministic, which needs 0."""

    def absolute(self) -> DataConfig:
        """The same folders and files from wherever the run is resumed or evaluated."""
        root = self.root and tuple(folder.absolute() for folder in self.root)
        return replace(self, root=root, skip=self.skip and self.skip.absolute())


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: Literal[tuple(NETWORKS)] = "resnet34"  # type: ignore[valid-type]
    """Architecture: plain and residual as in "Deep Residual Learning"; vgg and alexnet, which have no BatchNorm."""
    shortcut: Shortcut = "B"
    """Residual shortcuts: A = zero padding, B = projection where dimensions grow, C = all projections."""
    bottleneck_stride: BottleneckStride = "3x3"
    """Where bottleneck blocks subsample: 3x3 (v1.5, torchvision's) or 1x1 (v1, the paper's)."""
    zero_init_gamma: bool = False
    """Start each residual branch at zero (last BatchNorm's gamma = 0)."""
    pretrained: str | None = None
    """Weights to start from, all but the last layer: IMAGENET1K_V1 or IMAGENET1K_V2 (torchvision's, downloaded), a
    .pth or .safetensors file of torchvision's names, or a run or checkpoint of fastflower."""
    norm: NormChoice = "auto"
    """BatchNorm + ReLU by torch's operators or by our Triton kernels (in plain torch on a CPU); auto = triton on kinds
    of GPU where it was measured to be faster, else torch. The weights are the same."""
    sync_norm: bool = False
    """Take BatchNorm's statistics over all processes' pictures (SyncBatchNorm), for small batches; by our kernels."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimization."""

    epochs: PositiveInt | None = None
    """Passes over the training split; None = 70, or as many as train.hours leaves time for."""
    hours: PositiveFloat | None = None
    """End after so many hours, preparation, validation and saving and earlier sessions of the run included, with
    cosine or onecycle completed by then; with train.epochs too, after what comes first. None = after the epochs."""
    batch_size: PositiveInt | Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = 256
    """Pictures in a step, over all processes together; auto = the largest that 80 % of the GPU's memory are tried to
    allow and that leaves ten steps an epoch, or a share such as 0.9 in place of 80 %."""
    optimizer: Literal["sgd", "adamw", "apex_sgd"] = "sgd"
    """sgd and adamw = torch's, fused; apex_sgd = FusedSGD of NVIDIA's apex, on a GPU."""
    lr: PositiveFloat | None = None
    """Learning rate: the first (plateau, step) or the highest (cosine, onecycle); None = 0.01 with model.pretrained,
    else the one of the network's paper: 0.1, or 0.01 for vgg and alexnet."""
    head_lr: PositiveFloat | None = None
    """Learning rate of the last layer; None = lr. It follows the same schedule."""
    freeze_epochs: Annotated[int, Field(ge=0)] = 0
    """First epochs in which only the last layer learns, and BatchNorm's running statistics rest."""
    momentum: Share = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov's form of momentum."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty on the parameters (adamw: decoupled)."""
    decay_norm_and_bias: bool = True
    """Whether weight decay also acts on BatchNorm's parameters and on biases."""
    schedule: Literal["plateau", "step", "cosine", "onecycle"] = "plateau"
    """plateau = multiply lr by factor when the validation loss has not improved for more than patience epochs;
    step = multiply it by factor after each of the epochs in milestones; cosine = linear warm-up, then half a cosine to
    0; onecycle = cosine up from lr/25 in the warm-up, then down to lr/250000."""
    milestones: tuple[PositiveInt, ...] = (30, 60, 90)
    """Epochs after which step lowers the learning rate."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What plateau and step multiply the learning rate by."""
    patience: Annotated[int, Field(ge=0)] = 7
    """Epochs without improvement (by a relative 1e-4) that plateau lets pass; the next one lowers the rate."""
    warmup_epochs: NonNegativeFloat = 1.0
    """Length of the warm-up of cosine and onecycle (epochs; fractions allowed)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over all classes."""
    class_weights: Literal["none", "balanced"] | Share = "none"
    """A power p from 0 to 1: a record's loss counts in proportion to the size of its class to the power -p; none = 0,
    all records count alike; balanced = 1, all classes do."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup's Beta distribution; 0 = off. With cutmix too, each batch gets one of them."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of cutmix's Beta distribution; 0 = off."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the weights (0.999, say), which then validates, decides what is best
    and is what eval uses; 0 = off. It is lower in the first steps: at most (1 + steps) / (10 + steps)."""
    clip_grad: PositiveFloat | None = None
    """Largest norm of the gradient of all parameters together; None = unlimited."""
    accumulate: PositiveInt = 1
    """Pieces that a step's batch is computed in, one after another, to save memory; BatchNorm sees each by itself."""
    best: Literal["loss", "accuracy", "macro_f1"] = "loss"
    """The validation figure that decides which checkpoint is best."""
    early_stop: PositiveInt | None = None
    """End when the best figure has not improved for so many epochs; None = never."""
    max_steps: PositiveInt | None = None
    """End, and save, after so many optimizer steps; None = after the epochs."""
    deterministic: bool = False
    """Compute the same bits each time, on the same kind and number of devices with the same versions, at a cost in
    speed: only by algorithms that add in one order, none chosen by trying, and without the hardware JPEG decoder. On a
    CPU runs are so in any case."""
    profile: bool = False
    """Record some steps of the first epoch with torch's profiler: trace.json in the run folder, and a list of the ten
    heaviest operations."""
    compile: bool | None = None
    """torch.compile the network; auto = on a GPU only."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode."""
    log_every: PositiveInt = 20
    """Steps between readings of the loss from the device (progress line, NaN check)."""

    @property
    def pictures(self) -> int:
        """`batch_size`, once it is a number: training finds one where it is asked to.

        Raises:
            UserError: it was not found yet.
        """
        if isinstance(self.batch_size, int):
            return self.batch_size
        raise UserError(f"train.batch_size {self.batch_size} is only found where training begins: give a number.")

    @property
    def most_epochs(self) -> float:
        """`epochs`, or what None stands for; infinite with hours alone."""
        return self.epochs or (math.inf if self.hours else EPOCHS)

    @property
    def peak_lr(self) -> float:
        """`lr`, once `resolve` has been asked for it."""
        assert self.lr is not None
        return self.lr


@dataclass(frozen=True)
class Config:
    """All settings of a training run."""

    amp: bool = False
    """Mixed precision."""
    amp_dtype: Literal["auto", "bf16", "fp16"] = "auto"
    """Type of mixed precision: auto = bf16 on GPUs from compute capability 8.0 on, fp16 with loss scaling on older
    ones, fp32 on a CPU without bf16 instructions; naming a type forces it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs; auto = on the GPU where there is one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initialization, order, augmentation, and of what validates (data.val_share, data.folds)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def resolve(config: Config) -> Config:
    """The configuration with the values that None stands for where they follow from other settings."""
    data, train = config.data, config.train
    if train.lr is None:
        train = replace(train, lr=0.01 if config.model.pretrained else find_network(config.model.name).lr)
    if train.epochs is None and train.hours is None:
        train = replace(train, epochs=EPOCHS)
    if train.deterministic and data.hw_decoder_load is None:
        data = replace(data, hw_decoder_load=0.0)
    return replace(config, data=data, train=train)
