"""Observers watch passes, dumps are numbered, settings are validated, log lines go where they were asked to."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import fx

from sift_compiler.errors import UserError
from sift_compiler.observe.instruments import Dump, Timer
from sift_compiler.observe.log import configure_logging
from sift_compiler.observe.settings import Settings, from_environment
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.manager import run_passes


def graph():
    return fx.symbolic_trace(lambda x: torch.relu(x) + 1)


class Tanh(Pass):
    def call(self, graph_module):
        for node in graph_module.graph.nodes:
            if node.target is torch.relu:
                node.target = torch.tanh
        return PassResult(graph_module, ("relu",))


class Idle(Pass):
    def call(self, graph_module):
        return PassResult(graph_module)


def test_observers_see_every_pass(tmp_path):
    timer, given = Timer(), graph()
    outcome = run_passes(given, (Idle(), Tanh()), (timer, Dump(tmp_path / "dumps")))
    assert [name for name, _ in outcome.results] == ["Idle", "Tanh"]
    assert [time.name for time in timer.times] == ["Idle", "Tanh"]
    assert len(timer.times[1].nodes) == 2
    assert all(time.milliseconds > 0 for time in timer.times)
    files = sorted(file.name for file in (tmp_path / "dumps").iterdir())
    assert files == ["000-Idle.txt", "001-Tanh.txt"]
    assert "tanh" in (tmp_path / "dumps" / "001-Tanh.txt").read_text()
    run_passes(given, (Idle(),), (Dump(tmp_path / "dumps"),))
    assert (tmp_path / "dumps" / "002-Idle.txt").exists()


def test_settings_are_validated(tmp_path):
    settings = from_environment({"SIFT_DUMP": str(tmp_path), "SIFT_LOG": "Info"})
    assert settings.dump == tmp_path
    assert settings.log == "INFO"
    assert from_environment({"SIFT_DUMP": "", "SIFT_LOG": ""}) == from_environment({})
    with pytest.raises(UserError, match="Did you mean 'debug'"):
        from_environment({"SIFT_LOG": "debgu"})
    assert from_environment({"SIFT_CACHE_DIR": str(tmp_path)}).cache == tmp_path
    (tmp_path / "file").write_text("")
    for variable in ("SIFT_DUMP", "SIFT_CACHE_DIR"):
        with pytest.raises(UserError, match=f"{variable} names .* must name a folder"):
            from_environment({variable: str(tmp_path / "file")})


def test_logging_is_configured_only_when_asked(capsys):
    logger = logging.getLogger("sift_compiler")
    before = (list(logger.handlers), logger.level, logger.propagate)
    try:
        configure_logging(Settings())
        assert list(logger.handlers) == before[0]
        configure_logging(Settings(log="INFO"))
        configure_logging(Settings(log="INFO"))
        assert len(logger.handlers) == len(before[0]) + 1
        run_passes(graph(), (Tanh(),), (Timer(),))
        assert "Tanh: 1 changes" in capsys.readouterr().err
    finally:
        logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]
