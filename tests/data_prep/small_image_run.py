"""To be killed: python -m tests.data_prep.small_image_run INPUT OUTPUT FORMAT WORKERS"""

import sys
from pathlib import Path
from typing import Any

from data_prep.image_sources import ImageSource, open_images
from data_prep.images import ImageOptions, prepare_images


def source(folder: Path, validation_share: float = 0.2) -> ImageSource:
    return ImageSource(open_images([folder], None), validation_share)


def options(output: Path, **changes) -> ImageOptions:
    """Ten rows an image, so that a unit has 6 images and there are several."""
    settings: dict[str, Any] = {"size": 8, "augmentation": "ten-crop", "rows_per_shard": 70, "format": "tar"}
    more = {"workers": 1, "show_progress": False, "max_corrupt_share": 0.5}
    return ImageOptions(output=output, **settings | more | changes)


if __name__ == "__main__":
    folder, output, shard_format, workers = sys.argv[1:]
    prepare_images(source(Path(folder)), options(Path(output), format=shard_format, workers=int(workers)))
