"""What each command of the command line takes; the text under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from fastflower.config import Config, PositiveInt, Split
from fastflower.layers import Layers

POSITIONAL, FIXED = "positional", "fixed"
T = TypeVar("T")
Positional = Annotated[T, POSITIONAL]  # a word that stands without a name
Fixed = Annotated[T, FIXED]  # no option, but what the command line as a whole says


@dataclass(frozen=True)
class Named:
    """How an option is named, where it is not by its field."""

    name: str | None = None  # in place of the field's; "" = settings' own names, with nothing before them
    others: tuple[str, ...] = ()  # are accepted too


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command takes."""

    debug: bool = False
    """Show the traceback of an error, and what decoders say of pictures, if any are read."""


@dataclass(frozen=True)
class TrainCommand(Options):
    """Train a network: fastflower train PICTURES

        fastflower train PICTURES --run runs/mine --train.hours 1.5
        fastflower train PICTURES --config finetune --model.name resnet50
        fastflower train --config resnet34 --data.root DATA --amp
        fastflower train --resume runs/mine

    What is named here wins, then --config or the run that is resumed. Without these two, or with --config finetune or
    scratch, what nobody named is fitted to the pictures; without pictures too, the demo's configuration trains on the
    built-in flowers.
    """

    pictures: Positional[tuple[Path, ...]] = ()
    """Folder of the pictures, or several: the same as --data.root."""
    settings: Annotated[Config, Named("")] = field(default_factory=Config)
    layers: Fixed[Layers] = field(default_factory=Layers)
    config: Path | None = None
    """YAML file of settings, or the name of one that comes with fastflower (demo, finetune, flowers102_64, paper,
    plain34, resnet34, resnet50, resnet50_pretrained, scratch)."""
    run: Path | None = None
    """Folder for the configuration, logs and checkpoints; None = runs/CONFIG-DATE-TIME."""
    resume: Path | None = None
    """Go on from a run folder (its last checkpoint), a checkpoint file of it, or auto = the run in --run (else the
    newest of this configuration) if there is one, or a new run."""
    overwrite: bool = False
    """Replace the run that --run already holds."""
    print_config: bool = False
    """Print the settings as YAML and stop."""
    dry_run: bool = False
    """Build everything, train two steps, validate one batch, and say what time and memory they took; no run folder is
    made."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """What to test on, and how."""

    root: Annotated[tuple[Path, ...] | None, Named("data.root")] = None
    """Data folder, or several that are taken together; None = the run's."""
    sizes: Annotated[Literal["all"] | tuple[PositiveInt, ...] | None, Named("data.sizes", ("sizes",))] = None
    """Stored sizes to take (pixels); None = training's to evaluate by one or ten crops, and where data.val_resize is
    none; else all. Predictions and scales take each picture once, from the largest of them."""
    crops: Literal[1, 10] = 1
    """1 = the center of each picture; 10 = corners and center and their mirror images, averaged."""
    scales: tuple[PositiveInt, ...] = ()
    """Shorter sides (pixels) at which all positions of each picture and of its mirror image are averaged, such as
    224,256,384,480,640."""
    batch_size: Annotated[PositiveInt | None, Named(others=("train.batch_size",))] = None
    """Crops at once, over all processes together; None = as in training."""
    device: Literal["run", "auto", "cpu", "cuda"] = "run"
    """Where the network runs; run = as in training."""
    compile: bool = False
    """torch.compile the network, which takes a while and pays on a GPU with many pictures."""


@dataclass(frozen=True)
class EvalCommand(EvaluationOptions):
    """Evaluate a trained run: fastflower eval runs/NAME --split val

    Prints loss, top-1, top-5, macro F1 and expected calibration error, and writes the confusion matrix, each class's
    figures, the most confused classes and the most confident mistakes.
    """

    run: Positional[Path]
    """Run folder (its best checkpoint) or a checkpoint file."""
    split: Split = "val"
    """The split, which must have classes."""
    names: str | None = None
    """Names of the classes: a JSON list, a text file with one a line, or kaggle104; None = the data's."""
    out: Path | None = None
    """Folder for what is written; None = eval-SPLIT in the run folder."""
    json: bool = False
    """Print one JSON object: split, n, loss, accuracy, top5, macro_f1."""


@dataclass(frozen=True)
class PredictCommand(EvaluationOptions):
    """Predict classes: fastflower predict runs/NAME NEWPICTURES --out names.csv

        fastflower predict runs/NAME rose.jpg "photos/*.jpg" --top 5
        fastflower predict runs/NAME --split test --submission submission.csv

    Names pictures: files, folders with all folders in them, and patterns such as "photos/*.jpg". What cannot be read or
    decoded is listed at the end (exit code 1). Without pictures it predicts a split of the run's data, each id once.
    """

    run: Positional[Path]
    """Run folder (its best checkpoint) or a checkpoint file."""
    pictures: Positional[tuple[Path, ...]] = ()
    """Picture files, folders and patterns; without any, a split is predicted."""
    split: Split | None = None
    """A split of the run's data, which needs no classes; None = test, where no pictures are named."""
    out: Path | None = None
    """File of the predictions: .csv or .json with the likeliest classes, or .parquet with the probability of each
    class; None = no file, or of a split predictions-SPLIT.parquet in the run folder."""
    top: int = 3
    """Classes that are named for each picture, the likeliest first."""
    submission: Path | None = None
    """Write the competition's CSV, id,label, of a split."""
    sample: Path | None = None
    """Sample submission, whose ids must be those of the records: the answers are written in its form, as labels by name
    or by place, or as a probability for each class; None = id,label, by name where a class is called by a number, else
    by place."""
    names: str | None = None
    """Names of the classes: a JSON list, a text file with one a line, or kaggle104; None = the data's."""
    json: bool = False
    """Print a JSON list of objects, one for each picture: file (or id), name, probability, best."""


@dataclass(frozen=True)
class EnsembleCommand(Options):
    """Combine networks: fastflower ensemble runs/A runs/B runs/C --submission submission.csv

    On a split with classes it prints the figures of each member and of the ensemble.
    """

    members: Positional[tuple[Path, ...]]
    """Run folders, checkpoints, folders of cross-validation or predictions files, at least two. What a run has not
    predicted yet by these crops or scales is predicted now."""
    method: Literal["vote", "mean", "weighted"] = "vote"
    """vote = what most members say, of equally many the class with the higher mean probability; mean = of the
    probabilities; weighted = with weights that make validation's classes the likeliest."""
    split: Split = "test"
    """The split to combine predictions of."""
    root: Annotated[tuple[Path, ...] | None, Named("data.root")] = None
    """Data folder, or several, for what is predicted now; None = each run's."""
    crops: Literal[1, 10] = 1
    """1 = runs are predicted by the center of each picture; 10 = by corners and center and their mirror images."""
    scales: tuple[PositiveInt, ...] = ()
    """Shorter sides (pixels) at which all positions of each picture and of its mirror image are averaged."""
    mix_views: bool = False
    """Combine members that were predicted by other crops or scales than others, which is refused without it."""
    fit_on: tuple[Path, ...] = ()
    """Predictions to fit the weights on, one for each member in the same order; without any, the runs' val."""
    out: Path | None = None
    """Write the ensemble's predictions, as .csv, .json or .parquet, as predict does."""
    submission: Path | None = None
    """Write the competition's CSV, id,label."""
    sample: Path | None = None
    """Sample submission, whose ids must be those of the members: the answers are written in its form (see predict);
    None = id,label, by name where a class is called by a number, else by place."""
    json: bool = False
    """Print the figures as one JSON list of objects: name, weight, n, loss, accuracy, top5, macro_f1."""


@dataclass(frozen=True)
class CvCommand(Options):
    """Cross-validate: fastflower cv PICTURES --folds 5 --run runs/cv

    Train and val together are divided by class into folds, and never one picture into two; each fold validates a
    network that the others trained. The same command again goes on where it was stopped. Settings come from where
    train has them from.
    """

    pictures: Positional[tuple[Path, ...]] = ()
    """Folder of the pictures, or several: the same as --data.root."""
    settings: Annotated[Config, Named("")] = field(default_factory=Config)
    layers: Fixed[Layers] = field(default_factory=Layers)
    config: Path | None = None
    """YAML file of settings, or the name of one that comes with fastflower."""
    folds: int | None = None
    """Number of folds; None = data.folds, or else 5."""
    run: Path | None = None
    """Folder for the folds, as runs fold-0, fold-1, ..., and for what they give together; None =
    runs/cv-CONFIG-DATE-TIME."""
    overwrite: bool = False
    """Begin anew, and replace the folds that --run already holds."""
    crops: Literal[1, 10] = 1
    """1 = each picture is predicted by its center; 10 = by corners and center and their mirror images."""
    scales: tuple[PositiveInt, ...] = ()
    """Shorter sides (pixels) at which all positions of each picture and of its mirror image are averaged."""
    test: bool = False
    """Also predict the test split, by the mean of the folds' networks."""
    submission: Path | None = None
    """Write those predictions as the competition's CSV, id,label."""


@dataclass(frozen=True)
class LrCommand(Options):
    """Find a learning rate: fastflower lr PICTURES

    The range test: a new network takes a step at each of many rates, from low to high, until its loss explodes. Prints
    a suggestion, and writes a plot and its numbers. Nothing of the network is kept.
    """

    pictures: Positional[tuple[Path, ...]] = ()
    """Folder of the pictures, or several: the same as --data.root; or a run folder, whose settings are tried."""
    settings: Annotated[Config, Named("")] = field(default_factory=Config)
    layers: Fixed[Layers] = field(default_factory=Layers)
    config: Path | None = None
    """YAML file of settings, or the name of one that comes with fastflower."""
    low: float = 1e-5
    """The first learning rate."""
    high: float = 10.0
    """The last one, unless the loss explodes before."""
    steps: int = 200
    """How many rates are tried, a batch each."""
    out: Path = Path("lr-range.png")
    """The plot; beside it lie its numbers, as .json."""


@dataclass(frozen=True)
class FlopsCommand(Options):
    """Count what networks cost: fastflower flops resnet34 resnet50 resnet50-v1

    Parameters, multiply-adds (MACs) and FLOPs (2 x MACs) of one forward pass of one image, for 1000 classes. Only
    convolutions and matrix products are counted, not normalization, ReLU, pooling, addition and biases.
    """

    models: Positional[tuple[str, ...]] = ()
    """Networks, as model.name; those with bottlenecks are v1.5, or the paper's as resnet50-v1; without any, all."""
    size: int = 224
    """Side of the image (pixels)."""
    layers: bool = False
    """Also list each network's layers one by one."""
    json: bool = False
    """Print a JSON list of objects: model, size, params, macs, flops, and with --layers layers."""


@dataclass(frozen=True)
class ReportCommand(Options):
    """Compare runs: fastflower report runs/A runs/B runs/C --out report

    Prints a table and which run converges first, and writes report.html, which shows the learning curves too, and each
    of its pictures as PNG and SVG.
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders, or folders of TensorBoard events with the tags loss/train, loss/val, accuracy/train and
    accuracy/val."""
    out: Path = Path("report")
    """Folder to write into."""
    throughput: Path | None = None
    """Results of bench/throughput.py (its --out) to draw too."""


@dataclass(frozen=True)
class DoctorCommand(Options):
    """Say what this machine gives, what will be used, and what is missing and how to get it: fastflower doctor

    Exit code 1 if something is missing that nothing runs without.
    """

    json: bool = False
    """Print one JSON list of objects: section, item, value, mend, essential."""


@dataclass(frozen=True)
class DemoCommand(Options):
    """Draw the synthetic flowers in the Kaggle layout: fastflower data demo DIR"""

    dir: Positional[Path]
    """Folder to make."""
    sizes: tuple[int, ...] = (64,)
    """Stored sizes (pixels)."""
    train: int = 2400
    """Pictures in the training split."""
    val: int = 480
    """Pictures in the validation split."""
    test: int = 480
    """Pictures in the test split (without classes)."""
    seed: int = 0
    """Seed of the drawing."""


@dataclass(frozen=True)
class CheckCommand(Options):
    """Read and decode every record of all splits and sizes, and name what is wrong: fastflower data check ROOT

    Exit code 1 if there is a problem.
    """

    root: Positional[Path]
    """Data folder."""
    json: bool = False
    """Print one JSON object: root, splits, classes, problems."""


@dataclass(frozen=True)
class StatsCommand(Options):
    """Measure all pixels, for data.mean and data.std: fastflower data stats ROOT

    Prints YAML for a configuration file; the covariance is a comment in it.
    """

    root: Positional[tuple[Path, ...]]
    """Data folder, or several that are taken together."""
    split: Literal["train", "train+val"] = "train"
    """The part to measure, as data.train_on names it."""
    sizes: Literal["auto", "all"] | tuple[int, ...] = "auto"
    """Stored sizes to measure (pixels), as data.sizes names them."""


@dataclass(frozen=True)
class CompletionCommand(Options):
    """Print the script by which a shell completes commands and options: fastflower completion bash"""

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """bash, zsh or fish."""


@dataclass(frozen=True)
class PackCommand(Options):
    """Write a data set once as TFRecords of sizes that train fast: fastflower data pack ROOT OUT

    Pictures become upright RGB JPEGs with 4:2:0 chroma that keep their aspect and are never enlarged; classes, splits
    and ids stay. A pack that was stopped goes on. Exit code 1 if pictures are left out since they cannot be read.
    """

    root: Positional[Path]
    """Data folder."""
    out: Positional[Path]
    """Folder to make, of tfrecords-jpeg-SxS/{train,val,test}/ and class_names.json."""
    sizes: tuple[int, ...] = (256, 512)
    """Lengths of the shorter side (pixels), each of which is stored."""
    quality: int = 92
    """Quality of the JPEG files, from 1 to 100."""
    seed: int = 0
    """What validates, where a folder of classes has no val: as the seed of training chooses it."""


# By what each is called; a name of two words is one of a group.
COMMANDS: dict[str, type[Options]] = {
    "train": TrainCommand,
    "eval": EvalCommand,
    "predict": PredictCommand,
    "ensemble": EnsembleCommand,
    "cv": CvCommand,
    "lr": LrCommand,
    "flops": FlopsCommand,
    "report": ReportCommand,
    "doctor": DoctorCommand,
    "completion": CompletionCommand,
    "data demo": DemoCommand,
    "data check": CheckCommand,
    "data stats": StatsCommand,
    "data pack": PackCommand,
}
