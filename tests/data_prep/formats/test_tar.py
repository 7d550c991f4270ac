"""Our tar writer gives the bytes of Python's tarfile, and says where each member lies."""

import hashlib
import io
import random
import tarfile
from pathlib import Path

import pytest

from data_prep.formats.tar import TarWriter


def _by_tarfile(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "names",
    [[], ["a.jpg"], ["a" * 100, "猫.jpg", "b" * 60 + "/" + "c" * 60], [f"{n:032x}.jpg" for n in range(60)]],
)
def test_the_bytes_are_those_of_tarfile(names: list[str], tmp_path: Path) -> None:
    rng = random.Random(0)
    members = [(name, rng.randbytes(rng.choice((0, 1, 511, 512, 513, 30_000)))) for name in names]
    path = tmp_path / "a.tar"
    with TarWriter(str(path)) as tar:
        places = [tar.add(name, data) for name, data in members]
    assert path.read_bytes() == _by_tarfile(members)
    for place, (_, data) in zip(places, members, strict=True):
        assert path.read_bytes()[place.offset_bytes : place.offset_bytes + place.size_bytes] == data
        assert place.sha256 == hashlib.sha256(data).hexdigest()


def test_a_name_that_no_header_holds_is_refused(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "a.tar")) as tar, pytest.raises(ValueError, match="name is too long"):
        tar.append("a" * 300, b"")
