"""Files appear whole or not at all, on disk and on an object store."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from pipeline.core import store
from pipeline.core.files import durability


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_write_read_list_digest_remove(folder: str) -> None:
    path = store.join(folder, "stage", "a.txt")
    assert not store.exists(path)
    assert store.list_files(store.join(folder, "stage")) == []
    store.write_text(path, "汉字")
    store.write_bytes(store.join(folder, "stage", "b.bin"), bytes(3_000_000))
    assert store.exists(path)
    assert store.read_text(path) == "汉字"
    assert store.num_bytes(path) == 6
    assert store.list_files(store.join(folder, "stage")) == ["a.txt", "b.bin"]
    assert (
        store.digest_file(path)
        == hashlib.sha256("汉字".encode()).hexdigest()
        == store.digest_bytes("汉字".encode())
    )
    assert store.digest_file(store.join(folder, "stage", "b.bin")) == store.digest_bytes(bytes(3_000_000))
    with store.open_read(path) as file:
        file.seek(3)
        assert file.read() == "字".encode()
    store.write_text(path, "new")
    assert store.read_text(path) == "new"
    store.remove(path)
    assert store.list_files(store.join(folder, "stage")) == ["b.bin"]
    store.remove(store.join(folder, "stage"))
    store.remove(store.join(folder, "stage"))  # nothing there: nothing happens
    assert not store.exists(store.join(folder, "stage", "b.bin"))


def _fail_half_way(path: str) -> None:
    with store.publish(path) as temporary:
        Path(temporary).write_bytes(b"half")
        raise ZeroDivisionError


def test_a_failed_publish_leaves_nothing(folder: str) -> None:
    path = store.join(folder, "stage", "a.bin")
    with pytest.raises(ZeroDivisionError):
        _fail_half_way(path)
    assert not store.exists(path)
    assert store.list_files(store.join(folder, "stage")) == []


def test_a_failed_publish_keeps_what_was_there(folder: str) -> None:
    path = store.join(folder, "a.bin")
    store.write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError):
        _fail_half_way(path)
    with store.publish(path) as temporary:
        Path(temporary).write_bytes(b"new")
        assert store.read_bytes(path) == b"old"  # the new one is not seen before it is whole
    assert store.read_bytes(path) == b"new"


def test_a_failed_local_publish_removes_its_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _fail_half_way(str(tmp_path / "a.bin"))
    assert list(tmp_path.iterdir()) == []


def _die_while_publishing(path: str) -> None:
    with store.publish(path) as temporary:
        Path(temporary).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_publish_never_shows(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    process = multiprocessing.get_context("fork").Process(target=_die_while_publishing, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not store.exists(path)
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []


def test_sizes_of_missing_files(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        store.num_bytes(store.join(folder, "none"))
    with pytest.raises(FileNotFoundError):
        store.read_bytes(store.join(folder, "none"))


def test_join_keeps_schemes() -> None:
    assert store.join("s3://bucket/run/", "a", "b") == "s3://bucket/run/a/b"
    assert store.is_local("/a/b")
    assert not store.is_local("s3://bucket/a")


def killed_while_publishing(target: Path) -> Path:
    """The file that is left."""
    program = (
        "import os, signal; from pipeline.core import store\n"
        f"with store.publish({str(target)!r}) as temporary:\n"
        "    open(temporary, 'wb').write(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    (left,) = target.parent.glob(f".{target.name}.*")
    return left


def test_sweep_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "table.parquet"
    killed_while_publishing(target)
    store.sweep(str(tmp_path))
    assert os.listdir(target.parent) == []


def test_in_a_shared_folder_only_what_nobody_writes_is_swept(tmp_path: Path) -> None:
    store.sweep_shared(str(tmp_path / "none"))
    old, fresh = (tmp_path / f".{name}.npy.0badcafe-1-0badcafe.partial" for name in ("old", "fresh"))
    for path in (old, fresh, tmp_path / "whole.npy"):
        path.write_bytes(b"of another machine")
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    killed_while_publishing(tmp_path / "killed.npy")
    with store.publish(str(tmp_path / "own.npy")) as temporary:
        Path(temporary).write_bytes(b"half")
        store.sweep_shared(str(tmp_path))
        left = {Path(temporary).name, fresh.name, "whole.npy"}
        assert set(os.listdir(tmp_path)) == left
    assert store.read_bytes(str(tmp_path / "own.npy")) == b"half"


def test_a_linked_folder_is_emptied_and_stays_a_link(tmp_path: Path) -> None:
    other, link = tmp_path / "other_disk", tmp_path / "stage"
    store.write_text(str(other / "deep" / "a.txt"), "a")
    store.write_text(str(other / "manifest.json"), "{}")
    link.symlink_to(other)
    store.remove(str(link))
    assert link.is_symlink()
    assert list(other.iterdir()) == []
    store.write_text(str(link / "b.txt"), "b")
    assert (other / "b.txt").read_text() == "b"


def test_a_link_to_a_file_goes_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    store.remove(str(tmp_path / "link"))
    store.remove(str(tmp_path / "dangling"))
    assert os.listdir(tmp_path) == ["target"]


def test_sweep_removes_what_a_killed_removal_left(tmp_path: Path) -> None:
    store.write_text(str(tmp_path / "stage.removing" / "a.txt"), "a")
    store.write_text(str(tmp_path / "linked" / ".removing" / "a.txt"), "a")
    store.sweep(str(tmp_path), deep=False)
    store.sweep(str(tmp_path / "linked"))
    assert os.listdir(tmp_path) == ["linked"]
    assert os.listdir(tmp_path / "linked") == []


def test_sizes_of_a_folder(folder: str) -> None:
    assert store.sizes(store.join(folder, "stage")) == {}
    store.write_text(store.join(folder, "stage", "a.txt"), "汉字")
    store.write_text(store.join(folder, "stage", "deep", "b.txt"), "b")
    assert store.sizes(store.join(folder, "stage")) == {"a.txt": 6}


def test_publish_syncs_the_file_its_folder_and_new_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = list[str]()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    store.write_text(str(tmp_path / "run" / "stage" / "a.txt"), "a")
    names = [os.path.relpath(path, tmp_path) for path in synced]
    assert names[:2] == [".", "run"]  # the entries of the new folders
    assert names[2].startswith("run/stage/.a.txt.")
    assert names[3:] == ["run/stage"]
    synced.clear()
    with durability.together():
        for name in ("b", "c"):
            store.write_text(str(tmp_path / "run" / "stage" / f"{name}.txt"), name)
        assert len(synced) == 2  # the files' bytes
    assert [os.path.relpath(path, tmp_path) for path in synced[2:]] == ["run/stage"]


def test_writers_of_the_same_number_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 42)  # two containers that share a folder
    both, failed = threading.Barrier(2), []

    def write() -> None:
        try:
            with store.publish(str(tmp_path / "tokens.npz")) as temporary:
                Path(temporary).write_bytes(b"same")
                both.wait()
        except OSError as error:
            failed.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failed == []
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npz"]


def test_a_file_that_its_writer_made_private_gets_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    with store.publish(str(tmp_path / "weights")) as temporary:
        Path(temporary).touch(mode=0o600)  # as safetensors does
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "any").stat().st_mode
