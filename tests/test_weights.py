"""The fingerprint of weights: equal for equal weights under any name, different for any other revision."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.errors import Unsupported
from kvd.pages import Identity, chain, seed
from kvd.sidecar.weights import fingerprint


def safetensors(path: Path, tensors: dict[str, bytes]) -> None:
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(tensors.values()))


def model(folder: Path, config: str = '{"rope_theta": 10000}', **tensors: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    safetensors(folder / "model.safetensors", tensors or {"a": bytes(9000), "b": bytes(range(256)) * 20})
    return folder


def test_a_copy_under_another_name_is_the_same_model(tmp_path: Path) -> None:
    assert fingerprint(model(tmp_path / "one")) == fingerprint(model(tmp_path / "two"))


@pytest.mark.parametrize(
    "other",
    [
        {"a": bytes(4500) + b"\x01" + bytes(4499), "b": bytes(range(256)) * 20},
        {"a": bytes(9000), "b": bytes(range(256)) * 20, "c": b"x"},
        {"a": bytes(9000), "renamed": bytes(range(256)) * 20},
        {"a": bytes(9001), "b": bytes(range(256)) * 20},
    ],
    ids=["another value", "another tensor", "another name", "another size"],
)
def test_another_revision_is_another_model(tmp_path: Path, other: dict[str, bytes]) -> None:
    assert fingerprint(model(tmp_path / "one")) != fingerprint(model(tmp_path / "two", **other))


def test_the_configuration_counts(tmp_path: Path) -> None:
    assert fingerprint(model(tmp_path / "one")) != fingerprint(model(tmp_path / "two", '{"rope_theta": 500000}'))


def test_other_formats_are_sampled(tmp_path: Path) -> None:
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    one.write_bytes(bytes(100_000))
    two.write_bytes(bytes(50_000) + b"\x01" + bytes(49_999))
    assert fingerprint(one) != fingerprint(two)


def test_what_cannot_be_fingerprinted_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no weight files"):
        fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(Unsupported, match="not a safetensors file"):
        fingerprint(tmp_path)


IDENTITY = Identity("w", "kv", "MHA", "page_first", "f16", "f16", 64, 4096, (2, 0, 2), (8, 64), False, 1)


@pytest.mark.parametrize("field", Identity.__struct_fields__)
def test_every_field_of_an_identity_counts(field: str) -> None:
    import msgspec

    value = getattr(IDENTITY, field)
    other = {str: "other", int: 99, bool: not value, tuple: (9, 9, 9)}[type(value)]
    assert msgspec.structs.replace(IDENTITY, **{field: other}).namespace() != IDENTITY.namespace()
    assert len(IDENTITY.namespace()) == 16


# The vectors are SGLang 0.5.23's own answers; the whole function is compared with it in test_sglang_identity.py.
def test_page_keys_are_sglangs() -> None:
    keys = chain(range(1, 9), 4)
    assert [key.hex()[:16] for key in keys] == ["cf97adeedb59e05b", "4ebfa8a1f3c34151"]
    salted = chain(range(1, 9), 4, seed(cache_salt="s1"))
    assert [key.hex()[:16] for key in salted] == ["669fbd8556430da4", "161a75cf944104c0"]
    assert chain(range(7), 4) == chain(range(4), 4)


@given(st.lists(st.integers(0, 2**40), min_size=4, max_size=40), st.text(max_size=4), st.text(max_size=4))
def test_salts_and_adapters_never_share(tokens: list[int], salt: str, adapter: str) -> None:
    plain = chain(tokens, 4)
    salted = chain(tokens, 4, seed(cache_salt=salt))
    adapted = chain(tokens, 4, seed(extra_key=adapter))
    assert not set(plain) & set(salted)
    assert not set(salted) & set(adapted)
