"""64 virtual CPU devices for every test and doctest; operands of different ranks are an error; cheap compilation."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests that compile for TPUs run in several processes at once

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 64)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time of a test is LLVM's, and what LLVM makes of a program is not what most tests are about: without its
# optimization a contract of an algorithm needs half of the time. A test of bits, memory, a schedule or many rounds has
# the marker `full_compilation`; `make test-all` has it for all. By jax.config: what tests start in other processes is
# compiled as users do, so that "a resumed run gives the same bits" is a statement on two compilations.
CHEAP = "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ
jax.config.update("jax_disable_most_optimizations", CHEAP)


def _compile_as_users_do(full):
    if jax.config.jax_enable_compilation_cache == full:
        jax.config.update("jax_disable_most_optimizations", CHEAP and not full)
        jax.config.update("jax_enable_compilation_cache", not full)
        compilation_cache.reset_cache()  # JAX asks only once whether there is a cache


@pytest.hookimpl(tryfirst=True)  # before the fixtures, of which a module's are made once
def pytest_runtest_setup(item):
    _compile_as_users_do(item.get_closest_marker("full_compilation") is not None)


@pytest.fixture(scope="session", autouse=True)
def _one_compilation_cache(tmp_path_factory):
    """For all processes of pytest-xdist, new with every run."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    jax.config.update("jax_compilation_cache_dir", str(root / "jax-cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
