"""One thread for torch in the tests and in the processes that they start: bits depend on the number of threads."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
