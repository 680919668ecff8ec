"""What `minter check` says of settings that load: doubts that an operator should look at, and failures."""

from collections.abc import Iterable, Iterator

from minter.policy.exchanges import Exchange
from minter.policy.routes import SHIPPED_RISK_ASSESSMENT, Route
from minter.providers.dialects import Provider
from minter.sections import DrillSettings
from minter.settings import Loaded
from minter.storages.dialects import DIALECTS
from minter.storages.directory import Directory, Storage


def doubts(loaded: Loaded) -> Iterator[str]:
    """Yield the warnings of `minter check`: valid settings that an operator should look at."""
    for vo, directory in loaded.policy.directories.items():
        yield from _doubts_of_directory(vo, directory)
    untried = sorted({s.dialect for s in loaded.storages if not DIALECTS[s.dialect].tried})
    if untried:
        yield f"dialects from documentation, not tried: {', '.join(untried)}"
    for storage in loaded.storages:
        yield from _doubts_of_storage(storage)
    for route in loaded.settings.routes:
        yield from _doubts_of(route)
    for provider in loaded.settings.providers:
        yield from _doubts_of_provider(provider, loaded.settings.routes)
    yield from _doubts_of_clock(loaded.settings.drill)
    if loaded.settings.http.listen not in ("127.0.0.1", "::1", "localhost"):
        yield (
            f"http.listen is {loaded.settings.http.listen}: nothing there bounds peers that read slowly; "
            "listen on 127.0.0.1 behind a web server (deploy/nginx.conf)"
        )
    if not loaded.settings.database.archive_folder:
        yield "no database.archive_folder: past days stay in the database"
    if not loaded.settings.fts:
        yield "no [[fts]]: FTS jobs cannot be filled"


def _doubts_of_directory(vo: str, directory: Directory) -> Iterator[str]:
    for first, second in directory.shared:
        yield f"{vo}: {first} and {second} share an endpoint and prefix"
    for first, second, endpoint in directory.siblings():
        yield (
            f"{vo}: at {endpoint} the prefix of {second} begins with that of {first}, and paths match as "
            "strings there: a token for one may open the other; give them prefixes that differ"
        )


def _doubts_of_storage(storage: Storage) -> Iterator[str]:
    unable = DIALECTS[storage.dialect].unable
    if storage.tape and {"stage", "poll"} <= unable.keys():
        yield f"{storage.name}: is tape, and dialect {storage.dialect} can neither stage nor poll by token"
    if any("jwt/v1/any" in a for a in storage.audience):
        yield f"{storage.name}: audience any opens every storage of the VO"


def failures(loaded: Loaded) -> Iterator[str]:
    """Yield what cannot work: a storage that verifies no key of its issuer, a rule that never applies."""
    for rule in loaded.settings.exchanges:
        yield from _failures_of(rule)
    for storage in loaded.storages:
        algorithms = loaded.settings.issuers[storage.vo].algorithms
        verifiable = DIALECTS[storage.dialect].algorithms
        if storage.tokens and not verifiable & {*algorithms}:
            yield (
                f"{storage.name}: dialect {storage.dialect} verifies {', '.join(verifiable)} only, and "
                f"issuers.{storage.vo}.algorithms has {', '.join(algorithms)}; add one that it verifies"
            )


def _failures_of(rule: Exchange) -> Iterator[str]:
    if not rule.offline_access or rule.providers:
        return
    for name in rule.clients:
        if name in rule.subject_clients and not set("*?[") & set(name):
            yield (
                f"exchange rule {rule.name}: client {name} gets no refresh tokens for its own tokens, as "
                "it can request new ones at any time; take it out of clients or subject_clients, or set "
                "offline_access = false"
            )


def _doubts_of_clock(drill: DrillSettings) -> Iterator[str]:
    if drill != DrillSettings():
        yield "[drill] is set: this engine's clock does not show the real time"


def _doubts_of_provider(provider: Provider, routes: Iterable[Route]) -> Iterator[str]:
    if not provider.how.tried:
        yield f"provider {provider.name}: {provider.how.software} is from documentation, not tried"
    if not any(route.provider == provider.name for route in routes):
        yield f"provider {provider.name}: no route asks it for tokens"


def _doubts_of(route: Route) -> Iterator[str]:
    if route.risk_assessment == SHIPPED_RISK_ASSESSMENT:
        yield f"route {route.name}: relies on Minter's own risk assessment; adopt or replace it"
    if route.plaintext_queue:
        yield f"route {route.name}: its tokens may lie unencrypted on durable queues"
    ordinary = route.wait_seconds + route.transfer_seconds * (1 + route.retries) + route.margin_seconds
    if route.granularity != "file" and 2 * ordinary > route.max_lifetime_seconds:
        yield (
            f"route {route.name}: shared tokens live {route.max_lifetime_seconds} s and an ordinary need is "
            f"{ordinary} s, so few files will share one; shorten wait_seconds or transfer_seconds"
        )
