"""Settings from YAML and the command line: precedence, checks and messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastflower.cli import parse
from fastflower.config import Config, resolve
from fastflower.errors import UserError
from fastflower.layers import split_recipe
from fastflower.options import TrainCommand
from fastflower.settings import build, load_yaml, to_yaml
from tests.conftest import PLAIN, fastflower

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def settings(*arguments: object) -> Config:
    command = parse(["train", *map(str, arguments)])
    assert isinstance(command, TrainCommand)
    return command.settings


def test_command_line_wins_over_file_wins_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {epochs: 5, lr: 1e-3}\ndata: {sizes: [192, 224]}\n")
    config = settings("--config", file, "--train.epochs", 7)
    assert (config.train.epochs, config.train.lr, config.train.batch_size) == (7, 0.001, 256)
    assert config.data.sizes == (192, 224)


def test_without_configuration_and_data_the_demos_settings_are_the_defaults(tmp_path: Path) -> None:
    demo = build(load_yaml(CONFIGS[0].with_name("demo.yaml")), "demo.yaml")
    assert settings() == demo
    fitted = parse(["train", str(tmp_path)])
    assert isinstance(fitted, TrainCommand)
    assert fitted.layers.recipe == "auto"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_that_ships_is_valid_and_found_by_name(file: Path) -> None:
    recipe, named = split_recipe(load_yaml(file), str(file))
    assert recipe == {"finetune": "finetune", "scratch": "scratch"}.get(file.stem)
    direct = resolve(build(named, str(file)))
    assert settings("--config", file) == direct
    assert settings("--config", file.stem) == direct


def test_the_studys_configurations_are_its_recipe() -> None:
    for name, epochs in (("plain34", 70), ("resnet34", 70), ("resnet50", 50)):
        config = settings("--config", name)
        assert config.model.name == name
        assert config.data.sizes == "all"
        assert config.data.val_resize is None
        train = config.train
        assert (train.epochs, train.lr, train.batch_size, train.schedule, train.patience, train.factor) == (
            *(epochs, 0.1, 256, "plateau", 7, 0.1),
        )


def test_the_studys_transfer_and_the_papers_recipe() -> None:
    transfer, paper = settings("--config", "resnet50_pretrained"), settings("--config", "paper")
    assert (transfer.model.name, transfer.model.pretrained) == ("resnet50", "IMAGENET1K_V1")
    assert (transfer.train.lr, transfer.train.epochs, transfer.train.schedule) == (0.01, 50, "plateau")
    assert transfer.data.mean is None
    assert (paper.train.lr, paper.train.epochs, paper.train.batch_size, paper.train.factor) == (0.1, 120, 256, 0.1)
    assert (paper.data.scale, paper.data.crop, paper.data.lighting) == ((256, 480), 224, 0.1)


def test_the_rate_without_one_given_depends_on_pretrained_weights() -> None:
    assert settings("--config", PLAIN).train.lr == 0.1
    assert settings("--config", PLAIN, "--model.pretrained", "IMAGENET1K_V1").train.lr == 0.01
    assert settings("--config", PLAIN, "--model.pretrained", "w.pth", "--train.lr", 0.3).train.lr == 0.3


def test_a_deterministic_run_leaves_the_hardware_decoder_alone(tmp_path: Path) -> None:
    assert settings("--data.root", "x").data.hw_decoder_load is None
    for given in ((), ("--data.hw_decoder_load", 0)):
        assert settings("--data.root", "x", "--train.deterministic", *given).data.hw_decoder_load == 0
    file = tmp_path / "mine.yaml"
    file.write_text("train: {deterministic: true}")
    assert settings("--config", file).data.hw_decoder_load == 0
    assert settings("--config", file, "--train.no_deterministic").data.hw_decoder_load is None


def test_help_names_every_configuration_that_ships() -> None:
    shown = fastflower("train", "--help").out
    assert [file.stem for file in CONFIGS if file.stem not in shown] == []


def test_yaml_reads_back_to_the_same() -> None:
    original = settings("--data.sizes", "all", "--data.val_resize", "None", "--train.compile", "--train.lr", "1e-5")
    again = build(yaml.safe_load(to_yaml(original)), "again")
    assert again == original


def test_print_config_prints_what_would_run() -> None:
    result = fastflower("train", "--config", "resnet50", "--train.lr", "0.2", "--print_config")
    printed = yaml.safe_load(result.out)
    assert printed["train"]["lr"] == 0.2
    assert printed["model"]["name"] == "resnet50"
    assert build(printed, "printed") == settings("--config", "resnet50", "--train.lr", "0.2")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None),
        (["--train.compile"], True),
        (["--train.compile", "off"], False),
        (["--train.compile=on"], True),
        (["--train.no_compile"], False),
        (["--train.no-compile"], False),
        (["--train.compile", "auto"], None),
        (["--train.compile", "--amp"], True),
    ],
)
def test_compile_is_a_flag_with_a_third_state(words: list[str], value: bool | None) -> None:
    assert settings(*words).train.compile is value


def test_amp_is_a_flag_with_its_opposite(tmp_path: Path) -> None:
    file = tmp_path / "amp.yaml"
    file.write_text("amp: true\n")
    assert settings("--amp").amp
    assert settings("--config", file).amp
    assert not settings("--config", file, "--no-amp").amp
    assert not settings("--config", file, "--no_amp").amp


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {epoch: 5}", "there is no setting train.epoch; did you mean train.epochs?"),
        ("lr: 0.1", "there is no setting lr; did you mean train.lr?"),
        ("zzz: 1", "there is no setting zzz; the keys here are amp, "),
        ("train: 5", "train is 5: it takes keys such as epochs"),
        ("train: {lr: fast}", "train.lr is fast: it takes a number above 0 or none."),
        ("train: {lr: -1}", "train.lr is -1: it takes a number above 0"),
        ("train: {lr: .nan}", "train.lr is nan: "),
        ("data: {mean: [0.5, .nan, 0.5], std: [1, 1, 1]}", "data.mean is [0.5, nan, 0.5]: it takes 3 numbers"),
        ("data: {mean: [0.5, 0.5, 0.5], std: [1, 1, .inf]}", "data.std is [1, 1, inf]: "),
        ("train: {epochs: 1.5}", "train.epochs is 1.5: "),
        ("train: {schedule: linear}", "train.schedule is linear: it takes plateau, step, cosine or onecycle."),
        ("model: {name: resnet43}", "model.name is resnet43: it takes plain18, "),
        (
            "data: {sizes: [192, -1]}",
            "data.sizes is [192, -1]: it takes auto, all or one or more whole numbers above 0.",
        ),
        ("data: {sizes: some}", "data.sizes is some: "),
        ("data: {scale: [480, 256]}", "data.scale is 480 256: give the smaller size first"),
        ("data: {scale: [200, 256], crop: 224}", "data.scale starts at 200 pixels, below data.crop (224)"),
        ("data: {val_resize: 100, crop: 224}", "data.val_resize is 100 pixels, below data.crop (224)"),
        ("recipe: best", "recipe is 'best': choose one of auto, finetune, scratch"),
        ("data: {mean: [0.5, 0.5, 0.5]}", "data.mean and data.std go together"),
        ("data: {mean: [0, 0, 0], std: [1, 1, 0]}", "each value must be above 0"),
        ("train: {schedule: cosine, epochs: 2, warmup_epochs: 2}", "train.warmup_epochs is 2, not below train.epochs"),
        (
            "{train: {deterministic: true}, data: {hw_decoder_load: 0.9}}",
            "data.hw_decoder_load is 0.9, but train.determ",
        ),
        ("data: {hw_decoder_load: 1.1}", "data.hw_decoder_load is 1.1: "),
        ("data: {decode: half}", "data.decode is half: "),
        ("- a list", "holds no settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_the_key(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    result = fastflower("train", "--config", file)
    assert result.code == 2
    assert str(file) in result.err
    assert sentence in result.err
    assert "Traceback" not in result.err


def test_wrong_options_are_named_with_the_nearest() -> None:
    result = fastflower("train", "--train.epoch", "5")
    assert result.code == 2
    assert "--train.epochs" in result.err
    for words, part in (
        (["--train.lr", "-1"], "--train.lr is -1: it takes a number above 0"),
        (["--data.scale", "64", "32"], "command line: data.scale is 64 32"),
        (["--config", "nothing.yaml"], "nothing.yaml cannot be read"),
        (["--config", "resnet43"], "resnet43"),
        (["--data.root", "no-such-folder"], "no-such-folder is not a folder"),
    ):
        result = fastflower("train", *words)
        assert result.code == 2, words
        assert part in result.err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        fastflower_debug(tmp_path)


def fastflower_debug(folder: Path) -> None:
    from fastflower import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fastflower", "train", "--data.root", str(folder / "none"), "--debug"])
        cli.main()
