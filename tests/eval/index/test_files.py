"""Index files are whole or absent, known by their digests, and written by one command at a time."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from eval.index import files
from eval.index.embeddings import Embeddings
from eval.index.files import load_index, write_index
from eval.index.partitioned import PartedIndex, build_parts
from eval.index.structure import walk
from pipeline import cli as command_line
from pipeline.core.files.lock import exclusive
from pipeline.core.records import InputError

DIM, ROWS = 16, 900


@pytest.fixture
def rows() -> npt.NDArray[np.float32]:
    found = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), dtype=np.float32)


@pytest.fixture
def features(rows: npt.NDArray[np.float32], tmp_path: Path) -> str:
    np.save(tmp_path / "rows.npy", rows)
    return str(tmp_path / "rows.npy")


def build(features: str, folder: Path, **settings: Any) -> PartedIndex:
    options = {"factory": "Flat", "rows_per_part": 300, "train_rows": ROWS} | settings
    return build_parts(Embeddings.open(features), str(folder), **options)


def fail_after(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Make files under `.partial` names take so many bytes and no more, as a full disk does."""
    real = open

    def limited(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real(path, mode, *args, **kwargs)
        if "w" not in mode or not str(path).endswith(".partial"):
            return file

        class Full:
            written = 0

            def write(self, data: bytes) -> int:
                self.written += len(data)
                if self.written > num_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return int(file.write(data))

            def tell(self) -> int:
                return int(file.tell())

            def __enter__(self) -> "Full":
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

        return Full()

    monkeypatch.setattr("builtins.open", limited)


def test_a_full_disk_leaves_no_index(
    rows: npt.NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = faiss.IndexFlatIP(DIM)
    index.add(rows)
    path = tmp_path / "out" / "rows.index"
    size = len(faiss.serialize_index(index))
    for room in (0, 10, size // 2, size - 1):
        with monkeypatch.context() as patch:
            fail_after(patch, room)
            with pytest.raises(OSError, match="No space left on device") as caught:
                write_index(index, str(path))
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert list((tmp_path / "out").iterdir()) == []
    assert write_index(index, str(path)) == (size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert path.read_bytes() == faiss.serialize_index(index).tobytes()


def test_parts_have_digests_and_other_bytes_are_seen(features: str, tmp_path: Path) -> None:
    build(features, tmp_path / "index")
    described = json.loads((tmp_path / "index" / "index.json").read_text())
    for part in described["parts"]:
        data = (tmp_path / "index" / part["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (part["num_bytes"], part["digest"])
    path = tmp_path / "index" / "parts" / "00001.index"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:-4] + b"\0\0\0\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"00001\.index: not a readable FAISS index .*: cnclip index"):
            PartedIndex.open(str(tmp_path / "index"))
    path.unlink()
    with pytest.raises(InputError, match=r"00001\.index: .*no such file"):
        PartedIndex.open(str(tmp_path / "index"))


def test_the_same_command_builds_again_what_is_damaged(
    features: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["index", features, str(tmp_path / "index"), "--factory", "SQ8", "--rows-per-part", "300"]
    assert command_line.main(words) == 0
    places = [path for path in (tmp_path / "index").rglob("*") if path.suffix in (".index", ".json")]
    whole = {path: path.read_bytes() for path in places}
    capsys.readouterr()
    for name in ("parts/00001.index", "parts/00002.index"):
        path = tmp_path / "index" / name
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
        assert command_line.main(words) == 0
        assert f"{name}: its bytes have changed: built again" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in places} == whole
    # a build that was cut short has no digests yet: what is cut is told by reading it
    (tmp_path / "index" / "index.json").unlink()
    path = tmp_path / "index" / "parts" / "00001.index"
    path.write_bytes(path.read_bytes()[:500])
    (tmp_path / "index" / "trained.index").write_bytes(b"IxF")
    assert command_line.main(words) == 0
    said = capsys.readouterr().err
    assert "parts/00001.index: not a readable FAISS index (" in said
    assert "trained.index: not a readable FAISS index" in said
    assert {path: path.read_bytes() for path in places} == whole


def test_an_index_of_before_digests_is_still_read(features: str, tmp_path: Path) -> None:
    build(features, tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    fields = json.loads(path.read_text())
    for part in fields["parts"]:
        del part["digest"]
    path.write_text(json.dumps(fields))
    assert PartedIndex.open(str(tmp_path / "index")).num_rows == ROWS
    build(features, tmp_path / "index")
    assert all(part.digest for part in PartedIndex.open(str(tmp_path / "index")).parts)


def test_a_cut_file_that_is_mapped_ends_no_process(
    rows: npt.NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAISS's mapped reader reads beyond the end of a short file; another process is the one to find out."""
    monkeypatch.setattr(files, "MAP_BYTES", 0)
    path = tmp_path / "rows.index"
    index = faiss.index_factory(DIM, "HNSW8", faiss.METRIC_INNER_PRODUCT)
    index.add(rows)
    faiss.write_index(index, str(path))
    assert load_index(str(path)).ntotal == ROWS
    path.write_bytes(path.read_bytes()[:180])
    with pytest.raises(InputError, match=r"rows\.index: not a readable FAISS index \("):
        load_index(str(path))


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8_HNSW16,Flat", "HNSW16", "NSG16,Flat"])
def test_what_a_search_looks_at_is_limited_at_every_load(
    factory: str, rows: npt.NDArray[np.float32], tmp_path: Path
) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    for part in walk(index):
        if isinstance(part, faiss.IndexIVF):
            part.nprobe = 1 << 40
        elif isinstance(part, faiss.IndexHNSW):
            part.hnsw.efSearch = 1 << 30
        elif isinstance(part, faiss.IndexNSG):
            part.nsg.search_L = 1 << 30
    faiss.write_index(index, str(tmp_path / "rows.index"))
    for _ in range(3):  # from the second time on the file is known to be sound
        found = load_index(str(tmp_path / "rows.index"))
        numbers = [
            part.nprobe
            if isinstance(part, faiss.IndexIVF)
            else part.hnsw.efSearch
            if isinstance(part, faiss.IndexHNSW)
            else part.nsg.search_L
            for part in walk(found)
            if isinstance(part, faiss.IndexIVF | faiss.IndexHNSW | faiss.IndexNSG)
        ]
        assert numbers == {"IVF8,Flat": [8], "IVF8_HNSW16,Flat": [8, 8]}.get(factory, [ROWS])
        assert found.search(rows[:5], 1)[1].ravel().tolist() == [0, 1, 2, 3, 4] or "IVF" not in factory


def test_a_transformation_that_changes_products_is_refused(
    rows: npt.NDArray[np.float32], tmp_path: Path
) -> None:
    """FAISS's factory makes rotations and projections; a file may hold any matrix."""
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(DIM, DIM)))[0].astype(np.float32)
    stretched = turn * np.linspace(1, 2, DIM, dtype=np.float32)
    mirrored = turn.copy()
    mirrored[0] = mirrored[1]
    path = str(tmp_path / "rows.index")
    for matrix, is_right in ((turn, True), (turn[:8], True), (stretched, False), (mirrored, False)):
        step = faiss.LinearTransform(DIM, len(matrix), False)
        faiss.copy_array_to_vector(np.ascontiguousarray(matrix).ravel(), step.A)
        step.is_trained = True
        index = faiss.IndexPreTransform(step, faiss.IndexFlatIP(len(matrix)))
        index.add(rows)
        faiss.write_index(index, path)
        if is_right:
            assert load_index(path).ntotal == ROWS
            continue
        for _ in range(2):
            with pytest.raises(
                InputError, match=r"rows\.index: LinearTransform stretches rows or drops some"
            ):
                load_index(path)
    index = faiss.IndexPreTransform(faiss.RemapDimensionsTransform(DIM, 8, True), faiss.IndexFlatIP(8))
    index.add(rows)
    faiss.write_index(index, path)
    with pytest.raises(InputError, match=r"rows\.index: RemapDimensionsTransform stretches rows"):
        load_index(path)


def test_fast_scan_of_many_lists_is_read_but_not_its_table(
    rows: npt.NDArray[np.float32], tmp_path: Path
) -> None:
    """FAISS refuses a file for the size of a table of 8 times the centroids, which it does not compute."""
    index = faiss.index_factory(DIM, "IVF200,PQ8x4fsr,RFlat", faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    for count in (0, 100):
        if count:
            index.add(rows[:count])
        faiss.write_index(index, str(tmp_path / "index"))
        size = (tmp_path / "index").stat().st_size
        assert size + files._SPARE_BYTES < 200 * 8 * 16 * 4
        read = load_index(str(tmp_path / "index"))
        assert read.ntotal == count
        assert faiss.downcast_index(faiss.extract_index_ivf(read)).precomputed_table.size() == 0


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.index")
    for name in ("pipe.index", "nothing.index", "."):
        with pytest.raises(InputError) as caught:
            load_index(str(tmp_path / name))
        assert str(caught.value).startswith(str(tmp_path / name))
    with pytest.raises(InputError, match="not a readable FAISS index"):
        load_index("/dev/zero")


def test_two_builds_in_one_folder_exclude_each_other(features: str, tmp_path: Path) -> None:
    refused = []

    def meanwhile(*_: object) -> None:
        try:
            build(features, tmp_path / "index", factory="SQ8", redo=True)
        except InputError as error:
            refused.append(str(error))

    build(features, tmp_path / "index", progress=meanwhile)
    assert len(refused) == 3
    assert f"process {os.getpid()} on" in refused[0]
    assert "another command is at work here" in refused[0]
    assert PartedIndex.open(str(tmp_path / "index")).factory == "Flat"
    assert build(features, tmp_path / "index", factory="SQ8", redo=True).factory == "SQ8"


def test_commands_that_write_a_folder_take_its_lock(
    features: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with exclusive(str(tmp_path / "out")):
        assert command_line.main(["index", features, str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/out: another command is at work here (")
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "out" / ".lock").unlink()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "elsewhere")
    assert command_line.main(["index", features, str(tmp_path / "out")]) == 1
    assert (
        ".lock: a link or not a regular file, so not a lock; remove it and rerun" in capsys.readouterr().err
    )
    assert (tmp_path / "elsewhere").read_text() == "kept"
