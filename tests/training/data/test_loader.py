import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.records import ConfigError, InputError, Shard
from pipeline.core.shard_format import sidecar_of
from tests.helpers.batches import WholeBatches
from tests.helpers.shard_files import VOCABULARY, write_shards
from training.config.train import AugmentConfig
from training.data.loader import BatchReader, CaptionConfig
from training.data.sampler import SampleOrder
from training.data.shard_table import check_shards, read_shard_table
from training.data.views import ViewConfig, image_id_of
from training.model.tokenizer import Tokenizer


def make_order(
    sizes: Sequence[int], *, lanes: int, batch: int, window: int = 2, seed: int = 5
) -> SampleOrder:
    return SampleOrder(sizes, seed=seed, global_batch=batch, lanes=lanes, window_shards=window)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    lanes=st.integers(1, 4),
    per_lane=st.integers(1, 5),
    window=st.integers(1, 3),
)
def test_every_epoch_of_a_lane_has_each_of_its_samples_once(
    sizes: list[int], lanes: int, per_lane: int, window: int
) -> None:
    num_samples = sum(sizes)
    if lanes * per_lane > num_samples:
        with pytest.raises(ConfigError, match="the corpus has"):
            make_order(sizes, lanes=lanes, batch=lanes * per_lane, window=window)
        return
    order = make_order(sizes, lanes=lanes, batch=lanes * per_lane, window=window)
    for lane in range(lanes):
        start, end = lane * num_samples // lanes, (lane + 1) * num_samples // lanes
        steps = -(-2 * (end - start) // per_lane)  # two epochs
        parts = [order.batch(step, range(lane, lane + 1)) for step in range(steps)]
        index = np.concatenate([part[0] for part in parts])
        epoch = np.concatenate([part[1] for part in parts])
        assert all(len(part[0]) == per_lane for part in parts)
        assert np.all(np.diff(epoch) >= 0)
        for number in (0, 1):
            assert sorted(index[epoch == number]) == list(range(start, end))


def test_a_window_holds_whole_pieces_of_few_shards() -> None:
    order = make_order([10] * 8, lanes=1, batch=20, window=2)
    index, _ = order.batch(0, range(1))
    shards = np.unique(index // 10)
    assert len(shards) == 2
    assert sorted(index) == sorted(np.concatenate([np.arange(10) + 10 * shard for shard in shards]))
    assert index.tolist() != sorted(index)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    def read(steps: Sequence[int], seed: int) -> dict[int, list[int]]:
        order = make_order([7, 9, 5, 11], lanes=4, batch=8, seed=seed)
        return {step: order.batch(step, range(4))[0].tolist() for step in steps}

    forwards, backwards = read(range(12), 1), read(range(11, -1, -1), 1)
    assert forwards == backwards
    assert forwards != read(range(12), 2)
    assert forwards[0] != forwards[4]  # an epoch later


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_own_whole_lanes_and_together_the_same_batch(ranks: int) -> None:
    order = make_order([7, 9, 5, 11], lanes=4, batch=12)
    whole = order.batch(3, range(4))[0].tolist()
    lanes = [order.rank_lanes(rank, ranks) for rank in range(ranks)]
    parts = [order.batch(3, owned)[0].tolist() for owned in lanes]
    assert [*itertools.chain(*parts)] == whole
    assert [len(part) for part in parts] == [order.rank_num_samples(rank, ranks) for rank in range(ranks)]
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


def test_a_batch_that_the_lanes_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch = 10 is not a multiple of lanes = 4"):
        make_order([100], lanes=4, batch=10)


class CountingTokenizer(Tokenizer):
    calls = 0

    def encode(self, texts: Sequence[str], context_length: int) -> Any:
        self.calls += 1
        return super().encode(texts, context_length)


NO_CHANGE = AugmentConfig(
    crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), horizontal_flip=0, auto_augment="none"
)


def make_reader(
    shards: Sequence[Shard],
    folder: Path,
    *,
    lanes: range = range(2),
    num_lanes: int = 2,
    augment: AugmentConfig = NO_CHANGE,
) -> WholeBatches:
    order = make_order([shard.num_samples for shard in shards], lanes=num_lanes, batch=4 * num_lanes)
    captions = CaptionConfig(
        weights={"caption": 1.0}, context_length=16, token_folder=str(folder / "tokens"), seed=0
    )
    reader = BatchReader(shards, order, Tokenizer(VOCABULARY), captions, lanes=lanes)
    paths = [shard.path for shard in shards]
    views = ViewConfig(paths=paths, image_size_px=32, augment=augment, seed=0, open_shards=reader.open_shards)
    return WholeBatches(reader, views)


def test_a_batch_holds_the_images_and_captions_of_its_keys(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [6, 6, 5])
    rows = {}
    for shard in shards:
        data = Path(shard.path).read_bytes()
        for row in pq.read_table(sidecar_of(shard.path)).to_pylist():
            jpg = data[row["offset_bytes"] :][: row["size_bytes"]]
            image = cv2.imdecode(np.frombuffer(jpg, np.uint8), cv2.IMREAD_COLOR)
            assert image is not None
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            # 40 to 32 pixels is slight shrinking: bilinear
            rows[row["key"]] = (cv2.resize(image, (32, 32), interpolation=cv2.INTER_LINEAR), row["caption"])
    reader = make_reader(shards, tmp_path)
    seen: set[str] = set()
    for step in range(2):
        batch = reader.read(step)
        assert batch.step == step
        for i, key in enumerate(key.decode() for key in batch.keys.tolist()):
            image, caption = rows[key]
            np.testing.assert_array_equal(batch.image[i].permute(1, 2, 0).numpy(), image)
            tokens = batch.tokens_BL[i]
            assert [VOCABULARY[t] for t in tokens[tokens > 0].tolist()] == ["[CLS]", *caption, "[SEP]"]
            seen.add(key)
        assert batch.tokens_BL[:, -1].any()  # as long as the longest, no longer
        same_caption = batch.caption_id_B[:, None] == batch.caption_id_B
        assert same_caption.equal((batch.tokens_BL[:, None] == batch.tokens_BL).all(2))
        assert len(set(batch.image_id_B.tolist())) == len(batch.image_id_B)
    assert len(seen) == 16


def test_a_sample_looks_the_same_on_any_rank(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [20, 20])
    change: dict[str, Any] = {"augment": AugmentConfig(crop_area=(0.3, 1.0)), "num_lanes": 2}
    whole = make_reader(shards, tmp_path, **change).read(3)
    halves = [make_reader(shards, tmp_path, lanes=range(i, i + 1), **change).read(3) for i in range(2)]
    together = np.concatenate([half.image.numpy() for half in halves])
    np.testing.assert_array_equal(whole.image.numpy(), together)
    other_epoch = make_reader(shards, tmp_path, **change).read(8)
    key = whole.keys[0]
    later = [
        view
        for step in range(5, 10)
        for batch in [make_reader(shards, tmp_path, **change).read(step)]
        for view, other in zip(batch.image, batch.keys, strict=True)
        if other == key
    ]
    assert other_epoch.step == 8
    assert later
    assert not later[0].equal(whole.image[0])


def test_shards_at_a_url_read_the_same(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [12])
    memory = fsspec.filesystem("memory")
    for path in (shards[0].path, sidecar_of(shards[0].path)):
        memory.pipe(f"/shards/{Path(path).name}", Path(path).read_bytes())
    remote = [dataclasses.replace(shards[0], path="memory://shards/00000.tar")]
    check_shards(remote)
    ours = make_reader(shards, tmp_path).read(0)
    theirs = make_reader(remote, tmp_path).read(0)
    assert ours.image.equal(theirs.image)


def read_table(shard: Shard, folder: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "caption_weights": {"caption": 1.0},
        "context_length": 16,
        "token_folder": str(folder),
    }
    return read_shard_table(shard, tokenizer or Tokenizer(VOCABULARY), **options | changes)


def test_token_ids_are_made_once_for_a_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = write_shards(tmp_path / "shards", [6])
    tokenizer, tokens = CountingTokenizer(VOCABULARY), tmp_path / "tokens"
    first = read_table(shard, tokens, tokenizer)
    again = read_table(shard, tokens, tokenizer)
    assert tokenizer.calls == 1
    np.testing.assert_array_equal(first.token_ids, again.token_ids)
    read_table(shard, tokens, tokenizer, caption_weights={"caption_en": 1.0})
    read_table(shard, tokens, CountingTokenizer([*VOCABULARY, "新"]))
    assert len(list(tokens.iterdir())) == 3
    for file in tokens.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    damaged = read_table(shard, tokens, tokenizer)
    assert tokenizer.calls == 3
    np.testing.assert_array_equal(first.token_ids, damaged.token_ids)
    assert "cnclip makes the token ids again" in capsys.readouterr().out
    file = max(tokens.iterdir(), key=lambda path: path.stat().st_size)  # the one that was made again
    data = bytearray(file.read_bytes())
    data[data.index(b"PK\x01\x02") + 10] = 99  # a way of compressing that zipfile does not know
    file.write_bytes(data)
    read_table(shard, tokens, tokenizer)
    assert (
        "That compression method is not supported): cnclip makes the token ids again"
        in capsys.readouterr().out
    )


def test_captions_that_are_cut_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = write_shards(tmp_path / "shards", [30])
    table = read_table(shard, tmp_path, context_length=10)
    lengths = np.diff(table.token_starts)
    captions = pq.read_table(sidecar_of(shard.path))["caption"].to_pylist()
    num_cut = sum(len(caption) > 8 for caption in captions)
    assert lengths.max() == 10
    assert f"{num_cut} of 30 captions cut to 10 tokens" in capsys.readouterr().out


def test_damaged_or_foreign_shards_are_refused_by_name(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [6])
    sidecar = Path(sidecar_of(shard.path))
    whole = sidecar.read_bytes()
    with pytest.raises(InputError, match=r"00000.parquet: 6 rows, but its manifest says 7 samples"):
        read_table(dataclasses.replace(shard, num_samples=7), tmp_path)
    with pytest.raises(InputError, match=r"00000.parquet: has no column title: name one .*: key, caption,"):
        read_table(shard, tmp_path, caption_weights={"title": 1.0})
    with pytest.raises(InputError, match=r"row .: the image lies outside the tar of 3000 bytes"):
        read_table(dataclasses.replace(shard, num_bytes=3000), tmp_path)
    sidecar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"00000.parquet: not a readable sidecar \(.*: build the shard"):
        read_table(shard, tmp_path)
    sidecar.unlink()
    with pytest.raises(InputError, match=r"00000.parquet: no such file, and every tar needs its sidecar"):
        read_table(shard, tmp_path)


def test_shards_that_are_not_whole_are_refused_at_the_start(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [6])
    check_shards([shard])
    tar = Path(shard.path)
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(InputError, match=rf"00000.tar: {shard.num_bytes - 512} bytes, but its manifest says"):
        check_shards([shard])
    tar.unlink()
    with pytest.raises(InputError, match=r"00000.tar: no such file"):
        check_shards([shard])
    Path(sidecar_of(shard.path)).unlink()
    with pytest.raises(InputError, match=r"00000.parquet: no such file"):
        check_shards([shard])
    with pytest.raises(InputError, match="no shards to train on"):
        check_shards([])


def test_a_damaged_image_that_still_decodes_is_refused(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [8])
    tar = Path(shard.path)
    sidecar = pq.read_table(sidecar_of(shard.path))
    end = sidecar["offset_bytes"][0].as_py() + sidecar["size_bytes"][0].as_py()
    data = bytearray(tar.read_bytes())
    data[end - 20] ^= 0x55  # inside the entropy-coded part: libjpeg warns and goes on
    tar.write_bytes(data)
    first = np.frombuffer(data, np.uint8)[sidecar["offset_bytes"][0].as_py() : end]
    assert cv2.imdecode(first, cv2.IMREAD_COLOR) is not None
    with pytest.raises(InputError, match=rf"{sidecar['key'][0].as_py()}.jpg is not the image"):
        make_reader([shard], tmp_path).read(0)


def test_keys_and_digests_come_whole_out_of_the_column(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [4])
    table, sidecar = read_table(shard, tmp_path), pq.read_table(sidecar_of(shard.path))
    keys: npt.NDArray[np.bytes_] = table.keys
    assert [key.decode() for key in keys.tolist()] == sidecar["key"].to_pylist()
    assert table.image_id.tolist() == [image_id_of(sha) for sha in sidecar["image_sha256"].to_pylist()]


def test_of_several_captions_each_epoch_draws_one_whatever_the_ranks(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [20, 20])
    of_key = {}
    for number, shard in enumerate(shards):
        table = pq.read_table(sidecar_of(shard.path))
        lists = [["一个红色的圆"] * (row % 3) + ["图片" * (row % 4 + 1)] for row in range(table.num_rows)]
        lists[5], lists[7] = [], []  # rows of a source that keeps one caption
        if number == 0:  # the other one has a caption each, as another source of the same run
            table = table.append_column("captions", pa.array([found or None for found in lists]))
            pq.write_table(table, sidecar_of(shard.path))
        else:
            lists = [[] for _ in lists]
        texts = [found or [text] for found, text in zip(lists, table["caption"].to_pylist(), strict=True)]
        of_key |= dict(zip((key.encode() for key in table["key"].to_pylist()), texts, strict=True))
    encode = Tokenizer(VOCABULARY).encode
    whole = make_reader(shards, tmp_path, num_lanes=2)
    seen: dict[bytes, set[bytes]] = {}
    for step in range(40):
        batch = whole.read(step)
        halves = [
            make_reader(shards, tmp_path, lanes=range(i, i + 1), num_lanes=2).read(step) for i in range(2)
        ]
        ids = [tokens[tokens != 0].tobytes() for half in halves for tokens in half.tokens_BL.numpy()]
        assert ids == [tokens[tokens != 0].tobytes() for tokens in batch.tokens_BL.numpy()]
        for key, drawn in zip(batch.keys, ids, strict=True):
            seen.setdefault(key, set()).add(drawn)
    for key, drawn in seen.items():
        tokens = encode(of_key[key], 52).astype(np.int64)
        assert drawn <= {row[row != 0].tobytes() for row in tokens}
    both = [key for key in seen if len(set(of_key[key])) > 1]
    assert sum(len(seen[key]) for key in both) > 1.5 * len(both) > 0


def test_columns_of_captions_are_drawn_by_weight(tmp_path: Path) -> None:
    """A sample without a caption in one has the others; where there is one column, nothing changes."""
    (shard,) = write_shards(tmp_path, [40])
    path = sidecar_of(shard.path)
    table = pq.read_table(path)
    english = pa.array([("红" if row % 4 else [None, ""][row // 4 % 2]) for row in range(40)], pa.string())
    keywords = pa.array([["蓝", "绿"] if row % 2 else None for row in range(40)], pa.list_(pa.string()))
    table = table.append_column("title", english).append_column("tag", english)
    pq.write_table(table.append_column("tags", keywords), path)
    weights = {"caption": 3.0, "title": 1.0, "tag": 2.0}
    read = read_table(shard, tmp_path, caption_weights=weights)
    ids = Tokenizer(VOCABULARY).encode(["红", "蓝", "绿"], 3)[:, 1]
    drawn = np.stack([read.drawn_captions(np.arange(40), 5, np.full(40, epoch)) for epoch in range(200)])
    is_short = read.num_tokens[drawn] == 3
    first_id = read.token_ids[read.token_starts[drawn] + 1]
    title, blue, green = ((first_id == one) & is_short for one in ids)
    row = np.arange(40)
    both, listed = row % 4 > 0, row % 2 == 1
    share = {"title": title.mean(0), "blue": blue.mean(0), "green": green.mean(0)}
    np.testing.assert_allclose(share["title"][both & listed].mean(), 1 / 6, atol=0.02)
    np.testing.assert_allclose(share["blue"][both & listed].mean(), 2 / 6 / 2, atol=0.02)
    np.testing.assert_allclose(share["green"][both & listed].mean(), 2 / 6 / 2, atol=0.02)
    np.testing.assert_allclose(share["title"][both & ~listed].mean(), 3 / 6, atol=0.03)  # title and tag alike
    assert not (title | blue | green)[:, ~both].any()
    alone = read_table(shard, tmp_path)
    np.testing.assert_array_equal(alone.drawn_captions(row, 5, row), row)
    lacking = table.set_column(table.column_names.index("caption"), "caption", english)
    pq.write_table(lacking, path)
    with pytest.raises(
        InputError, match=r"00000.parquet: row 0 has no caption in any of the columns caption"
    ):
        read_table(shard, tmp_path, caption_weights={"caption": 1.0, "title": 1.0})
