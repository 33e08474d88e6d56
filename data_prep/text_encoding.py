"""Texts to token rows in a worker process, which imports numpy and tokenizers only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.packing import Packing, pack
from data_prep.tokenizers import encode, open_tokenizer
from data_prep.units import Unit, UnitRows
from pgm_scale.data.manifest import Vocabulary


@dataclass(frozen=True)
class TextEncoding:
    """How texts are tokenized and packed."""

    tokenizer_file: Path
    vocabulary: Vocabulary
    packing: Packing
    length_tokens: int
    detokenise: Callable[[str], str] | None

    def start(self) -> Callable[[Unit], UnitRows]:
        tokenizer = open_tokenizer(self.tokenizer_file.read_bytes(), str(self.tokenizer_file))

        def encode_unit(unit: Unit) -> UnitRows:
            texts = unit.documents if self.detokenise is None else list(map(self.detokenise, unit.documents))
            rows = pack(self.packing, list(encode(tokenizer, texts)), self.length_tokens, self.vocabulary)
            return UnitRows(len(texts), *rows)

        return encode_unit

    def finisher(self) -> None:
        return None
