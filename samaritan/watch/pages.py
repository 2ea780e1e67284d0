"""The small web server of a kit: four addresses, read-only, on this machine alone."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import samaritan.report
from samaritan.errors import DeploymentError, SamaritanError
from samaritan.report import units
from samaritan.watch import words
from samaritan.watch.follow import Json
from samaritan.watch.metrics import MISSING, Metric, exposition

REFRESH_S = 15
"""How often a page loads itself anew."""

_HERE = Path(__file__).parent
_FRESH_S = 3.0
_STALE_S = 30.0
_HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names by which a browser may ask. Another one is a page elsewhere that tries to read this one."""
_TIMEOUT_S = 2.0
"""For sockets that set no time of their own, above all the supervisor's."""

_log = logging.getLogger("samaritan.watch")


@dataclass(frozen=True)
class Pages:
    """What a kit shows of itself.

    Attributes:
        look: How everything stands, as JSON; under `problems` what is wrong with the processes.
        template: File of the page.
        context: More for the page, from what `look` returned.
        metrics: Numbers, from what `look` returned.
    """

    look: Callable[[], Json]
    template: Path
    context: Callable[[Json], Mapping[str, Any]]
    metrics: Callable[[Json], Sequence[Metric]]


class Recent:
    """A value that is looked up at most every few seconds, by one caller at a time.

    While somebody looks, others get the value before. A look that does not end makes itself known.

    Args:
        look: May take a while.
        clock: Of seconds.
    """

    def __init__(
        self, look: Callable[[], Json], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look, self._clock = look, clock
        self._lock = threading.Lock()
        self._value: tuple[float, Json] | None = None

    def get(self) -> Json:
        """The value.

        Raises:
            DeploymentError: SAM-N502 when no look has ended for half a minute.
        """
        begun = self._clock()
        known = self._value
        if known is not None and begun - known[0] < _FRESH_S:
            return known[1]
        wait_s = _STALE_S if known is None else 0.0
        if not self._lock.acquire(timeout=wait_s):
            if known is not None and begun - known[0] < _STALE_S:
                return known[1]
            raise DeploymentError(
                "SAM-N502",
                f"the state of the kit could not be read for {_STALE_S:g} s",
                "A disk or a process hangs: look at the machine.",
            )
        try:
            known = self._value
            if known is None or self._clock() - known[0] >= _FRESH_S:
                found = self._look()
                self._value = known = self._clock(), found
            return known[1]
        finally:
            self._lock.release()


def application(pages: Pages) -> Starlette:
    """The web server's four addresses."""
    recent = Recent(pages.look)
    template = _environment(pages.template.parent).get_template(pages.template.name)
    style = stylesheet()

    def page(request: Request) -> Response:
        tree = recent.get()
        text = template.render(
            **tree,
            **pages.context(tree),
            style=Markup(style),  # noqa: S704  our own files
            refresh_s=0 if "still" in request.query_params else REFRESH_S,
        )
        return HTMLResponse(text)

    def health(request: Request) -> Response:
        problems = recent.get()["problems"]
        if problems:
            return JSONResponse({"ok": False, "problems": problems}, 503)
        return JSONResponse({"ok": True})

    def status(request: Request) -> Response:
        return JSONResponse(recent.get())

    def metrics(request: Request) -> Response:
        made = exposition(pages.metrics(recent.get()))
        if made is None:
            return PlainTextResponse(MISSING + "\n", 404)
        return Response(made[0], headers={"content-type": made[1]})

    def fault(request: Request, error: Exception) -> Response:
        _log.error("%s: %s", request.url.path, error)
        if request.url.path == "/health":
            return JSONResponse({"ok": False, "problems": [str(error)]}, 503)
        return PlainTextResponse(f"{error}\n", 503)

    policy = _content_policy(style)
    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/status.json", status),
            Route("/metrics", metrics),
        ],
        middleware=[
            Middleware(_Headers, policy=policy),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(_HOSTS), www_redirect=False),
        ],
        exception_handlers={SamaritanError: fault},
    )


def serve(app: ASGIApp, port: int) -> None:
    """Serves on the loopback address until SIGTERM or SIGINT.

    Raises:
        DeploymentError: SAM-N501 when the port is taken.
    """
    import uvicorn

    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise DeploymentError(
            "SAM-N501",
            f"the status page cannot listen on 127.0.0.1:{port}: {error.strerror or error}",
            "Set another status_port in server.yaml or site.yaml, and start anew.",
        ) from error
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, date_header=True,
        timeout_graceful_shutdown=3, limit_concurrency=64, ws="none",
    )  # fmt: skip
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


def stylesheet() -> str:
    """The report's, and what a status page needs more."""
    report = Path(samaritan.report.__file__).parent / "report.css"
    return report.read_text("utf-8") + (_HERE / "page.css").read_text("utf-8")


def linked(text: str) -> Markup:
    """A text for a page: error codes lead to their explanation, commands look like commands."""
    markup = str(escape(text))
    for code in words.codes_in([text]):
        if words.meaning(code):
            markup = markup.replace(code, f'<a href="#{code}">{code}</a>')
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", markup))  # noqa: S704  escaped above


def explained(texts: Sequence[str]) -> list[tuple[str, str, str]]:
    """Every error code in some texts with its meaning and what to do, where that is known."""
    found = ((code, words.meaning(code)) for code in sorted(words.codes_in(texts)))
    return [(code, *said) for code, said in found if said is not None]


def process_rows(processes: Mapping[str, Json], meanings: Mapping[str, str]) -> list[Json]:
    """Rows of the table of processes.

    Args:
        processes: From `samaritan.operate.processes.states`.
        meanings: What each of them does.
    """
    return [
        {
            "name": name,
            "what": meanings.get(name, ""),
            "state": told["state"],
            "message": told["message"],
            "up": words.lasting(told["seconds"]) if told["pid"] else units.MISSING,
        }
        for name, told in processes.items()
    ]


class _Headers:
    """What every answer says to browsers: nothing from elsewhere, nothing kept, no frames."""

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = self._policy
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
                headers["cross-origin-resource-policy"] = "same-origin"
                headers["cache-control"] = "no-store"
            await send(message)

        await self._app(scope, receive, with_headers)


def _content_policy(style: str) -> str:
    """Our own style sheet and nothing else: no script, no picture, no address elsewhere."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(folder), FileSystemLoader(_HERE)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": units.score, "count": units.count, "size": units.size, "plural": units.plural,
        "duration": units.duration, "linked": linked, "days": words.days,
        "lasting": words.lasting,
    }  # fmt: skip
    return environment
