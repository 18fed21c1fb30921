"""The cached step by operator.

python benchmarks/profile_step.py ../shared    # two threads; two minutes; results/profile.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from pair import RESULTS, measured
from torch.profiler import ProfilerActivity, profile

STEPS, WARM = 20, 10


def main(shared: Path) -> None:
    """Profile, print, and keep the table."""
    with measured(shared, images=STEPS * 128) as pair:
        trainer = pair.trainer("cached")
        trainer.task.train()
        chunks = np.arange(STEPS * 128).reshape(STEPS, 128)
        for batch in trainer.train.batches([*chunks, *chunks[:WARM]], view=0):  # fills the cache
            trainer._step(batch, 128, view=0)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for batch in trainer.train.batches(chunks, view=0):
                trainer._step(batch, 128, view=0)
    table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=45)
    (RESULTS / "profile.txt").write_text(f"{STEPS} steps, cached\n{table}\n")
    print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
