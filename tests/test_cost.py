"""What a unit is said to have cost: its own work, its children's, and nobody else's."""

from __future__ import annotations

import subprocess
import sys
import time

from jobs import world
from jobs.cost import Meter

HALF_A_SECOND = "import time\nwhile time.process_time() < 0.5: pass"


def test_work_of_this_process_and_of_its_children_is_counted():
    meter = Meter()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    alone = meter.read()["core_seconds"]
    subprocess.run([sys.executable, "-c", HALF_A_SECOND], check=True)
    both = meter.read()["core_seconds"]
    assert 0.29 <= alone < both - 0.45


def test_the_peak_is_that_of_this_unit():
    world.set_numerics(1)  # which has memory kept from step to step
    memory = [bytearray(b"x" * 3_000_000) for _ in range(100)]
    large = Meter().read()["peak_gb"]
    del memory
    small = Meter().read()["peak_gb"]
    assert small < large - 0.2
