"""Minter on a real cluster: Patroni, etcd, PgBouncer, HAProxy and three RabbitMQ nodes, in network namespaces."""
