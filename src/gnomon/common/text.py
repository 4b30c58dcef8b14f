"""Tokenizers trained on the spot, so that tests, claims and the demo need no download."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gnomon.common.files import atomic_folder, cache_dir, content_hash
from gnomon.errors import ConfigError

__all__ = ["byte_tokenizer", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def train_tokenizer(texts: Sequence[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the result is cached by the texts and the size.

    Parameters
    ----------
    texts : sequence of str
    vocab_size : int, default 2048
        At least 257: all bytes and the end-of-text token.

    Returns
    -------
    PreTrainedTokenizerFast
        With ``<|endoftext|>`` (id 0) as end, begin and padding token.

    Raises
    ------
    ConfigError
        When `vocab_size` is under 257.
    """
    if vocab_size < 257:
        raise ConfigError(f"vocab_size = {vocab_size}: a byte-level tokenizer needs at least 257 entries.")
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    folder = cache_dir() / f"tokenizer-{content_hash([digest.hexdigest(), vocab_size])}"
    if not (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        with atomic_folder(folder) as part:
            tokenizer.save(str(part / "tokenizer.json"))
    return _wrap(Tokenizer.from_file(str(folder / "tokenizer.json")))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes: 257 ids, ``<|endoftext|>`` is 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0, **{c: i for i, c in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer)
