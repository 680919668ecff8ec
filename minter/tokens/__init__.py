"""The engine: mint tokens, issue them again, and the keys that sign them."""
