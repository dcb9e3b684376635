"""Settings for every process of the tests: imports create a million objects, none of which is garbage."""

import gc

gc.set_threshold(100_000, 50, 100)
