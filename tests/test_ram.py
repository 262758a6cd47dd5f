"""RAM: the contract of all tiers, and the machine that compares it with a dict."""

from pathlib import Path

import pytest

from kvd.storage.tier import Tier
from tests.ram_tier import RamTier
from tests.tier_contract import TierContract
from tests.tier_machine import tier_machine


class TestRam(TierContract):
    def open(self, folder: Path) -> Tier:
        return RamTier(folder)


TestRamMachine = tier_machine(lambda folder: RamTier(folder, 12), examples=20).TestCase
TestRamMachineLong = pytest.mark.timeout(1800)(
    pytest.mark.slow(tier_machine(lambda folder: RamTier(folder, 12), 400).TestCase)
)
