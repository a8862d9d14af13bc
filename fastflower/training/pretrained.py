"""Weights to start from: torchvision's for ImageNet, a file, or a run of ours. The last layer is never taken."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastflower.config import ModelConfig
from fastflower.data.view import IMAGENET, Normalization
from fastflower.errors import UserError
from fastflower.files import atomic_write
from fastflower.models import NETWORKS, architecture
from fastflower.models.layers import head_prefix
from fastflower.runtime.checkpoint import (
    FORMAT,
    first_non_finite,
    misfit,
    plain_names,
    trained_network,
    weights_of,
)
from fastflower.runtime.entries import About, as_about, is_weights
from fastflower.runtime.run_folder import RunFolder

# Where torchvision publishes weights (torchvision.models.ResNet50_Weights and its like). A file's name ends with the
# first digits of its SHA-256.
URL = "https://download.pytorch.org/models"
ANSWER_S = 8  # after which a server counts as out of reach
READ = 1 << 20  # bytes at once


@dataclass(frozen=True)
class Pretrained:
    """Weights that were read."""

    source: Path
    weights: dict[str, torch.Tensor]  # under torchvision's names
    normalization: Normalization  # of the pictures that they were trained on


def open_pretrained(model: ModelConfig, say: Callable[[str], None]) -> Pretrained | None:
    """The weights that `model.pretrained` names, on the CPU; None where it names none.

    A file without normalization of its own is taken to be trained with ImageNet's.

    Args:
        model: what is to be trained; see `fastflower.config.ModelConfig.pretrained`.
        say: gets a line when something is downloaded.

    Raises:
        UserError: there is no such file, it is damaged or of another kind or network, or it cannot be downloaded.
    """
    if not model.pretrained:
        return None
    if model.pretrained in (published := _published()):
        path = _torchvision_file(model, published[model.pretrained], say)
    else:
        path = Path(model.pretrained).expanduser()
        path = RunFolder(path).best if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"model.pretrained: there is no file {path}; give {' or '.join(published)}, a .pth or .safetensors file, "
            "or a run of fastflower that has finished an epoch."
        )
    weights, about = _read(path)
    if "architecture" in about:
        _refuse_other_architecture(path, about["architecture"], model)
    normalization = IMAGENET
    if "normalization" in about:
        normalization = Normalization.of(about["normalization"])
    return Pretrained(path, plain_names(weights, path), normalization)


def load_pretrained(network: torch.nn.Module, pretrained: Pretrained) -> None:
    """Put the weights into `network`, whose last layer stays as it is.

    Raises:
        UserError: other keys or shapes than the network's, or a value that is not finite. Counts of BatchNorm's steps
            (num_batches_tracked) may be missing, as in files older than them.
    """
    head = head_prefix(network)
    weights = {name: tensor for name, tensor in pretrained.weights.items() if not name.startswith(head)}
    own = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.startswith(head) and (name in weights or not name.endswith(".num_batches_tracked"))
    }
    if problems := misfit(own, weights):
        raise UserError(
            f"{pretrained.source} does not fit the network, keys: {problems}; give the model.name and "
            "model.shortcut that it was trained with, or other weights as model.pretrained."
        )
    if name := first_non_finite(weights):
        raise UserError(f"{pretrained.source}: {name} is not finite; give other weights as model.pretrained.")
    network.load_state_dict(weights, strict=False)


def _published() -> dict[str, dict[str, str]]:
    """Torchvision's files by the weights' name and the network's."""
    files: dict[str, dict[str, str]] = {}
    for network in NETWORKS.values():
        for kind, name in network.weights.items():
            files.setdefault(kind, {})[network.name] = name
    return files


def _torchvision_file(model: ModelConfig, files: Mapping[str, str], say: Callable[[str], None]) -> Path:
    """The file in torch.hub's folder, downloaded and its hash checked unless it is there."""
    kind = model.pretrained
    if model.name not in files:
        raise UserError(f"model.pretrained: torchvision has no {kind} of {model.name}, only of {', '.join(files)}.")
    its = ModelConfig(model.name)
    if architecture(asdict(model)) != architecture(asdict(its)):
        raise UserError(
            f"model.pretrained {kind} was trained with model.shortcut {its.shortcut} and model.bottleneck_stride "
            f"{its.bottleneck_stride}: give these."
        )
    name = files[model.name]
    return _local_file(name) or _downloaded(name, say)


def at_hand(networks: Sequence[str], kind: str, say: Callable[[str], None]) -> tuple[tuple[str, ...], str]:
    """Those of the networks whose weights can be had, or why there are none, as the end of a sentence.

    They are had in FASTFLOWER_WEIGHTS, if that names a folder, or in torch.hub's; or else those of the first network
    are downloaded, unless there is such a folder.

    Args:
        networks: names, the best first.
        kind: of weights, such as IMAGENET1K_V1.
        say: gets a line when something is downloaded.

    Raises:
        UserError: a file in FASTFLOWER_WEIGHTS is not what its name says.
    """
    files = {name: NETWORKS[name].weights[kind] for name in networks}
    if local := tuple(name for name, file in files.items() if _local_file(file)):
        return local, ""
    first = files[networks[0]]
    if folder := _weights_folder():
        return (), f"{folder} (FASTFLOWER_WEIGHTS) holds none of {', '.join(files.values())}"
    try:
        _downloaded(first, say)
    except UserError as error:
        text = str(error)
        return (), f"{text[0].lower()}{text[1:].rstrip('.')}"
    return (networks[0],), ""


def network_of(pretrained: str, preferred: Sequence[str]) -> str | None:
    """The network that `model.pretrained` fits: of those preferred for torchvision's weights, and a run's own.

    None where a file does not say it, or there is none.

    Raises:
        UserError: the file is damaged.
    """
    if published := _published().get(pretrained):
        return next((name for name in preferred if name in published), None)
    path = Path(pretrained).expanduser()
    path = RunFolder(path).best if path.is_dir() else path
    if not path.is_file():
        return None
    _, about = _read(path)
    name = about["architecture"].get("name") if "architecture" in about else None
    return name if name in NETWORKS else None


def _weights_folder() -> Path | None:
    """Where the user keeps torchvision's files by their names."""
    named = os.environ.get("FASTFLOWER_WEIGHTS")
    return Path(named).expanduser() if named else None


def _local_file(name: str) -> Path | None:
    """One of torchvision's files, where it is in FASTFLOWER_WEIGHTS or in torch.hub's folder.

    Raises:
        UserError: FASTFLOWER_WEIGHTS has a file of that name with other bytes.
    """
    folder = _weights_folder()
    if folder and (path := folder / name).is_file():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(READ):
                digest.update(part)
        if not digest.hexdigest().startswith(_digits(name)):
            raise UserError(
                f"{path} (FASTFLOWER_WEIGHTS) is damaged: its SHA-256 does not begin as its name says; copy it again."
            )
        return path
    path = _hub_folder() / name
    return path if path.exists() else None


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _digits(name: str) -> str:
    return Path(name).stem.rpartition("-")[2]


def _downloaded(name: str, say: Callable[[str], None]) -> Path:
    """One of torchvision's files, put into torch.hub's folder after its hash is checked.

    Raises:
        UserError: it cannot be had within reasonable time, or has other bytes.
    """
    folder, url = _hub_folder(), f"{URL}/{name}"
    say(f"Downloading {url} to {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with _answer(url) as answer, atomic_write(folder / name) as file:
            while part := answer.read(READ):
                digest.update(part)
                file.write(part)
            if not digest.hexdigest().startswith(_digits(name)):
                raise OSError(f"invalid hash value {digest.hexdigest()[:8]}")
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{url} cannot be downloaded to {folder} ({error}): fetch it on another machine and copy it there, or "
            "into a folder that FASTFLOWER_WEIGHTS names."
        ) from error
    return folder / name


def _answer(url: str) -> Any:
    """What the server sends, once it begins to.

    Asked in a thread, because looking up a server's name may take minutes where there is no network.

    Raises:
        OSError: it does not answer, or not soon enough.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "fastflower"})
            answers.put(urllib.request.urlopen(request, timeout=ANSWER_S))
        except Exception as error:  # goes to who asked
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_S} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _read(path: Path) -> tuple[Mapping[str, torch.Tensor], About]:
    """A file's state_dict, and what a file of ours says about it: architecture, normalization.

    Raises:
        UserError: it is neither whole nor of a known kind.
    """
    try:
        weights, about = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except UserError:
        raise
    except Exception as error:  # torch's unpickler raises whatever the instructions in a damaged file run into
        raise UserError(
            f"{path} cannot be read as weights: it is damaged, is not yours to read, or holds more than tensors and "
            "plain values; save the network's state_dict alone with torch.save or safetensors."
        ) from error
    if not is_weights(weights):
        raise UserError(f"{path} holds no state_dict, neither by itself nor under state_dict or model: save one there.")
    return weights, about


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], About]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        ours = {key: json.loads(metadata[key]) for key in ("architecture", "normalization") if key in metadata}
        return {name: file.get_tensor(name) for name in file.keys()}, as_about(ours, path)  # noqa: SIM118 - it is no dict


def _read_pickle(path: Path) -> tuple[Any, About]:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, Mapping):
        return saved, {}
    if saved.get("format") == FORMAT:  # a checkpoint of ours
        trained = trained_network(saved, path)
        about: About = {"architecture": trained["config"]["model"], "normalization": trained["normalization"]}
        return weights_of(trained), about
    return saved.get("state_dict", saved.get("model", saved)), {}


def _refuse_other_architecture(path: Path, about: Any, model: ModelConfig) -> None:
    its = architecture(about if isinstance(about, Mapping) else {})
    for key, ours in architecture(asdict(model)).items():
        if its[key] != ours:
            raise UserError(f"{path} holds a network of model.{key} {its[key]}, not {ours}: give the same.")
