"""Trains the small model of tests/training in one of several processes, and prints what came out.

python tests/stress/norm_groups.py 127.0.0.1:1234 4 0    # coordinator, processes, number
"""

import json
import sys
from pathlib import Path

import jax

TESTS = Path(__file__).parents[1]
GROUPS = (0, 1, 2, 4)  # devices that share statistics of BatchNorm; 0: all


def main(address: str, num_processes: str, number: str) -> None:
    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "training")]
    from small_model import BATCH_SIZE, random_batch
    from test_devices import KINDS, mixing_config, start

    from tokenvit_jax.training import processes

    if int(num_processes) > 1:
        processes.connect(address, int(num_processes), int(number))
    rows = BATCH_SIZE // jax.process_count()
    own = slice(rows * jax.process_index(), rows * (jax.process_index() + 1))
    found = {}
    for kind in KINDS:
        for group in GROUPS:
            parallel = kind()
            step, state = start(parallel, mixing_config(), norm_group=group)
            losses = []
            for seed in range(3):
                batch = {name: x[own] for name, x in random_batch(seed).items()}
                state, metrics = step(state, parallel.put_batch(batch))
                losses.append(float(metrics["loss"]))
            variance = jax.device_get(state.model_state["batch_stats"]["norm"]["var"])
            found[f"{kind.__name__}, {group}"] = [*losses, *variance.tolist()]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
