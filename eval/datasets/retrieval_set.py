"""A retrieval set by name and folder, in either layout that needs no conversion."""

from eval.datasets.cnclip_tsv import RetrievalSet, read_evaluation
from eval.datasets.shards import read_shards
from pipeline.core import store
from pipeline.core.evaluation_sets import SUFFIXES, shard_stems


def read_retrieval_set(folder: str, name: str) -> RetrievalSet:
    """`<name>_imgs.tsv` with `<name>_texts.jsonl` where one of them is there, else the folder's shards.

    Raises InputError as the layout's reader does, and where the folder holds neither.
    """
    has_files = any(store.exists(store.join(folder, name + suffix)) for suffix in SUFFIXES)
    if has_files or not shard_stems(folder):
        return read_evaluation(folder, name)
    return read_shards(folder, name)
