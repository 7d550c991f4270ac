"""Finds the vocabulary of weights: given, next to them, in caches, in an installed cn_clip."""

import contextlib
import importlib.util
import os

from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import InputError
from training.model.tokenizer import Tokenizer
from training.weights.hub.locate import local_path

# The 21,128 tokens of Chinese BERT, which every Chinese CLIP uses (A.1), under the names the hub knows.
PUBLIC_SOURCES = ("bert-base-chinese", "google-bert/bert-base-chinese", "hfl/chinese-roberta-wwm-ext")
_FILE = "vocab.txt"


def find_vocabulary(weights: str, vocab_size: int, *, given: str | None = None) -> Tokenizer:
    """Find the vocabulary for weights whose embedding has `vocab_size` rows.

    `given` (what `Tokenizer.load` takes) goes first; then the folder of the weights, or the run that trained
    them; then Hugging Face's cache, an installed cn_clip, and Hugging Face's hub.

    Raises:
        InputError: if none of these has one, or it is of another size; it names all of these.
    """
    tokenizer = Tokenizer.load(given) if given is not None else _look(local_path(weights))
    if tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"{tokenizer.origin}: a vocabulary of {tokenizer.vocab_size} tokens, but the embedding in"
            f" {weights} has {vocab_size}: give the vocabulary that these weights were trained with (--vocab)"
        )
    return tokenizer


def _look(weights: str) -> Tokenizer:
    path = _beside(weights) or _in_cache() or _in_cn_clip()
    if path is not None:
        return Tokenizer.load(path)
    for source in (PUBLIC_SOURCES[0], PUBLIC_SOURCES[2]):
        with contextlib.suppress(InputError):  # the hub is out of reach
            return Tokenizer.load(source)
    raise InputError(
        f"{weights}: no vocabulary found: not next to the weights ({_FILE}), none given (--vocab), not in"
        " Hugging Face's cache or hub (bert-base-chinese, hfl/chinese-roberta-wwm-ext), not in an installed"
        f" cn_clip; put {_FILE} next to the weights, or give it"
    )


def _beside(weights: str) -> str | None:
    """Return `vocab.txt` or `NAME.vocab.txt` next to NAME.pt, or what the run's own job file names."""
    if _FILE in store.list_files(weights):
        return store.join(weights, _FILE)
    folder, _, name = weights.rstrip("/").rpartition("/")
    folder = folder or ("/" if weights.startswith("/") else ".")
    for candidate in (f"{name.rsplit('.', 1)[0]}.{_FILE}", _FILE):
        if store.exists(store.join(folder, candidate)):
            return store.join(folder, candidate)
    job = store.join(folder, "job.json")
    if not store.exists(job):
        return None
    try:
        vocabulary = str(parse_json(store.read_text(job))["vocabulary"])
    except (ValueError, KeyError, TypeError):
        return None
    moved = store.join(folder, "..", "vocabulary", os.path.basename(vocabulary))  # the run may have moved
    return moved if store.exists(moved) else vocabulary


def _in_cache() -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(source, _FILE) for source in PUBLIC_SOURCES)
    return next((path for path in found if isinstance(path, str)), None)


def _in_cn_clip() -> str | None:
    spec = importlib.util.find_spec("cn_clip")  # found, not imported: its import may pull in flash-attn
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = os.path.join(folder, "clip", _FILE)
        if os.path.isfile(path):
            return path
    return None
