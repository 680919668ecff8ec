"""The SQL statements of Minter; no other package has any."""
