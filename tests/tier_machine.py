"""Any sequence of calls to a tier, next to a dict: a page may be absent, never wrong, and never silently.

TestNvmeMachine = tier_machine(open).TestCase          `open` as in tests.tier_contract
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvd.storage.tier import Tier
from tests.tier_samples import Sample, get, held, put, sample

Open = Callable[[Path], Tier]
# Numbers name pages; a number's sizes never change, as a namespace's never do.
KINDS = ((700, 1), (9000, 3), (60_000, 1), (260_000, 2))
NUMBERS = st.lists(st.integers(0, 47), min_size=1, max_size=12)


def of_kind(number: int, version: int = 0) -> Sample:
    length, shards = KINDS[number % len(KINDS)]
    return sample(number, length, shards, version)


def tier_machine(open_tier: Open, examples: int = 25, steps: int = 30) -> type[RuleBasedStateMachine]:
    """The test, for a tier that `open_tier` opens."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.folder = Path(tempfile.mkdtemp(prefix="kvd-tier-"))
            self.tier: Tier | None = None
            self.versions: dict[int, set[Sample]] = {}  # all that was ever put under a number
            self.there: set[int] = set()  # put said True, and nothing took it away since

        @initialize()
        def start(self) -> None:
            self.tier = open_tier(self.folder / "tier")

        @rule(numbers=NUMBERS, version=st.integers(0, 2), aligned=st.booleans())
        def put(self, numbers: list[int], version: int, aligned: bool) -> None:
            assert self.tier is not None
            samples = [of_kind(number, version) for number in numbers]
            for number, what in zip(numbers, samples, strict=True):
                self.versions.setdefault(number, set()).add(what)
            stored = put(self.tier, *samples, aligned=aligned)
            self.there |= {number for number, ok in zip(numbers, stored, strict=True) if ok}
            self.listen()

        @rule(numbers=NUMBERS, aligned=st.booleans())
        def get(self, numbers: list[int], aligned: bool) -> None:
            assert self.tier is not None
            got = get(self.tier, *[of_kind(number) for number in numbers], aligned=aligned)
            self.listen()
            for number, what in zip(numbers, got, strict=True):
                self.compare(number, what is not None)
                assert what is None or what in self.versions[number], f"page {number} came back wrong"

        @rule(numbers=NUMBERS)
        def find(self, numbers: list[int]) -> None:
            assert self.tier is not None
            found = self.tier.find([of_kind(number).page.name for number in numbers])
            self.listen()
            for number, page in zip(numbers, found, strict=True):
                self.compare(number, page is not None)
                assert page is None or page in {what.page for what in self.versions[number]}

        @rule(numbers=NUMBERS)
        def remove(self, numbers: list[int]) -> None:
            assert self.tier is not None
            self.tier.remove([of_kind(number).page.name for number in numbers])
            self.there -= set(numbers)

        @rule()
        def reopen(self) -> None:
            assert self.tier is not None
            self.tier.close()
            self.tier = open_tier(self.folder / "tier")

        @invariant()
        def names_are_what_is_there(self) -> None:
            if self.tier is None:
                return
            self.listen()
            names = {of_kind(number).page.name for number in self.there}
            assert held(self.tier) == names
            assert self.tier.usage().pages == len(names)

        def compare(self, number: int, present: bool) -> None:
            assert present == (number in self.there), f"page {number} is {'' if present else 'not '}there"

        def listen(self) -> None:
            assert self.tier is not None
            came, left = self.tier.news()
            assert not came, "nobody else stores pages here"
            numbers = {of_kind(number).page.name: number for number in self.there}
            self.there -= {numbers[name] for name in left if name in numbers}

        def teardown(self) -> None:
            if self.tier is not None:
                self.tier.close()
            shutil.rmtree(self.folder)

    Machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    return Machine
