"""Reads files out of packages in memory, within bounds; nothing is unpacked to disk and no link followed."""

import base64
import hashlib
import io
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.files.foreign import foreign
from pipeline.core.processes import dies_with_us
from pipeline.core.records import InputError

MAX_MEMBER_BYTES = 128 << 20  # the largest file that is read has 104 MB
MAX_TOTAL_BYTES = 1 << 30  # of all files that are read from one package


def read_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Read the wanted regular files of a package, in its order.

    Paths are those below `package/` of an npm tarball, and those below the root of a Debian package.

    Raises:
        InputError: if the package is damaged, or more than MAX_TOTAL_BYTES are wanted.
    """
    total = 0
    with foreign(str(archive), "package", "delete it and build again"), _opened(archive) as members:
        for member in members:
            path = member.name.partition("/")[2]
            if not (member.isreg() and member.size <= MAX_MEMBER_BYTES and wanted(path)):
                continue
            total += member.size
            if total > MAX_TOTAL_BYTES:
                raise InputError(f"{archive}: more than {MAX_TOTAL_BYTES >> 20} MiB to read; not used")
            file = members.extractfile(member)
            assert file is not None  # a regular file has content
            yield path, file.read()


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    if archive.suffix != ".deb":
        with tarfile.open(archive, "r:gz") as members:
            yield members
        return
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=dies_with_us()
    ) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as members:
                yield members
        finally:
            process.stdout.close()  # ends dpkg-deb if not all was read


def read_one(archive: Path, path: str) -> bytes:
    """Read one file of a package.

    Raises:
        InputError: if it is not in there.
    """
    for _, content in read_members(archive, lambda name: name == path):
        return content
    raise InputError(
        f"{archive}: no file {path} in it (of at most {MAX_MEMBER_BYTES >> 20} MiB);"
        f" delete {archive.parent} and build again"
    )


def content_of(archive: Path) -> str:
    """Return a digest of a package's files by path, in npm's form, but for `usr/share/doc/` and for dates.

    A zip counts as the files in it. So a rebuilt package has the digest of the one before if only its
    changelog differs.
    """
    lines = []
    for path, content in read_members(archive, lambda path: not path.startswith("usr/share/doc/")):
        parts = [("", content)]
        if path.endswith(".zip"):
            parts = list(read_zip(content, f"{archive}: {path}", lambda _: True))
        lines += [f"{path}\0{name}\0{hashlib.sha256(part).hexdigest()}\n" for name, part in parts]
    digest = hashlib.sha512("".join(sorted(lines)).encode()).digest()
    return "sha512-" + base64.b64encode(digest).decode()


def read_zip(content: bytes, where: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Read the wanted files of a zip that lies inside a package, within the same bounds.

    Raises:
        InputError: if the zip is damaged or too much is wanted; `where` names it.
    """
    total = 0
    with (
        foreign(where, "zip", "delete the package and build again"),
        zipfile.ZipFile(io.BytesIO(content)) as archive,
    ):
        for member in archive.infolist():
            if member.is_dir() or member.file_size > MAX_MEMBER_BYTES or not wanted(member.filename):
                continue
            total += member.file_size
            if total > MAX_TOTAL_BYTES:
                raise InputError(f"{where}: more than {MAX_TOTAL_BYTES >> 20} MiB to read; not used")
            yield member.filename, archive.read(member)
