"""Counts the tasks that SLURM started together with this process."""

import os

from tokenvit_jax.errors import UserError


def num_tasks() -> int:
    """Returns the number of tasks of this step of a SLURM job; 1 elsewhere.

    The number of the job is jax's; in an interactive step, the shell alone has a smaller one.
    """
    if "SLURM_STEP_NODELIST" not in os.environ:
        return 1
    of_job = os.environ.get("SLURM_NTASKS", 1)
    return min(int(of_job), int(os.environ.get("SLURM_STEP_NUM_TASKS", of_job)))


def check_one_task(command: str) -> None:
    """Raises UserError for a command that cannot divide its work if it runs in several tasks.

    Args:
      command: its name, for the message.
    """
    count = num_tasks()
    if count > 1:
        raise UserError(
            f"{command} works in one process, and SLURM has started {count} tasks; valid: "
            "srun --ntasks=1, or SLURM_NTASKS=1 if only one task runs the command"
        )
