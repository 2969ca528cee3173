"""64 virtual CPU devices for every test and doctest, and one compilation cache; different ranks are an error."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests that compile for TPUs run in several processes at once

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 64)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """One cache for all processes of pytest-xdist, new with every run.

    By jax.config, not by the environment: what a test starts in another process compiles its own programs, so that
    "a run that was resumed gives the same bits" is a statement on two compilations.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    jax.config.update("jax_compilation_cache_dir", str(root / "jax-cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
