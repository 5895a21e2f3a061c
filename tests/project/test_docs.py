"""The pages lead somewhere, and the reference has every public name. (`make docs` finds what is wrong in the site.)"""

import importlib.util
import re
from pathlib import Path

import pytest

import weft
from weft.cli.entry import _COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
spec = importlib.util.spec_from_file_location("links", ROOT / "docs_site/links.py")
links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(links)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    origin = str(page.relative_to(ROOT))
    targets = {links.resolve(origin, link) for link in links.links(page.read_text())}
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_links_are_found_and_replaced_outside_of_code_only():
    text = "[a](x.md#here) ![b](y.png) [web](https://x.org) [here](#there)\n```\n[c](z.md)\n```\n[d](../w)\n"
    assert list(links.links(text)) == ["x.md", "y.png", "../w"]
    replaced = links.replace_links(text, str.upper)
    assert replaced == text.replace("x.md", "X.MD").replace("y.png", "Y.PNG").replace("../w", "../W")


def test_what_is_outside_of_docs_becomes_part_of_the_site():
    assert links.resolve("docs/training.md", "../examples/harness.py") == "examples/harness.py"
    assert links.resolve("examples", "harness.py") == "examples/harness.py"
    assert links.site_path("docs/reference/training.md") == "reference/training.md"
    assert links.site_path("examples/harness.py") == "repository/examples/harness.py.md"
    assert links.site_path("examples") == "repository/examples/index.md"
    assert links.site_path("README.md") == "repository/README.md"
    assert "[harness.py](harness.py)" in links.as_page("examples")
    assert (ROOT / "examples/harness.py").read_text() in links.as_page("examples/harness.py")


def test_the_reference_has_every_public_name():
    reference = "".join(page.read_text() for page in (ROOT / "docs/reference").iterdir())
    assert set(re.findall(r"^::: weft\.(\w+)$", reference, flags=re.M)) - {"errors"} == set(weft.__all__)


def test_the_reference_has_every_command():
    text = (ROOT / "docs/reference/command_line.md").read_text()
    shown = dict(re.findall(r"^## weft ([\w-]+)\n\n::: ([\w.]+)$", text, flags=re.M))
    assert shown == {name: f"weft.options.{options.__name__}" for name, (_, options) in _COMMANDS.items()}
