"""The keys of runs that several processes share."""

from pydantic import Field

from mlx_ppo.config.fields import CountOrZero, InputPath, Positive, Section


class ParallelSection(Section):
    """Processes that share the work of a run; its prompts, seeds, batches and completions don't depend on how many."""

    processes: CountOrZero = Field(
        0,
        description="how many; each has a copy of the models. 0: on a CPU as many as there are cores, where the run "
        "is long enough and memory (with `train` that of `memory.budget_gb`, for all together) has room, and in "
        "`train`, of a model with more than 20 million parameters, only as many as decode 16 responses together each; "
        "otherwise 1",
    )
    hosts: InputPath | None = Field(
        None,
        description="JSON file of the machines that share the run, one process each, instead of processes on this one; "
        "the command is given on each of them",
    )
    patience: Positive = Field(
        300.0, description="seconds that processes wait for one of them before the run is saved and stopped"
    )
