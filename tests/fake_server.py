"""A real HTTP server on this machine that speaks the OpenAI protocol and misbehaves on purpose."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[int], Any]  # number of the request → None, or what comes instead of an answer
EXTRAS = {"include_stop_str_in_output", "no_stop_trim", "min_tokens", "skip_special_tokens"}


def words_of(prompt: object, seed: int) -> str:
    """What the server's model says: a function of prompt and seed."""
    digest = hashlib.sha256(f"{prompt} {seed}".encode()).digest()
    return f" is {digest[0]} and {digest[1]} so {digest[2]} it is </think> <answer> {digest[0] % 3} </answer> and more"


@dataclass
class FakeServer:
    """How it behaves, and what it was asked.

    Attributes:
        models: that it lists.
        endpoints: that it has.
        refuses: options that it refuses by 422; all others that it does not know it ignores.
        takes_ids: whether a prompt may be token ids.
        stops: `kept`, `told` or `dropped`.
        samples: does so even where greedy responses are asked for.
        fault: of a request for a response, by its number from 0.
        context: as it lists it.
        counts: whether it tells how many tokens there are.
        delay: seconds of each response.
        drip: seconds between the bytes of an answer.
    """

    models: tuple[str, ...] = ("tiny",)
    endpoints: tuple[str, ...] = ("/v1/completions", "/v1/chat/completions")
    refuses: frozenset[str] = frozenset()
    takes_ids: bool = True
    stops: str = "kept"
    samples: bool = False
    fault: Fault = lambda _: None
    context: int | None = None
    counts: bool = True
    delay: float = 0.0
    drip: float = 0.0
    key: str | None = None
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path not in self.endpoints:
            return 404, {"detail": "Not Found"}
        if refused := self.refuses & body.keys():
            return 422, {"detail": f"Unexpected fields in the request: {refused}"}
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        is_chat = path.endswith("chat/completions")
        prompt = body["messages"] if is_chat else body["prompt"]
        if isinstance(prompt, list) and not is_chat and not self.takes_ids:
            return 400, {"detail": "prompt must be a string."}
        drawn = body["seed"] if body.get("temperature", 0) > 0 else 0
        drawn = time.monotonic_ns() if self.samples else drawn
        words = words_of(prompt, drawn).split(" ")[: body["max_tokens"] + 1]
        text, reason, matched = " ".join(words), "length", None
        if len(words) <= body["max_tokens"]:
            reason = "stop"
        ends = [(text.find(s), s) for s in body.get("stop") or () if s in text]
        if ends:
            start, found = min(ends)
            text = text[:start] + (found if self.stops == "kept" else "")
            reason, matched = "stop", found if self.stops == "told" else None
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "stop_reason": matched}
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": text.count(" ")}
        return 200, {
            "model": body["model"], "choices": [choice], **({"usage": usage} if self.counts else {})
        }  # fmt: skip

    def handle(self, path: str, body: dict[str, Any]) -> Any:
        """Note a request and answer it; the number of requests at once is counted."""
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(self.delay)
            fault = self.fault(number)
            return self.answer(path, body) if fault is None else fault
        finally:
            with self._lock:
                self.at_once -= 1

    @contextmanager
    def running(self, port: int = 0) -> Iterator[FakeServer]:
        """Serve on a port of this machine while the block lasts."""
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join(10)


def _handler(fake: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            models = [{"id": name, "max_model_len": fake.context} for name in fake.models]
            self.reply(200, {"object": "list", "data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if fake.key and self.headers.get("authorization") != f"Bearer {fake.key}":
                return self.reply(401, {"error": {"message": "Incorrect API key provided"}})
            answer = fake.handle(self.path, body)
            if answer == "reset":
                return self.connection.close()
            self.reply(*answer)

        def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if not fake.drip:
                self.wfile.write(data)
                return
            with suppress(OSError):  # nobody waits any more
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    time.sleep(fake.drip)

    return Handler
