"""Checks a configuration before anything is loaded or compiled."""

from ml_collections import ConfigDict

from tokenvit_jax.config import NEEDS, check_needs
from tokenvit_jax.data import check_data
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import Task, check_values, entries_of


def check_task(task: Task, *, training: bool = True) -> None:
    """Raises UserError for the first invalid entry of a task's configuration.

    Args:
      task: the task.
      training: whether training starts. Only then is it checked whether entries go together, and
        whether those that were changed have an effect: a run that exists can be evaluated.
    """
    config = task.config
    check_values(config)
    if not training:
        return
    if config.optimizer.warmup_steps >= config.num_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={config.optimizer.warmup_steps} must be below "
            f"config.num_steps={config.num_steps}"
        )
    _check_milestones(config)
    profiled_steps(config)
    check_data(config)
    task.check()
    check_needs(config, entries_of(config.task), (*NEEDS, *task.needs))


def _check_milestones(config: ConfigDict) -> None:
    """Raises UserError unless every milestone of the step schedule is passed after the warm-up."""
    milestones = tuple(config.optimizer.milestones)
    warmup, last = config.optimizer.warmup_steps, config.num_steps
    within = all(warmup < step < last for step in milestones)
    if not within or len(set(milestones)) < len(milestones):
        raise UserError(
            f"config.optimizer.milestones={milestones} is not valid; valid: different steps above "
            f"config.optimizer.warmup_steps={warmup} and below config.num_steps={last}"
        )


def profiled_steps(config: ConfigDict) -> tuple[int, int]:
    """Returns the first and the last step of the profiler trace; (0, 0): none.

    Raises:
      UserError: the last step is before the first, or training has fewer steps.
    """
    if not config.profile:
        return 0, 0
    first, last = map(int, config.profile.split(":"))
    if not first <= last <= config.num_steps:
        raise UserError(
            f"config.profile={config.profile!r} is not valid; valid: steps 'first:last' in this "
            f"order, from 1 to config.num_steps={config.num_steps}"
        )
    return first, last
