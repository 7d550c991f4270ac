"""What is known of a shard's samples without opening its tar, with their captions as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import store
from pipeline.core.arrays import BoolArray, Int32Array, Int64Array
from pipeline.core.files.written import check_zip, naming
from pipeline.core.processes import say
from pipeline.core.records import InputError, Shard, too_few
from pipeline.core.shard_format import all_captions, read_sidecar, sidecar_of
from training.data.statements import Statements
from training.data.text_encoder import TextEncoder

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
    caption_starts: Int64Array  # [num_samples + 1]: of each sample's captions
    mentioned: BoolArray | None  # [num_captions, O]: objects that captions name, if statements ask for them

    def drawn_caption(self, row: int, seed: int, epoch: int) -> int:
        """Return which caption a sample has in an epoch: a function of (seed, epoch, key)."""
        first, end = (int(start) for start in self.caption_starts[row : row + 2])
        if end - first == 1:
            return first
        counter = [0, _PURPOSE, epoch, seed]
        random = np.random.Generator(np.random.Philox(key=int(self.keys[row], 16), counter=counter))
        return first + int(random.integers(end - first))


def check_shards(shards: Sequence[Shard]) -> None:
    """Check that every tar and sidecar is there, and that each tar has the length that was written.

    It opens nothing: `cnclip verify` reads the bytes, and every read checks what it reads.

    Raises:
        InputError: if a file is missing or a tar has another length.
    """
    if not shards:
        raise too_few(InputError("no shards to train on: the shards stage kept no sample"), 0)
    for shard in shards:
        for path in (sidecar_of(shard.path), shard.path):
            try:
                num_bytes = store.num_bytes(path)
            except FileNotFoundError:
                raise InputError(f"{path}: no such file; run the shards stage again") from None
        if num_bytes != shard.num_bytes:
            raise InputError(
                f"{shard.path}: {num_bytes} bytes, but its manifest says {shard.num_bytes}:"
                " the tar is cut short or was changed; run the shards stage again"
            )


def read_shard_table(
    shard: Shard,
    tokenizer: TextEncoder,
    *,
    caption_column: str,
    context_length: int,
    token_folder: str,
    statements: Statements | None = None,
) -> ShardTable:
    """Read a shard's sidecar; the token ids come from `token_folder` or are made and kept there.

    Raises:
        InputError: if the sidecar is missing, truncated, lacks a column or does not fit its tar.
    """
    path = sidecar_of(shard.path)
    columns = list(dict.fromkeys(("key", "offset_bytes", "size_bytes", "image_sha256", caption_column)))
    table = read_sidecar(path, columns, optional=(all_captions(caption_column),))
    if table.num_rows != shard.num_samples:
        raise InputError(f"{path}: {table.num_rows} rows, but its manifest says {shard.num_samples} samples")
    for column in columns:
        if num_empty := table[column].null_count:
            raise InputError(f"{path}: column {column} has {num_empty} empty rows")
    if not pc.all(pc.match_substring_regex(table["key"], "^[0-9a-f]{32}$"), min_count=0).as_py():
        raise InputError(f"{path}: column key: expected 32 hexadecimal digits in every row")
    offset_bytes, size_bytes = (
        np.asarray(table[name].to_numpy(), dtype=np.int64) for name in ("offset_bytes", "size_bytes")
    )
    is_outside = (offset_bytes < 0) | (size_bytes <= 0) | (offset_bytes + size_bytes > shard.num_bytes)
    if is_outside.any():
        row = int(np.argmax(is_outside))
        raise InputError(f"{path}: row {row}: the image lies outside the tar of {shard.num_bytes} bytes")
    captions, caption_starts = _captions(path, table, caption_column)
    token_ids, token_starts = _cached_tokens(path, captions, tokenizer, context_length, token_folder)
    return ShardTable(
        keys=np.array(table["key"].to_pylist(), dtype="S32"),
        offset_bytes=offset_bytes,
        size_bytes=size_bytes,
        image_id=np.array([image_id_of(sha) for sha in table["image_sha256"].to_pylist()], dtype=np.int64),
        token_ids=token_ids,
        token_starts=token_starts,
        caption_starts=caption_starts,
        mentioned=None if statements is None else statements.mentions(captions),
    )


def _captions(path: str, table: pa.Table, column: str) -> tuple[list[str], Int64Array]:
    """Return all captions one after the other, and where those of each sample start."""
    several = all_captions(column)
    found = table[several].combine_chunks() if several in table.column_names else None
    if found is None or not (pa.types.is_list(found.type) or pa.types.is_large_list(found.type)):
        return table[column].to_pylist(), np.arange(table.num_rows + 1, dtype=np.int64)
    # Rows of sources that keep one caption have no list.
    lists = [own or [one] for own, one in zip(found.to_pylist(), table[column].to_pylist(), strict=True)]
    captions = [caption for own in lists for caption in own]
    if None in captions:
        raise InputError(f"{path}: column {several} has empty captions")
    return captions, np.concatenate([[0], np.cumsum([len(own) for own in lists], dtype=np.int64)])


def _cached_tokens(
    sidecar: str, captions: list[str], tokenizer: TextEncoder, context_length: int, token_folder: str
) -> tuple[Int32Array, Int64Array]:
    # The name holds all that the ids depend on, so that a file that is there is right and never stale.
    digest = blake2b(f"{tokenizer.digest} {context_length} ".encode(), digest_size=16)
    for caption in captions:
        digest.update(blake2b(caption.encode(), digest_size=16).digest())
    path = store.join(token_folder, f"{digest.hexdigest()}.npz")
    if store.exists(path):
        try:
            with store.open_read(path) as file, np.load(file, allow_pickle=False) as arrays:
                return arrays["token_ids"], arrays["token_starts"]
        except Exception as error:  # damaged bytes surface as whatever zipfile and numpy trip over
            say(f"{path}: cannot be read ({error}): cnclip makes the token ids again")
    tokens_NL = tokenizer.encode(captions, context_length)
    full = [caption for caption, last in zip(captions, tokens_NL[:, -1], strict=True) if last]
    if full and (num_cut := tokenizer.num_truncated(full, context_length)):
        say(f"{sidecar}: {num_cut} of {len(captions)} captions cut to {context_length} tokens")
    is_token = tokens_NL != 0
    token_ids = tokens_NL[is_token]
    token_starts = np.concatenate([[0], np.cumsum(is_token.sum(axis=1), dtype=np.int64)])
    with store.publish(path) as temporary, naming(path):
        with open(temporary, "wb") as file:
            np.savez(file, token_ids=token_ids, token_starts=token_starts)
        check_zip(temporary, path)
    return token_ids, token_starts


def image_id_of(image_sha256: str) -> int:
    """Return the number that stands for an image with this digest."""
    return int(image_sha256[:15], 16)  # 60 bits: what an int64 holds of the digest
