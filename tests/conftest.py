"""Every test sees eight CPU devices and full-precision products; a parity or sharding test that skips fails the run."""

# ruff: noqa: E402  (the environment comes before JAX)

import os
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the time of the tests: little optimisation, and a program that several processes run is compiled once.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# Eight devices on two busy cores: one that comes late to a collective is no reason to abort the process.
FLAGS += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # errors of XLA, which pytest is told not to capture, but none of its warnings
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
# Sessions, workers and child processes share what they compile; JAX's key holds the program, the flags and the versions.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gigagan_jax_tests"
CACHE.mkdir(parents=True, exist_ok=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
_KEPT_DAYS = 7

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
# Programs on eight devices one after the other: two at once share XLA's few threads, and their collectives wait in them.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# A test with one of these in its name is worth something only where it runs.
MUST_RUN = ("sharding", "parity", "mesh", "torch")
_skipped: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What a test leaves in the environment would reach the child processes of those after it."""
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        if os.environ != before:
            os.environ.clear()
            os.environ.update(before)


def _note(report):
    if report.skipped and any(word in report.nodeid.lower() for word in MUST_RUN):
        _skipped.append(report.nodeid)


def pytest_runtest_logreport(report):
    _note(report)


def pytest_collectreport(report):
    _note(report)  # a module that skips itself, with all its tests


def pytest_sessionstart(session):
    """Forgets programs that no session has read for a week."""
    if hasattr(session.config, "workerinput"):
        return
    for file in CACHE.iterdir():
        try:
            if time.time() - file.stat().st_mtime > _KEPT_DAYS * 86400:
                file.unlink()
        except FileNotFoundError:  # another session was first
            continue


def pytest_sessionfinish(session):
    if _skipped:
        session.exitstatus = max(int(session.exitstatus), int(pytest.ExitCode.TESTS_FAILED))


def pytest_terminal_summary(terminalreporter):
    for nodeid in _skipped:
        terminalreporter.write_line(f"FAILED {nodeid}: a test of {', '.join(MUST_RUN)} must not be skipped", red=True)


@pytest.fixture(scope="session")
def tiny():
    """configs/laion.py:tiny in float32, frozen: 16 px, every part at toy width."""
    from configs.laion import get_config
    from gigagan_jax.config import from_dict

    config = get_config("tiny")
    config.dtype = "float32"
    return from_dict(config)


@pytest.fixture(scope="session")
def random_weights():
    """random_weights(model, seed): fills a torch model so that no output hides another: embeddings, norms and all."""
    import torch

    def fill(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                if p.ndim < 2:
                    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                    p.copy_(centre + 0.1 * noise)
                elif "embed" in name and "patch" not in name:
                    p.copy_(0.3 * noise)
                else:
                    p.copy_(noise / p[0].numel() ** 0.5)
        return model

    return fill


@pytest.fixture(scope="session")
def make_clip(random_weights):
    """make_clip(folder, seed): a tiny CLIP with its tokenizer, saved by transformers."""
    import warnings

    import transformers

    # The 256 bytes in CLIP's printable form, alone and at the end of a word, two merges, and the two special tokens.
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    tokens = [*letters, *(x + "</w>" for x in letters), "th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    ids = {"vocab_size": len(tokens), "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}

    def make(folder, seed=0):
        config = transformers.CLIPConfig(
            text_config=tower | ids | {"num_hidden_layers": 3, "pad_token_id": len(tokens) - 1},
            vision_config=tower | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            random_weights(transformers.CLIPModel(config), seed).save_pretrained(folder)
            merges = [("t", "h"), ("th", "e</w>")]
            transformers.CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def clip_folder(make_clip, tmp_path_factory):
    """A tiny CLIP with its tokenizer, as transformers saves them."""
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def refused():
    """refused(call, *words): the one line of a UserError, with all of `words` in it."""
    from gigagan_jax.core.errors import UserError

    def refused(call, *words):
        with pytest.raises(UserError) as caught:
            call()
        message = str(caught.value)
        assert message.splitlines() == [message]
        for word in words:
            assert str(word) in message
        return message

    return refused


@pytest.fixture(scope="session")
def tars(tmp_path_factory):
    """Three tars of eight examples; not to be written to."""
    from tests.img2dataset import write_tars

    return write_tars(tmp_path_factory.mktemp("img2dataset"))
