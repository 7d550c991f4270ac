"""Fetches pinned packages with their registries' own clients and checks their digests."""

import base64
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.corpora.packages.archives import content_of
from data_prep.corpora.packages.table import Package
from pipeline.core.processes import dies_with_us
from pipeline.core.records import ConfigError, InputError

TIMEOUT_S = 900
_FETCHES = 4  # at once; what npm does before it downloads takes longer than the download
_INSTALL = {
    "npm": "install Node.js's npm (Debian: apt-get install npm)",
    "apt-get": "packages of Debian need Debian or one of its derivatives",
}


def integrity_of(path: Path) -> str:
    """Return the sha512 of a file in npm's form."""
    with open(path, "rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def fetch(package: Package, cache: Path) -> Path:
    """Get a package's file into the cache with its registry's client, unless it is there; check its digest.

    If the registry no longer has the pinned version, another one with the pinned content takes its place.

    Raises:
        ConfigError: if the client is not installed.
        InputError: if the client fails or the digest is another one.
    """
    cache = cache.resolve()  # clients run in another folder
    ending = "tgz" if package.registry == "npm" else "deb"
    target = cache / f"{re.sub(r'[^A-Za-z0-9.+~-]', '_', f'{package.name}-{package.version}')}.{ending}"
    if target.is_file() and _is_pinned(target, package):
        return target
    client = "npm" if package.registry == "npm" else "apt-get"
    if shutil.which(client) is None:
        raise ConfigError(f"{client}: not found on the PATH; {_INSTALL[client]}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        try:
            found = _download(package.pinned, client, Path(folder), ending)
        except InputError:
            if package.content is None:
                raise
            found = _download(package.name, client, Path(folder), ending)
        if not _is_pinned(found, package):
            raise InputError(
                f"{package.pinned}: digest {integrity_of(found)}, but {package.integrity} is pinned; not used"
            )
        os.replace(found, target)
    return target


def _is_pinned(path: Path, package: Package) -> bool:
    if integrity_of(path) == package.integrity:
        return True
    return package.content is not None and content_of(path) == package.content


def _download(asked: str, client: str, folder: Path, ending: str) -> Path:
    commands = {
        "npm": ["pack", asked, "--pack-destination", str(folder), "--ignore-scripts"],
        "apt-get": ["download", asked, "--quiet"],
    }
    command = [client, *commands[client], *(["--loglevel", "error"] if client == "npm" else [])]
    said = " ".join(command[:3])
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            cwd=folder,
            preexec_fn=dies_with_us(),
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"{said}: no end after {TIMEOUT_S} s; run again") from None
    files = list(folder.glob(f"*.{ending}"))
    if result.returncode != 0 or len(files) != 1:
        reason = (result.stderr.strip() or f"no .{ending} file").splitlines()[-1]
        raise InputError(f"{said}: exit status {result.returncode}: {reason}; run again")
    return files[0]


def fetch_all(
    packages: Mapping[str, Package], cache: Path
) -> tuple[dict[str, Path], dict[str, InputError | ConfigError]]:
    """Fetch several packages at once; return the files by role, and why the others were not had."""

    def attempt(package: Package) -> Path | InputError | ConfigError:
        try:
            return fetch(package, cache)
        except (InputError, ConfigError) as error:
            return error

    with ThreadPoolExecutor(_FETCHES) as threads:
        results = dict(zip(packages, threads.map(attempt, packages.values()), strict=True))
    had = {role: result for role, result in results.items() if isinstance(result, Path)}
    return had, {role: result for role, result in results.items() if not isinstance(result, Path)}
