"""Checks the tools of `report_to`, to which transformers' Trainer sends the log."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

_ALONE = ("none", "all")
# Tool -> modules, of which it needs one, if they have other names than the tool. (Kubeflow is a server.)
_MODULES = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
# Tool -> package, if it has another name than the tool.
_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}


def report_problems(report_to: Sequence[str] | str) -> list[str]:
    """One sentence for each tool that cannot receive the log. The Trainer checks them after the model is loaded."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if len(names) == 1 and names[0] in _ALONE:
        return []
    unknown = [name for name in names if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        known = ", ".join(INTEGRATION_TO_CALLBACK)
        return [f"report_to ({', '.join(unknown)}) must be of {known}, or {' or '.join(_ALONE)} alone"]
    missing = {name: _PACKAGES.get(name, name) for name in names if not _is_installed(name)}
    return [
        f"report_to ({name}) needs the package {package}, which is not installed: pip install {package}"
        for name, package in missing.items()
    ]


def _is_installed(name: str) -> bool:
    modules = _MODULES.get(name, (name,))
    return not modules or any(find_spec(module) for module in modules)
