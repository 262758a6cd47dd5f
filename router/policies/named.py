"""All policies by the names that operators know them by. Pure: chance arrives as an argument."""

from collections.abc import Callable, Mapping
from typing import Final, Literal

from kvd.router.policies.baselines import CacheAware, Dynamo, LeastBusy, Lmetric, Random, RoundRobin
from kvd.router.policies.choice import Draw, Policy
from kvd.router.policies.kvd import Kvd
from kvd.router.rates import Rates

Name = Literal["kvd", "lmetric", "dynamo", "cache_aware", "round_robin", "random", "least_busy"]

POLICIES: Final[Mapping[str, Callable[[Draw, Callable[[str], Rates]], Policy]]] = {
    "kvd": lambda draw, rates: Kvd(rates),
    "lmetric": lambda draw, rates: Lmetric(draw),
    "dynamo": lambda draw, rates: Dynamo(draw),
    "cache_aware": lambda draw, rates: CacheAware(),
    "round_robin": lambda draw, rates: RoundRobin(),
    "random": lambda draw, rates: Random(draw),
    "least_busy": lambda draw, rates: LeastBusy(),
}
