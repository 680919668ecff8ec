"""The contracts: tables, migrations, and the JSON Schemas of messages."""
