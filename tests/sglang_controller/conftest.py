"""The fixture of the self-tests: attach a controller, let it go, and see that no thread is left."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.sglang_controller import pools
from tests.sglang_controller.controller import CONTROLLERS, Controller
from tests.sglang_controller.dict_backend import DictStorage, Start, dict_backend
from tests.sglang_controller.releases import RELEASES


@pytest.fixture
def start() -> Iterator[Start]:
    """Attach a controller (over a dict unless told otherwise) and let it go at the end."""
    running: list[Controller] = []

    def attach(version: str, pool: Any = None, base: type[Any] = DictStorage, **options: Any) -> Controller:
        pool = pool or pools.MHATokenToKVPoolHost(release=version)
        controller = CONTROLLERS[version](dict_backend(RELEASES[version], base), pool, **options)
        running.append(controller)
        controller.attach()
        return controller

    yield attach
    for controller in running:
        controller.detach()
        assert not [t for _, t in controller.threads if t.is_alive()]
