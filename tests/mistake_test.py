"""A mistake is one line and 1; a crash is a crash, wherever it was raised."""

import jax.numpy as jnp
import pytest

from lladax.devices import distributed
from lladax.mistake import Diverged, Missing, Mistake


@pytest.fixture(autouse=True)
def stays(monkeypatch):
  monkeypatch.setattr(distributed, "leave", lambda code: None)


def raising(error):
  def command(argv):
    raise error

  return command


@pytest.mark.parametrize(
  ("kind", "builtin"), [(Mistake, ValueError), (Missing, FileNotFoundError), (Diverged, FloatingPointError)]
)
def test_a_mistake_is_one_line_and_exit_code_1(kind, builtin, capsys):
  assert issubclass(kind, Mistake) and issubclass(kind, builtin)
  assert distributed.guard(raising(kind("data.length=0: must be at least 1")), []) == 1
  assert capsys.readouterr().err == "lladax: data.length=0: must be at least 1\n"


@pytest.mark.parametrize("error", [ValueError("a shape"), FileNotFoundError("a file"), FloatingPointError("nan")])
def test_what_our_code_did_not_expect_is_a_crash(error, capsys):
  assert distributed.guard(raising(error), []) == 70
  assert "Traceback" in capsys.readouterr().err


def test_a_crash_inside_jax_is_a_crash(capsys):
  """JAX filters its own frames out of a traceback: the last one left is ours."""
  assert distributed.guard(lambda argv: jnp.zeros((2, 3)) @ jnp.zeros((2, 3)), []) == 70
  assert "Traceback" in capsys.readouterr().err
