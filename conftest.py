"""64 virtual CPU devices for every test and doctest; operands of different ranks are an error; cheap compilation."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests that compile for TPUs run in several processes at once

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 64)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time of a test is LLVM's, and what LLVM makes of a program is not what most tests are about: without its
# optimization a contract of an algorithm needs half of the time. A test of bits, memory, a schedule or many rounds has
# the marker `full_compilation`; `make test-all` has it for all. By jax.config: what tests start in other processes is
# compiled as users do.
# There is no compilation cache. It saves nothing more, and a step of workers of two devices behind a switch that
# jaxlib 0.10.2 reads from it for CPUs hangs or aborts: its collectives no longer wait for each other.
CHEAP = "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ
jax.config.update("jax_disable_most_optimizations", CHEAP)


@pytest.hookimpl(tryfirst=True)  # before the fixtures, of which a module's are made once
def pytest_runtest_setup(item):
    cheap = CHEAP and item.get_closest_marker("full_compilation") is None
    if CHEAP and jax.config.read("jax_disable_most_optimizations") != cheap:
        jax.config.update("jax_disable_most_optimizations", cheap)
        jax.clear_caches()  # of what was compiled the other way, such as the drawing of first parameters
