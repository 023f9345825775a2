"""PPO from human feedback for language models, entirely offline, on a laptop.

Importing this package changes the process: environment variables switch third-party libraries offline, TMPDIR becomes a
private folder (where mlx's compiler writes) and, on Linux, an optimised BLAS is loaded for all of the process. All of
this must happen before mlx, mlx_lm or transformers are imported. Nothing else is imported until a name of the public
interface (`mlx_ppo.api`) is used. No network guard is set and no signal handler changed.
"""

from typing import TYPE_CHECKING, Any

from mlx_ppo.compute.cpu.blas import load_blas as _load_blas
from mlx_ppo.runtime.offline import go_offline as _go_offline
from mlx_ppo.runtime.private_tmp import use_private_tmp as _use_private_tmp

if TYPE_CHECKING:
    from mlx_ppo.api import Callback, Policy, RewardModel, generate, load_policy, load_reward_model, score, train_policy

__version__ = "0.2.0"
__all__ = ["Callback", "Policy", "RewardModel", "generate", "load_policy", "load_reward_model", "score", "train_policy"]

_go_offline()
_use_private_tmp()
BLAS = _load_blas()


def __getattr__(name: str) -> Any:
    """The public interface, imported with mlx at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlx_ppo import api

    return getattr(api, name)
