"""What the console's pages show, and the changes that operators make there."""

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from minter import search, status
from minter.broker.connections import connect
from minter.console import charts
from minter.database import audit, control_changes, overview
from minter.database.connection import transaction
from minter.database.control import read_control, read_keys
from minter.database.live_tokens import count_live
from minter.database.traces import TraceRecord
from minter.errors import InvalidRequest, MinterError, RequestError, Unavailable
from minter.lines import SECONDS, Line
from minter.policy.clients import Client
from minter.probe.probe import PROBED
from minter.service import Service
from minter.storages.dialects import DIALECTS
from minter.tasks import bans as ban_names
from minter.tasks import dead_letters
from minter.tasks.dead_letters import DeadLetter
from minter.tokens import keys
from minter.tokens.keys import Key

logger = logging.getLogger(__name__)

LOOK_SECONDS = 15.0
SIGNING = ("prepared", "active")
"""States of keys that sign or will sign: the time line leaves out others first."""
MOST_TOKENS, MOST_CHANGES, MOST_KEYS = 50, 200, 24
AUDITED = ("actor", "action", "subject")


class Overview:
    """The state of the whole system, asked for in a thread: a part that is down would hold up a page."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.at: datetime | None = None
        self.lines: list[Line] = []
        self.live: dict[str, tuple[int, int]] = {}

    def start(self) -> None:
        """Start the thread."""
        status.keep_looking(self.look, LOOK_SECONDS)

    def look(self) -> None:
        """Ask every part now."""
        self.lines = status.lines(self._service.loaded)
        try:
            self.live = count_live(self._service.pool, self._service.clock(), timedelta(hours=1))
        except MinterError as error:
            logger.warning("live tokens cannot be counted: %s", error)
        self.at = self._service.clock()


class Pages:
    """Reads for pages, and writes for forms; every write is audited under the person's name."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.overview = Overview(service)

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def home(self, period: str) -> dict[str, Any]:
        """Return what the overview shows; raises InvalidRequest for an unknown period."""
        if period not in charts.PERIODS:
            raise InvalidRequest(f"no period {period!r}, expected one of {', '.join(charts.PERIODS)}")
        now, pool, chosen = self.service.clock(), self.service.pool, charts.PERIODS[period]
        totals: dict[str, dict[str, int]] = {}
        means: dict[str, float] = {}
        wrong = ""
        try:
            for kind in charts.KINDS:
                totals[kind] = _totals(charts.rates(pool, kind, chosen, now), chosen)
            means = charts.means(pool, chosen, now)
        except Unavailable as error:
            wrong = error.message
        return {
            "period": period, "periods": list(charts.PERIODS), "kinds": charts.KINDS,
            "lines": self.overview.lines, "at": self.overview.at, "live": self.overview.live,
            "worst": status.worst(self.overview.lines),
            "totals": totals, "means": means, "wrong": wrong,
        }  # fmt: skip

    def search(self, text: str) -> dict[str, Any]:
        """Return the tokens and refusals that a text names; `wrong` says why it names nothing."""
        text = text.strip()
        if not text:
            return _found("", None)
        try:
            found, refusals = search.by_text(self.service, text, MOST_TOKENS)
        except RequestError as error:
            return _found(text, [], query=text, wrong=error.message)
        return _found(text, found, query=text, refusals=refusals)

    def newest(self, by: str, name: str, *, everywhere: bool = False) -> dict[str, Any]:
        """Return the newest tokens of a client, storage or key, as far `back_to` as a short time allows.

        `everywhere` looks at the whole retention, which may take long.
        """
        text = f"{by} {name}"
        if everywhere:
            return _found(text, search.find(self.service, by, name, self.service.since(), MOST_TOKENS))
        found, back_to = search.newest(self.service, by, name, MOST_TOKENS)
        return _found(text, found, back_to=back_to, further={by: name, "everywhere": "1"})

    def storages(self) -> dict[str, Any]:
        """Return the storages of the settings: dialect, what the last day brought, and their last probe."""
        listed = sorted(self.service.loaded.storages, key=lambda s: (s.vo, s.name))
        counted = charts.of_storages(self.service.pool, self.service.clock())
        probed = audit.last(self.service.pool, PROBED, [f"{s.vo}/{s.name}" for s in listed])
        return {
            "storages": [
                (s, DIALECTS[s.dialect], *counted.get((s.vo, s.name), (0, 0)), probed.get(f"{s.vo}/{s.name}"))
                for s in listed
            ]
        }

    def clients(self) -> dict[str, Any]:
        """Return the registered clients with their limits."""
        with transaction(self.service.pool) as connection:
            found: Mapping[str, Client] = read_control(connection).clients
        return {"clients": sorted(found.values(), key=lambda c: c.name)}

    def bans(self) -> dict[str, Any]:
        """Return the bans in force."""
        return {"bans": control_changes.list_bans(self.service.pool), "kinds": ban_names.KINDS,
                "vos": list(self.service.loaded.issuers)}  # fmt: skip

    def keys(self) -> dict[str, Any]:
        """Return the signing keys with their times."""
        ring = self._ring()
        rotation, now = self.service.engine.rotation, self.service.clock()
        return {
            "keys": [
                {
                    "key": k, "signs_from": k.activated_at or keys.may_sign_from(k, rotation),
                    "signs_until": keys.signs_until(k, rotation), "public": keys.is_public(k, now),
                }
                for k in sorted(ring, key=lambda k: (k.vo, k.algorithm, k.published_at))
            ],
        }  # fmt: skip

    def key_lines(self) -> bytes:
        """Return the keys' time line, as a picture."""
        rotation, now = self.service.engine.rotation, self.service.clock()
        newest = sorted(self._ring(), key=lambda k: (k.state in SIGNING, k.published_at))[-MOST_KEYS:]
        return charts.key_lines([charts.KeyLine.of(k, rotation, now) for k in newest], now)

    def _ring(self) -> list[Key]:
        with transaction(self.service.pool) as connection:
            return read_keys(connection)

    def providers(self) -> dict[str, Any]:
        """Return the external IAMs: circuit breaker, pending and fresh tokens."""
        found = {p.name: p for p in self.service.loaded.settings.providers}
        rows = [row for row in overview.providers(self.service.pool, SECONDS) if row[0] in found]
        return {"providers": [(found[row[0]], *row[1:]) for row in rows], "now": self.service.clock()}

    def dead(self) -> dict[str, Any]:
        """Return the dead letters."""
        loaded = self.service.loaded
        found: list[DeadLetter] = []
        if loaded.broker_url:
            dead_letters.each(connect(loaded.broker_url, loaded.broker_ca), found.append)
        return {"letters": found}

    def audit(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Return the newest changes, of an actor, action or subject if the query names one."""
        wanted = {name: query[name].strip() for name in AUDITED}
        actor, action, subject = (value or None for value in wanted.values())
        since = self.service.since()
        found = audit.changes(self.service.pool, since, actor, action, subject, MOST_CHANGES)
        return {"changes": found, **wanted}

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def ban(self, form: Mapping[str, str], actor: str) -> str:
        """Ban what the form names; return what was done. Raises InvalidRequest."""
        reason = form.get("reason", "").strip()
        if form.get("kind") not in ban_names.KINDS or not reason:
            raise InvalidRequest(f"expected a kind of {', '.join(ban_names.KINDS)}, and a reason")
        made = ban_names.named(form["kind"], form.get("value", "").strip(), form.get("vo") or None)
        ban_names.check_known(self.service.pool, made)
        control_changes.add_ban(self.service.pool, made, reason, actor)
        return f"{made.kind} {made.value} is banned"

    def unban(self, form: Mapping[str, str], actor: str) -> str:
        """Lift the ban that the form names; return what was done."""
        made = ban_names.named(form.get("kind", ""), form.get("value", ""), form.get("vo") or None)
        control_changes.lift_ban(self.service.pool, made, actor)
        return f"{made.kind} {made.value} is not banned any more"

    def able(self, form: Mapping[str, str], actor: str) -> str:
        """Disable or enable the client that the form names; return what was done."""
        name, disabled = form.get("client", ""), form.get("to") == "disabled"
        control_changes.disable_client(self.service.pool, name, actor, disabled=disabled)
        return f"client {name} is {'disabled' if disabled else 'enabled'}"

    def rotate(self, form: Mapping[str, str], actor: str) -> str:
        """Let the standby key of a VO and algorithm sign; return what was done. Raises NoUsableKey."""
        of = next((k for k in self._ring() if k.kid == form.get("kid")), None)
        if of is None:
            raise InvalidRequest("no key has this kid")
        (key,) = self.service.rotate_keys(of.vo, [of.algorithm], actor)
        return f"key {key.kid} signs now"


def _found(text: str, tokens: Sequence[TraceRecord] | None, **more: object) -> dict[str, Any]:
    """Return what the search page shows; no tokens are shown, not even their number, for None."""
    told = None if tokens is None else _told(tokens)
    return {"query": "", "text": text, "tokens": told, "refusals": [], "wrong": "", "back_to": None, **more}


def _told(found: Sequence[TraceRecord]) -> list[dict[str, Any]]:
    return [{"trace": one, "claims": msgspec.json.decode(one.payload)} for one in found]


def _totals(shown: charts.Rates, period: charts.Period) -> dict[str, int]:
    step = period.step.total_seconds()
    return {label: round(sum(values) * step) for label, values in sorted(shown.per_second.items())}
