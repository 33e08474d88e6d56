"""Parquet files of a data set on the Hugging Face hub, at one commit, without running any script of it."""

from __future__ import annotations

from pathlib import Path

from data_prep.readers import InputFile, find_files
from pgm_scale.errors import UserError

_CONVERTED = "refs/convert/parquet"  # where the hub itself keeps parquet of data sets made by a script


def download_parquet(repository: str, revision: str | None) -> tuple[list[InputFile], str]:
    """Download (or find in the local cache) all .parquet files; return them sorted by name, and the commit.

    Without a `revision` it is the newest commit of the main branch, or of the hub's own conversion where the
    main branch has no parquet. The commit is kept in `dataset.json`, and given as `revision` it is a pin.

    Raises:
        UserError: a hub that cannot be reached, and data that is absent or only a part.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        for candidate in [revision] if revision else ["main", _CONVERTED]:
            info = HfApi().dataset_info(repository, revision=candidate)
            names = [entry.rfilename for entry in info.siblings or []]
            if info.sha and any(name.endswith(".parquet") for name in names):
                break
        else:
            raise UserError(
                f"{repository} at {revision or 'main'}: no .parquet files; give local files with --input"
            )
        folder = snapshot_download(
            repository, repo_type="dataset", revision=info.sha, allow_patterns=["*.parquet"]
        )
    except (OSError, ValueError) as error:  # every error of the hub, and of the network below it
        raise UserError(
            f"{repository}: the hub did not give it ({type(error).__name__}); give local files, see --help"
        ) from None
    files = find_files([Path(folder)])
    partial = [file.name for file in files if "partial-" in file.name]
    if partial:
        raise UserError(
            f"{repository}: {partial[0]} holds only a part of the data; give local files, see --help"
        )
    return files, info.sha


def files_of_split(files: list[InputFile], split: str) -> list[InputFile]:
    """Those whose file or folder name starts with the split's name."""
    found = [file for file in files if any(part.startswith(split) for part in file.name.split("/"))]
    if not found:
        raise UserError(f"no file of the split {split!r} among {files[0].name} and {len(files) - 1} others")
    return found
