"""Islands: workers that are programs of their own, so that nobody waits and nobody's death ends the run."""

# ruff: noqa: F401  # imported for callers

from crossover_jax.islands.island import Island, LongAway
from crossover_jax.islands.joining import NoState
from crossover_jax.islands.observe import gather_mean, look
from crossover_jax.islands.roster import Roster, Superseded, directory, dns, roster_of, static
from crossover_jax.islands.stream import LinkError
from crossover_jax.islands.transport import Tls, Transport
