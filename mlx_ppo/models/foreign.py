"""What a file is that was given where a model belongs, and what to do with it. None of these is ever opened further."""

from pathlib import Path

from mlx_ppo.files import open_regular

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z", ".nemo")
_STARTS = (b"PK\x03\x04", b"\x1f\x8b", b"\xfd7zXZ\x00", b"BZh", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c")
_TAR = (257, b"ustar")  # where a tar says that it is one


def foreign(path: Path) -> str | None:
    """Why this file is never read and what to do with it, as the rest of a sentence; None for other files.

    Raises:
        OSError: it can't be read.
    """
    with open_regular(path) as stream:
        start = stream.read(512)
    suffix = path.suffix.lower()
    if start.startswith(b"GGUF"):
        return None
    if suffix in PICKLES or start[:1] == b"\x80":
        return "a pickle, which can run code; only safetensors and GGUF are read. Convert it where you trust it"
    if suffix in _ARCHIVES or start.startswith(_STARTS) or start[_TAR[0] :].startswith(_TAR[1]):
        return "an archive, which is never unpacked here: unpack it where you trust it, and give the folder"
    return None
