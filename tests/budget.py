"""How many examples an expensive law gets, under whatever hypothesis profile."""

from __future__ import annotations

from hypothesis import Phase, settings


def one_in(n: int) -> settings:
    """Settings with one n-th of the examples of the profile."""
    profile = settings.get_profile(settings.get_current_profile_name())
    return settings(max_examples=max(1, profile.max_examples // n))


def real(n: int) -> settings:
    """The same for real ranks, which restart at a failure: shrinking is for simulated ones."""
    return settings(one_in(n), phases=[Phase.explicit, Phase.reuse, Phase.generate])


def rounds(ci: int, nightly: int) -> int:
    """How often to do what takes seconds each time."""
    return nightly if settings.get_current_profile_name() == "nightly" else ci
