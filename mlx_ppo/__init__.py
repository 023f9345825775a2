"""PPO from human feedback for language models, entirely offline, on a laptop.

Importing this package first switches third-party libraries offline, gives mlx's compiler a private folder and, on
Linux, loads an optimised BLAS: all of this must happen before mlx, mlx_lm or transformers are imported.
"""

from mlx_ppo.compute.cpu.blas import load_blas as _load_blas
from mlx_ppo.runtime.offline import go_offline as _go_offline
from mlx_ppo.runtime.private_tmp import use_private_tmp as _use_private_tmp

__version__ = "0.1.0"

_go_offline()
_use_private_tmp()
BLAS = _load_blas()
