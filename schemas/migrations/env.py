"""Alembic's environment: the caller hands over the connection (`minter db upgrade`)."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"], transactional_ddl=True, target_metadata=None
)
with context.begin_transaction():
    context.run_migrations()
