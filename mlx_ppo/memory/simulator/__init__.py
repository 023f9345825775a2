"""What mlx would allocate for a function: its trace, replayed by mlx's rules of evaluation, donation and allocation.

Two functions are for others; nothing outside of this folder imports its modules.
"""

from mlx_ppo.memory.simulator.products import Product, products
from mlx_ppo.memory.simulator.replay import Peak, named, predict

__all__ = ["Peak", "Product", "named", "predict", "products"]
