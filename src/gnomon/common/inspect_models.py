"""A language model by its Inspect name, or a folder: opened with one clear message when it cannot be.

Names: ``hf/<hub id>``, ``openai-api/<service>/<model>`` (any OpenAI-compatible server), ``openai/...``,
``anthropic/...``, ``vllm/...``, ``mockllm/model``, or an existing folder, which is run by transformers.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gnomon.common.files import read_json
from gnomon.common.tasks import INSTALL, inspect_installed
from gnomon.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from inspect_ai.model import Model

__all__ = ["check_server", "open_model"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

NAMES = (
    "Give a folder with a model, or an Inspect name: hf/<hub id>, openai-api/<service>/<model> with --model-base-url, "
    "openai/<model>, anthropic/<model>, vllm/<model>."
)


def open_model(name: str, *, base_url: str | None = None, args: Mapping[str, Any] | None = None) -> Model:
    """Return an Inspect model.

    A folder is short for ``hf/local`` with ``model_path``; models that gnomon changed or adapted are rebuilt as
    `gnomon.load_model` does. Models of the provider ``hf`` decode greedily unless ``args`` say ``do_sample: true``.

    Parameters
    ----------
    name : str
        Inspect name or folder.
    base_url : str, optional
        Where the server is, for providers that have one.
    args : mapping, optional
        The provider's own arguments, such as ``device`` or ``dtype``.

    Returns
    -------
    Model

    Raises
    ------
    ConfigError
        When inspect-ai is missing, there is no such provider, or a key, a package or the server is missing.
    ModelError
        When the folder holds no model that can be run.
    """
    if not inspect_installed():
        raise ConfigError(f"Models are run through Inspect: {INSTALL}")
    arguments = dict(args or {})
    folder = Path(name).expanduser()
    if folder.is_dir():
        if base_url:
            raise ConfigError(
                f"{name} is a folder, run in this process; a base URL has no meaning for it. Leave it out."
            )
        return _open_folder(folder, arguments)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"{name}: there is no such folder. {NAMES}")
    if "/" not in name:
        raise ConfigError(f"{name!r} is neither a folder nor an Inspect model name. {NAMES}")
    if name.startswith("hf/"):
        arguments.setdefault("do_sample", False)
    model = _get(name, base_url, arguments)
    check_server(getattr(model.api, "base_url", None), name)
    return model


def _get(name: str, base_url: str | None, arguments: Mapping[str, Any]) -> Model:
    from inspect_ai.model import ModelInfo, get_model, get_model_info, set_model_info

    if name.startswith("openai-api/") and len(name.split("/")) < 3:
        raise ConfigError(f"{name!r}: write openai-api/<service>/<model>, such as openai-api/local/my-model.")
    arguments = dict(arguments)
    if name.startswith("openai-api/") and base_url and urlsplit(base_url).hostname in _LOOPBACK:
        service = re.sub(r"\W", "_", name.split("/")[1]).upper()
        if f"{service}_API_KEY" not in os.environ:
            arguments.setdefault("api_key", "none")  # a server on this machine rarely asks for one
    try:
        model = get_model(name, base_url=base_url, memoize=False, **arguments)
        if name.startswith("hf/") and get_model_info(model) is None:
            # to look such a model up, Inspect would load it a second time, or search the hub for "local"
            set_model_info(name, ModelInfo(model=name))
        return model
    except Exception as error:  # every provider raises its own
        text = re.sub(r"\[/?[a-z ]+\]", "", " ".join(str(error).split()))
        text = text.removeprefix("ERROR: ")
        if "API_KEY" in text:
            text += " Set that environment variable."
        hint = "" if "API_KEY" in text or "BASE_URL" in text or "pip install" in text else f" {NAMES}"
        raise ConfigError(f"the model {name!r} cannot be opened: {text}{hint}") from error


def _open_folder(folder: Path, arguments: dict[str, Any]) -> Model:
    import torch

    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            f"{folder} holds no config.json, so it is no model folder. Give the folder that save_pretrained wrote "
            "(of a run of gnomon: its model/ or export/)."
        )
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise ModelError(f"{folder} holds no tokenizer. Save it into the same folder: tokenizer.save_pretrained.")
    arguments.setdefault("do_sample", False)
    arguments.setdefault("device", "cuda:0" if torch.cuda.is_available() else "cpu")
    changed = read_json(config).get("gnomon") or (folder / "adapter" / "adapter_config.json").is_file()
    rebuilt: Any = None
    if changed:
        from gnomon.common.models import load_model

        rebuilt = load_model(folder).to(arguments["device"])
    try:
        model = _get("hf/local", None, {"model_path": str(folder), **arguments})
    except ConfigError as error:
        raise ModelError(str(error).replace("'hf/local'", str(folder))) from error
    if rebuilt is not None:  # what transformers alone made of the folder lacks what gnomon recorded
        model.api.model = rebuilt  # type: ignore[attr-defined]
    return model


def check_server(url: str | None, name: str = "the model", timeout: float = 5.0) -> None:
    """See whether something answers at a URL, so that a server that is not there does not mean endless retries.

    Nothing is checked where requests go through a proxy.

    Raises
    ------
    ConfigError
        When no connection can be made.
    """
    if not url:
        return
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"the base URL {url!r} is no web address. Write it as http://host:port/v1.")
    if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(parts.hostname):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=timeout).close()
    except OSError as error:
        raise ConfigError(
            f"no server answers at {url} ({error}), where {name} should be. Start it, or correct --model-base-url."
        ) from error
