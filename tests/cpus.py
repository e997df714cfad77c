"""Workers that see another CPU: `LocalEngine(warm="tests.cpus")`, with its features in TEST_CPU_FEATURES."""

import os

import searchfm.learn.warm  # noqa: F401
from searchfm.learn import precision

FEATURES = "TEST_CPU_FEATURES"
if FEATURES in os.environ:
    precision.cpu_features = lambda: frozenset(os.environ[FEATURES].split())
