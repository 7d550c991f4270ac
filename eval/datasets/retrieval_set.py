"""A retrieval set by name and folder, in either layout that needs no conversion."""

from dataclasses import replace

from eval.datasets.cnclip_tsv import RetrievalSet, read_evaluation
from eval.datasets.shards import read_shards
from pipeline.core import store
from pipeline.core.evaluation_sets import SUFFIXES, is_scored_image_to_text, shard_stems


def read_retrieval_set(folder: str, name: str) -> RetrievalSet:
    """Read `<name>_imgs.tsv` with `<name>_texts.jsonl` if one of them is there, else the folder's shards.

    The set's name and folder say whether it is scored in both directions.

    Raises:
        InputError: as the layout's reader raises it, and if the folder holds neither.
    """
    has_files = any(store.exists(store.join(folder, name + suffix)) for suffix in SUFFIXES)
    by_files = has_files or not shard_stems(folder)
    found = read_evaluation(folder, name) if by_files else read_shards(folder, name)
    return replace(found, image_to_text=is_scored_image_to_text(name, folder))
