"""The command lines of README and docs do what they say: they are run, in a folder that has what they name.

Networks are tiny and so are data, and settings are added that make a command short; see NOT_RUN for what is not run.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

from bench.harness import compute
from fastflower.data.dataset import builtin_root
from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.runtime.distributed import Ranks
from tests.conftest import ROOT, example, fastflower, jpeg, write_dataset, write_folders
from tests.markdown import commands, mentioned_commands, read
from tests.test_docs import PAGES

NOT_RUN = {  # what a command line holds, and why it is only parsed (tests/test_docs.py)
    "--nproc_per_node 8": "needs eight GPUs",
    "IMAGENET1K_V1": "fetches weights from the network",
    "/kaggle/": "needs Kaggle's data",
    "python -m pip": "fetches packages from the network",
    "python3 -m venv": "makes the environment that the tests run in",
    "make ": "makes that environment, or runs these tests; tests/bench/test_proof.py runs make proof's command",
    "--model.norm triton": "needs a GPU",
    "--data.cache gpu": "needs a GPU",
    "python bench/gpu_check.py": "needs a GPU; tests/bench/gpu/test_stages.py tries each stage without one",
    "python bench/registers.py": "tests/kernels/test_ahead_of_time.py runs it, without Triton's interpreter",
}
TRAINING = "--data.crop 32 --data.scale 36 48 --data.val_resize 36 --train.batch_size 8"
SMALL = "--batch 4 --steps 2 --warmup 1 --repeats 1 --out results.jsonl"
SHORT = {  # what is added, by the first words of a command
    # the default schedule asks validation, which this leaves out
    "fastflower train --data.train_on": f"{TRAINING} --train.max_steps 4 --train.schedule cosine",
    "fastflower train": f"{TRAINING} --train.max_steps 4",  # an epoch
    "fastflower cv": f"{TRAINING} --train.epochs 1 --train.warmup_epochs 0",
    "fastflower data demo": "--train 10 --val 10 --test 5",
    "python bench/throughput.py loader --data.root DATA --sizes 512": f"{SMALL} --crop 32 --scale 36 48 --sizes 224",
    "python bench/throughput.py loader": f"{SMALL} --crop 32 --scale 36 48",
    "python bench/throughput.py model": f"{SMALL} --size 32 --compile off",
    "python bench/throughput.py train": SMALL,
    "python bench/throughput.py --": "",
    "python bench/throughput.py": f"overview {SMALL} --crop 32 --scale 36 48 --val_resize 36",
    "python bench/kernels.py": "--layers 1 --repeats 1 --size 32",
    "python bench/flops.py": "--models resnet18",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages take as given."""
    folder = tmp_path_factory.mktemp("made")
    for size in (192, 224):
        for split, first, count in (("train", 0, 16), ("val", 16, 8), ("test", 24, 5)):
            records = [
                example(i, None if split == "test" else i % 3, jpeg(size, size, i)) for i in range(first, first + count)
            ]
            path = folder / "DATA" / f"tfrecords-jpeg-{size}x{size}" / split / f"00-{size}x{size}-{count}.tfrec"
            write_tfrecord(path, records)
    shutil.copytree(folder / "DATA", folder / "ROOT")
    write_folders(folder / "PICTURES", {"rose": 12, "tulip": 12})
    for name in ("NEWPICTURES/rose.jpg", "photos/1.jpg", "tulip.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jpeg(50, 40))
    (folder / "bench/results").mkdir(parents=True)
    for name in ("before.jsonl", "after.jsonl", "bench/results/local.jsonl", "bench/results/loader.jsonl"):
        shutil.copy(ROOT / "bench/results/loader.jsonl", folder / name)
    (folder / "FILE").write_text(fastflower("data", "check", folder / "ROOT", "--json").out)
    return folder


@pytest.fixture
def sandbox(made: Path, tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it is the current folder, and a small set lies where the synthetic flowers would be drawn."""
    shutil.copytree(made, tmp_path / "sandbox")
    write_dataset(builtin_root(), {"train": 16, "val": 8, "test": 5})
    monkeypatch.chdir(tmp_path / "sandbox")
    monkeypatch.setattr(compute, "SIDE", {"cpu": 64})
    monkeypatch.setattr(Ranks, "cores", 1)


def command_lines(path: Path) -> list[str]:
    """Those of a page in its order, each once, but for the bare names of commands in sentences."""
    page = read(path.read_text(encoding="utf-8"))
    blocks = [block for block in page.blocks if block.language not in ("python", "mermaid")]
    numbered = [command for block in blocks for command in commands(block)]
    for number, words in mentioned_commands(page):
        if not all(re.fullmatch("[a-z]+", word) for word in words):
            numbered.append((number, words))
    return list(dict.fromkeys(shlex.join(words) for _, words in sorted(numbered)))


def reason_not_to_run(line: str) -> str | None:
    return next((reason for part, reason in NOT_RUN.items() if part in f"{line} "), None)


def prepare(words: list[str]) -> None:
    """Runs that a command takes are trained, and one that it makes is not there yet."""
    trains = words[1] in ("train", "cv") and words[0] == "fastflower" and "--resume" not in words
    for word in (word for word in words if word.startswith("runs/")):
        run = Path(word)
        if trains:
            shutil.rmtree(run, ignore_errors=True)
        elif not run.exists():
            data = "PICTURES" if word == "runs/mine" else "DATA"
            seed = sum(word.encode())
            arguments = ["train", "--data.root", data, "--run", run, "--seed", seed, *SHORT["fastflower train"].split()]
            result = fastflower(*arguments)
            assert result.code == 0, result.err


def shortened(words: list[str]) -> list[str]:
    """With what makes it short; training reads the data at hand where it names none."""
    line = shlex.join(words)
    added = next((more for first, more in SHORT.items() if line.startswith(first)), "").split()
    if line.startswith("fastflower train --") and not {"--data.root", "--resume", "--run", "--amp"} & set(words):
        added += ["--data.root", "DATA"]
    return words + added


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What went wrong; None where nothing did."""
    if words[0] == "fastflower":
        result = fastflower(*words[1:])
        return None if result.code == 0 else f"{result.code}: {result.err}"
    script = Path(words[1])
    code = importlib.import_module(".".join(script.with_suffix("").parts)).main(words[2:])
    return None if code == 0 else f"{code}: {capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
@pytest.mark.usefixtures("sandbox")
def test_command_lines_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = {}
    for line in command_lines(path):
        if reason_not_to_run(line):
            continue
        words = shlex.split(line)
        prepare(words)
        if fault := run(shortened(words), capsys):
            faults[line] = fault
    assert faults == {}, "\n".join(f"{line}: {fault}" for line, fault in faults.items())


def test_what_is_not_run_is_there() -> None:
    lines = [line for path in PAGES for line in command_lines(path)]
    assert len([line for line in lines if reason_not_to_run(line) is None]) > 50
    for part in NOT_RUN:
        assert any(part in f"{line} " for line in lines), part
