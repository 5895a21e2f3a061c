"""The pages lead somewhere, and the reference has every public name. (`make docs` finds what is wrong in the site.)"""

import importlib.util
import re
from pathlib import Path

import pytest

import weft
from weft.cli.commands import COMMANDS
from weft.options.described import options_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def hook(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs_site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links = hook("links")


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


def test_the_text_of_a_link_may_break_into_the_next_line_but_not_into_the_next_paragraph():
    assert list(links.links("see the [commented\n  files](configs) and [x]\n\n(no) [y\n\nz](none)")) == ["configs"]


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


def test_the_reference_has_every_option_of_every_command():
    text = hook("commands").on_page_markdown((ROOT / "docs/reference/command_line.md").read_text(), None, None, None)
    sections = dict(re.findall(r"^## weft ([\w-]+)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))
    assert list(sections) == list(COMMANDS)
    for name, command in COMMANDS.items():
        for option in options_of(command.options):
            typed = option.flag.replace("--", "--[no-]") if option.kind == "switch" else option.flag
            assert re.search(rf"^\| `{re.escape(typed)}[ `]", sections[name], flags=re.M), (name, option.name)
