"""Try on a real storage what its dialect promises, with tokens of one minute."""
