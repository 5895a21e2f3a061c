"""`weft --version` and `weft env` say what weft runs on."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys

import pytest
import torch

import weft
import weft.cli.environment
from weft.cli import main


def test_version_names_what_weft_stands_on_without_importing_it():
    code = "import sys; from weft.cli import main\nmain(['--version'])\n"
    code += "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft")]
    assert shown == f"weft {weft.__version__} ({', '.join(versions)})\n[]\n"


def test_env_says_what_a_report_needs(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = {line[:14].strip(): line[14:] for line in lines[: lines.index("")]}
    assert facts["weft"] == weft.__version__
    assert facts["Python"] == platform.python_version()
    assert re.fullmatch(r".+, \d+ cores", facts["processor"])
    assert f", {len(os.sched_getaffinity(0))} cores" in facts["processor"]
    assert re.fullmatch(r"\d+\.\d GiB", facts["memory"])
    for name in ("torch", "transformers", "peft", "accelerate", "safetensors"):
        assert facts[name] == importlib.metadata.version(name)
    assert facts["devices"] == "none but the processor"
    extras = {line[2:38].strip(): line[38:] for line in lines[lines.index("extras") + 1 :]}
    assert extras["quantised base models"].startswith(f"bitsandbytes {importlib.metadata.version('bitsandbytes')}")


def test_env_names_devices_and_what_is_missing(monkeypatch, capsys):
    class Properties:
        name, total_memory = "NVIDIA H100", 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    monkeypatch.setattr(weft.cli.environment, "_version", lambda package: None)
    assert main(["env"]) == 0
    found = capsys.readouterr().out
    assert "devices       cuda:0 NVIDIA H100 (80 GiB)\n" in found
    assert "torch         not installed\n" in found
    assert 'weft inspect --figure               not installed: pip install "weft[figures]"\n' in found
    assert "weft serve with vLLM                not installed\n" in found


def test_a_processor_without_a_name_is_what_python_calls_it(monkeypatch, tmp_path):
    monkeypatch.setattr(weft.cli.environment, "Path", lambda name: tmp_path / "missing")
    assert weft.cli.environment._processor() == (platform.processor() or platform.machine())


@pytest.mark.parametrize("extra", ["quant", "serve", "figures", "harness"])
def test_the_extras_are_those_of_the_package(extra):
    assert extra in importlib.metadata.metadata("weft").get_all("Provides-Extra")
    assert any(extra == one for _, _, one in weft.cli.environment._EXTRAS)
