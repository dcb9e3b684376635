"""What processes of the tests start with: imports make a million objects, and none of them is garbage."""

import gc

gc.set_threshold(100_000, 50, 100)
