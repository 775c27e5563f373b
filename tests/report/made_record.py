"""Records of runs that never were."""

import numpy as np

from moe_runtime.recording.run_record import (
    DENSE,
    DISK,
    EXPERTS,
    LANES,
    WAIT,
    FirstForwards,
    Forward,
    ForwardTotals,
    RunRecord,
)


def made_record(num_layers: int = 2, num_bins: int = 3, *, per_bin: int = 1) -> RunRecord:
    """A made-up run of a forward or more a bin; the second bin asked for nothing."""
    generator = np.random.default_rng(0)
    hits = generator.integers(0, 5, (num_layers, num_bins)).astype(float)
    misses = generator.integers(1, 5, (num_layers, num_bins)).astype(float)
    hits[:, 1:2] = misses[:, 1:2] = 0
    seconds = np.full(num_bins, 0.01 * per_bin)
    lanes = dict.fromkeys(LANES, 0.0) | {DENSE: 0.02, EXPERTS: 0.01, WAIT: 0.005, DISK: 0.006}
    forwards = [
        Forward(span=(0.01 * i, 0.01 * (i + 1)), num_tokens=1, is_decode=True)
        for i in range(num_bins)
    ]
    return RunRecord(
        began_at=0.0,
        seconds=0.01 * num_bins,
        prefill=ForwardTotals(num_forwards=0, num_tokens=0, seconds=0.0),
        decode=ForwardTotals(
            num_forwards=num_bins * per_bin, num_tokens=num_bins, seconds=0.01 * num_bins
        ),
        hits_LB=hits,
        misses_LB=misses,
        forward_seconds_B=seconds,
        forwards_per_bin=per_bin,
        lane_seconds=lanes,
        lane_seconds_S={lane: np.full(4, lanes[lane] / 4) for lane in LANES},
        bytes_read_S=np.full(4, 100.0),
        bin_seconds=0.01,
        recent_forwards=forwards,
        recent_spans={lane: [(0.001, 0.004), (0.011, 0.012)] for lane in (DENSE, DISK)},
        first=FirstForwards(forwards=[], visits=[], is_whole=True),
    )
