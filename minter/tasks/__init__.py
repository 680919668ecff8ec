"""The six tasks of the contract, served."""
