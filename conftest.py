"""64 virtual CPU devices for every test and doctest; operands of different ranks are an error; cheap compilation."""

import gc
import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests that compile for TPUs run in several processes at once

import jax
import pytest
from jax._src import compiler  # its options for all programs have no public name

jax.config.update("jax_num_cpu_devices", 64)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time of a test is LLVM's, and what LLVM makes of a program is not what most tests are about: without its
# optimization a contract of an algorithm needs half of the time. A test of bits, memory, a schedule or many rounds has
# the marker `full_compilation`; `make test-all` has it for all. By jax.config: what tests start in other processes is
# compiled as users do, without the fixture `compiled_alike`.
# There is no compilation cache. It saves nothing more, and a step of workers of two devices behind a switch that
# jaxlib 0.10.2 reads from it for CPUs hangs or aborts: its collectives no longer wait for each other.
CHEAP = "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ
jax.config.update("jax_disable_most_optimizations", CHEAP)

# Of the rest two thirds are what XLA sets up for each fusion and for each of the 32 parts it compiles a program in,
# however small: without both a step of three layers compiles in a fourth of the time, to the same collectives.
QUICKLY = {"xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):  # later jaxlibs have no others
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
options_of_jax = compiler.get_compile_options


def compile_options(*args, env_options_overrides=None, backend=None, **kwargs):
    if jax.config.read("jax_disable_most_optimizations") and backend is not None and backend.platform == "cpu":
        env_options_overrides = QUICKLY | dict(env_options_overrides or {})
    return options_of_jax(*args, env_options_overrides=env_options_overrides, backend=backend, **kwargs)


compiler.get_compile_options = compile_options


@pytest.fixture
def compiled_alike(monkeypatch):
    """Processes that the test starts compile as this one does, to the same bits."""
    jax.jit(lambda: 0)()  # now this one has read its XLA_FLAGS
    if jax.config.read("jax_disable_most_optimizations"):
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        monkeypatch.setenv("XLA_FLAGS", " ".join(f"--{name}={value}".lower() for name, value in QUICKLY.items()))


# What wraps packages of others is for where they are: `pip install -e '.[peers]'`.
collect_ignore = [] if importlib.util.find_spec("torch") else ["benchmarks/network/contenders/in_torch.py"]

# Tracing makes objects by the hundred thousand that live as long as their program: looked through less often.
gc.set_threshold(100_000, 20, 50)


@pytest.hookimpl(tryfirst=True)  # before the fixtures, of which a module's are made once
def pytest_runtest_setup(item):
    cheap = CHEAP and item.get_closest_marker("full_compilation") is None
    if CHEAP and jax.config.read("jax_disable_most_optimizations") != cheap:
        jax.config.update("jax_disable_most_optimizations", cheap)
        jax.clear_caches()  # of what was compiled the other way, such as the drawing of first parameters
