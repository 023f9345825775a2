"""What surrounds a job on this machine: the offline environment, BLAS, devices."""
