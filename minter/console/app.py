"""The console's application: pages for people who are signed in, and forms for operators.

No page has a script, so the content policy forbids them all. A form holds its person's key, and its change is
made only after a second page asked whether it is meant.
"""

import getpass
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import falcon
import jinja2

from minter import __version__
from minter.console import charts
from minter.console.pages import AUDITED, Pages
from minter.console.signin import Person, SignIn
from minter.errors import (
    InvalidClient,
    InvalidRequest,
    MinterError,
    OperationNotAllowed,
    RequestError,
    Unavailable,
)
from minter.storages.urls import authority_key

logger = logging.getLogger(__name__)

SESSION, LOGIN = "minter-session", "minter-login"
MAX_FORM_BYTES = 16 * 1024
BANNING = "Ban this? Nothing new is issued for it; tokens that are out work on."
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; form-action 'self';"
    " frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers hide the Origin of forms
}
Change = Callable[[Mapping[str, str], str], str]
Read = Callable[[falcon.Request], Mapping[str, object]]
_STATUS: dict[type[MinterError], int] = {InvalidClient: 401, OperationNotAllowed: 403}


class Shown:
    """The pages' templates."""

    def __init__(self) -> None:
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("minter.console"), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self._templates.globals["version"] = __version__
        self._templates.filters["when"] = lambda at: f"{at:%Y-%m-%d %H:%M:%S}" if at else ""

    def page(
        self, req: falcon.Request, resp: falcon.Response, name: str, person: Person | None, **values: object
    ) -> None:
        """Answer with a page, whose links are relative to the path that was asked for."""
        resp.content_type = "text/html; charset=utf-8"
        root = "../" * (req.path.count("/") - 1)
        template = self._templates.get_template(f"{name}.html")
        resp.text = template.render(person=person, page=name, root=root, **values)


class Guard:
    """Middleware: headers on every answer, and a session before every page but those for signing in."""

    open_to_all = ("/enter", "/sign-in", "/callback", "/style.css", "/favicon.ico", "/health")

    def __init__(self, sign_in: SignIn) -> None:
        self._sign_in = sign_in

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Find the person; raises InvalidClient where nobody is signed in."""
        resp.set_headers(_HEADERS)
        person = self._sign_in.sessions.find(req.cookies.get(SESSION, ""))
        req.context.person = person
        if "\x00" in "".join(map(str, req.params.values())):
            raise InvalidRequest("a parameter has a NUL character")
        if person is None and req.path not in self.open_to_all:
            raise InvalidClient("sign in first")


class Page:
    """A page that is read."""

    def __init__(self, shown: Shown, name: str, read: Read) -> None:
        self._shown, self._name, self._read = shown, name, read

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with the page."""
        self._shown.page(req, resp, self._name, req.context.person, **self._read(req))


class Act:
    """A change by a form of an operator: asked once more, then made and audited under the person's name."""

    def __init__(self, shown: Shown, base: str, back: str, change: Change, question: str) -> None:
        self._shown, self._base, self._back = shown, base, back
        self._change, self._question = change, question

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Ask or act; raises OperationNotAllowed for a viewer, or a form that this console did not give."""
        person: Person = req.context.person
        form = read_form(req)
        origin = req.get_header("Origin")
        if form.pop("form_key", "") != person.form_key or (origin and _place(origin) != _place(self._base)):
            raise OperationNotAllowed("this form is not of your session; open the page again")
        if person.role != "operator":
            raise OperationNotAllowed("only operators may change anything; you may look")
        if form.pop("sure", "") != "yes":
            self._shown.page(
                req,
                resp,
                "sure",
                person,
                question=self._question,
                form=form,
                action=req.path,
                back=self._back,
            )
            return
        done = self._change(form, person.name)
        logger.info("%s: %s", person.name, done)
        self._shown.page(req, resp, "done", person, done=done, back=self._back)


def read_form(req: falcon.Request) -> dict[str, str]:
    """Return the fields of a form; raises OperationNotAllowed or InvalidRequest for a bad one."""
    if (req.content_length or 0) > MAX_FORM_BYTES:
        raise OperationNotAllowed(f"a form has at most {MAX_FORM_BYTES} bytes")
    body = req.bounded_stream.read(MAX_FORM_BYTES + 1).decode(errors="replace")
    found = falcon.uri.parse_query_string(body, keep_blank=True)
    if "\x00" in "".join(map(str, found.values())):
        raise InvalidRequest("a field has a NUL character")
    return {name: value for name, value in found.items() if isinstance(value, str)}


class Door:
    """Signing in and out."""

    def __init__(self, shown: Shown, sign_in: SignIn, base: str) -> None:
        self._shown, self._sign_in = shown, sign_in
        self._secure = base.startswith("https:")
        self._path = urlsplit(base).path or "/"

    def _cookie(self, resp: falcon.Response, name: str, value: str) -> None:
        resp.set_cookie(name, value, path=self._path, secure=self._secure, http_only=True, same_site="Lax")

    def on_get_enter(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Sign in by the one-time link."""
        name = os.environ.get("SUDO_USER") or getpass.getuser()
        session = self._sign_in.enter(req.get_param("key") or "", name)
        if session is None:
            raise InvalidClient("this link was used, or is of an earlier start; the console prints a new one")
        self._cookie(resp, SESSION, session)
        raise falcon.HTTPSeeOther("./")

    def on_get_sign_in(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Send the person to the IAM."""
        if self._sign_in.iam is None:
            raise InvalidClient("this console has no OpenID Connect: open the link that it printed")
        url, login = self._sign_in.iam.start()
        self._cookie(resp, LOGIN, login)
        raise falcon.HTTPSeeOther(url)

    def on_get_callback(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Sign in the person whom the IAM sent back; raises InvalidClient for another browser's sign-in."""
        state, code = req.get_param("state") or "", req.get_param("code") or ""
        if self._sign_in.iam is None or not code:
            raise InvalidClient("the IAM refused this sign-in")
        name, role = self._sign_in.iam.finish(req.cookies.get(LOGIN, ""), state, code)
        self._cookie(resp, SESSION, self._sign_in.open(name, role))
        resp.unset_cookie(LOGIN, path=self._path)
        raise falcon.HTTPSeeOther("./")

    def on_post_sign_out(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Forget the session."""
        self._sign_in.sessions.end(req.cookies.get(SESSION, ""))
        resp.unset_cookie(SESSION, path=self._path)
        self._shown.page(
            req, resp, "error", None, wrong="You are signed out.", iam=self._sign_in.iam is not None
        )


class Files:
    """The style sheet, the charts, and `/health`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        loader = jinja2.PackageLoader("minter.console")
        self._style = loader.get_source(jinja2.Environment(autoescape=True), "style.css")[0]

    def on_get_style(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with the style sheet."""
        resp.content_type, resp.text = "text/css; charset=utf-8", self._style

    def on_get_chart(self, _req: falcon.Request, resp: falcon.Response, kind: str, period: str) -> None:
        """Answer with a chart of rates."""
        service = self._pages.service
        _picture(resp, charts.svg(service.pool, kind, period, service.clock()))

    def on_get_keys(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with the keys' time line."""
        _picture(resp, self._pages.key_lines())

    def on_get_icon(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Answer browsers, which always ask for an icon, that there is none."""
        resp.status = 204

    def on_get_health(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Say that the console serves."""
        resp.media = {"status": "alive"}


def application(pages: Pages, sign_in: SignIn, base: str) -> "falcon.App[Any, Any]":
    """Return the application; `base` is the console's public URL."""
    shown = Shown()
    app: falcon.App[Any, Any] = falcon.App(middleware=[Guard(sign_in)])

    def wrong(req: falcon.Request, resp: falcon.Response, error: MinterError, _params: object) -> None:
        status = _STATUS.get(type(error), 400)
        if not isinstance(error, RequestError):
            status = 503 if isinstance(error, Unavailable) else 500
            logger.warning("%s: %s: %s", req.path, error.reason, error)
        resp.status = status
        person = getattr(req.context, "person", None)
        shown.page(req, resp, "error", person, wrong=error.message, iam=sign_in.iam is not None)

    def failed(req: falcon.Request, resp: falcon.Response, error: Exception, _params: object) -> None:
        logger.error("%s failed", req.path, exc_info=error)
        resp.status = 500
        shown.page(req, resp, "error", None, wrong="The console failed; its log says why.", iam=False)

    app.add_error_handler(Exception, failed)
    app.add_error_handler(falcon.HTTPError, _plain)
    app.add_error_handler(falcon.HTTPStatus, _status)
    app.add_error_handler(MinterError, wrong)
    for name, read in _reads(pages).items():
        app.add_route("/" if name == "overview" else f"/{name}", Page(shown, name, read))
    for path, back, change, question in (
        ("/bans/add", "../bans", pages.ban, BANNING),
        ("/bans/lift", "../bans", pages.unban, "Lift this ban?"),
        ("/clients/able", "../clients", pages.able, "Change whether this client is served?"),
        ("/keys/rotate", "../keys", pages.rotate, "Let the standby sign from now on, instead of this key?"),
    ):
        app.add_route(path, Act(shown, base, back, change, question))
    door, files = Door(shown, sign_in, base), Files(pages)
    for path, resource, suffix in (
        ("/enter", door, "enter"), ("/sign-in", door, "sign_in"), ("/callback", door, "callback"),
        ("/sign-out", door, "sign_out"), ("/style.css", files, "style"), ("/health", files, "health"),
        ("/favicon.ico", files, "icon"),
        ("/chart/{kind}/{period}.svg", files, "chart"), ("/chart/keys.svg", files, "keys"),
    ):  # fmt: skip
        app.add_route(path, resource, suffix=suffix)
    return app


def _reads(pages: Pages) -> dict[str, Read]:
    """Return what reads each page, by the page's name."""
    return {
        "overview": lambda req: pages.home(req.get_param("period") or "hour"),
        "search": lambda req: _searched(pages, req),
        "storages": lambda _: pages.storages(),
        "clients": lambda _: pages.clients(),
        "bans": lambda _: pages.bans(),
        "keys": lambda _: pages.keys(),
        "providers": lambda _: pages.providers(),
        "dead": lambda _: pages.dead(),
        "audit": lambda req: pages.audit({name: req.get_param(name) or "" for name in AUDITED}),
    }


def _picture(resp: falcon.Response, svg: bytes) -> None:
    """Answer with a picture, whose own styles its policy allows."""
    resp.content_type, resp.data = "image/svg+xml", svg
    resp.set_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")


def _place(url: str) -> tuple[str, str]:
    """Return scheme and place of a URL in one spelling, both empty for no URL."""
    scheme, _, rest = url.partition("://")
    return scheme.lower(), authority_key(rest.partition("/")[0])


def _searched(pages: Pages, req: falcon.Request) -> Mapping[str, object]:
    for by in ("client", "storage", "key"):
        if name := req.get_param(by):
            return pages.newest(by, name, everywhere="everywhere" in req.params)
    return pages.search(req.get_param("q") or "")


def _plain(_req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, _params: object) -> None:
    resp.status, resp.content_type, resp.text = error.status, "text/plain", error.title or ""


def _status(_req: falcon.Request, resp: falcon.Response, status: falcon.HTTPStatus, _params: object) -> None:
    resp.status = status.status
    resp.set_headers(dict(status.headers or {}))
