"""Every SQL statement of Minter, and nothing else."""
