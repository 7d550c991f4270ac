"""Captions to token ids as Chinese CLIP makes them, and vocabularies learned from captions."""

import hashlib
import heapq
import itertools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Self

import numpy as np
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit

from pipeline.core import store
from pipeline.core.records import InputError

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNK, CLS, SEP, MASK)

_CONTINUATION = "##"
_MAX_WORD_CHARACTERS = 200  # a longer word becomes one [UNK]; the reference's limit
_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+|bert-base-chinese")  # the hub knows this one without its owner

# What the reference splits off character by character, compatibility and extension blocks included.
_CHINESE_BLOCKS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


class _CharacterMap(dict[int, str]):
    """A table for `str.translate` that is filled character by character as captions bring them."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code_point: int) -> str:
        self[code_point] = replacement = self._rule(chr(code_point))
        return replacement


def _clean(character: str) -> str:
    """Drop control characters, make all spaces plain, and put spaces around every Chinese character."""
    if character in "\t\n\r":
        return " "
    category = unicodedata.category(character)
    if category in ("Cc", "Cf") or character == "\ufffd":
        return ""
    if category == "Zs":
        return " "
    if any(first <= ord(character) <= last for first, last in _CHINESE_BLOCKS):
        return f" {character} "
    return character


def _split(character: str) -> str:
    """Drop accents (characters of their own once decomposed) and put spaces around punctuation."""
    category = unicodedata.category(character)
    if category == "Mn":
        return ""
    if category == "Cs":  # half a surrogate pair, as broken JSON has: no UTF-8, so in no vocabulary
        return "\ufffd"
    is_ascii_symbol = character.isascii() and character.isprintable() and not character.isalnum()
    if character != " " and (is_ascii_symbol or category.startswith("P")):
        return f" {character} "
    return character


_CLEAN = _CharacterMap(_clean)
_SPLIT = _CharacterMap(_split)


def normalise(text: str) -> str:
    """Return a caption as words with spaces between, as BERT splits them.

    Letters become lower case, curly double quotes straight; Chinese characters are separate words.

    A Rust BERT normaliser differs from the reference on private-use and newer characters, so this is Python's
    own Unicode tables, as the reference uses them.
    """
    text = text.lower().replace("“", '"').replace("”", '"')
    return unicodedata.normalize("NFD", text.translate(_CLEAN)).translate(_SPLIT)


class Tokenizer:
    """WordPiece over a vocabulary; a token's id is its place in the list.

    Raises:
        InputError: if the list lacks a special token, has a duplicate, or does not begin with [PAD]: the
            model takes id 0 as padding.
    """

    def __init__(self, vocabulary: Sequence[str], *, origin: str = "vocabulary") -> None:
        self.vocabulary = tuple(vocabulary)
        self.origin = origin  # path or name, for messages
        ids = {token: index for index, token in enumerate(self.vocabulary)}
        for token in SPECIAL_TOKENS:
            if token not in ids:
                raise InputError(
                    f"{origin}: lacks the token {token}; a BERT vocabulary has {', '.join(SPECIAL_TOKENS)}"
                )
        if ids[PAD] != 0:
            raise InputError(
                f"{origin}: [PAD] is line {ids[PAD] + 1}, but the model takes id 0 as padding: put it first"
            )
        if len(ids) != len(self.vocabulary):
            token, count = Counter(self.vocabulary).most_common(1)[0]
            raise InputError(f"{origin}: the token {token!r} occurs {count} times; each token needs one line")
        self._cls, self._sep = ids[CLS], ids[SEP]
        self._word_pieces = WordPieceTokenizer(
            WordPiece(ids, unk_token=UNK, max_input_chars_per_word=_MAX_WORD_CHARACTERS)
        )
        self._word_pieces.pre_tokenizer = WhitespaceSplit()

    @classmethod
    def load(cls, source: str) -> Self:
        """Load a `vocab.txt` (path or URL), a folder that holds one, or a Hugging Face model id."""
        if store.exists(store.join(source, "vocab.txt")):
            path = store.join(source, "vocab.txt")
        elif store.exists(source) and not os.path.isdir(source):
            path = source
        elif _MODEL_ID.fullmatch(source) and not os.path.isdir(source):
            path = _download_vocabulary(source)
        else:
            raise InputError(
                f"{source}: not a vocabulary file, folder with a vocab.txt, or model id like owner/name"
            )
        try:
            lines = store.read_text(path).split("\n")
        except UnicodeDecodeError:
            raise InputError(f"{path}: not UTF-8 text; expected one token per line") from None
        if lines[-1] == "":
            lines.pop()
        return cls([line.rstrip("\r") for line in lines], origin=path)

    def save_vocabulary(self, path: str) -> None:
        """Write BERT's `vocab.txt`: one token a line, in the order of ids."""
        store.write_text(path, "".join(f"{token}\n" for token in self.vocabulary))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @cached_property
    def digest(self) -> str:
        """sha256 of the vocabulary file's bytes, hex: token ids made with it are bound to it."""
        return hashlib.sha256("".join(f"{token}\n" for token in self.vocabulary).encode()).hexdigest()

    def encode(
        self, texts: Sequence[str], context_length: int
    ) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        """Return tokens_NL int32: [CLS], the caption's first `context_length` - 2 word pieces, [SEP],
        zeros.
        """
        return self.encode_counting(texts, context_length)[0]

    def encode_counting(
        self, texts: Sequence[str], context_length: int
    ) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int32]], int]:
        """Return what `encode` returns, and how many captions it cut."""
        tokens_NL = np.zeros((len(texts), context_length), dtype=np.int32)
        num_cut = 0
        for row, ids in zip(tokens_NL, self._piece_ids(texts), strict=True):
            kept = ids[: context_length - 2]
            num_cut += len(ids) > len(kept)
            row[: len(kept) + 2] = [self._cls, *kept, self._sep]
        return tokens_NL, num_cut

    def num_truncated(self, texts: Sequence[str], context_length: int) -> int:
        """Return how many captions `encode` cuts."""
        return self.encode_counting(texts, context_length)[1]

    def with_unknown(self, texts: Sequence[str]) -> list[str]:
        """Return the texts that have a part which the vocabulary lacks: the model reads it as [UNK]."""
        unknown = self.vocabulary.index(UNK)
        return [text for text, ids in zip(texts, self._piece_ids(texts), strict=True) if unknown in ids]

    def _piece_ids(self, texts: Sequence[str]) -> list[list[int]]:
        normalised = [normalise(text) for text in texts]
        return [encoding.ids for encoding in self._word_pieces.encode_batch_fast(normalised)]


def hugging_face_tokenizer(tokenizer: Tokenizer) -> str:
    """Return a `tokenizer.json` for Hugging Face's libraries: the nearest that they have to `Tokenizer`.

    Lower case, accents, Chinese characters (the extension blocks included) and curly quotes as here. It
    differs for characters newer than its Unicode tables, for private use, and in that it takes the text
    "[SEP]" for the token.
    """
    ids = {token: index for index, token in enumerate(tokenizer.vocabulary)}
    backend = WordPieceTokenizer(WordPiece(ids, unk_token=UNK, max_input_chars_per_word=_MAX_WORD_CHARACTERS))
    blocks = "".join(f"{chr(first)}-{chr(last)}" for first, last in _CHINESE_BLOCKS)
    backend.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(quote, '"') for quote in "“”"),
            normalizers.BertNormalizer(
                clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
            ),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(f"[{blocks}]"), "isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS}:0 $A:0 {SEP}:0",
        pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
        special_tokens=[(CLS, ids[CLS]), (SEP, ids[SEP])],
    )
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return str(backend.to_str(pretty=True))


def _download_vocabulary(model_id: str) -> str:
    from training.weights.hub.locate import fetch_file

    return fetch_file(model_id, "vocab.txt")


def learn_vocabulary(captions: Iterable[str], size: int) -> list[str]:
    """Learn at most `size` word pieces from captions: the special tokens, characters, then merges.

    Byte-pair merging by count, as BERT vocabularies are commonly learned; ties go to the lexicographically
    first pair, so that the same captions always give the same list, whatever their order. Chinese characters
    are separate words and never merge. Characters that do not fit and pieces seen once are left out.

    Raises:
        ValueError: if `size` does not exceed the number of special tokens.
    """
    if size <= len(SPECIAL_TOKENS):
        raise ValueError(
            f"a vocabulary of {size} has no room next to the {len(SPECIAL_TOKENS)} special tokens"
        )
    word_counts: Counter[str] = Counter()
    for caption in captions:
        word_counts.update(normalise(caption).split())
    words = sorted(word_counts.items())
    pieces_of = [[word[0], *(_CONTINUATION + character for character in word[1:])] for word, _ in words]

    character_counts: Counter[str] = Counter()
    for pieces, (_, count) in zip(pieces_of, words, strict=True):
        for piece in pieces:
            character_counts[piece] += count
    by_count = sorted(character_counts, key=lambda piece: (-character_counts[piece], piece))
    vocabulary = [*SPECIAL_TOKENS, *by_count[: size - len(SPECIAL_TOKENS)]]
    known = set(vocabulary)

    pair_counts: Counter[tuple[str, str]] = Counter()
    words_with: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, pieces in enumerate(pieces_of):
        for pair in itertools.pairwise(pieces):
            pair_counts[pair] += words[index][1]
            words_with[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    while heap and len(vocabulary) < size:
        negative_count, pair = heapq.heappop(heap)
        if pair_counts[pair] != -negative_count:
            continue  # an outdated entry: the pair was pushed again with its new count
        if -negative_count < 2:
            break
        left, right = pair
        merged = left + right.removeprefix(_CONTINUATION)
        if merged not in known and left in known and right in known:
            vocabulary.append(merged)
            known.add(merged)
        changed: set[tuple[str, str]] = set()
        for index in sorted(words_with.pop(pair)):
            count, pieces = words[index][1], pieces_of[index]
            for old in itertools.pairwise(pieces):
                pair_counts[old] -= count
                changed.add(old)
            pieces_of[index] = pieces = _merge(pieces, left, right, merged)
            for new in itertools.pairwise(pieces):
                pair_counts[new] += count
                words_with[new].add(index)
                changed.add(new)
        changed.discard(pair)
        for other in changed:
            if pair_counts[other] > 0:
                heapq.heappush(heap, (-pair_counts[other], other))
    return vocabulary


def _merge(pieces: list[str], left: str, right: str, merged: str) -> list[str]:
    """Return the word's pieces with every `left, right` made one, from the left."""
    result: list[str] = []
    for piece in pieces:
        if piece == right and result and result[-1] == left:
            result[-1] = merged
        else:
            result.append(piece)
    return result
