"""What the machine reaches, and a run measured."""
