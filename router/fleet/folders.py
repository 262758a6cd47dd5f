"""Where a model's tokenizer lies on this machine. Nothing is ever downloaded."""

from pathlib import Path

from kvd.errors import SettingsError
from kvd.router.fleet.told import Told

_FILE = "tokenizer.json"


def find(told: Told, model_path: Path | None) -> Path:
    """The folder: as the settings say, else as the worker says, else the Hugging Face cache. Blocks.

    Raises SettingsError where none of them has a tokenizer.
    """
    if model_path is not None:
        return model_path
    named = told.tokenizer_path
    try:
        if (Path(named) / _FILE).is_file():
            return Path(named)
        cached = _cached(named, told.revision)
    except OSError as error:  # it may be another user's, or no name that a file can have
        raise SettingsError(
            f"the tokenizer of {named} cannot be read here: {error.strerror}",
            "let the router's user read that folder, or copy the model's tokenizer here and set model_path",
        ) from error
    if cached is None:
        raise SettingsError(
            f"the tokenizer of {named} is not on this machine", "copy the model's tokenizer here and set model_path"
        )
    return cached


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # here: it takes long to import, and is seldom needed

    try:
        found = try_to_load_from_cache(name, _FILE, revision=revision)
    except ValueError:  # no name of a repository
        return None
    return Path(found).parent if isinstance(found, str) else None
