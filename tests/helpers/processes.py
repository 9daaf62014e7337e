"""Python in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path


def python(*arguments):
    """Runs Python in a process of its own, and returns what it wrote to stderr."""
    job = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert job.returncode == 0, job.stderr[-5000:]
    return job.stderr
