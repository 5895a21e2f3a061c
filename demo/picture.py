"""The picture of the page in docs/inspect.md, of the long demo: run `make demo-full` and `make browser` first."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOMAINS = ["python", "reference", "licences", "records", "mixed"]


def main() -> None:
    """Record a trace of the held-out texts, write its page and take its picture."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=ROOT / ".demo-full")
    parser.add_argument("--base", help="the base model, where it has been moved")
    parser.add_argument("--page", type=Path, default=ROOT / ".demo-full/inspect.html")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/inspect.png")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    arguments = parser.parse_args()
    work = arguments.work_dir
    if not arguments.page.exists():
        command = [sys.executable, "-m", "weft", "inspect", str(work / "mixture"), "--max-tokens", "1280"]
        command += ["--data", *(f"{name}={work / 'data/heldout' / name}.jsonl" for name in reversed(DOMAINS))]
        command += ["--sequence-length", "256", "--html", str(arguments.page), "--title", "demo, held-out texts"]
        subprocess.run([*command, *(["--base", arguments.base] if arguments.base else [])], check=True)
    with sync_playwright() as playwright:
        path = os.environ.get("WEFT_CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 900}, color_scheme=arguments.scheme)
        page.goto(arguments.page.resolve().as_uri())
        page.locator("#relative").click()
        page.locator("[data-i='96']").click()
        page.locator("[data-i='160']").click(modifiers=["Shift"])
        page.locator("[data-i='118']").hover()
        page.screenshot(path=arguments.output, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
