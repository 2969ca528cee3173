"""What the stand-ins for train.py and island.py have in common, and how a test of the launcher watches them."""

import pathlib
import time

# The end of a stand-in: it does what `todo` says.
AS_TOLD = """
if isinstance(todo, int):
    sys.exit(todo)
if todo.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, todo))
for _ in range(1000):  # not for ever, should the launcher forget this process
    if told and todo != "ignore":
        sys.exit(75)
    time.sleep(0.02)
sys.exit(99)
"""


def is_alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
