"""Fetching a checkpoint from the hub: the local cache first, then the network with short timeouts."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from assay.errors import BadWeights, ModelNotFound, UnsafeCheckpoint
from assay.models._checkpoint import is_pickle, weight_files
from assay.models._quiet import quiet

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_SECONDS = 5.0


def fetch(hub_id: str) -> Path:
    """The directory of a hub model, complete in the local cache or downloaded into it; pickles are never fetched.

    Raises:
        ModelNotFound: not in the cache, and the hub does not have it or cannot be reached.
        UnsafeCheckpoint: the hub has it as a pickle only.
    """
    return _cached(hub_id) or _downloaded(hub_id)


def _cached(hub_id: str) -> Path | None:
    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=_FILES, local_files_only=True))
        weight_files(directory)
    except (LocalEntryNotFoundError, ValueError, ModelNotFound, BadWeights):
        return None
    return directory if (directory / "config.json").is_file() else None


def _downloaded(hub_id: str) -> Path:
    try:
        names = [file.rfilename for file in HfApi().model_info(hub_id, timeout=_SECONDS).siblings or []]
        _refuse_pickles(hub_id, names)
        with quiet():
            return Path(snapshot_download(hub_id, allow_patterns=_FILES, etag_timeout=_SECONDS))
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ModelNotFound(
            f"{hub_id!r} is no directory here, is not in the local cache, and the hub did not give it: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            wanted="a directory, reference:NAME, shape:NAME, or a hub id that can be downloaded",
            do="check the name and the network, or download the model elsewhere and give its directory",
        ) from error


def _refuse_pickles(hub_id: str, names: list[str]) -> None:
    pickles = [name for name in names if is_pickle(name)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise UnsafeCheckpoint(
            f"{hub_id!r} is published only as a pickle ({pickles[0]}), which would execute code when it is read",
            wanted="safetensors",
            do="ask its authors for safetensors, or convert it on a machine you can afford to lose",
        )
