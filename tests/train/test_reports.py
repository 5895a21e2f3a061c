"""The log goes to the tools that the Trainer knows; one that is not there is named before anything is loaded."""

import importlib.util

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import weft.train.reports
from weft.cli import main
from weft.options import TrainOptions
from weft.train.arguments import training_arguments
from weft.train.reports import report_problems

# None of them is a dependency of the tests.
ABSENT = [name for name in ("wandb", "mlflow", "trackio", "swanlab") if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("given", ["none", ["none"], "all", [], "tensorboard", ["tensorboard"]])
def test_tools_that_are_there_are_handed_to_the_trainer(given, tmp_path):
    assert report_problems(given) == []
    arguments = training_arguments(TrainOptions(report_to=given), tmp_path, 1, 1)
    expected = {"none": [], "tensorboard": ["tensorboard"]}.get("".join(given), [])
    assert arguments.report_to == expected or given == "all"


@pytest.mark.parametrize("name", ABSENT)
def test_a_tool_that_is_not_installed_is_named_with_what_installs_it(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "c.txt").write_text("a text")
    command = ["train", "--base", "base", "--adapters", "a=a", "b=b", "--data", "c.txt", "--report-to", "tensorboard"]
    assert main([*command, name]) == 1
    said = capsys.readouterr().err
    assert f"report_to ({name}) needs the package {name}, which is not installed: pip install {name}\n" in said
    assert "tensorboard" not in said


def test_tools_whose_package_has_another_name(monkeypatch):
    monkeypatch.setattr(weft.train.reports, "find_spec", lambda name: None)
    problems = report_problems(list(INTEGRATION_TO_CALLBACK))
    packages = [problem.rpartition(" ")[2] for problem in problems]
    assert {"azureml-sdk", "comet-ml", "flytekit", "tensorboard", "wandb"} <= set(packages)
    monkeypatch.setattr(weft.train.reports, "find_spec", lambda name: name == "tensorboardX" or None)
    assert report_problems("tensorboard") == []


@pytest.mark.parametrize("given", [["wandbb"], ["none", "tensorboard"]])
def test_a_name_that_is_none_is_answered_with_those_that_are(given):
    (problem,) = report_problems(given)
    assert problem.startswith(f"report_to ({given[0]}) must be of azure_ml, ")
    assert "tensorboard, " in problem
    assert problem.endswith(", or none or all alone")
