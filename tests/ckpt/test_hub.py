"""`mt ckpt pull`, `push` and the `hub` loader, against a hub on this machine."""

import hashlib
import os
import subprocess
import sys
import time

import pytest

from ckpt.hub_server import serving
from mt_ckpt.conversion.convert import convert

pytestmark = pytest.mark.slow


@pytest.fixture
def model(save_model):
    return save_model("llama")


@pytest.fixture
def hub(model):
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    others = {"pytorch_model.bin": b"pickle", "original/params.json": b"{}"}
    with serving({"org/llama": files | others, "org/pickled": {"config.json": files["config.json"]}}) as hub:
        yield hub


@pytest.fixture
def mt(hub, tmp_path):
    """Runs `mt` with a cache of its own and the local hub for the endpoint."""

    def run(*args, start=False, **env):
        places = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-m", "mt_cli", *map(str, args)]
        environment = {**os.environ, **places, **quiet, **env}
        if start:
            return subprocess.Popen(command, env=environment)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    return run


def test_pull_writes_the_checkpoint_and_nothing_else(mt, model, tmp_path):
    done = mt("ckpt", "pull", "org/llama", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'out'}: config.json, generation_config.json, model.safetensors\n"
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {
        file.name: file.read_bytes() for file in model.iterdir()
    }


def test_what_is_cached_needs_no_network_and_is_not_sent_again(mt, hub, tmp_path):
    mt("ckpt", "pull", "org/llama", tmp_path / "one")
    sent = len(hub.ranges)
    assert mt("ckpt", "pull", "org/llama", tmp_path / "two").returncode == 0
    assert len(hub.ranges) == sent
    assert mt("ckpt", "pull", "org/llama", tmp_path / "three", HF_HUB_OFFLINE="1").returncode == 0
    unreachable = mt("ckpt", "pull", "org/llama", tmp_path / "four", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == 0, unreachable.stderr


def test_a_broken_transfer_goes_on_where_it_stopped(mt, hub, save_model, tmp_path):
    model = save_model("llama", vocab_size=60_000, num_hidden_layers=1)  # 15 MB
    hub.repositories["org/large"] = {file.name: file.read_bytes() for file in model.iterdir()}
    hub.cut_after = 12 << 20
    done = mt("ckpt", "pull", "org/large", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    sent = [wanted for name, wanted in hub.ranges if name == "model.safetensors"]
    assert sent == [None, f"bytes={10 << 20}-"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


@pytest.fixture
def large(hub, save_model):
    """Files of a model of 15 MB, which are on the hub as org/large."""
    model = save_model("llama", vocab_size=60_000, num_hidden_layers=1)
    hub.repositories["org/large"] = {file.name: file.read_bytes() for file in model.iterdir()}
    return hub.repositories["org/large"]


def test_a_killed_run_is_taken_up_where_it_stopped(mt, hub, large, tmp_path):
    hub.hang_after = 12 << 20
    killed = mt("ckpt", "pull", "org/large", tmp_path / "out", start=True)
    wait_for(lambda: [f for f in (tmp_path / "cache").rglob("*.incomplete") if f.stat().st_size >= 10 << 20])
    killed.kill()
    killed.wait()
    hub.hanging.set()
    hub.hang_after, before = None, len(hub.ranges)
    done = mt("ckpt", "pull", "org/large", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert hub.ranges[before:] == [("model.safetensors", f"bytes={10 << 20}-")]
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == large
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_part_that_does_not_fit_is_fetched_again(mt, hub, large, tmp_path):
    etag = hashlib.sha256(large["model.safetensors"]).hexdigest()
    blobs = tmp_path / "cache" / "hub" / "models--org--large" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag}.0123abcd.incomplete").write_bytes(b"x" * 1000)
    (blobs / f"{etag}.4567abcd.incomplete").write_bytes(b"x" * 10)
    assert mt("ckpt", "pull", "org/large", tmp_path / "out").returncode == 0
    sent = [wanted for name, wanted in hub.ranges if name == "model.safetensors"]
    assert sent == ["bytes=1000-", None]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == large["model.safetensors"]


def wait_for(condition, seconds=60):
    """The first result that is not empty."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    return result


def test_a_run_that_failed_is_taken_up_with_the_files_that_lack(mt, hub, save_model, tmp_path):
    model = save_model("llama", shard="30KB")
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    hub.repositories["org/shards"] = files
    sizes = sorted(len(data) for data in files.values())
    hub.cut_after = sizes[-2]
    broken = mt("ckpt", "pull", "org/shards", tmp_path / "out")
    assert broken.returncode == 2
    assert "hub:org/shards: the connection failed" in broken.stderr
    assert "run this again: files that have arrived are not sent again" in broken.stderr
    assert not list(tmp_path.glob("out*"))
    hub.cut_after, before = None, len(hub.ranges)
    arrived = {name for name, _ in hub.ranges[:before] if len(files[name]) <= sizes[-2]}
    assert mt("ckpt", "pull", "org/shards", tmp_path / "out").returncode == 0
    again = {name for name, _ in hub.ranges[before:]}
    assert arrived
    assert not arrived & again
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == files


@pytest.mark.parametrize(
    ("name", "env", "message"),
    [
        ("org/none", {}, "hub:org/none: no such repository, or a private one; check the name, or log in"),
        ("org/llama@old", {}, "hub:org/llama@old: no such revision; give a branch, a tag or a commit of it"),
        ("org/gated", {}, "hub:org/gated: access to it must be granted; ask for it on the hub's page"),
        ("org/strange", {}, "hub:org/strange: the hub answered 418; run this again later"),
        ("llama", {}, "hub:llama: is no name of a repository; give org/name, or org/name@revision"),
        ("org/-llama", {}, "hub:org/-llama: is no name of a repository ("),
        ("org/pickled", {}, "holds neither model.safetensors nor model.safetensors.index.json"),
        ("org/llama", {"HF_HUB_OFFLINE": "1"}, "hub:org/llama: the hub cannot be reached, and the cache does not"),
        ("org/llama", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "hub:org/llama: the hub cannot be reached, and the"),
    ],
)
def test_what_cannot_be_pulled_is_one_line_that_says_what_to_do(name, env, message, mt, tmp_path):
    done = mt("ckpt", "pull", name, tmp_path / "out", **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_pull_overwrites_nothing(mt, tmp_path):
    (tmp_path / "out").mkdir()
    done = mt("ckpt", "pull", "org/llama", tmp_path / "out")
    assert (done.returncode, "already exists" in done.stderr) == (2, True)


def test_the_hub_is_a_loader_like_any_other(mt, tmp_path):
    done = mt(
        "ckpt",
        "convert",
        "--loader",
        "hub",
        "--load-dir",
        "org/llama",
        "--saver",
        "native",
        "--save-dir",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr


def test_push_publishes_a_checkpoint_that_can_be_pulled(mt, hub, model, tmp_path):
    done = mt("ckpt", "push", model, "me/mine", HF_TOKEN="right")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"pushed {model}: {hub.url}/me/mine/commit/")
    assert hub.repositories["me/mine"] == {file.name: file.read_bytes() for file in model.iterdir()}
    assert mt("ckpt", "pull", "me/mine", tmp_path / "out").returncode == 0


def test_a_push_that_failed_sends_no_file_twice(mt, hub, model):
    hub.refuses_commits = True
    broken = mt("ckpt", "push", model, "me/mine", HF_TOKEN="right")
    assert (broken.returncode, "hub:me/mine: the hub answered 418" in broken.stderr) == (2, True)
    sent, hub.refuses_commits = dict(hub.uploads), False
    assert len(sent) == 1
    hub.uploads = Once(sent)
    assert mt("ckpt", "push", model, "me/mine", HF_TOKEN="right").returncode == 0
    assert hub.repositories["me/mine"]["model.safetensors"] == (model / "model.safetensors").read_bytes()


class Once(dict):
    """Takes no key that it has."""

    def __setitem__(self, key, value):
        assert key not in self, "sent twice"
        super().__setitem__(key, value)


@pytest.mark.parametrize("token", ["", "wrong"])
def test_push_without_the_right_is_one_line(token, mt, model):
    done = mt("ckpt", "push", model, "me/mine", HF_TOKEN=token)
    assert done.returncode == 2
    assert "hub:me/mine: not allowed; log in with a token that may do this: hf auth login" in done.stderr


def test_push_checks_before_it_publishes(mt, hub, model, tmp_path):
    convert("hf", model, "native", tmp_path / "native")
    native = mt("ckpt", "push", tmp_path / "native", "me/mine", HF_TOKEN="right")
    assert "is in native format; convert it first: mt ckpt convert --saver hf" in native.stderr
    revision = mt("ckpt", "push", model, "me/mine@old", HF_TOKEN="right")
    assert "names a revision; push goes to the main branch: give org/name" in revision.stderr
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    damaged = mt("ckpt", "push", model, "me/mine", HF_TOKEN="right")
    assert "truncated or not safetensors" in damaged.stderr
    assert [done.returncode for done in (native, revision, damaged)] == [2, 2, 2]
    assert "me/mine" not in hub.repositories
