"""Small packages, and clients of registries on the PATH that hand them out."""

import dataclasses
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from data_prep.corpora.packages.fetch import integrity_of
from data_prep.corpora.packages.table import Package


def tarball(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files as npm packs them."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def deb(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files as a Debian package."""
    folder = path.with_name(path.name + ".folder")
    control = b"Package: small\nVersion: 1\nArchitecture: all\nMaintainer: none\nDescription: small\n"
    for name, content in {"DEBIAN/control": control, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    subprocess.run(["dpkg-deb", "-Znone", "--build", folder, path], check=True, capture_output=True)


def serve_packages(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    packages: Mapping[str, Package],
    files: Mapping[str, Mapping[str, bytes]],
) -> dict[str, Package]:
    """Return packages with small contents, pinned to their digests.

    `npm` and `apt-get` on the PATH hand them out of `store/` and note each call in `calls.txt`.
    """
    store = folder / "store"
    store.mkdir()
    small = {}
    for role, package in packages.items():
        path = store / package.pinned.replace("/", "_")
        (tarball if package.registry == "npm" else deb)(path, files[role])
        small[role] = dataclasses.replace(package, integrity=integrity_of(path))
    (folder / "bin").mkdir()
    for client, ending in (("npm", "tgz"), ("apt-get", "deb")):
        program = folder / "bin" / client
        program.write_text(
            f"#!{sys.executable} -S\n"
            "import pathlib, shutil, sys\n"
            f"store, calls = pathlib.Path({str(store)!r}), {str(folder / 'calls.txt')!r}\n"
            "print(sys.argv[2], file=open(calls, 'a'))\n"
            "path = store / sys.argv[2].replace('/', '_')\n"
            "if not path.exists(): sys.exit('npm error 404 no such package')\n"
            f"shutil.copy(path, 'package.{ending}')\n"
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return small
