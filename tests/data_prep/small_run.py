"""To be killed: python -m tests.data_prep.small_run INPUT OUTPUT FORMAT WORKERS"""

import sys
from pathlib import Path
from typing import Any

from data_prep.readers import Reading
from data_prep.sources import TextSource, UnitSize
from data_prep.text import PrepareOptions, prepare


class SmallUnits(TextSource):
    unit_size = UnitSize(documents=4)


def source(folder: Path, validation_share: float = 0.1) -> SmallUnits:
    return SmallUnits([folder], Reading(), validation_share)


def options(output: Path, **changes) -> PrepareOptions:
    settings: dict[str, Any] = {
        "output": output,
        "tokenizer": "train:bpe:300",
        "length_tokens": 16,
        "rows_per_shard": 150,
    }
    return PrepareOptions(**settings | {"format": "tar", "workers": 1, "show_progress": False} | changes)


if __name__ == "__main__":
    text_folder, output, shard_format, workers = sys.argv[1:]
    prepare(source(Path(text_folder)), options(Path(output), format=shard_format, workers=int(workers)))
