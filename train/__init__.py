"""The commands: `python -m train.<verb>`."""

import os

# read once, when torch loads OpenMP: threads that wait for work sleep instead of spinning. On a CPU the loader's
# workers need the cores: with spinning, a step of the demo took 7 times as long beside two busy processes on two cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
