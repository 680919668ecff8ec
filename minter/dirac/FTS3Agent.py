# ruff: noqa: N999 - DIRAC finds a class by its module's name
"""DIRAC's FTS3Agent with per-file tokens; `HandlerPath = minter/dirac/FTS3Agent` makes DIRAC load it."""

from DIRAC import gLogger
from DIRAC.DataManagementSystem.Agent import FTS3Agent as stock  # noqa: N813
from DIRAC.DataManagementSystem.Client.FTS3Job import FTS3Job
from DIRAC.Resources.Storage.StorageElement import StorageElement

from minter.dirac.jobs import wrap

wrap(stock, FTS3Job, StorageElement, gLogger.getSubLogger("minter"))

FTS3Agent = stock.FTS3Agent
"""The agent itself is DIRAC's; DIRAC looks for a class with the module's name."""
