"""The controllers, by release: `Controller055`, `Controller0510`, `Controller0523`."""

from tests.sglang_controller.controller_0510 import Controller0510
from tests.sglang_controller.controller_0523 import Controller0523
from tests.sglang_controller.controller_055 import Controller055
from tests.sglang_controller.controller_base import AttachFailed, Controller
from tests.sglang_controller.operations import Operation, Prefetch, Side
from tests.sglang_controller.ranks import CollectiveTimeout, RankGroup, TensorParallel
from tests.sglang_controller.record import Call, Failure

CONTROLLERS: dict[str, type[Controller]] = {
    "0.5.5": Controller055,
    "0.5.10": Controller0510,
    "0.5.23": Controller0523,
}

__all__ = [
    "CONTROLLERS",
    "AttachFailed",
    "Call",
    "CollectiveTimeout",
    "Controller",
    "Controller0510",
    "Controller0523",
    "Controller055",
    "Failure",
    "Operation",
    "Prefetch",
    "RankGroup",
    "Side",
    "TensorParallel",
]
