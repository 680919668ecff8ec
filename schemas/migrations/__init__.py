"""Migrations, run by `minter db upgrade`."""
