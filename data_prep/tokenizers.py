"""Tokenizers by path, by hub name, or trained on the input; and the ids they give a model (FACTS 1.7)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.packing import Packing
from data_prep.sources import content_hash
from pgm_scale.data.manifest import LARGEST_VOCABULARY, TOKENIZER_NAME, Vocabulary
from pgm_scale.errors import UserError

TRAIN_PREFIX = "train:bpe:"
END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257  # every byte and the end of text
TRAINING_SAMPLE_CHARACTERS = 64_000_000  # about 25 s of training on 2 cores, and 1 GB of memory

# (BOS, EOS) by the first pair that a tokenizer has; GPT-2 uses one token as both, BERT has the second pair.
_ENDS = [("<|endoftext|>", "<|endoftext|>"), ("[CLS]", "[SEP]"), ("<s>", "</s>")]
_MASKS = ["[MASK]", "<mask>"]
_PADS = ["[PAD]", "<pad>"]


def size_to_train(specification: str) -> int | None:
    """K of `train:bpe:K`, or None where the tokenizer is to be loaded."""
    if not specification.startswith("train:"):
        return None
    size = specification.removeprefix(TRAIN_PREFIX)
    if not (size.isdecimal() and int(size) >= SMALLEST_BPE):
        raise UserError(
            f"tokenizer {specification!r}: expected train:bpe:<size> of at least {SMALLEST_BPE}, "
            "for example train:bpe:1024"
        )
    return int(size)


def load_tokenizer(specification: str) -> bytes:
    """The `tokenizer.json` of a path (the file, or a Hugging Face folder) or of a name on the hub.

    Raises:
        UserError: a file that is no tokenizer, or a name that is neither a path nor reachable.
    """
    path = Path(specification)
    if not path.exists():
        return _canonical(_download(specification), specification)
    file = path / TOKENIZER_NAME if path.is_dir() else path
    if not file.is_file():
        return _convert_folder(path)
    try:
        return _canonical(file.read_bytes(), specification)
    except OSError as error:
        raise UserError(f"tokenizer {file}: cannot read it ({error.strerror}); check permissions") from None


def _download(name: str) -> bytes:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    advice = f"give a path of a {TOKENIZER_NAME}, or train one on the input with train:bpe:<size>"
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its retries are told in eight lines each
    try:
        return Path(hf_hub_download(name, TOKENIZER_NAME)).read_bytes()
    except HFValidationError:
        raise UserError(f"tokenizer {name!r}: no such path, and no name that a hub has; {advice}") from None
    except OSError as error:  # every error of the hub, and of the network below it
        reason = type(error).__name__
        raise UserError(
            f"tokenizer {name!r}: no such path, and the hub did not give it ({reason}); {advice}"
        ) from None
    finally:
        logger.setLevel(level)


def _convert_folder(folder: Path) -> bytes:
    """A Hugging Face folder with the older files (vocab.json and merges.txt, vocab.txt)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return tokenizer.backend_tokenizer.to_str().encode()
    except (OSError, ValueError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"tokenizer {folder}: no fast tokenizer in this folder ({reason}); add a {TOKENIZER_NAME}"
        ) from None


def _canonical(content: bytes, specification: str) -> bytes:
    """The bytes as they are, unless they ask for truncation or padding, which is the packing's business."""
    tokenizer = open_tokenizer(content, specification)
    if tokenizer.truncation is None and tokenizer.padding is None:
        return content
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.to_str().encode()


def open_tokenizer(content: bytes, specification: str) -> Tokenizer:
    """A tokenizer that takes special tokens written out in a text ("[MASK]") as ordinary text."""
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception and ValueError
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"tokenizer {specification}: not a {TOKENIZER_NAME} ({reason}); give another"
        ) from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_of(tokenizer: Tokenizer, packing: Packing, specification: str) -> Vocabulary:
    """Ids of a model (FACTS 1.7): a mask of the tokenizer's own, else one row after its last token.

    `pad_id` is None when rows are packed full; else the tokenizer's own, else EOS (never the mask, which
    would make padding look like noise).
    """
    ends = next((pair for pair in _ENDS if None not in map(tokenizer.token_to_id, pair)), None)
    if ends is None:
        known = ", ".join(eos for _, eos in _ENDS)
        raise UserError(f"tokenizer {specification}: it has none of the end tokens {known}; add one to it")
    bos_id, eos_id = map(tokenizer.token_to_id, ends)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size >= LARGEST_VOCABULARY:
        raise UserError(
            f"tokenizer {specification}: its highest id is {size - 1}, above {LARGEST_VOCABULARY - 2}; give another"
        )
    mask_id = _first_id(tokenizer, _MASKS)
    pad_id = None
    if packing == "pad":
        own_pad = _first_id(tokenizer, _PADS)
        pad_id = eos_id if own_pad is None else own_pad
    if mask_id is None:
        return Vocabulary(size + 1, size, bos_id, eos_id, pad_id)
    return Vocabulary(size, mask_id, bos_id, eos_id, pad_id)


def _first_id(tokenizer: Tokenizer, names: list[str]) -> int | None:
    return next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)


def train_bpe(texts: Iterable[str], size: int) -> bytes:
    """Byte-level BPE with `size` tokens, of which the first is the end of text. The same texts give the same
    bytes; an input that is too small for so many merges gives fewer tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(texts), trainer)
    return tokenizer.to_str().encode()


def sample_texts(texts: Iterable[str], limit_characters: int = TRAINING_SAMPLE_CHARACTERS) -> list[str]:
    """All texts, or of a larger input those of the lowest content hashes: the same in any order of the input.

    Whenever the kept texts exceed the limit, the bar is halved and those above it go, so that memory is bounded
    and about a half to all of the limit is kept.
    """
    bar, kept_characters = 2**64, 0
    kept: list[tuple[int, str]] = []
    for value, text in ((content_hash(text), text) for text in texts):
        if value >= bar:
            continue
        kept.append((value, text))
        kept_characters += len(text)
        while kept_characters > limit_characters and len(kept) > 1:
            bar //= 2
            kept = [(value, text) for value, text in kept if value < bar]
            kept_characters = sum(len(text) for _, text in kept)
    return [text for _, text in kept]


def encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """Ids of each text without special tokens; in batches, as an encoding takes some 200 bytes a token."""
    start, characters = 0, 0
    for end, text in enumerate(texts, 1):
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or end == len(texts):
            for encoding in tokenizer.encode_batch_fast(texts[start:end], add_special_tokens=False):
                yield encoding.ids
            start, characters = end, 0


_BATCH_CHARACTERS = 1 << 18
