"""The plugin's settings: the object under "kvd" in SGLang's --hicache-storage-backend-extra-config.

    {"backend_name": "kvd", "module_path": "kvd.sidecar.hicache", "class_name": "KvdStorage", "interface_v1": 1,
     "hicache_storage_pass_prefix_keys": true, "kvd": {"socket": "/run/kvd/kvd.sock"}}

All keys are optional. Unknown ones are refused: the plugin then stays off and says so, in the worker's log and in
`kvdctl doctor`; it never takes the worker down.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from kvd.errors import SettingsError
from kvd.places import SOCKET, run_dir

Seconds = Annotated[float, msgspec.Meta(gt=0, le=60)]


class PluginConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator can set per worker."""

    socket: str = ""  # kvd.sock; empty: KVD_RUN_DIR, else the user's default folder
    model_path: str = ""  # folder or hub name of the weights; empty: as SGLang was told
    weights_id: str = ""  # replaces the fingerprint of the weights; workers with equal ids, launched alike, share
    tenant: Annotated[str, msgspec.Meta(max_length=256)] = ""  # workers of different tenants never share
    copy_threads: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2  # for batches of large pages; 1 on starved hosts
    get_timeout_s: Seconds = 2.0  # the longest a read or write of <= 128 pages may take, from a slow disk too
    exists_timeout_s: Seconds = 0.005  # only where the shared index cannot be used
    promise_s: Seconds = 10.0  # how long pages that a lookup reported are held for the read that follows

    def socket_path(self) -> Path:
        return Path(self.socket) if self.socket else run_dir(os.environ, os.getuid()) / SOCKET


def read_config(extra_config: Mapping[str, Any] | None) -> PluginConfig:
    """Raises SettingsError naming the key."""
    given = (extra_config or {}).get("kvd", {})
    try:
        return msgspec.convert(given, PluginConfig)
    except msgspec.ValidationError as error:
        raise SettingsError(
            f'"kvd" in --hicache-storage-backend-extra-config: {error}',
            f"known keys are {', '.join(PluginConfig.__struct_fields__)}",
        ) from error
