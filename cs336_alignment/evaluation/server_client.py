"""HTTP to an OpenAI-compatible server: JSON there and back, patience with a busy one, and words for
what goes wrong.
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from cs336_alignment.errors import MAX_GOT_CHARS, UserError

BUSY = (408, 425, 429, 500, 502, 503, 504)  # what another try may change
FIRST_WAIT = 0.5  # seconds; doubled with every try
LONGEST_WAIT = 60.0
LONGEST_ASKED = 3600.0  # a server that asks for more patience than that gets none
CONNECT_SECONDS = 10.0
KEPT_SECONDS = 2.0  # of an idle connection; many servers close theirs after five
TELL_SECONDS = 10.0  # between lines about retries: many requests fail at once
MOST_BYTES = 2**24  # of an answer
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
START_LINES = "vllm serve MODEL, transformers serve MODEL, python -m sglang.launch_server …"
GO_ON = "the same command goes on: what was answered is kept"


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


class Refused(Exception):
    """The server understood that there is a request and will not do it: a status of 4xx, or of 5xx
    where no other try was wanted.

    Attributes:
        status: the number.
        text: what it said, in one line.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text}".strip())
        self.status = status
        self.text = text


class Unreachable(Exception):
    """No connection, or one that broke."""


class ServerClient:
    """A server at an address.

    Args:
        url: the address up to and with `/v1`.
        key: the API key, None: none is sent. It is part of no message and no file. White space
            around it, such as the line end of a file, is none of it.
        timeout: seconds until a response must be there, whole.
        retries: further tries.
        connections: at once.
        tell: takes a line about a retry; called from any thread.

    Raises:
        UserError: the address is none, or the key cannot be sent (78).
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None,
        timeout: float,
        retries: int,
        connections: int,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.url = url.rstrip("/")
        self._retries = retries
        self._timeout = timeout
        self._tell = tell
        self._told, self._lock = -math.inf, threading.Lock()
        key = _sendable(key)
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS), pool=None),
            limits=httpx2.Limits(
                max_connections=connections,
                max_keepalive_connections=connections,
                keepalive_expiry=KEPT_SECONDS,
            ),
            # A proxy of the environment would be asked for this machine's own ports, too.
            trust_env=_host_of(url) not in LOCAL_HOSTS,
        )

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Ask once: GET, or POST of a body.

        Returns:
            The answer, parsed.

        Raises:
            Refused: any status but 200.
            Unreachable: no answer.
            UserError: the answer is no JSON, or endless (74).
        """
        method, content = "GET" if body is None else "POST", bytearray()
        deadline = time.monotonic() + self._timeout  # httpx's is between two pieces
        try:
            with self._http.stream(method, f"{self.url}/{path}", json=body) as response:
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > deadline:
                        raise Unreachable(f"no whole answer within {self._timeout:g} s")
                    if len(content) > MOST_BYTES:
                        what = f"the answer is larger than {MOST_BYTES:,} bytes"
                        raise rubbish(
                            self.url, what, content[:MAX_GOT_CHARS].decode("utf-8", "replace")
                        )
        except httpx2.TimeoutException as failure:
            raise Unreachable(f"no answer within {self._timeout:g} s") from failure
        except (httpx2.TransportError, httpx2.DecodingError) as failure:
            raise Unreachable(str(failure) or type(failure).__name__) from failure
        answered = content.decode("utf-8", "replace")
        if response.status_code != 200:
            said = _said(answered)
            text = " ".join(dict.fromkeys((response.reason_phrase, said))).strip()
            if response.status_code in BUSY:
                raise _Busy(response.status_code, text, _wait_asked_for(response.headers))
            raise Refused(response.status_code, text)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as failure:
            raise rubbish(self.url, "the answer is no JSON", answered) from failure

    def insist(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        gave_up: Callable[[float], bool] = _sleep,
    ) -> Any:
        """POST, again and again where that can help.

        Args:
            path: behind the address.
            body: of the request.
            gave_up: waits so many seconds; True: nobody wants the answer any more.

        Returns:
            The answer, parsed.

        Raises:
            Refused: another try would change nothing.
            UserError: it went wrong as often as `retries` allow, the server asks for too much
                patience, or the answer is no JSON (74).
        """
        for tried in range(self._retries + 1):
            asked = 0.0
            try:
                return self.ask(path, body)
            except _Busy as busy:
                what, asked = str(busy), busy.wait
            except Unreachable as failure:
                what = str(failure)
            # Half of it at random: those that were refused together do not come back together.
            pause = min(LONGEST_WAIT, FIRST_WAIT * 2**tried) * random.uniform(0.5, 1.0)
            pause = max(pause, asked)
            if tried == self._retries or asked > LONGEST_ASKED:
                break
            self._say(f"{self.url}: {what}; try {tried + 2} of {self._retries + 1}", pause)
            if gave_up(pause):
                break
        raise self._failed(what, asked)

    def _say(self, line: str, pause: float) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._told < TELL_SECONDS:
                return
            self._told = now
        self._tell(f"{line} in {pause:.1f} s")

    def _failed(self, what: str, asked: float) -> UserError:
        return UserError(
            "R342",
            f"the server {self.url} does not answer: {what}",
            expected=f"an answer within {self._retries + 1} tries"
            if asked <= LONGEST_ASKED
            else f"to wait at most {LONGEST_ASKED:,.0f} s, and it asks for {asked:,.0f}",
            hint=f"{GO_ON}; for a slow server evaluation.server_timeout=…, "
            "for one that is often busy evaluation.server_retries=… or a smaller "
            "evaluation.server_concurrency=…",
        )

    def down(self, failure: Unreachable) -> UserError:
        """Make the error of a server that is not there at the start."""
        return UserError(
            "R341",
            f"no server answers at {self.url}: {failure}",
            hint=f"start one ({START_LINES}), or name its address: evaluation.server_url=…",
        )


def _sendable(key: str | None) -> str:
    """Take white space off a key, and refuse one that no header can hold, without showing it."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            "C148",
            "the API key of the server holds characters that cannot be sent",
            expected="printable ASCII in OPENAI_API_KEY",
            hint="set it anew, or unset OPENAI_API_KEY",
        )
    return key


def _host_of(url: str) -> str:
    try:
        return httpx2.URL(url).host
    except httpx2.InvalidURL as failure:
        raise UserError(
            "C103",
            f"evaluation.server_url is no address: {failure}",
            expected="an address such as http://127.0.0.1:8000/v1",
            got=url,
        ) from failure


class _Busy(Refused):
    """A refusal that may pass; `wait`: the seconds that the server asks to wait, 0: it says
    nothing.
    """

    def __init__(self, status: int, text: str, wait: float) -> None:
        super().__init__(status, text)
        self.wait = wait


def rubbish(url: str, what: str, got: object) -> UserError:
    """Make the error of an answer that is none (74)."""
    text = got if isinstance(got, str) else json.dumps(got, ensure_ascii=False, default=str)
    return UserError(
        "R344",
        f"the server {url} answered with something that is no response: {what}",
        got=_one_line(text),
        hint=f"is it an OpenAI-compatible server? {GO_ON}",
    )


def _said(text: str) -> str:
    """Find the message in an error's body; servers have several forms of it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _one_line(text)
    while isinstance(found, dict):
        found = next((found[k] for k in ("error", "message", "detail") if k in found), str(found))
    return _one_line(found if isinstance(found, str) else json.dumps(found))


def _one_line(text: str, most: int = 2 * MAX_GOT_CHARS) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "…"


def _wait_asked_for(headers: Mapping[str, str]) -> float:
    """Read `Retry-After`: seconds or a date."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
