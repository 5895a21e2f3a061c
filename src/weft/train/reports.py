"""The tools that a training's log goes to beside the screen: those that transformers' Trainer knows."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

_ALONE = ("none", "all")
# What a tool needs, where that is no module of its name: any of these. (Kubeflow's is a server.)
_MODULES = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
# What is installed to have it, where that has another name.
_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}


def report_problems(report_to: Sequence[str] | str) -> list[str]:
    """Why the log cannot go to these tools, a sentence each: what the Trainer says once the model is loaded."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if len(names) == 1 and names[0] in _ALONE:
        return []
    unknown = [name for name in names if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        known = ", ".join(INTEGRATION_TO_CALLBACK)
        return [f"report_to ({', '.join(unknown)}) must be of {known}, or {' or '.join(_ALONE)} alone"]
    missing = {name: _PACKAGES.get(name, name) for name in names if not _is_there(name)}
    return [
        f"report_to ({name}) needs the package {package}, which is not installed: pip install {package}"
        for name, package in missing.items()
    ]


def _is_there(name: str) -> bool:
    modules = _MODULES.get(name, (name,))
    return not modules or any(find_spec(module) for module in modules)
