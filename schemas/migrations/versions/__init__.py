"""One file for each step of the schema; none is ever changed."""
