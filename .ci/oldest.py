"""The oldest versions that pyproject.toml admits, as constraints for pip: each `name>=version` as `name==version`."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["dev"], *extras["demo"]]:
    if found := re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement):
        print("{}=={}".format(*found.groups()))
