"""Reshard, subset, merge and export through the command line, read back by those who are to read them."""

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
import webdataset  # type: ignore[import-untyped]
from PIL import Image

from data_prep.shards import repack
from pipeline.cli import main
from pipeline.core.run import Run
from pipeline.core.shard_format import read_sidecar_frame
from tests.helpers.corpus_files import drawing, encoded, finish, make_run, plain_corpus, sidecars


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Forty samples in shards of eight."""
    return plain_corpus(tmp_path_factory.mktemp("corpus"), range(40))


def pictures_of(folder: Path) -> list[tuple[str, bytes, str]]:
    """(key, image, caption) of all samples, in order, read as tars."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        keys = [name.removesuffix(".jpg") for name in members if name.endswith(".jpg")]
        found += [(key, members[f"{key}.jpg"], members[f"{key}.txt"].decode()) for key in keys]
    return found


def heights(folder: Path) -> list[int]:
    return [pl.read_parquet(path).height for path in sorted(folder.glob("*.parquet"))]


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder but receipts, which hold times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "receipts" not in path.parts
    }


def test_reshard_keeps_samples_and_order(corpus: Run, tmp_path: Path) -> None:
    before = Path(corpus.folder, "shards")
    words = ["reshard", corpus.folder, "--out", str(tmp_path / "none"), "--samples", "11"]
    assert main([*words, "--processes", "0"]) == 2
    assert not (tmp_path / "none").exists()
    assert main(["reshard", corpus.folder, "--out", str(tmp_path / "a"), "--samples", "11"]) == 0
    after = tmp_path / "a" / "shards"
    assert heights(after) == [11, 11, 11, 7]
    assert pictures_of(after) == pictures_of(before)
    # And back: byte for byte what it was.
    assert main(["reshard", str(after), "--out", str(tmp_path / "b"), "--samples=8", "--processes=1"]) == 0
    back = tmp_path / "b" / "shards"
    for path in sorted(before.glob("00*")):
        assert (back / path.name).read_bytes() == path.read_bytes()


def test_again_is_nothing_to_do_and_another_size_is_refused(
    corpus: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reshard", corpus.folder, "--processes=1", "--out", str(tmp_path / "out"), "--samples"]
    assert main([*words, "16"]) == 0
    first = tree(tmp_path / "out")
    assert main([*words, "16"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*words, "12"]) == 2
    assert "was made from something else (shards: its configuration changed" in capsys.readouterr().err
    assert tree(tmp_path / "out") == first


def test_an_interrupted_reshard_goes_on(corpus: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    words = ["--samples", "8", "--processes", "1"]
    assert main(["reshard", corpus.folder, "--out", str(whole), *words]) == 0
    pack, packed = repack.write_shard, []

    def until_the_third(context: object, name: str, *rest: object) -> object:
        if len(packed) == 2:
            raise KeyboardInterrupt
        packed.append(name)
        return pack(context, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(repack, "write_shard", until_the_third)
    assert main(["reshard", corpus.folder, "--out", str(halved), *words]) == 130
    assert not (halved / "shards" / "manifest.json").exists()
    packed.clear()
    monkeypatch.setattr(
        repack, "write_shard", lambda context, name, *rest: packed.append(name) or pack(context, name, *rest)
    )
    assert main(["reshard", corpus.folder, "--out", str(halved), *words]) == 0
    assert packed == ["00002", "00003", "00004"]
    assert tree(halved) == tree(whole)


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_subset_by_a_list_of_keys(
    corpus: Run, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = pictures_of(Path(corpus.folder, "shards"))
    wanted = samples[::3]
    keys = pl.DataFrame({"key": [key for key, *_ in reversed(wanted)] + ["f" * 32, wanted[0][0]]})
    path = tmp_path / f"keys.{kind}"
    if kind == "txt":
        path.write_text("\r\n".join(keys["key"]) + "\n\n")
    else:
        getattr(keys, f"write_{kind}")(path)
    out = tmp_path / "out"
    assert (
        main(
            ["subset", corpus.folder, "--keys", str(path), "--out", str(out), "--samples=5", "--processes=1"]
        )
        == 0
    )
    assert pictures_of(out / "shards") == wanted
    assert heights(out / "shards") == [5, 5, 4]
    said = capsys.readouterr().out
    assert "keys: 16 in, 15 kept, 1 duplicate" in said
    assert "rows: 40 in, 14 kept, 26 not_listed" in said
    assert "1 of the listed keys are not in the corpus" in said
    drops = pl.concat([pl.read_parquet(file) for file in (out / "rows" / "dropped").glob("*.parquet")])
    assert set(drops["key"]) == {key for key, *_ in samples} - {key for key, *_ in wanted}


def test_a_long_list_is_read_in_ranges(corpus: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack, "_KEYS_PER_BUCKET", 4)
    wanted = pictures_of(Path(corpus.folder, "shards"))[1::2]
    (tmp_path / "keys.txt").write_text("".join(f"{key}\n" for key, *_ in wanted))
    out = tmp_path / "out"
    words = ["subset", corpus.folder, "--keys", str(tmp_path / "keys.txt"), "--out", str(out)]
    assert main([*words, "--processes", "1"]) == 0
    assert len(list((out / "keys" / "kept").glob("*.parquet"))) == 6
    assert pictures_of(out / "shards") == wanted


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("keys.txt", "0123\n", "'0123' is not a key"),
        ("keys.csv", "id\n1\n", "no column key; found id"),
        ("keys.json", "[]", "unknown kind of list"),
        ("keys.txt", "", "no keys in it"),
        ("keys.csv", "key\n", "no keys in it"),
        ("keys.parquet", "no Parquet", "not a readable table"),
        ("keys.txt", "f" * 32, "none of its keys is in"),
        ("absent.txt", None, "no such file"),
    ],
)
def test_a_bad_list_is_named(
    corpus: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, says: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    words = ["subset", corpus.folder, "--keys", str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert main([*words, "--processes=1"]) == 1
    assert f"{tmp_path / name}: {says}" in capsys.readouterr().err


def test_merge_counts_repeated_keys(
    corpus: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(repack, "_ROWS_PER_PARTITION", 20)
    other = plain_corpus(tmp_path / "other", range(30, 60), source="theirs")
    out = tmp_path / "out"
    words = ["merge", corpus.folder, other.folder, "--out", str(out), "--processes", "1"]
    assert main([*words, "--samples", "25"]) == 0
    assert "rows: 70 in, 60 kept, 10 duplicate" in capsys.readouterr().out
    both = {key: rest for run in (other, corpus) for key, *rest in pictures_of(Path(run.folder, "shards"))}
    assert [[key, *rest] for key, *rest in pictures_of(out / "shards")] == [
        [key, *both[key]] for key in sorted(both)
    ]
    assert heights(out / "shards") == [25, 25, 10]
    table = sidecars(Run(str(out), 0, "local", 1, ()))
    assert table["source"].value_counts().sort("source").rows() == [("mine", 40), ("theirs", 20)]
    # The same on another number of ranges, and merging a corpus with itself gives the corpus.
    monkeypatch.setattr(repack, "_ROWS_PER_PARTITION", 1000)
    again = [*words[:3], "--out", str(tmp_path / "again"), "--samples", "25", "--processes", "1"]
    assert main(again) == 0
    assert tree(tmp_path / "again" / "shards").keys() == tree(out / "shards").keys()
    for path in (out / "shards").glob("00*"):
        assert (tmp_path / "again" / "shards" / path.name).read_bytes() == path.read_bytes()


def test_changed_bytes_are_found_while_they_are_copied(
    corpus: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = plain_corpus(tmp_path / "copy", range(8))
    tar = Path(copy.folder, "shards", "00000.tar")
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert main(["reshard", copy.folder, "--out", str(tmp_path / "out"), "--samples", "4"]) == 1
    assert "00000.tar: the bytes at 512 are not" in capsys.readouterr().err


def test_what_is_no_corpus_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reshard", str(tmp_path), "--out", str(tmp_path / "out"), "--samples", "4"]) == 1
    assert f"{tmp_path}: no manifest.json here or in shards/" in capsys.readouterr().err


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty-four samples, six of which show an image that another one shows too."""
    pictures = {f"{number}.jpg": encoded(drawing(number % 18, side=40)) for number in range(24)}
    captions = {name: f"名为“{name[:-4]}”的图片，第{index}张" for index, name in enumerate(pictures)}
    return finish(make_run(tmp_path_factory.mktemp("repeated"), pictures, captions))


@pytest.mark.parametrize("rows_per_bucket", [4_000_000, 5])
def test_export_to_tsv(
    repeated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_bucket: int
) -> None:
    monkeypatch.setattr("data_prep.shards.export._ROWS_PER_BUCKET", rows_per_bucket)
    assert main(["export", repeated.folder, "--out", str(tmp_path), "--split", "valid"]) == 0
    lines = (tmp_path / "valid_imgs.tsv").read_text().splitlines()
    images = {int(name): base64.b64decode(data) for name, data in (line.split("\t") for line in lines)}
    texts = [json.loads(line) for line in (tmp_path / "valid_texts.jsonl").read_text().splitlines()]
    samples = pictures_of(Path(repeated.folder, "shards"))
    assert len(images) == len(lines) == len(set(images.values())) == 18
    assert [text["text_id"] for text in texts] == list(range(24))
    assert [(images[text["image_ids"][0]], text["text"]) for text in texts] == [
        (picture, caption) for _, picture, caption in samples
    ]


def test_export_writes_every_caption_of_a_sample(
    repeated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: str, columns: Sequence[str], optional: Sequence[str]) -> pl.DataFrame:
        """Read a sidecar whose second sample keeps two captions."""
        table = read_sidecar_frame(path, columns, optional)
        lists = [["甲", "乙"] if row == 1 else None for row in range(table.height)]
        return table.with_columns(pl.Series("captions", lists, dtype=pl.List(pl.String)))

    monkeypatch.setattr("data_prep.shards.export.read_sidecar_frame", read)
    assert main(["export", repeated.folder, "--out", str(tmp_path), "--split", "valid"]) == 0
    samples = pictures_of(Path(repeated.folder, "shards"))
    lines = (tmp_path / "valid_imgs.tsv").read_text().splitlines()
    assert len(lines) == 18
    images = {int(name): base64.b64decode(data) for name, data in (line.split("\t") for line in lines)}
    texts = [json.loads(line) for line in (tmp_path / "valid_texts.jsonl").read_text().splitlines()]
    per_shard = heights(Path(repeated.folder, "shards"))
    expected = list[tuple[bytes, str]]()
    for size in per_shard:
        shard, samples = samples[:size], samples[size:]
        for row, (_, image, caption) in enumerate(shard):
            expected += [(image, text) for text in (["甲", "乙"] if row == 1 else [caption])]
    assert [(images[text["image_ids"][0]], text["text"]) for text in texts] == expected
    assert [text["text_id"] for text in texts] == list(range(24 + len(per_shard)))


CN_CLIP = """
import json, sys
import training.model  # declares the operators that a CPU-only torchvision lacks
from cn_clip.training.data import LMDBDataset
data = LMDBDataset(sys.argv[1], split="train", max_txt_length=52, use_augment=False, resolution=40)
found = []
for number in range(data.number_samples):
    image, text, eos = data[number]
    found.append([list(image.shape), int((text != 0).sum()), float(image.sum()), data.number_images])
print(json.dumps(found))
"""


def test_export_to_lmdb_is_read_by_cn_clip(repeated: Run, tmp_path: Path) -> None:
    assert main(["export", repeated.folder, "--out", str(tmp_path), "--to", "lmdb"]) == 0
    done = subprocess.run(
        [sys.executable, "-c", CN_CLIP, str(tmp_path / "lmdb" / "train")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 24
    assert {tuple(item[0]) for item in found} == {(3, 40, 40)}
    assert {item[3] for item in found} == {18}
    assert len({round(item[2], 3) for item in found}) == 18  # as many images as there are, by their sums
    # And byte for byte the same once more.
    again = tmp_path / "again"
    assert main(["export", repeated.folder, "--out", str(again), "--to", "lmdb"]) == 0
    for name in ("imgs", "pairs"):
        path = Path("lmdb", "train", name, "data.mdb")
        assert (tmp_path / path).read_bytes() == (again / path).read_bytes()


def test_what_was_exported_trains_again(repeated: Run, tmp_path: Path) -> None:
    """Our own reader takes the LMDB as a source; texts and images come back."""
    from data_prep.sources.packed import pieces, unpack
    from data_prep.sources.readers.source import PackedSource
    from data_prep.sources.regions import Places

    assert main(["export", repeated.folder, "--out", str(tmp_path), "--to", "lmdb"]) == 0
    source = PackedSource(kind="cn_clip_lmdb", path=str(tmp_path), name="back")
    [files] = pieces(source)
    to = Places(*(str(tmp_path / f"{name}.parquet") for name in ("table", "malformed", "dropped")))
    unpacked = unpack(source, files, to)
    captions = [caption for *_, caption in pictures_of(Path(repeated.folder, "shards"))]
    assert unpacked.dropped == {}
    assert pl.read_parquet(tmp_path / "table.parquet")["caption"].to_list() == captions


def test_exports_are_whole_or_not_there(
    repeated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", repeated.folder, "--out", str(tmp_path / "out"), "--to"]
    for form, killed in (("tsv", "json.dumps"), ("lmdb", "pickle.dumps")):
        with monkeypatch.context() as patch:
            patch.setattr(
                f"data_prep.shards.export.{killed}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            assert main([*words, form]) == 130
        assert not list((tmp_path / "out").glob(f"train_{form}.json"))
        assert not list((tmp_path / "out").glob("train_imgs.tsv" if form == "tsv" else "lmdb/train"))
        assert main([*words, form]) == 0
        assert main([*words, form]) == 0
        assert "nothing to do" in capsys.readouterr().out
    assert not list((tmp_path / "out" / "lmdb").glob(".*"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "train_imgs.tsv").write_text("mine\n")
    assert main(["export", repeated.folder, "--out", str(foreign)]) == 2
    assert "train_imgs.tsv: already exists" in capsys.readouterr().err
    assert (foreign / "train_imgs.tsv").read_text() == "mine\n"


OPEN_CLIP = """
import json, sys
import training.model  # declares the operators that a CPU-only torchvision lacks
from types import SimpleNamespace
from open_clip_train.data import get_wds_dataset
arguments = SimpleNamespace(
    train_data=sys.argv[1], val_data=sys.argv[1], train_num_samples=int(sys.argv[2]),
    val_num_samples=int(sys.argv[2]), train_data_upsampling_factors=None, dataset_resampled=False, seed=0,
    workers=1, batch_size=4, world_size=1,
)
data = get_wds_dataset(
    arguments, lambda image: image.convert("RGB").resize((1, 1)).getpixel((0, 0)), False,
    tokenizer=lambda text: [text],
)
print(json.dumps([[list(map(int, pixel)), text] for pixels, texts in data.dataloader
                  for pixel, text in zip(pixels, texts)]))
"""


def test_open_clip_and_webdataset_read_the_tars(corpus: Run, tmp_path: Path) -> None:
    assert main(["reshard", corpus.folder, "--out", str(tmp_path), "--samples=12", "--processes=1"]) == 0
    samples = pictures_of(tmp_path / "shards")
    tars = str(tmp_path / "shards" / "{00000..00003}.tar")
    read = webdataset.WebDataset(tars, shardshuffle=False).to_tuple("__key__", "jpg", "txt")
    assert [(key, jpg, txt.decode()) for key, jpg, txt in read] == samples
    done = subprocess.run(
        [sys.executable, "-c", OPEN_CLIP, tars, str(len(samples))],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = [
        [list(Image.open(io.BytesIO(jpg)).convert("RGB").resize((1, 1)).getpixel((0, 0))), caption]  # type: ignore[arg-type]
        for _, jpg, caption in samples
    ]
    assert sorted(found) == sorted(expected)
