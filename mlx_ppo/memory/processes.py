"""How many processes a run is worth, and how many threads each of them, beside what else the machine does."""

import psutil

from mlx_ppo.compute.adapted import count_of
from mlx_ppo.compute.cpu import threads
from mlx_ppo.compute.device import kind
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.phases import Accountant
from mlx_ppo.runtime.load import left_by, looked
from mlx_ppo.runtime.system import cores

_MOST = 8  # processes; more were never measured
_WORTH = 2e12  # multiplications of a run; below it takes some 20 seconds, of which the start of a process takes two
# Responses that each process of a large model decodes together at least. With fewer, a token takes as long as reading
# the weights, which each does for itself; measured with 135 million parameters on two cores: an iteration of two takes
# 1.13 times as long as that of one process with 4 each, 0.95 times with 16 each.
_TOGETHER = 16
LONG = 5.0  # seconds after which a load is no passing one


def parameters_of(accountant: Accountant) -> int:
    """Numbers in the policy's model."""
    return count_of(accountant.roles.trunk.base.values())


def most_processes(config: TrainConfig, accountant: Accountant) -> int:
    """As many as have a core, a prompt of their own and enough responses, where the run is worth them."""
    section, shapes, parameters = config.rollout, accountant.shapes, parameters_of(accountant)
    responses = section.prompts * section.samples_per_prompt
    tokens = responses * (shapes.prompt + shapes.response) * config.run.iterations
    most = worthwhile(tokens * parameters * (4 + 6 * config.ppo.epochs), section.prompts)
    together = min(responses, section.batch_size or responses)
    return min(most, max(1, together // _TOGETHER)) if threads.gaining(parameters) > 1 else most


def worthwhile(multiplications: float, pieces: int) -> int:
    """Processes for a work of so many multiplications, which comes in so many pieces; 1 where a GPU computes."""
    if multiplications < _WORTH or kind() != "CPU":
        return 1
    return max(1, min(cores(), psutil.cpu_count(logical=False) or cores(), pieces, _MOST))


def first_threads(parameters: int, processes: int) -> int:
    """Threads for each process of a run that begins; 0 where a GPU computes. What other programs keep busy is left."""
    if kind() != "CPU":
        return 0
    most = threads.gaining(parameters, processes)
    if most == 1 or threads.given() is not None:
        return most
    return min(most, left_by(looked().others, processes))
