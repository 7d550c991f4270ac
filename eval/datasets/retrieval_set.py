"""Reads a retrieval set by name and folder, in either layout that needs no conversion."""

from dataclasses import replace

from eval.datasets.cnclip_tsv import RetrievalSet, read_evaluation
from eval.datasets.shards import read_shards
from pipeline.core import store
from pipeline.core.evaluation_sets import SUFFIXES, is_scored_image_to_text, shard_stems


def read_retrieval_set(folder: str, name: str) -> RetrievalSet:
    """Read `<name>_imgs.tsv` with `<name>_texts.jsonl` if either exists, otherwise the folder's shards.

    The set's name and folder decide whether it is scored in both directions.

    Raises:
        InputError: if the folder holds neither, or the reader of its layout raises one.
    """
    has_files = any(store.exists(store.join(folder, name + suffix)) for suffix in SUFFIXES)
    by_files = has_files or not shard_stems(folder)
    found = read_evaluation(folder, name) if by_files else read_shards(folder, name)
    return replace(found, image_to_text=is_scored_image_to_text(name, folder))
