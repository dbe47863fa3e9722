"""The server: answers, refusals that tell nothing, policies, metrics, drift, and how it ends."""

import asyncio
import io
import json
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from adaptive.policy import Policy
from adaptive.reference import Reference
from deploy import server as program
from deploy.client import Connections, post, raw
from deploy.drift import Watch
from deploy.runner import Runner
from deploy.service import Limits, Service
from deploy.uploads import BadImage, decode

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(deadline_ms=5000, queue=8, body_bytes=4000, pixels=10_000, read_s=0.2)


@pytest.fixture(scope="module")
def service(exported_colors):
    one = Service(Runner(exported_colors, "onnxruntime", micro_batch=2, threads=1), "fp32", LIMITS)
    yield one
    one.close()


@pytest.fixture
def ask(service):
    """`ask(method, path, ...)`: the response of the application, without a network."""
    app = program.make_app(service)

    def send(method, path, **words):
        async def one():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **words)

        return asyncio.run(one())

    return send


def picture(color, form="PNG", size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form)
    return file.getvalue()


def classify(ask, body, kind="image/png", query=""):
    return ask("POST", f"/classify{query}", content=body, headers={"Content-Type": kind})


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_images_get_their_class(ask, form):
    found = classify(ask, picture("lime", form), f"image/{form.lower()}; x=y").json()
    assert found["class"] == "green" and found["label"] == 1 and found["exit"] == 0 and not found["cut"]
    assert found["confidence"] > 0.99 and found["deadline_met"] and 0 < found["ms"] < 5000
    grey = classify(ask, picture((130, 120, 120))).json()
    assert grey["exit"] == 1 and grey["class"] == "red"


def test_refusals_have_one_line_and_tell_nothing(ask, service):
    good, noise = picture("red"), b"\x89PNG\r\n\x1a\n" + bytes(100)
    cases = [
        (400, classify(ask, noise)),
        (400, classify(ask, good[:-30])),
        (400, classify(ask, b"")),
        (400, classify(ask, good, "image/jpeg")),
        (400, classify(ask, picture("red", size=(101, 100)))),
        (400, classify(ask, picture("red", size=(1, 60)))),
        (400, classify(ask, good, query="?deadline_ms=nan")),
        (400, classify(ask, good, query="?deadline_ms=1e9")),
        (413, classify(ask, bytes(4001))),
        (415, classify(ask, good, "text/html")),
        (404, ask("GET", "/../../etc/passwd")),
        (404, ask("GET", "/docs")),
        (405, ask("GET", "/classify")),
        (400, ask("PUT", "/policy", content=b"{")),
        (400, ask("PUT", "/policy", content=b"[" * 9000)),
        (400, ask("PUT", "/policy", content=b"[]")),
        (400, ask("PUT", "/policy", json={"policy": "../policy.json"})),
        (400, ask("PUT", "/policy", json={"policy": ["policy.json"]})),
        (413, ask("PUT", "/policy", content=bytes(20_000))),
    ]
    for status, response in cases:
        assert response.status_code == status, response.text
        (line,) = response.json().values()
        assert response.json().keys() == {"error"} and "\n" not in line
        assert not any(word in line for word in ("/work", "/tmp", ".py", "Error", "object at"))
    assert service.policy == "policy.json"


def test_a_bug_tells_nothing_either(ask, service, monkeypatch, caplog):
    def fails(image):
        raise KeyError("/secret/path")

    monkeypatch.setattr(service.runner, "prepare", fails)
    response = classify(ask, picture("red"))
    assert response.status_code == 500 and response.json() == {"error": "internal error"}
    assert "/secret/path" in caplog.text


def test_deadlines_and_full_queues(ask, service, monkeypatch):
    response = classify(ask, picture("red"), query="?deadline_ms=0.001")
    assert response.status_code == 504 and "deadline" in response.json()["error"]
    for attribute, value in (("inside", 8), ("lag", 3.0)):
        with monkeypatch.context() as patch:
            patch.setattr(service, "inside", 2)
            patch.setattr(service, attribute, value)
            response = classify(ask, picture("red"))
            assert response.status_code == 503 and response.headers["retry-after"] == "1"
            assert response.json() == {"error": "there is no room; try again"}
    assert classify(ask, picture("red")).status_code == 200


def test_policies_of_the_folder_can_be_switched(ask, service):
    grey = picture((130, 120, 120))
    assert ask("GET", "/policy").json() == {
        "policy": "policy.json",
        "thresholds": [0.9, 0.0],
        "menu": ["policy.json", "fast.json"],
    }
    assert (
        service.drift and ask("PUT", "/policy", json={"policy": "fast.json"}).json()["policy"] == "fast.json"
    )
    assert classify(ask, grey).json()["exit"] == 0 and service.drift is None
    ask("PUT", "/policy", json={"policy": "policy.json"})
    assert classify(ask, grey).json()["exit"] == 1 and service.drift.samples <= 1


def test_policies_that_were_changed_are_refused(exported_colors, tmp_path):
    for file in exported_colors.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    Policy((0.1, 0.0)).save(tmp_path / "fast.json")
    with pytest.raises(ValueError, match="fast.json is not the file that was exported"):
        Service(Runner(tmp_path, "onnxruntime", threads=1), "fp32", LIMITS)


def test_health_and_metrics(ask):
    classify(ask, picture("red"))
    assert ask("GET", "/healthz").json() == {"alive": True, "ready": True}
    text = ask("GET", "/metrics").text
    for line in (
        'dynexit_requests_total{status="200"}',
        'dynexit_answers_total{cut="false",exit="0"}',
        'dynexit_calls_total{batch="1",stage="0"}',
        'dynexit_queue{stage="1"} 0.0',
        "dynexit_waiting 0.0",
        'dynexit_answer_seconds_bucket{le="0.5"}',
        "dynexit_drift_p_value",
        "process_resident_memory_bytes",
    ):
        assert f"\n{line}" in text
    assert "/classify" in ask("GET", "/openapi.json").json()["paths"]


def test_drift_is_found_as_by_the_monitor():
    rng = np.random.default_rng(0)
    reference = Reference.of(rng.integers(0, 3, 500), rng.random(500), num_exits=3)
    content = {"edges": reference.edges, "weights": reference.weights}
    watch, other = Watch(content), Watch(content)
    watch.update(rng.integers(0, 3, 300), rng.random(300))
    other.update([2] * 300, rng.random(300))
    assert not watch.drift.alarm and watch.drift.samples == 300 and watch.drift.p_value > 0.05
    assert other.drift.alarm and other.drift.change == "harder images than in calibration"
    with pytest.raises(ValueError, match="no reference"):
        Watch({"edges": [[1, 2]]})


def test_what_is_decoded_is_limited():
    with pytest.raises(BadImage, match="10000"):
        decode(picture("red", size=(101, 100)), "image/png", 10_000)
    assert decode(picture("red", size=(100, 100)), "image/png", 10_000).size == (100, 100)


@pytest.fixture(scope="module")
def process(exported_colors):
    """The server in a process of its own, and its port."""
    words = [
        sys.executable,
        "-W",
        "error",
        str(ROOT / "deploy/server.py"),
        str(exported_colors),
        "--port",
        "0",
    ]
    words += [
        "--read_s",
        "0.2",
        "--deadline_ms",
        "20000",
        "--backend",
        "onnxruntime",
        "--threads",
        "1",
        "--micro_batch",
        "2",
    ]
    one = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield one, int(one.stdout.readline().split()[-1])
    one.kill()


def test_malformed_requests_over_a_connection(process):
    rng = np.random.default_rng(0)
    body = picture("red", size=(30, 30))

    async def attack():
        kinds = (import_module("bench_server").malformed(body, rng) for _ in range(150))
        kinds = [*kinds, post(body).replace(b"Length: ", b"Length: 9"), post(b"")[:20]]
        return await asyncio.gather(*(raw(process[1], one) for one in kinds))

    replies = asyncio.run(attack())
    statuses = {reply[9:12] for reply in replies}
    assert statuses <= {b"", b"400", b"404", b"405", b"408", b"413", b"415"} and {b"400", b"408"} <= statuses
    assert not any(word in reply for reply in replies for word in (b"Traceback", b".py", b"/work"))


def test_pytorch_is_not_loaded(process):
    assert "libtorch" not in Path(f"/proc/{process[0].pid}/maps").read_text()


def test_sigterm_answers_what_was_accepted(process):
    one, port = process

    async def load():
        connections = Connections(port)
        asks = [asyncio.create_task(connections.ask(post(picture("lime")))) for _ in range(20)]
        await asks[0]
        one.send_signal(signal.SIGTERM)
        return await asyncio.gather(*asks)

    replies = asyncio.run(load())
    assert {status for status, _ in replies} == {200} and json.loads(replies[0][1])["class"] == "green"
    said, errors = one.communicate(timeout=10)
    assert one.returncode == 0 and said == "stopped: 20 answers, 0 requests too late, 0 without an answer\n"
    assert not errors


def test_wrong_folders_and_ports_are_one_line(exported_colors, tmp_path, monkeypatch, capsys):
    for words, line in (
        ([str(tmp_path)], "manifest.json"),
        ([str(exported_colors), "--port", "99999"], "port 99999"),
    ):
        monkeypatch.setattr(sys, "argv", ["server.py", *words, "--micro_batch", "1", "--threads", "1"])
        with pytest.raises(SystemExit, match="2"):
            program.main()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and line in error and error.count("\n") == 1
