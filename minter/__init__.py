"""Minter: the token engine of grid data management.

Minter turns transfer requests into narrow, recorded WLCG tokens, one for each file and storage.
Start reading at `minter/tokens/mint.py`.
"""

__version__ = "0.1.0"
