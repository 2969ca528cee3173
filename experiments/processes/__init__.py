"""Many processes: how they find each other, agree before the first step, and end together."""

from experiments.processes.agreement import Disagreement as Disagreement
from experiments.processes.agreement import agreement as agreement
from experiments.processes.agreement import differences as differences
from experiments.processes.agreement import failures as failures
from experiments.processes.arrays import fetch as fetch
from experiments.processes.arrays import place as place
from experiments.processes.identity import code_version as code_version
from experiments.processes.identity import digest as digest
from experiments.processes.join import join as join
from experiments.processes.join import leave as leave
from experiments.processes.log import is_first as is_first
from experiments.processes.log import log_to as log_to
from experiments.processes.log import say as say
from experiments.processes.preemption import PREEMPTED as PREEMPTED
from experiments.processes.preemption import Preemption as Preemption
