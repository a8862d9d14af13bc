"""Data folders that tests write, and how they are asked about."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fastflower.config import DataConfig
from fastflower.data.check import Report, check
from fastflower.data.dataset import Dataset, open_dataset
from fastflower.data.sources.layout import HIDDEN, LeftOut
from fastflower.errors import UserError

# Names that mean each split, and the heads of files that are pictures whatever their names say.
NAMES = {
    "train": ["train", "Train", "TRAINING", "training_set", "train-images"],
    "val": ["val", "Val", "valid", "VALID", "validation", "Validation", "dev", "val_data", "validation set"],
    "test": ["test", "Test", "testing", "TEST_SET"],
}


def opened(*roots: Path, **settings: object) -> Dataset:
    return open_dataset(DataConfig(root=roots, **settings), 0)  # type: ignore[arg-type]


def touch(root: Path, *names: str, content: bytes | None = None) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() if content is None else content)
    return root


def refusal(call: object, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)  # type: ignore[operator]
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def run_check(root: Path) -> Report:
    return check(root, threads=1, follow=lambda _: lambda done, total: None)


def counted(rows: tuple[LeftOut, ...]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for row in rows:
        kinds[{"without extension": "", HIDDEN: "hidden"}.get(row.kind, row.kind)] += row.count
    return kinds
