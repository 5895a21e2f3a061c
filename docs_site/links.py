"""A hook of mkdocs: links from the pages in docs/ to the rest of the repository, which has no address on the web.

On GitHub and in an editor `../examples/harness.py` is a file beside docs/. In the site, what is linked so becomes part
of it, below `repository/`: Markdown as a page, sources as pages that show them, folders as lists, all else as it is.
A link to a file that does not exist is a warning, which `mkdocs build --strict` makes an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Shown as they stand. Browsers show JSON and images themselves, and would save these.
SOURCES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".txt": "text"}
# The text of a link may go on in the next line, not in the next paragraph.
_LINK = re.compile(r"(!?\[(?:[^\]\n]|\n(?![ \t]*\n))*\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^ *(```|~~~)")
_log = logging.getLogger("mkdocs.plugins.links")
_origins: dict[str, str] = {}  # a page that this hook added -> what it shows


def links(markdown: str) -> Iterator[str]:
    """The targets of all links within the repository, without their anchors; code blocks have none."""
    found: list[str] = []

    def note(target: str) -> str:
        found.append(target)
        return target

    replace_links(markdown, note)
    yield from found


def replace_links(markdown: str, replace: Any) -> str:
    """The text with another target in each link within the repository; anchors stay."""

    def replaced(match: re.Match[str]) -> str:
        path, hash_sign, anchor = match[2].partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        return f"{match[1]}{replace(path)}{hash_sign}{anchor}{match[3]}"

    parts, prose, in_code = [], "", False
    for line in markdown.splitlines(keepends=True):
        if _FENCE.match(line):
            in_code = not in_code
            parts += [_LINK.sub(replaced, prose), line]
            prose = ""
        elif in_code:
            parts.append(line)
        else:
            prose += line
    return "".join(parts) + _LINK.sub(replaced, prose)


def resolve(origin: str, target: str) -> str:
    """The path from the root of the repository that a link in the file or folder `origin` means."""
    folder = origin if (ROOT / origin).is_dir() else posixpath.dirname(origin)
    return posixpath.normpath(posixpath.join(folder, target))


def site_path(path: str) -> str:
    """Where mkdocs takes a file or folder of the repository from."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    return f"repository/{path}{'.md' if Path(path).suffix in SOURCES else ''}"


def as_page(path: str) -> str | bytes:
    """What the site shows of a file or folder outside of docs/."""
    file = ROOT / path
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n"
    if file.is_dir():
        names = [f"{part.name}/" if part.is_dir() else part.name for part in sorted(file.iterdir())]
        return head + f"# {path}\n\n" + "".join(f"- [{n}]({n})\n" for n in names if n[0] not in "._")
    if file.suffix == ".md":
        text = file.read_text("utf-8")
        return head + (text if text.startswith("# ") else f"# {file.stem}\n\n{text}")
    if file.suffix in SOURCES:
        return head + f"# {path}\n\n````{SOURCES[file.suffix]}\n{file.read_text('utf-8')}````\n"
    return file.read_bytes()


def on_files(files: Any, config: Any) -> Any:
    """Add what the pages link to, and what that links to."""
    from mkdocs.structure.files import File, InclusionLevel

    _origins.clear()
    texts = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while texts:
        origin, text = texts.pop()
        for path in {resolve(origin, link) for link in links(text)}:
            uri = site_path(path)
            if not (ROOT / path).exists():
                _log.warning(f"{origin} links to {path}, which does not exist")
            elif not path.startswith("docs/") and uri not in _origins:
                _origins[uri] = path
                content = as_page(path)
                files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
                if isinstance(content, str):
                    texts.append((path, content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let the links of a page lead to where the site has their targets."""
    uri = page.file.src_uri
    origin = _origins.get(uri, f"docs/{uri}")
    folder = posixpath.dirname(uri)

    def in_site(target: str) -> str:
        return posixpath.relpath(site_path(resolve(origin, target)), folder or ".")

    return replace_links(markdown, in_site)
