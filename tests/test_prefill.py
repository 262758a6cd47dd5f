"""The plugin's observation of how fast its worker computes."""

from kvd.sidecar.prefill import PrefillRate


def test_the_fastest_of_the_recent_observations_counts() -> None:
    rate = PrefillRate()
    assert rate.tokens_per_s == 0.0
    for n, seconds in enumerate((2.0, 0.5, 8.0)):
        rate.missed(f"k{n}", 10, 100.0)
        rate.computed(f"k{n}", 64, 100.0 + seconds)
    assert rate.tokens_per_s == 1280.0
    for n in range(32):
        rate.missed(f"l{n}", 10, 200.0)
        rate.computed(f"l{n}", 64, 201.0)
    assert rate.tokens_per_s == 640.0, "what was long ago is forgotten"


def test_what_was_not_missed_is_no_observation_and_lookups_that_lead_nowhere_are_bounded() -> None:
    rate = PrefillRate()
    rate.computed("never missed", 64, 5.0)
    for n in range(1000):
        rate.missed(f"k{n}", 10, 1.0)
    rate.computed("k0", 64, 2.0)
    assert rate.tokens_per_s == 0.0
    rate.computed("k999", 64, 2.0)
    assert rate.tokens_per_s == 640.0
