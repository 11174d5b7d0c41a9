"""Settings of all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile(
    "search", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# The same examples in every run: a change is judged by itself. `--hypothesis-profile search` looks
# for others.
settings.register_profile("steady", settings.get_profile("search"), derandomize=True)
settings.load_profile("steady")
