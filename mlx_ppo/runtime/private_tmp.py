"""A temporary folder that only this user can write.

mlx's CPU compiler writes libraries into a predictable folder under TMPDIR and loads what it finds there, so in the
shared /tmp another user could plant one. The folder stays, so that nothing is compiled twice.
"""

import os
import stat
import tempfile
from pathlib import Path


def use_private_tmp() -> Path | None:
    """Point TMPDIR to a 0700 folder of this user's cache; to a fresh one where that isn't possible.

    Returns:
        The folder; None where none could be made, and TMPDIR stays.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx-ppo" / "tmp"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = cache.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
            raise OSError("not a private folder")
        probe, name = tempfile.mkstemp(dir=cache)
        os.close(probe)
        os.unlink(name)
    except (OSError, RuntimeError):
        try:
            cache = Path(tempfile.mkdtemp(prefix="mlx-ppo-"))
        except OSError:
            return None
    tempfile.tempdir = tempfile.gettempdir()  # this process's own temporary files stay where they were
    os.environ["TMPDIR"] = str(cache)
    return cache
