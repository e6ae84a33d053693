"""One small tokenizer of each family that language models use, trained on a few lines."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from assay.models import load_tokenizer

CODE = "def solve(x):\n    return x + 1\n    if x > 0:\n        y = [int(c) for c in str(x)]\n"
WORDS = "漢字。仮名、한글 ёж ßtraße éa e\u0301 👩🏽\u200d💻 🛑 नमस्ते ไทย \U00020000 STOP </end> ` ~ \t\r\n"
TEXT = [(CODE + WORDS) * 20]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_end|>"],
    )


def _byte_level(size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # No borders of words: tokens end inside of letters, and go over spaces.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [WORDS, "漢仮", *TEXT],
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, max_token_length=6
        ),
    )
    return _wrapped(tokenizer)


def _sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """As of Llama 2 with the prefix, and of Gemma without: bytes stand for unknown letters."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        [CODE * 20],
        trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, max_token_length=8),
    )
    state = trained.model.__getstate__()
    parsed = json.loads(state)
    vocabulary = dict(parsed["vocab"])
    for name in bytes_:
        vocabulary[name] = len(vocabulary)
    merges = [tuple(pair) for pair in parsed["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(SPECIAL)
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + spaces)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * prefix)
    return _wrapped(tokenizer)


def _unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>"),
    )
    return _wrapped(tokenizer)


def _word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL)
    )
    return _wrapped(tokenizer)


def _suffixed() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>"),
    )
    return _wrapped(tokenizer)


def _no_decoder() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return _wrapped(tokenizer)


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bundled": lambda: load_tokenizer("reference:qwen3"),
    "bytes": lambda: _byte_level(260),
    "byte-level BPE over borders": lambda: _byte_level(600),
    "sentencepiece with a prefix and bytes": lambda: _sentencepiece(prefix=True),
    "sentencepiece with bytes": lambda: _sentencepiece(prefix=False),
    "unigram with a prefix": _unigram,
    "word pieces": _word_piece,
    "suffixes of words": _suffixed,
    "no decoder": _no_decoder,
}


@cache
def family(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family."""
    return FAMILIES[name]()
