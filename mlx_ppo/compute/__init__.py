"""How numbers are computed on a device."""
