"""What is on the wire: names, and the structs of every message."""
