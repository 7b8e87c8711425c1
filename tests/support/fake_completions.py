"""A server of the OpenAI completions API on this machine: answers from a real model, fails as it is told to."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moecover.checkpoints.structure import read_structure
from moecover.corpora.tokenizer import load_tokenizer
from moecover.runtime.loading import load_model

Json = dict[str, Any]


class Completions(http.server.ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        names: of the models that it lists.
        failures: what happens to the next requests to ``/completions``, one each: a status, ``cut`` (the connection
            breaks within the answer), ``slow``, or text that is sent as it is.
        after: ``Retry-After`` of an answer that is an error.
        change: changes an answer before it is sent.
        max_length: stated in the list of models; None states none.
        key: that requests have to bring; empty for none.
        seen: payloads of ``/completions`` in the order of their arrival.
        at_once: the most requests that were answered at the same time.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        structure = read_structure(folder)
        self.model, self.tokenizer = load_model(structure, dtype="float32"), load_tokenizer(folder)
        self.names, self.failures, self.after, self.key = ["tiny"], list[int | str](), "0", ""
        self.change: Callable[[Json], Json] = lambda answer: answer
        self.max_length: int | None = None
        self.seen: list[Json] = []
        self.at_once, self.running, self.lock, self.turn = 0, 0, threading.Lock(), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may go away before it is answered."""

    def models(self) -> Json:
        stated = {} if self.max_length is None else {"max_model_len": self.max_length}
        return {
            "object": "list",
            "data": [{"id": name, "owned_by": "fake", "root": f"/models/{name}", **stated} for name in self.names],
        }

    def answer(self, asked: Json) -> Json:
        """What the model says to a request, as vLLM writes it down."""
        prompt = asked["prompt"]
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            (ids,) = prompt
        with self.turn, torch.no_grad():
            choice = self.choice(list(ids), asked)
        used = {"prompt_tokens": len(ids), "completion_tokens": 1}
        return {"object": "text_completion", "model": asked["model"], "choices": [choice], "usage": used}

    def choice(self, ids: list[int], asked: Json) -> Json:
        found, text = list(ids), ""
        for _ in range(asked["max_tokens"]):
            logits = self.model(torch.tensor([found])).logits[0]
            found.append(int(logits[-1].argmax()))
            text = self.tokenizer.decode(found[len(ids) :], skip_special_tokens=True)
            stops = [text.index(stop) for stop in asked.get("stop") or [] if stop in text]
            if stops or found[-1] == self.tokenizer.eos_token_id:
                text = text[: min(stops, default=len(text))]
                break
        choice: Json = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
        if asked.get("echo") and asked.get("logprobs"):
            scores = self.model(torch.tensor([found])).logits[0].log_softmax(-1)
            values = [None, *(scores[i, one].item() for i, one in enumerate(found[1:]))]
            tops = [
                None,
                *(
                    {"best": row.max().item(), "it": row[one].item()}
                    for row, one in zip(scores, found[1:], strict=False)
                ),
            ]
            choice["logprobs"] = {"tokens": [str(one) for one in found], "token_logprobs": values, "top_logprobs": tops}
        return choice


class Handler(http.server.BaseHTTPRequestHandler):
    server: Completions
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status: int, said: str) -> None:
        self.reply(status, json.dumps({"error": {"message": said}}).encode(), Retry_After=self.server.after)

    def refused(self) -> bool:
        wrong = self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}"
        if wrong:
            self.fail(401, "Unauthorized")
        return bool(wrong)

    def do_GET(self) -> None:
        if not self.refused():
            self.reply(200, json.dumps(self.server.models()).encode())

    def do_POST(self) -> None:
        fake, asked = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return None
        if self.path != "/v1/completions" or asked["model"] not in fake.names:
            return self.fail(404, f"The model {asked['model']} does not exist.")
        with fake.lock:
            fake.seen.append(asked)
            fake.running += 1
            fake.at_once = max(fake.at_once, fake.running)
            failure = fake.failures.pop(0) if fake.failures else ""
        try:
            if isinstance(failure, int):
                return self.fail(failure, "not now")
            if failure == "slow":
                time.sleep(1.5)
            body = json.dumps(fake.change(fake.answer(asked))).encode()
            if failure == "cut":
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return None
            self.reply(200, body if failure in ("", "slow") else failure.encode())
        finally:
            with fake.lock:
                fake.running -= 1


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Completions]:
    """A server of a folder that answers until the block ends."""
    server = Completions(folder)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
