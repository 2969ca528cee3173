"""`python -m benchmarks.network.scaling`, under the name that it had."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # of a script it is the folder of the script

from benchmarks.network.scaling import main

if __name__ == "__main__":
    main(sys.argv[1:])
