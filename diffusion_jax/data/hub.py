"""Data sets of the Hugging Face hub, fetched by huggingface_hub into its cache."""

import functools
import re
from pathlib import Path

from diffusion_jax.data.folders import split_of_table
from diffusion_jax.errors import UserError, one_line


def snapshot(source: str) -> Path:
    """Returns the folder with the Parquet files of a data set, and fetches those that are missing or outdated.

    Takes the hub's cache as it is, and prints a line, if the hub does not answer.

    Args:
      source: "hf:<owner>/<name>", or "hf:<owner>/<name>/<folder>" for a part of the data set that has its own folder.

    Raises:
      UserError: huggingface_hub is missing, or the data set has no Parquet files, or they cannot be fetched.
    """
    match = re.fullmatch(r"hf:(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)", source)
    if not match:
        raise UserError(f"config.data.source={source!r} must be 'hf:<owner>/<name>' or 'hf:<owner>/<name>/<folder>'")
    name, folder = match[1], match[2][1:]
    hub = _huggingface_hub(source)
    fetch = functools.partial(
        hub.snapshot_download,
        name,
        repo_type="dataset",
        allow_patterns=[f"{folder}/*.parquet" if folder else "*.parquet"],
    )
    try:
        files = [file.rfilename for file in hub.HfApi().dataset_info(name, timeout=10).siblings]
    except Exception as error:  # requests, httpx and the hub raise types of their own
        root = _cached(fetch, source, one_line(error, 200))
        _check_folder(source, folder, [file.relative_to(root).as_posix() for file in root.rglob("*.parquet")])
        return root / folder
    _check_folder(source, folder, files)
    try:
        return Path(fetch()) / folder
    except Exception as error:
        reason = one_line(error, 200)
        raise UserError(f"config.data.source={source!r} cannot be fetched ({reason}): try again") from None


def _huggingface_hub(source):
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"config.data.source={source!r} is fetched from the Hugging Face hub: pip install huggingface_hub"
        ) from None
    return huggingface_hub


def _cached(fetch, source, reason):
    """Returns the folder of the last commit in the hub's cache."""
    try:
        root = Path(fetch(local_files_only=True))
    except Exception:
        raise UserError(
            f"config.data.source={source!r} cannot be fetched ({reason}) and is not in the hub's cache: check the name "
            "and the network, or give a folder of its Parquet files, --config.data.path=…"
        ) from None
    print(f"{source}: the hub does not answer ({reason}), so its cache is used as it is, {root}")
    return root


def _check_folder(source, folder, files):
    """Raises UserError unless there are Parquet files in the folder, or all are of one part of the data set."""
    tables = [file for file in files if file.endswith(".parquet")]
    parts = sorted({file.split("/")[0] for file in tables if "/" in file})
    if not tables:
        mend = "download its images and give their folder, --config.data.path=…"
        raise UserError(f"config.data.source={source!r} has no Parquet files: {mend}")
    if folder and not any(file.startswith(f"{folder}/") for file in tables):
        has = f"one of {', '.join(parts)}" if parts else "the data set alone"
        raise UserError(f"config.data.source={source!r} has no Parquet files in a folder {folder!r}: give {has}")
    parts = [part for part in parts if not split_of_table(part)]
    if not folder and len(parts) > 1:
        raise UserError(
            f"config.data.source={source!r} has several parts, {', '.join(parts)}: give one, '{source}/{parts[0]}'"
        )
