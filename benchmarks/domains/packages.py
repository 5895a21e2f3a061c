"""Files of Debian's packages and of wheels from PyPI, read where they are: nothing is installed or unpacked to disk."""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from table import Source


class MissingPackageError(Exception):
    """A package that the index does not have."""


def find(package: str, folder: Path) -> Path | None:
    """The package's file, if it is there."""
    name, _, version = package.partition("==")
    pattern = f"{re.sub('[-_.]+', '_', name)}-{version}-*.whl" if version else f"{name}_*.deb"
    return next(iter(sorted(folder.glob(pattern))), None)


def fetched(package: str, folder: Path) -> Path:
    """The package's file, downloaded if need be.

    Args:
        package: `name==version` of PyPI, or a name of Debian, which serves its release's version.
        folder: Where packages are kept.

    Raises:
        MissingPackageError: the index does not have it.
    """
    path = find(package, folder)
    if path is None:
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", package]
        command = pip if "==" in package else ["apt-get", "--quiet", "--quiet", "download", package]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        path = find(package, folder)
        if path is None:
            raise MissingPackageError(f"{package} cannot be had: {' '.join(command)}: {done.stderr.strip()[-400:]}")
    return path


def version_of(package: str, path: Path) -> str:
    """The version of a package's file: what Debian served, or what was asked of PyPI."""
    return package.partition("==")[2] or path.name.split("_")[1].replace("%3a", ":")


def archived(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an archive's files."""
    if name.endswith((".zip", ".whl")):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield member, archive.read(member)
    else:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            yield from tar_files(archive)


def tar_files(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a tar archive's files, without its links."""
    for member in archive:
        stream = archive.extractfile(member) if member.isreg() else None
        if stream:
            yield member.name.removeprefix("./"), stream.read()


def all_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a package's files."""
    if path.suffix == ".whl":
        yield from archived(path.name, path.read_bytes())
        return
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            yield from tar_files(archive)
        # What follows the end of the archive is read too, or the writer fails.
        assert process.stdout is not None
        process.stdout.read()


def matches(name: str, source: Source) -> bool:
    """Whether a file is one of those that a source asks for."""
    return any(fnmatchcase(name, pattern) for pattern in source.files) and not any(
        fnmatchcase(name, pattern) for pattern in source.but_not
    )


def read_files(source: Source, path: Path) -> dict[str, bytes]:
    """The files that a source asks for, by name, uncompressed."""
    found = {}
    for name, data in all_files(path):
        if source.inside and fnmatchcase(name, source.inside):
            found |= {inner: content for inner, content in archived(name, data) if matches(inner, source)}
        elif not source.inside and matches(name, source):
            found[name] = gzip.decompress(data) if name.endswith((".gz", ".dz")) else data
    return found
