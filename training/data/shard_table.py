"""What is known of a shard's samples without opening its tar, with their captions as token ids."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import store
from pipeline.core.arrays import BoolArray, Float64Array, Int32Array, Int64Array
from pipeline.core.files.written import check_zip, naming
from pipeline.core.processes import say
from pipeline.core.records import InputError, Shard, too_few
from pipeline.core.shard_format import all_captions, read_sidecar, sidecar_of
from training.config.train import CaptionCut
from training.data.short_captions import identity, shorten
from training.data.statements import Statements
from training.data.text_encoder import TextEncoder
from training.data.views import IMAGE_ID_DIGITS

_DIGESTS = {"key": 32, "image_sha256": 64}  # columns with their hexadecimal digits
_PURPOSE = 3  # a word of the generator's counter; 0 is the view's, 1 the patch mask's, 2 the statements'


@dataclass(frozen=True, slots=True)
class ShardTable:
    """What is known of a shard's samples without opening its tar, in tar order."""

    keys: npt.NDArray[np.bytes_]  # [num_samples] of 32 hexadecimal digits
    offset_bytes: Int64Array  # where each image's bytes start in the tar
    size_bytes: Int64Array
    image_id: Int64Array  # equal if the stored images are equal
    token_ids: Int32Array  # all captions' ids one after the other, without padding
    token_starts: Int64Array  # [num_captions + 1]
    caption_starts: Int64Array  # [num_columns, num_samples + 1]: of each sample's captions in a column
    column_weights: Float64Array  # [num_columns]: how often a sample's caption is drawn from each
    num_tokens: Int64Array  # [num_captions]
    caption_id: Int64Array  # [num_captions], equal for captions of equal tokens
    mentioned: BoolArray | None  # [num_captions, O]: objects that captions name, if statements ask for them

    def drawn_captions(self, row_N: Int64Array, seed: int, epoch_N: Int64Array) -> Int64Array:
        """Return which caption each sample has in an epoch: a function of (seed, epoch, key).

        A column is drawn by weight among those in which the sample has captions, then one of these.
        """
        start_KN = self.caption_starts[:, row_N]
        count_KN = self.caption_starts[:, row_N + 1] - start_KN
        column_N = (count_KN > 0).argmax(axis=0)  # the only one, for most
        caption_N: Int64Array = np.take_along_axis(start_KN, column_N[None], axis=0)[0]
        for at in np.flatnonzero(count_KN.sum(axis=0) > 1).tolist():
            counter = [0, _PURPOSE, int(epoch_N[at]), seed]
            key = int(self.keys[row_N[at]], 16)
            random = np.random.Generator(np.random.Philox(key=key, counter=counter))
            column = 0
            if len(self.column_weights) > 1:
                limit_K = np.cumsum(self.column_weights * (count_KN[:, at] > 0))
                column = int(np.searchsorted(limit_K, random.random() * limit_K[-1], side="right"))
            caption_N[at] = start_KN[column, at] + random.integers(int(count_KN[column, at]))
        return caption_N

    def copy_tokens(self, caption_N: Int64Array, tokens_BL: Int64Array, at_N: Int64Array) -> None:
        """Copy the token ids of captions into rows of a batch, which are 0 and long enough."""
        length_N = self.num_tokens[caption_N]
        place_NL = np.arange(length_N.max())
        is_token_NL = place_NL < length_N[:, None]
        source_NL = self.token_starts[caption_N][:, None] + place_NL
        rows, columns = is_token_NL.nonzero()
        tokens_BL[at_N[rows], columns] = self.token_ids[source_NL[is_token_NL]]


def check_shards(shards: Sequence[Shard]) -> None:
    """Check that every tar and sidecar is there, and that each tar has the length that was written.

    It opens nothing: `cnclip verify` reads the bytes, and every read checks what it reads.

    Raises:
        InputError: if a file is missing or a tar has another length.
    """
    if not shards:
        raise too_few(InputError("no shards to train on: the shards stage kept no sample"), 0)
    listed = functools.cache(store.sizes)  # one listing instead of two requests for each shard
    for shard in shards:
        for path in (sidecar_of(shard.path), shard.path):
            folder, name = os.path.split(path)
            found = listed(folder).get(name)
            if found is None:
                raise InputError(f"{path}: no such file; run the shards stage again")
            num_bytes = found
        if num_bytes != shard.num_bytes:
            raise InputError(
                f"{shard.path}: {num_bytes} bytes, but its manifest says {shard.num_bytes}:"
                " the tar is cut short or was changed; run the shards stage again"
            )


def read_shard_table(
    shard: Shard,
    tokenizer: TextEncoder,
    *,
    caption_weights: Mapping[str, float],
    context_length: int,
    token_folder: str,
    cut: CaptionCut = "end",
    statements: Statements | None = None,
) -> ShardTable:
    """Read a shard's sidecar; the token ids come from `token_folder` or are made and kept there.

    Raises:
        InputError: if the sidecar is missing, truncated, lacks a column or does not fit its tar.
    """
    path = sidecar_of(shard.path)
    columns = list(dict.fromkeys(("key", "offset_bytes", "size_bytes", "image_sha256", *caption_weights)))
    table = read_sidecar(path, columns, optional=[all_captions(column) for column in caption_weights])
    if table.num_rows != shard.num_samples:
        raise InputError(f"{path}: {table.num_rows} rows, but its manifest says {shard.num_samples} samples")
    for column in columns:
        if len(caption_weights) > 1 and column in caption_weights:
            continue  # one of them is enough
        if num_empty := table[column].null_count:
            raise InputError(f"{path}: column {column} has {num_empty} empty rows")
    hexadecimal = {name: _hexadecimal(path, table, name, size) for name, size in _DIGESTS.items()}
    offset_bytes, size_bytes = (
        np.asarray(table[name].to_numpy(), dtype=np.int64) for name in ("offset_bytes", "size_bytes")
    )
    is_outside = (offset_bytes < 0) | (size_bytes <= 0) | (offset_bytes + size_bytes > shard.num_bytes)
    if is_outside.any():
        row = int(np.argmax(is_outside))
        raise InputError(f"{path}: row {row}: the image lies outside the tar of {shard.num_bytes} bytes")
    captions, caption_starts = _captions_of_columns(path, table, list(caption_weights))
    token_ids, token_starts = _cached_tokens(path, captions, tokenizer, context_length, token_folder, cut)
    return ShardTable(
        keys=hexadecimal["key"],
        offset_bytes=offset_bytes,
        size_bytes=size_bytes,
        image_id=_image_ids(hexadecimal["image_sha256"]),
        token_ids=token_ids,
        token_starts=token_starts,
        caption_starts=caption_starts,
        column_weights=np.array(list(caption_weights.values()), dtype=np.float64),
        num_tokens=np.diff(token_starts),
        caption_id=_caption_ids(token_ids, token_starts),
        mentioned=None if statements is None else statements.mentions(captions),
    )


def _hexadecimal(path: str, table: pa.Table, column: str, size: int) -> npt.NDArray[np.bytes_]:
    """Return a column of texts of `size` hexadecimal digits each."""
    if not pc.all(pc.match_substring_regex(table[column], f"^[0-9a-f]{{{size}}}$"), min_count=0).as_py():
        raise InputError(f"{path}: column {column}: expected {size} hexadecimal digits in every row")
    return np.frombuffer(_bytes_of(table[column])[1], dtype=f"S{size}")


def _image_ids(sha256_N: npt.NDArray[np.bytes_]) -> Int64Array:
    """Return `training.data.views.image_id_of` each digest."""
    digit_N15 = sha256_N.view(np.uint8).reshape(-1, 64)[:, :IMAGE_ID_DIGITS].astype(np.int64)
    value_N15 = digit_N15 - np.where(digit_N15 > ord("9"), ord("a") - 10, ord("0"))
    return value_N15 @ (16 ** np.arange(IMAGE_ID_DIGITS - 1, -1, -1))


def _caption_ids(token_ids: Int32Array, token_starts: Int64Array) -> Int64Array:
    """Return a number for each caption by its tokens: a sum with random factors, one for each place.

    Two captions that differ have equal numbers with a probability of at most 2⁻⁴⁶, since token ids are below
    2¹⁷ (multilinear hashing: Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
    """
    length_C = np.diff(token_starts)
    place_T = np.arange(len(token_ids)) - np.repeat(token_starts[:-1], length_C)
    factor_L: npt.NDArray[np.uint64] = np.random.Philox(key=0).random_raw(int(length_C.max()))
    sum_C = np.add.reduceat(token_ids.astype(np.uint64) * factor_L[place_T], token_starts[:-1])
    return (sum_C >> np.uint64(1)).astype(np.int64)


def _captions_of_columns(path: str, table: pa.Table, columns: Sequence[str]) -> tuple[pa.Array, Int64Array]:
    """Return all captions, column by column, and where those of each sample start in each."""
    found = [_captions(path, table, column, may_lack=len(columns) > 1) for column in columns]
    num_before = np.cumsum([0, *(len(captions) for captions, _ in found[:-1])])
    starts_KS = np.stack([starts for _, starts in found]) + num_before[:, None]
    num_S = np.diff(starts_KS).sum(axis=0)
    if not num_S.all():
        raise InputError(
            f"{path}: row {int(np.argmin(num_S))} has no caption in any of the columns {', '.join(columns)}"
        )
    return pa.concat_arrays([captions for captions, _ in found]), starts_KS


def _captions(path: str, table: pa.Table, column: str, *, may_lack: bool) -> tuple[pa.Array, Int64Array]:
    """Return all captions of a column one after the other, and where those of each sample start.

    With `may_lack`, a sample with an empty caption has none.
    """
    several, single = all_captions(column), _joined(table[column]).cast(pa.large_string())
    has_single_N = np.ones(len(single), dtype=np.bool_)
    if may_lack:
        length_N = pc.fill_null(pc.binary_length(single), 0)
        has_single_N = np.asarray(length_N.to_numpy(zero_copy_only=False)) > 0
    found = _joined(table[several]) if several in table.column_names else None
    if found is None or not (pa.types.is_list(found.type) or pa.types.is_large_list(found.type)):
        starts: Int64Array = np.concatenate([[0], np.cumsum(has_single_N, dtype=np.int64)])
        return single.filter(pa.array(has_single_N)), starts
    lists = pc.list_flatten(found).cast(pa.large_string())
    if lists.null_count:
        raise InputError(f"{path}: column {several} has empty captions")
    # Rows of sources that keep one caption have no list.
    num_listed = np.asarray(pc.fill_null(pc.list_value_length(found), 0).to_numpy(zero_copy_only=False))
    num_captions = np.maximum(num_listed, has_single_N)
    starts = np.concatenate([[0], np.cumsum(num_captions, dtype=np.int64)])
    row_C = np.repeat(np.arange(table.num_rows), num_captions)
    is_single_C = num_listed[row_C] == 0
    source_C = np.where(is_single_C, len(lists) + row_C, np.cumsum(~is_single_C) - 1)
    return pa.concat_arrays([lists, single]).take(pa.array(source_C)), starts


def _joined(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _bytes_of(texts: pa.Array | pa.ChunkedArray) -> tuple[Int64Array, bytes]:
    """Return the lengths of texts, and their bytes one after the other."""
    texts = _joined(texts) if isinstance(texts, pa.ChunkedArray) else texts
    texts = texts.cast(pa.large_string())
    _, starts, data = texts.buffers()
    offset_N1 = np.frombuffer(starts, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return np.diff(offset_N1), memoryview(data)[offset_N1[0] : offset_N1[-1]].tobytes()


def _cached_tokens(
    sidecar: str,
    captions: pa.Array,
    tokenizer: TextEncoder,
    context_length: int,
    token_folder: str,
    cut: CaptionCut,
) -> tuple[Int32Array, Int64Array]:
    # The name holds all that the ids depend on, so that a file that is there is right and never stale.
    digest = blake2b(f"{tokenizer.digest} {context_length} {identity(cut)}".encode(), digest_size=16)
    lengths, data = _bytes_of(captions)
    digest.update(lengths.tobytes())
    digest.update(data)
    path = store.join(token_folder, f"{digest.hexdigest()}.npz")
    if store.exists(path):
        try:
            with store.open_read(path) as file, np.load(file, allow_pickle=False) as arrays:
                return arrays["token_ids"], arrays["token_starts"]
        except Exception as error:  # damaged bytes surface as whatever zipfile and numpy trip over
            say(f"{path}: cannot be read ({error}): cnclip makes the token ids again")
    texts = captions.to_pylist()
    tokens_NL = tokenizer.encode(texts, context_length)
    row_C = np.flatnonzero(tokens_NL[:, -1])
    if len(row_C):  # full; longer ones have a token more
        row_C = row_C[tokenizer.encode([texts[row] for row in row_C], context_length + 1)[:, -1] != 0]
    if len(row_C):
        say(f"{sidecar}: {len(row_C)} of {len(captions)} captions cut to {context_length} tokens")
        if cut != "end":
            short = shorten([texts[row] for row in row_C], cut, tokenizer, context_length)
            tokens_NL[row_C] = tokenizer.encode(short, context_length)
    is_token = tokens_NL != 0
    token_ids = tokens_NL[is_token]
    token_starts = np.concatenate([[0], np.cumsum(is_token.sum(axis=1), dtype=np.int64)])
    with store.publish(path) as temporary, naming(path):
        with open(temporary, "wb") as file:
            np.savez(file, token_ids=token_ids, token_starts=token_starts)
        check_zip(temporary, path)
    return token_ids, token_starts
