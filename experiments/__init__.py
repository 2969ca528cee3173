"""The training application: everything that a run needs around the library."""

import glob
import os
import sys

import jax

# libtpu, which the preflight compiles with, complains for a dozen lines where JAX looks for a TPU and there is none.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
if sys.platform == "linux" and "JAX_PLATFORMS" not in os.environ and not any(map(glob.glob, ACCELERATORS)):
    jax.config.update("jax_platforms", "cpu")
