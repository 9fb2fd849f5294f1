"""Trains a model: python -m tokenvit_jax.train --config=configs/dgt_t.py --workdir=DIRECTORY.

Rerunning the same command resumes from the latest checkpoint in the workdir. On several machines,
run it on each with --coordinator=host:port --num_processes=N --process_id=I; on TPU pods and under
SLURM these are found automatically.
"""

from tokenvit_jax import stopping

if __name__ == "__main__":
    stopping.watch()  # before the imports, which take seconds

import os
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.output import check_folder
from tokenvit_jax.valid import whole

if TYPE_CHECKING:
    from ml_collections import ConfigDict

FLAGS = cli.config_flags()
flags.DEFINE_string(
    "workdir", None, "folder of the run, created if it does not exist", flag_values=FLAGS
)
flags.DEFINE_string(
    "coordinator", None, "several processes: host:port of process 0", flag_values=FLAGS
)
cli.define_number(FLAGS, "num_processes", None, "several processes: number of processes", whole(1))
cli.define_number(
    FLAGS, "process_id", None, "several processes: number of this process, from 0", whole(0)
)


def main(flag_values: flags.FlagValues) -> None:
    """Connects the processes and trains the model."""
    from tokenvit_jax.tasks import create_task
    from tokenvit_jax.training import processes
    from tokenvit_jax.training.validate import check_task

    config, workdir = cli.read_config(flag_values), Path(flag_values.workdir)
    check_folder(workdir, "--workdir")
    check_task(create_task(config))  # here too: a mistake shows before processes wait for others
    processes.connect(flag_values.coordinator, flag_values.num_processes, flag_values.process_id)
    train(config, workdir)


def train(config: "ConfigDict", workdir: Path) -> None:
    """Trains a model, also in a notebook; see `tokenvit_jax.training.loop.train`."""
    from tokenvit_jax.training import loop

    loop.train(config, Path(os.path.expanduser(workdir)))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("config", "workdir"))
