"""The keeper: `python -m workers.keeper`. As many processes as the budget needs; they share it."""

import logging
import signal
from typing import Any

from minter import logs, wiring
from minter.errors import SettingsError
from minter.keeper import Keeper
from minter.lives import Lives
from minter.metrics import Metrics, serve_process

logger = logging.getLogger("minter.keeper")


def main() -> None:
    """Keep managed tokens fresh until SIGTERM; what is out then is waited for."""
    logs.configure(logging.INFO)
    metrics = Metrics()
    service = wiring.Service(wiring.load_settings(), metrics.observe)
    service.prepare()
    iams = service.iams()
    if not iams:
        raise SettingsError("no [[providers]] in the settings: there is nothing to keep")
    serve_process(metrics.registry, service.loaded.settings.metrics)
    keeper = Keeper(
        service.pool,
        service.keystore,
        Lives(service.engine, service.pool),
        iams,
        service.clock,
        metrics.provider,
    )

    def stop(*_: Any) -> None:
        keeper.stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    logger.info("keeping tokens of %s", ", ".join(iams))
    keeper.run()


if __name__ == "__main__":
    main()
