"""Prefixes moved between sites: `kvdctl export` and `kvdctl import`."""

from kvd.errors import KvdError


def needs_pyarrow() -> None:
    """pyarrow is an extra of a node's installation: it is loaded where it is needed. Raises KvdError."""
    try:
        import pyarrow  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise KvdError("this needs pyarrow", "pip install 'sglang-kvd[shared]'") from error
