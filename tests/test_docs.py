"""README and docs are true: command lines parse, links lead somewhere, the Python runs, and README stays short."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import itertools
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

from bench.harness.common import start
from fastflower import cli
from fastflower.arguments import options_of
from fastflower.config import Config
from fastflower.data.dataset import builtin_root
from fastflower.errors import UserError
from fastflower.options import COMMANDS
from fastflower.settings import find_config, to_plain
from tests.conftest import ROOT, jpeg, write_dataset
from tests.markdown import Block, commands, mentioned_commands, read, spans

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = ROOT / "docs/architecture.md"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WRITTEN = ("bench/results/local.jsonl", "bench/results/gpu_check-GPU.jsonl")  # by commands, and not in every checkout
LINK = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
REPOSITORY_PATH = re.compile(r"(bench|configs|docs|fastflower|kernels|tests)/[\w./-]*")


def fault(words: list[str], folder: Path, *, mentioned: bool = False) -> str | None:
    """What is wrong with a command line; None where it parses.

    Args:
        words: the program and its arguments.
        folder: the current one, for stand-ins of files that must be there to parse.
        mentioned: the command may be named without what it needs.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        try:
            return parse(words, folder, patch, mentioned=mentioned)
        except UserError as error:
            return str(error)
        except SystemExit as end:
            return (said.getvalue().strip() or str(end)) if end.code else None


def parse(words: list[str], folder: Path, patch: pytest.MonkeyPatch, *, mentioned: bool) -> str | None:
    program, *arguments = words
    if program == "make":
        return make_fault(arguments)
    if program == "torchrun":
        given = get_args_parser().parse_args(arguments)
        called = [*(["-m"] if given.module else []), given.training_script, *given.training_script_args]
        return parse(["python", *called], folder, patch, mentioned=False)
    if program == "fastflower":
        return fastflower_fault(arguments, folder, patch, mentioned=mentioned)
    if arguments[:2] == ["-m", "fastflower"]:
        return fastflower_fault(arguments[2:], folder, patch, mentioned=False)
    if arguments and arguments[0].endswith(".py"):
        return script_fault(arguments, patch)
    return None


def make_fault(arguments: list[str]) -> str | None:
    for word in arguments:
        variable, assigns, _ = word.partition("=")
        if assigns and f"$({variable})" not in MAKEFILE:
            return f"the Makefile has no variable {variable}"
        if not assigns and not re.search(rf"^{re.escape(word)}:", MAKEFILE, re.MULTILINE):
            return f"the Makefile has no target {word}"
    return None


def fastflower_fault(
    arguments: list[str], folder: Path, patch: pytest.MonkeyPatch, *, mentioned: bool = False
) -> str | None:
    if mentioned and all(re.fullmatch("[a-z]+", word) for word in arguments):
        shown = help_of(*arguments)
        return None if f"usage: {' '.join(['fastflower', *arguments])} " in shown else "there is no such command"
    patch.chdir(folder)
    patch.setattr("fastflower.runtime.checkpoint.load_trained", lambda _: {"config": to_plain(Config())})
    for option, value in itertools.pairwise(arguments):
        if option == "--resume" and value != "auto":
            checkpoint = folder / value / "checkpoints/last.pt"
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.touch()
        if option == "--config" and value.endswith((".yaml", ".yml")):
            (folder / value).parent.mkdir(parents=True, exist_ok=True)
            (folder / value).write_text(find_config("demo").read_text(encoding="utf-8"), encoding="utf-8")
    if arguments != ["--version"]:  # which is answered before anything is parsed
        cli.parse(arguments)
    return None


def script_fault(arguments: list[str], patch: pytest.MonkeyPatch) -> str | None:
    """A script's options parse as they do when it is started; the rest of it does not run."""
    script = Path(arguments[0])
    if not (ROOT / script).is_file():
        return f"there is no {script}"
    module: Any = importlib.import_module(".".join(script.with_suffix("").parts))
    if hasattr(module, "start"):
        patch.setattr(module, "start", lambda options, run, *rest: start(options, lambda *_: 0, *rest))
        return "its options do not parse" if module.main(arguments[1:]) else None
    if hasattr(module, "STAGES"):
        module.choose(module.parse(arguments[1:], module.STAGES).only, module.STAGES)
    return None


def help_of(*words: str) -> str:
    """What a command of fastflower says of itself."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.parse([*words, "--help"])
    return out.getvalue()


def faults(text: str, folder: Path) -> list[str]:
    """A sentence for each command line of a page that does not parse."""
    page = read(text)
    checked = [
        (line, words, fault(words, folder))
        for block in page.blocks
        if block.language not in ("python", "mermaid")
        for line, words in commands(block)
    ]
    checked += [(line, words, fault(words, folder, mentioned=True)) for line, words in mentioned_commands(page)]
    return [f"line {line}: {shlex.join(words)}: {wrong}" for line, words, wrong in checked if wrong]


def pages() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])


@pages()
def test_command_lines_parse(path: Path, tmp_path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), tmp_path) == []


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.name)
def test_command_lines_of_the_benchmarks_docstrings_parse(path: Path, tmp_path: Path) -> None:
    assert faults(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "", tmp_path) == []


def test_commands_are_found_as_a_shell_would_run_them() -> None:
    lines = [
        "So:",
        "",
        "    . .venv/bin/activate && make train  # once",
        "    for m in resnet18 vgg16; do",
        "        timeout --signal=INT 11h .venv/bin/fastflower train --model.name $m \\",
        "            --run 'runs/the ${m}' > log; fastflower doctor",
        "    done",
        "    A=1 torchrun -m -- fastflower train | head",
        "",
        "Then `fastflower eval`.",
    ]
    (block,) = read("\n".join(lines)).blocks
    assert list(commands(block)) == [
        (3, ["make", "train"]),
        (5, ["fastflower", "train", "--model.name", "resnet18", "--run", "runs/the resnet18"]),
        (5, ["fastflower", "train", "--model.name", "vgg16", "--run", "runs/the vgg16"]),
        (5, ["fastflower", "doctor"]),
        (5, ["fastflower", "doctor"]),
        (8, ["torchrun", "-m", "--", "fastflower", "train"]),
    ]


@pytest.mark.parametrize(
    "line",
    [
        *("fastflower train --train.epoch 3", "fastflower evil runs/a", "fastflower train --config resnet35"),
        *("fastflower eval", "fastflower train --train.epochs three", ".venv/bin/fastflower data chek ROOT"),
        "A=1 timeout --signal=INT 11h torchrun --nproc_per_node 2 -m -- fastflower train --confg resnet34",
        *("torchrun --nprocs_per_node 2 -m -- fastflower train", "!fastflower predict runs/a --crop 10"),
        *("make tset", "make proof BASES=main", "python bench/throughputs.py", "python3 bench/flops.py --modles vgg19"),
        *("python bench/gpu_check.py --only resnet51", "python bench/gpu_check.py --minutes"),
        *("cd x && fastflower flops --lairs  # a comment", "fastflower doctor --jsn > out.json"),
        "fastflower train --config resnet34 \\\n        --train.epoch 3",
        "for m in resnet18 resnet35; do\n        fastflower train --model.name $m\n    done",
        'fastflower train --config "resnet34',
    ],
)
def test_a_wrong_command_line_is_found(line: str, tmp_path: Path) -> None:
    for page in (f"So:\n\n    {line}\n\nand on.", f"So:\n\n```sh\n{line}\n```\n\nand on."):
        (sentence,) = faults(page, tmp_path)
        assert re.match("line [3-5]: ", sentence)


@pytest.mark.parametrize(
    "span",
    [
        *("fastflower evil", "fastflower data chek", "fastflower train\n--epochs 3", "make it"),
        *("--train.mixup much", "--data.sizes\nsome", "python bench/kernels.py --reverse"),
    ],
)
def test_a_wrong_command_in_a_sentence_is_found(span: str, tmp_path: Path) -> None:
    (sentence,) = faults(f"As said,\nsee what `{span}` does.", tmp_path)
    assert sentence.startswith("line 2: ")


def test_what_is_no_command_line_is_left_alone(tmp_path: Path) -> None:
    page = (
        "It's so:\n\n    pip install fastflower\n    %env FASTFLOWER=x\n    don't make it\n\n`make` and `fastflower`."
    )
    assert faults(page, tmp_path) == []
    assert faults("```python\nmake x\n```\n", tmp_path) == []


@pages()
def test_options_that_sentences_name_exist(path: Path, known_options: set[str]) -> None:
    page = read(path.read_text(encoding="utf-8"))
    named = {(line, word) for line, span in spans(page) for word in span.split() if span.startswith("--")}
    options = {(line, word.split("=")[0]) for line, word in named if re.match(r"--\w", word)}
    assert {(line, option) for line, option in options if option.replace("-", "_") not in known_options} == set()


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """Of all commands and benchmarks, each - of a name as _."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")  # so that no name is cut
        return options_in_help()


def options_in_help() -> set[str]:
    names = ["train", "eval", "predict", "ensemble", "cv", "lr", "flops", "report", "doctor"]
    shown = [help_of(name) for name in names] + [help_of("data", name) for name in ("demo", "check", "stats", "pack")]
    modes: list[list[str]] = [[], ["loader"], ["model"], ["train"], ["eval"], ["overview"]]
    for module, words in [("throughput", mode) for mode in modes] + [
        (name, []) for name in ("kernels", "flops", "registers", "gpu_check")
    ]:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            importlib.import_module(f"bench.{module}").main([*words, "--help"])
        shown.append(out.getvalue())
    shown += [option.opposite for kind in COMMANDS.values() for option in options_of(kind)]
    return {option.replace("-", "_") for text in shown for option in re.findall(r"--[\w.-]*\w", text)}


@pages()
def test_links_lead_somewhere(path: Path) -> None:
    page = read(path.read_text(encoding="utf-8"))
    for target in (match["target"] for match in LINK.finditer(page.prose)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target
    for _, span in spans(page):
        if REPOSITORY_PATH.fullmatch(span) and span not in WRITTEN:
            assert (ROOT / span).exists(), span


def anchors(path: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", read(path.read_text(encoding="utf-8")).prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1000
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= {m["target"] for m in LINK.finditer(text)}


def test_what_architecture_links_is_there() -> None:
    """A link whose text is a name leads to the file that defines it."""
    links = [
        (match["text"].strip("`"), match["target"])
        for match in LINK.finditer(ARCHITECTURE.read_text(encoding="utf-8"))
        if match["target"].endswith(".py")
    ]
    assert len(links) > 20
    missing = [(name, target) for name, target in links if name not in defined(ARCHITECTURE.parent / target)]
    assert missing == []


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, and CLASS.METHOD."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)]
    inner = [(node, member) for node in top if isinstance(node, ast.ClassDef) for member in node.body]
    return {node.name for node in top} | {f"{a.name}.{b.name}" for a, b in inner if isinstance(b, kinds)}


def test_architecture_names_files_that_are_there() -> None:
    rows = re.findall(r"^\| \[`([\w/]+)/`\]\(.*?\) \| (.*) \|$", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 5
    for folder, text in rows:
        for name in re.findall(r"`(\w+\.py)`", text):
            assert (ROOT / folder / name).is_file(), f"{folder}/{name}"


def floors_of_the_contract() -> list[list[str]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [other for other in settings["tool"]["importlinter"]["contracts"] if other["type"] == "layers"]
    return [re.findall(r"fastflower\.(\w+)", layer) for layer in contract["layers"]]


def test_architecture_draws_the_floors_of_the_contract() -> None:
    (drawing,) = [block for block in read(ARCHITECTURE.read_text("utf-8")).blocks if block.language == "mermaid"]
    assert [drawn.split(" · ") for drawn in re.findall(r'\["(.*?)"\]', drawing.text)] == floors_of_the_contract()


def test_everything_is_on_a_floor_that_contributors_read_of() -> None:
    """Also the kernels, and whatever comes to lie in the package: what is on no floor may import anything."""
    code = {path.parent.name if path.name == "__init__.py" else path.stem for path in ROOT.glob("fastflower/*.py")}
    code |= {path.parent.name for path in ROOT.glob("fastflower/*/__init__.py")}
    floors = [name for floor in floors_of_the_contract() for name in floor]
    assert sorted(floors) == sorted(code - {"fastflower", "__main__", "configs"})
    table = "\n".join(re.findall(r"^\|.*\|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE))
    for name in floors:
        assert f"`{name}.py`" in table or f"`{name}/`" in table, name


PYTHON = [
    pytest.param(blocks, id=str(path.relative_to(ROOT)))
    for path in PAGES
    if (blocks := [block for block in read(path.read_text(encoding="utf-8")).blocks if block.language == "python"])
]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", PYTHON)
def test_python_runs(blocks: list[Block], tmp_path: Path, tiny_net: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks go on from one another."""
    write_dataset(builtin_root(), {"train": 48, "val": 20})  # where the synthetic flowers would be drawn
    (tmp_path / "NEWPICTURES").mkdir()
    (tmp_path / "NEWPICTURES/rose.jpg").write_bytes(jpeg(50, 40))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.text, "example", "exec"), names)
    losses = [value for value in names.values() if isinstance(value, torch.Tensor) and value.ndim == 0]
    assert all(torch.isfinite(loss) for loss in losses)
