collect_ignore_glob = ["*.py"]  # programs: tests/test_trainers.py runs them
