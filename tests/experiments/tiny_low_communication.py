"""The experiment on communication with a model that compiles fast; the process tests start it."""

from __future__ import annotations

import os
import signal
import sys

from experiments import low_communication
from experiments.parts import replica_study, study
from experiments.parts.language_model import SIZES, Size

SIZES["tiny"] = Size(1, 16, 2, 16, 16, 6e-3)

if __name__ == "__main__":
    study.TIMING_ROUNDS = replica_study.TIMING_ROUNDS = 1
    if os.environ.get("KILLED_PROCESS") == os.environ["EXPERIMENT_PROCESS"].split()[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(low_communication.main(sys.argv[1:]))
