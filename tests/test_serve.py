"""examples/serve.py on loopback: texts of many callers share batches, and each gets its own vector."""

import http.client
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from scripts import EXAMPLES, load_script
from tokenizers import Tokenizer, models, pre_tokenizers

import modcompile as mc

serve = load_script(EXAMPLES / "serve.py")

# B batch  S rows  D width
B, S, D = 4, 6, 5
WORDS = "? it was raining the others pass by".split()
# Row 0 is of padding, as an engine may give it.
TABLE = np.concatenate([np.full((1, D), np.nan), np.random.default_rng(0).standard_normal((len(WORDS), D))])
MODEL = """<ir_version: 10, opset_import: ["": 18]>
main (int64[B, S] input_ids, int64[B, S] attention_mask) => (float[B, S, D] last_hidden_state)
{ used = Mul (input_ids, attention_mask) last_hidden_state = Gather (table, used) }"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    model = onnx.parser.parse_model(MODEL)
    model.graph.initializer.append(numpy_helper.from_array(TABLE.astype(np.float32), "table"))
    onnx.save(model, folder / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS, 1)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    mc.build_engine(folder / "model.onnx", folder / "varying").close()
    mc.build_engine(folder / "model.onnx", folder / "engine", shapes={"input_ids": (B, S)}).close()
    for name in ("engine", "varying"):
        mc.package(folder / name, folder / f"{name}-bundle", tokenizer=folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def service(bundles):
    with serve.serving(bundles / "engine-bundle", wait_s=0.2) as started:
        yield started


def expected(text):
    words = [WORDS.index(word) if word in WORDS else 0 for word in text.split()][:S]
    mean = TABLE[1:].astype(np.float32)[words].sum(0)
    return mean / max(np.linalg.norm(mean), 1e-12)


def test_a_text_has_one_vector_whoever_asks(service):
    texts = ["it was raining", "the others pass by", "", "who was it ?", "it " * 50, "raining"]
    np.testing.assert_allclose(serve.ask(service.url, texts), [expected(text) for text in texts], atol=1e-6)
    before = service.batcher.batches
    with ThreadPoolExecutor(12) as callers:
        answers = list(callers.map(lambda text: serve.ask(service.url, [text]), texts * 2))
    np.testing.assert_allclose(np.concatenate(answers), [expected(text) for text in texts * 2], atol=1e-6)
    # Twelve callers would be twelve batches, were they not gathered.
    assert 12 / B <= service.batcher.batches - before < 12


def request(service, method, path, body=b"", headers=()):
    connection = http.client.HTTPConnection(urlsplit(service.url).netloc, timeout=30)
    connection.request(method, path, body, dict(headers))
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 10_000, b'{"texts": "it"}', b'{"texts": []}',
                                  b'{"texts": [1]}', b"\xff"])
def test_bodies_that_do_not_fit(service, body):
    status, answer = request(service, "POST", "/embed", body)
    assert status == 400 and "texts" in answer["error"]


def test_requests_that_do_not_fit(service, monkeypatch):
    assert request(service, "GET", "/health") == (200, {"rows": B, "length": S})
    assert request(service, "GET", "/embed")[0] == 404
    assert request(service, "POST", "/", b"{}")[0] == 404
    assert request(service, "POST", "/embed", b"{}", {"Content-Length": "-1"})[0] == 411
    assert request(service, "POST", "/embed", b"", {"Content-Length": str(2**20 + 1)})[0] == 413
    assert request(service, "POST", "/embed", json.dumps({"texts": ["it"] * 1025}).encode())[0] == 413
    # The engine's failures are the caller's to know, and the service goes on.
    monkeypatch.setattr(service.batcher, "_vectors", lambda texts: 1 / 0)
    assert request(service, "POST", "/embed", b'{"texts": ["it"]}') == (500, {"error": "division by zero"})
    monkeypatch.undo()
    assert request(service, "POST", "/embed", b'{"texts": ["it"]}')[0] == 200


def test_it_listens_on_this_machine_alone(service):
    assert service.server_address[0] == "127.0.0.1"


def test_bundles_that_it_cannot_serve(bundles):
    with pytest.raises(SystemExit, match="--shape input_ids"), serve.serving(bundles / "varying-bundle"):
        pass
    with pytest.raises(SystemExit, match="no tokenizer"), serve.serving(bundles / "engine"):
        pass


def test_it_takes_no_torch(bundles):
    code = ("import runpy, sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
            f"serve = runpy.run_path({serve.__file__!r})\n"
            "with serve['serving'](sys.argv[1]) as service: print(serve['ask'](service.url, ['it']).shape)")
    done = subprocess.run([sys.executable, "-c", code, bundles / "engine-bundle"], capture_output=True, text=True,
                          timeout=60, env=os.environ)
    assert done.stdout == f"(1, {D})\n", done.stderr
