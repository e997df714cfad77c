"""Workers that see another CPU: `LocalEngine(warm="tests.cpus")`, with its features in TEST_CPU_FEATURES."""

import os

FEATURES = "TEST_CPU_FEATURES"
if FEATURES in os.environ:  # not in a process of tests: the settings of `warm` would hold for all of them
    import searchfm.learn.warm  # noqa: F401
    from searchfm.learn import precision

    precision.cpu_features = lambda: frozenset(os.environ[FEATURES].split())
