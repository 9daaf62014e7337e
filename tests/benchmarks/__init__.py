"""Speed and memory of the package, as ratios to a training gradient: `python -m tests.benchmarks --help`."""
