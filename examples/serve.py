"""Serves sentence embeddings over HTTP: callers' texts are gathered into the static batches of an engine.

    modcompile build mod-model -o engine --shape input_ids=8x128
    modcompile package engine -o minilm --tokenizer all-MiniLM-L6-v2/tokenizer.json
    python examples/serve.py minilm --port 8000
    curl 127.0.0.1:8000/embed -d '{"texts": ["It was raining."]}'
    python examples/serve.py --tiny     makes a small random engine, serves it, asks it, and stops

It listens on this machine alone, and takes the light runtime: numpy, tokenizers, and the engine's own runtime. A text
is one row of a batch: a batch leaves when it is full, or when its first text has waited long enough. Texts that are
longer than the engine's sequences are cut.
"""

import argparse
import contextlib
import json
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from modcompile.runtimes import Engine, load_engine
from tokenizers import Tokenizer

# B batch  S rows  D model dim

LIMIT_BYTES, LIMIT_TEXTS = 2**20, 1024
HIDDEN = "last_hidden_state"


class Batcher:
    """Runs an engine of static shapes on texts of many callers.

    Args:
        engine: Takes ``input_ids`` [B, S] and others of that shape, and gives ``last_hidden_state`` [B, S, D].
        tokenizer: Of the engine's model.
        wait_s: How long a batch that is not full waits for more.

    Attributes:
        batches: How many were run.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, wait_s: float = 0.005):
        shape = next(spec.shape for spec in engine.inputs if spec.name == "input_ids")
        if not all(isinstance(dim, int) for dim in shape):
            raise SystemExit(f"the engine's input_ids are {list(shape)}: build it with --shape input_ids=8x128")
        self.rows, self.length = (int(dim) for dim in shape)
        self.batches = 0
        self._engine, self._tokenizer, self._wait_s = engine, tokenizer, wait_s
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.length)
        self._waiting: queue.SimpleQueue[tuple[str, Future] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work)
        self._worker.start()

    def embed(self, texts: list[str]) -> list[list[float]]:
        """Unit vectors, one for each text."""
        pending: list[Future] = [Future() for _ in texts]
        for pair in zip(texts, pending, strict=True):
            self._waiting.put(pair)
        return [future.result().tolist() for future in pending]

    def close(self) -> None:
        """Ends once the texts that were given before are done."""
        self._waiting.put(None)
        self._worker.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, last = [first], False
            deadline = time.monotonic() + self._wait_s
            while len(batch) < self.rows and not last:
                try:
                    more = self._waiting.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                if more is None:
                    last = True
                else:
                    batch.append(more)
            self._run(batch)
            if last:
                return

    def _run(self, batch: list[tuple[str, Future]]) -> None:
        try:
            vectors = self._vectors([text for text, _ in batch])
        except Exception as error:
            # The callers are told, and the service goes on.
            for _, future in batch:
                future.set_exception(error)
            return
        # Behind the batch's rows there may be empty ones.
        for (_, future), vector in zip(batch, vectors, strict=False):
            future.set_result(vector)

    def _vectors(self, texts: list[str]) -> np.ndarray:
        arrays = {name: np.zeros((self.rows, self.length), np.int64)
                  for name in ("input_ids", "attention_mask", "token_type_ids")}  # [B, S]
        for row, encoding in enumerate(self._tokenizer.encode_batch(texts)):
            count = len(encoding.ids)
            for array, values in zip(arrays.values(), (encoding.ids, encoding.attention_mask, encoding.type_ids),
                                     strict=True):
                array[row, :count] = values
        hidden = self._engine.run({spec.name: arrays[spec.name] for spec in self._engine.inputs})[HIDDEN]  # [B, S, D]
        self.batches += 1
        # Rows of padding may hold anything, and a text may have no token.
        valid = arrays["attention_mask"][:, :, None] > 0  # [B, S, 1]
        sums = np.where(valid, hidden, 0).sum(1)  # [B, D]
        return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


class Refused(Exception):
    """What a request gets: a status and why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def texts_of(content: bytes) -> list[str]:
    """The texts of a request's body."""
    try:
        texts = json.loads(content)["texts"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused(400, 'the body is not JSON such as {"texts": ["It was raining."]}') from None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not texts:
        raise Refused(400, '"texts" is not a list of strings')
    if len(texts) > LIMIT_TEXTS:
        raise Refused(413, f"there are more than {LIMIT_TEXTS} texts")
    return texts


class Service(ThreadingHTTPServer):
    """POST /embed takes {"texts": [...]} and gives {"embeddings": [[...], ...]}; GET /health says that it is there."""

    daemon_threads = True

    # Callers who connect before one is accepted: of the library's 5, a burst would see connections reset.
    request_queue_size = 128

    def __init__(self, batcher: Batcher, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.batcher = batcher

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Service

    def do_GET(self) -> None:
        """Answers a question about the service."""
        if self.path == "/health":
            self._send(200, {"rows": self.server.batcher.rows, "length": self.server.batcher.length})
        else:
            self._send(404, {"error": "there is GET /health and POST /embed"})

    def do_POST(self) -> None:
        """Answers with embeddings, or says why not."""
        try:
            if self.path != "/embed":
                raise Refused(404, "there is GET /health and POST /embed")
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal():
                raise Refused(411, "the request says no Content-Length")
            if int(length) > LIMIT_BYTES:
                raise Refused(413, f"the body has more than {LIMIT_BYTES} bytes")
            self._send(200, {"embeddings": self.server.batcher.embed(texts_of(self.rfile.read(int(length))))})
        except Refused as refused:
            # What is left of the request is not read.
            self.close_connection = True
            self._send(refused.status, {"error": str(refused)})
        except Exception as error:
            self.close_connection = True
            self._send(500, {"error": str(error)})

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is logged."""

    def _send(self, status: int, answer: dict) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving(bundle: Path, port: int = 0, wait_s: float = 0.005) -> Iterator[Service]:
    """A service that is ready, on a port that is free unless one is named."""
    with load_engine(bundle) as engine:
        if engine.manifest.tokenizer is None:
            raise SystemExit(f"{bundle} has no tokenizer: make it with modcompile package --tokenizer")
        tokenizer = Tokenizer.from_file(str(engine.folder / engine.manifest.tokenizer))
        batcher = Batcher(engine, tokenizer, wait_s)
        try:
            with Service(batcher, port) as service:
                thread = threading.Thread(target=service.serve_forever)
                thread.start()
                try:
                    yield service
                finally:
                    service.shutdown()
                    thread.join()
        finally:
            batcher.close()


def ask(url: str, texts: list[str]) -> np.ndarray:
    """The embeddings of texts, from a service: [N, D]."""
    with urlopen(f"{url}/embed", json.dumps({"texts": texts}).encode(), timeout=60) as answer:
        return np.array(json.load(answer)["embeddings"])


def make_tiny_bundle(folder: Path) -> Path:
    """A random model of four blocks, and a tokenizer of a few words."""
    import torch
    from tokenizers import models, pre_tokenizers
    from transformers import BertConfig, BertModel

    import modcompile as mc

    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
                        max_position_embeddings=64)
    torch.manual_seed(0)
    inputs = {name: torch.ones(4, 16, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    model = mc.convert(BertModel(config, add_pooling_layer=False).eval(), inputs,
                       mc.MoDConfig(capacity_ratio=0.5, attend_to="all", gate="straight-through"))
    mc.build_engine(model, folder / "engine", shapes={"input_ids": (4, 16)}).close()
    words = {word: number for number, word in enumerate("? it was raining the others pass by unchanged".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))
    return mc.package(folder / "engine", folder / "bundle", tokenizer=folder / "words.json").folder


def try_out() -> None:
    """Asks a service from many threads at a time, and compares with asking one by one."""
    texts = ["it was raining", "the others pass by", "unchanged", "it was", "by the others"] * 8
    with tempfile.TemporaryDirectory() as folder, serving(make_tiny_bundle(Path(folder)), wait_s=0.05) as service:
        alone = np.concatenate([ask(service.url, [text]) for text in texts[:5]])
        before = service.batcher.batches
        with ThreadPoolExecutor(len(texts)) as callers:
            together = np.concatenate(list(callers.map(lambda text: ask(service.url, [text]), texts)))
        if not np.array_equal(together, np.tile(alone, (8, 1))):
            raise SystemExit("a text's embedding depends on the others in its batch")
        print(f"{len(texts)} callers at a time were served by {service.batcher.batches - before} batches of "
              f"{service.batcher.rows} x {service.batcher.length}")


def main() -> None:
    """Serves a bundle until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle with a tokenizer and static shapes")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--wait-ms", type=float, default=5, help="how long a batch waits to be full")
    parser.add_argument("--tiny", action="store_true", help="make a small random engine, ask it, and stop")
    options = parser.parse_args()
    if options.tiny:
        return try_out()
    if options.bundle is None:
        parser.error("name a bundle, or --tiny")
    with serving(options.bundle, options.port, options.wait_ms / 1000) as service:
        print(f"serving {options.bundle} on {service.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
