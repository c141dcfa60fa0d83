"""Settings that must stand before torch is imported."""

import os

# The suite runs several processes on few cores. OpenMP threads that wait for a core they do not get make tiny tensor
# operations tens of times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
