"""Pictures a second of the input pipeline alone, or of the training step alone.

    python bench/throughput.py loader --data.root DIR --peers
    python bench/throughput.py model --models resnet18 resnet50 --peers

All contenders of a run take turns, repeat by repeat, so that a machine that slows down slows all of them. Only the
steady state is timed: the first steps do not count (compiling, starting), and as much work lies begun ahead of the
last timed step as lay ahead of the first. Files come from the page cache once the first epoch has read them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `bench` lies

import nvidia.dali
import PIL.Image
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from tyro.conf import arg, subcommand

from bench.common import CORES, append, circumstances, describe, require_positive, start
from fastflower.config import Config, Data, build, resolve
from fastflower.data.dataset import choose_engine, ensure_builtin
from fastflower.data.loader import Loader
from fastflower.data.pipeline import IMAGENET, View
from fastflower.data.records import Records, read_image
from fastflower.data.sampler import Request, training_requests
from fastflower.data.sources import load_pictures
from fastflower.engine.distributed import Ranks
from fastflower.engine.precision import Precision, choose_device
from fastflower.engine.state import new_state
from fastflower.errors import UserError
from fastflower.models import create_model

CLASSES = 104  # of the networks: as many as the Kaggle flowers have


@dataclass(frozen=True)
class Common:
    """Options of both modes."""

    batch: int = 64
    """Pictures in a batch."""
    steps: int = 30
    """Timed steps of a repeat."""
    warmup: int = 5
    """Steps before them that do not count; more where a contender works further ahead."""
    repeats: int = 3
    """How often each contender is measured; reported are the median and the range."""
    peers: bool = False
    """Measure in turn with it what people use otherwise (needs torchvision)."""
    out: Path | None = None
    """File to append one JSON line a row to."""


@dataclass(frozen=True)
class LoaderCommand(Common):
    """Training batches from records: read, decode, resize, crop, flip, normalize to float32; no network.

    The peer is a torch DataLoader with a worker for each core, PIL and torchvision's transforms.
    """

    root: Annotated[tuple[Path, ...] | None, arg(name="data.root")] = None
    """Data folder, or several, as data.root; none = the built-in synthetic flowers."""
    sizes: Literal["auto", "all"] | tuple[int, ...] = "auto"
    """Stored sizes to read (pixels), as data.sizes."""
    crop: int | None = None
    """Side of the pictures in a batch (pixels); none = 224, or 56 of the built-in ones."""
    scale: tuple[int, int] | None = None
    """Range of the shorter side before the crop (pixels); none = 256 480, or 64 96 of the built-in ones."""
    threads: int | None = None
    """DALI's CPU threads; none = one for each core."""


@dataclass(frozen=True)
class ModelCommand(Common):
    """Training steps (forward, backward, SGD) on one synthetic batch that is already on the device, float32.

    The peer is torchvision's network of the same name, where it has one, eager.
    """

    models: tuple[str, ...] = ("resnet18",)
    """Networks to measure."""
    size: int = 56
    """Side of the pictures (pixels)."""
    eager: bool = False
    """Measure the network as it is; neither this nor --compile = both."""
    compile: bool = False
    """Measure the network compiled by torch.compile."""


@dataclass(frozen=True)
class Contender:
    """Something to measure."""

    name: str
    start: Callable[[int], Iterator[torch.Tensor]]  # begin so many steps; gives each one's [N, 3, S, S] when it is done
    ahead: int = 0  # most steps that it begins beyond the one that it hands over


class Timing(NamedTuple):
    """One repeat of one contender."""

    pictures: int  # delivered while the clock ran
    seconds: float
    first_s: float  # what the very first step took, before the clock ran


def measure(contenders: Sequence[Contender], command: Common, device: torch.device) -> list[dict[str, Any]]:
    """What is reported of each contender; all are measured `command.repeats` times in turns.

    first_step_s is that of the first repeat: compiling or building the pipeline is in it. pictures are those of all
    repeats together.
    """
    turns = [contender for _ in range(command.repeats) for contender in contenders]
    timings = [
        time_steps(contender, command.warmup, command.steps, device)
        for contender in track(turns, "measuring", console=Console(stderr=True), transient=True)
    ]
    rows = []
    for number, contender in enumerate(contenders):
        repeats = timings[number :: len(contenders)]
        rates = [timing.pictures / timing.seconds for timing in repeats]
        rows.append(
            {
                "name": contender.name,
                "images_per_s": median(rates),
                "spread": (min(rates), max(rates)),
                "ms_per_step": 1000 * median(timing.seconds for timing in repeats) / command.steps,
                "first_step_s": repeats[0].first_s,
                "pictures": sum(timing.pictures for timing in repeats),
            }
        )
    return rows


def time_steps(contender: Contender, warmup: int, steps: int, device: torch.device) -> Timing:
    """Time `steps` steps after at least `warmup` >= 1 others.

    As many steps as the contender works ahead are begun before the clock starts and, for the same reason, follow after
    it stops. They are waited for, so that they do not slow the next contender down.
    """
    lead = max(warmup, contender.ahead)
    began = time.perf_counter()
    done = contender.start(lead + steps + contender.ahead)
    next(done)
    _synchronize(device)
    first_s = time.perf_counter() - began
    _count(done, lead - 1)
    _synchronize(device)
    began = time.perf_counter()
    pictures = _count(done, steps)
    _synchronize(device)
    seconds = time.perf_counter() - began
    _count(done, contender.ahead)
    return Timing(pictures, seconds, first_s)


def _count(done: Iterator[torch.Tensor], steps: int) -> int:
    return sum(len(images) for images in islice(done, steps))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_defaults(command: LoaderCommand) -> LoaderCommand:
    """The command with data, geometry and threads filled in where they were not given."""
    builtin = command.root is None
    crop, scale = (56, (64, 96)) if builtin else (224, (256, 480))
    root = (ensure_builtin(),) if builtin else command.root
    defaults: dict[str, Any] = {"root": root, "crop": crop, "scale": scale, "threads": CORES}
    return replace(command, **{key: value for key, value in defaults.items() if vars(command)[key] is None})


def loader_contenders(command: LoaderCommand, device: torch.device) -> list[Contender]:
    """Ours and, with --peers, torch's DataLoader: the same records in the same order, float32 on `device`.

    Raises UserError where there is no such data, settings do not fit it or each other, or torchvision is missing.
    """
    settings = {key: vars(command)[key] for key in ("root", "sizes", "crop", "scale", "threads")}
    data = build({"data": settings | {"val_resize": None}}, "command line").data
    records = load_pictures(data, ["train"], seed=0)
    if len(records) < command.batch:
        raise UserError(
            f"{', '.join(map(str, data.root or ()))}: {len(records)} training records, fewer than --batch "
            f"{command.batch}: lower it."
        )
    contenders = []
    if command.peers:
        contenders.append(dataloader(records, data, command.batch, device))
    engine = choose_engine(data, device, Ranks())
    loader = Loader(records, View(data.crop, "random"), IMAGENET, engine, device, command.batch)

    def start(steps: int) -> Iterator[torch.Tensor]:
        for batch in loader.batches(requests(records, data.scale, command.batch, steps)):
            yield batch.images.float()  # float16 where DALI normalizes

    # one batch more is in the loader thread's hand, while it waits for room in the queue
    return [Contender("fastflower", start, ahead=engine.prefetch + loader.read_ahead + 1), *contenders]


def requests(records: Records, scale: tuple[int, int], batch: int, steps: int) -> Iterator[Request]:
    """The first `steps` batches of training, epoch after epoch."""
    n = len(records)
    epochs = (training_requests(n, seed=0, epoch=epoch, scale=scale, global_batch=batch) for epoch in count())
    return islice((request for epoch in epochs for request in epoch), steps)


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Records by PIL and torchvision: a random shorter side, crop and flip; float32 [3, crop, crop], normalized."""

    def __init__(self, records: Records, crop: int, scale: tuple[int, int]) -> None:
        tv = require_torchvision().transforms
        self.records, self.scale, self.resize = records, scale, tv.functional.resize
        self.crop, self.flip = tv.RandomCrop(crop), tv.RandomHorizontalFlip()
        self.to_tensor, self.normalize = tv.ToTensor(), tv.Normalize(IMAGENET.mean, IMAGENET.std)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = PIL.Image.open(BytesIO(read_image(self.records, index).tobytes())).convert("RGB")
        shorter = int(torch.randint(self.scale[0], self.scale[1] + 1, ()))
        picture = self.flip(self.crop(self.resize(picture, [shorter])))
        return self.normalize(self.to_tensor(picture)), int(self.records.labels[index])


def dataloader(records: Records, data: Data, batch: int, device: torch.device) -> Contender:
    """A DataLoader over `Pictures`; its workers start here and live from repeat to repeat."""
    schedule: list[list[int]] = []  # filled anew for each repeat: the DataLoader reads it when an iteration begins
    loader = DataLoader(
        Pictures(records, data.crop, data.scale),
        batch_sampler=schedule,
        num_workers=CORES,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        multiprocessing_context="spawn",  # a forked process that inherits DALI's or torch's threads may crash
    )
    list(loader)

    def start(steps: int) -> Iterator[torch.Tensor]:
        schedule[:] = [request.indices.tolist() for request in requests(records, data.scale, batch, steps)]
        for images, _ in loader:
            yield images.to(device, non_blocking=True)

    return Contender("DataLoader, torchvision", start, ahead=CORES * (loader.prefetch_factor or 0))


def model_contenders(command: ModelCommand, device: torch.device) -> list[Contender]:
    """Each network eager and compiled and, with --peers, torchvision's; UserError for an unknown one."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as in training
    images = torch.randn(command.batch, 3, command.size, command.size).to(device, memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (command.batch,)).to(device)
    both = command.eager == command.compile
    contenders = []
    for name in dict.fromkeys(command.models):
        if command.eager or both:
            contenders.append(training(f"{name}, eager", create_model(name, CLASSES), images, labels))
        if command.compile or both:
            network = create_model(name, CLASSES)
            contenders.append(training(f"{name}, compiled", network, images, labels, compiled=True))
        if command.peers and name in (models := require_torchvision().models).list_models(models):
            network = models.get_model(name, num_classes=CLASSES)
            contenders.append(training(f"{name}, torchvision", network, images, labels))
    return contenders


def training(
    name: str, network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, *, compiled: bool = False
) -> Contender:
    """Training steps of `network` (moved to the images' device) on one batch, [N, 3, S, S] channels-last."""
    network.to(images.device).to(memory_format=torch.channels_last).train()
    optimizer = new_state(network, resolve(Config()), images.device, Precision(None)).optimizer
    forward = torch.compile(network, dynamic=False) if compiled else network

    def start(steps: int) -> Iterator[torch.Tensor]:
        for _ in range(steps):
            loss = F.cross_entropy(forward(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            yield images

    return Contender(name, start)


def require_torchvision() -> Any:
    """The package; raises UserError where it is missing."""
    try:
        import torchvision
    except ImportError as error:
        raise UserError("--peers needs torchvision: pip install torchvision, or leave --peers out.") from error
    return torchvision


def versions(command: Common) -> dict[str, Any]:
    """Of what the contenders are made of, besides torch."""
    found = {"dali": nvidia.dali.__version__}
    if command.peers:
        found |= {"torchvision": require_torchvision().__version__, "pillow": PIL.__version__}
    return found


def show(mode: str, rows: Sequence[dict[str, Any]], machine: dict[str, Any], console: Console) -> None:
    """Print the rows as a table; ratios are to the first."""
    table = Table(mode, caption=describe(machine))
    for heading in ("images/s", "range", "ms a step", "ratio", "first step s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        spread = "-".join(f"{rate:.1f}" for rate in row["spread"])
        ratio = row["images_per_s"] / rows[0]["images_per_s"]
        figures = f"{row['images_per_s']:.1f}", spread, f"{row['ms_per_step']:.1f}", f"{ratio:.2f}"
        table.add_row(row["name"], *figures, f"{row['first_step_s']:.1f}")
    console.print(table)


def run(command: LoaderCommand | ModelCommand, console: Console) -> int:
    """Measure, print the table, append to --out.

    Raises UserError for settings that measure nothing or do not fit each other or the data.
    """
    require_positive(command, *sorted({"batch", "steps", "warmup", "repeats", "size"} & vars(command).keys()))
    if command.warmup >= command.steps:
        raise UserError(f"--warmup {command.warmup} is not below --steps {command.steps}: lower it or raise --steps.")
    device = choose_device("auto")
    if isinstance(command, LoaderCommand):
        command = with_defaults(command)
        mode, contenders = "loader", loader_contenders(command, device)
    else:
        mode, contenders = "model", model_contenders(command, device)
    around = circumstances(command, device, versions(command))
    rows = measure(contenders, command, device)
    show(mode, rows, around["machine"], console)
    if command.out:
        append(command.out, [{"mode": mode} | row | around for row in rows])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code, 2 for a user's mistake."""
    commands: Any = Annotated[LoaderCommand, subcommand("loader")] | Annotated[ModelCommand, subcommand("model")]
    return start(commands, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
