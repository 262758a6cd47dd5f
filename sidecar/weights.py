"""A fingerprint of a model's weights: cheap enough for every start, and different for any other revision.

SHA-256 over, for each weight file in name order: its size, and for safetensors the whole header (names, dtypes,
shapes) and 256 bytes from the middle of every tensor; for other formats 256 samples of 1 KiB spread evenly. The
model's JSON configuration goes in too, because rope scaling and the like change the KV cache. Names of files and
of the model do not: the same weights under another name are the same weights.
"""

import hashlib
import importlib
import json
import os
import struct
from pathlib import Path
from typing import Final

from kvd.errors import Unsupported

_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CONFIGS: Final = (
    "config.json", "quantize_config.json", "hf_quant_config.json", "params.json", "adapter_config.json",
)  # fmt: skip
_PER_TENSOR: Final = 256
_SAMPLES, _SAMPLE_BYTES = 256, 1024
_MAX_HEADER: Final = 256 << 20
_HINT: Final = 'set "weights_id" under "kvd" in the extra config'


def fingerprint(model: Path) -> str:
    """Hex digest of the weights in a folder (or one file). Raises Unsupported when there is nothing to read."""
    files = [model] if model.is_file() else sorted(p for p in model.iterdir() if p.suffix in _SUFFIXES)
    if any(p.suffix == ".safetensors" for p in files):
        files = [p for p in files if p.suffix == ".safetensors"]  # what SGLang prefers, too
    if not files:
        raise Unsupported(f"no weight files in {model}", _HINT)
    digest = hashlib.sha256(b"kvd-weights-1")
    for name in _CONFIGS:
        config = model / name
        if config.is_file():
            digest.update(name.encode() + hashlib.sha256(config.read_bytes()).digest())
    for file in files:
        try:
            _add_file(digest, file)
        except (OSError, ValueError) as error:
            raise Unsupported(f"cannot read the weights in {file}: {error}", _HINT) from error
    return digest.hexdigest()


def folder(path: str, revision: str | None) -> Path:
    """Where on this machine the weights are that SGLang was told to load. Raises Unsupported."""
    if Path(path).exists():
        return Path(path)
    try:
        hub = importlib.import_module("huggingface_hub")
        return Path(hub.snapshot_download(path, revision=revision, local_files_only=True))
    except Exception as error:
        raise Unsupported(
            f"cannot find the weights of {path!r} on this machine", 'set "model_path" or "weights_id" under "kvd"'
        ) from error


def _add_file(digest: "hashlib._Hash", file: Path) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        digest.update(struct.pack("<Q", size))
        if file.suffix == ".safetensors":
            _add_tensors(digest, fd, size)
        else:
            for sample in range(_SAMPLES):
                digest.update(os.pread(fd, _SAMPLE_BYTES, size * sample // _SAMPLES))
    finally:
        os.close(fd)


def _add_tensors(digest: "hashlib._Hash", fd: int, size: int) -> None:
    # https://github.com/huggingface/safetensors#format: u64 length, that much JSON, then the tensors' bytes
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
    if length > min(size, _MAX_HEADER):
        raise ValueError("not a safetensors file")
    header = os.pread(fd, length, 8)
    digest.update(hashlib.sha256(header).digest())
    spans = [t["data_offsets"] for name, t in json.loads(header).items() if name != "__metadata__"]
    for start, end in sorted(spans):
        middle = 8 + length + (start + end) // 2
        digest.update(os.pread(fd, min(_PER_TENSOR, end - start), middle))
