import chex
import jax
import numpy as np
import optax
import pytest

from lladax import optimizer
from lladax.optimizer import OptimizerConfig

LLADA_8B = ((2000, 4e-4), (226_882, 4e-4), (0, 1e-4), (152_588, 1e-4), (57_220, 1e-5))


@pytest.mark.parametrize(
  ("step", "rate"),
  [
    (0, 0.0), (500, 1e-4), (2000, 4e-4), (100_000, 4e-4), (228_881, 4e-4),
    (228_882, 1e-4), (300_000, 1e-4), (381_470, 1e-4), (410_080, 5.5e-5), (438_690, 1e-5), (10**6, 1e-5),
  ],
)  # fmt: skip
def test_the_schedule_of_llada_8b(step, rate):
  schedule = optimizer.schedule(OptimizerConfig(schedule=LLADA_8B), 438_690)
  assert float(schedule(step)) == pytest.approx(rate, rel=1e-5)


def test_fractions_and_the_rest():
  schedule = optimizer.schedule(OptimizerConfig(schedule=((10, 1.0), (-1, 2.0), (0.2, 0.0))), 100)
  rates = [float(schedule(step)) for step in (5, 10, 45, 80, 90, 100, 101)]
  assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.0, 0.0, 0.0])


def test_a_jump_at_the_start_is_a_constant():
  schedule = optimizer.schedule(OptimizerConfig(schedule=((0, 0.5),)), 10)
  assert [float(schedule(step)) for step in (0, 9)] == [0.5, 0.5]


def test_pieces_longer_than_the_run():
  c = OptimizerConfig(schedule=((30, 1.0), (-1, 1.0), (0.5, 0.0)))
  optimizer.schedule(c, 60)
  with pytest.raises(ValueError, match="optimizer.schedule: its pieces take 55 steps, more than steps=50"):
    optimizer.schedule(c, 50)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"schedule": ((10, 1.0, 2.0),)}, "optimizer.schedule: .* is not"),
    ({"schedule": ((-2, 1.0),)}, "optimizer.schedule: .* is not"),
    ({"schedule": ((10, -1.0),)}, "optimizer.schedule: .* is not"),
    ({"schedule": ((-1, 1.0), (-1, 0.0))}, "only one piece"),
    ({"b1": 1.0}, "optimizer.b1=1.0"),
    ({"b2": -0.1}, "optimizer.b2=-0.1"),
  ],
)
def test_bad_fields_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    OptimizerConfig(**fields)


LETTERS = {"matrix": "DF", "layers": "NDF", "norm": "D", "norms": "ND"}
SHAPES = {"matrix": (2, 3), "layers": (2, 2, 3), "norm": (2,), "norms": (2, 2)}


def random_tree(seed):
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def run(c, params, gradients):
  """Parameters after one step for each of the gradients."""
  tx = optimizer.create(c, 10, LETTERS)
  state = tx.init(params)
  for grads in gradients:
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_weight_decay_is_decoupled_and_of_matrices_only():
  params = random_tree(0)
  zeros = jax.tree.map(np.zeros_like, params)
  after = run(OptimizerConfig(schedule=((0, 0.5),), weight_decay=0.1), params, [zeros])
  for name, shrinks in {"matrix": 0.95, "layers": 0.95, "norm": 1.0, "norms": 1.0}.items():
    np.testing.assert_allclose(after[name], shrinks * params[name], rtol=1e-6)


def test_three_steps_of_adamw_by_hand():
  c = OptimizerConfig(schedule=((3, 0.3),), b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2, clip=1.0)
  params, gradients = random_tree(0), [random_tree(seed) for seed in (1, 2, 3)]
  gradients[1] = jax.tree.map(lambda x: 0.01 * x, gradients[1])  # short enough not to be clipped
  expected = {name: x.astype(np.float64) for name, x in params.items()}
  mu, nu = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
  for n, grads in enumerate(gradients, start=1):
    norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in grads.values()))
    for name, grad in grads.items():
      grad = grad / max(norm, 1.0)
      mu[name] = 0.8 * mu[name] + 0.2 * grad
      nu[name] = 0.9 * nu[name] + 0.1 * grad**2
      step = (mu[name] / (1 - 0.8**n)) / (np.sqrt(nu[name] / (1 - 0.9**n)) + 1e-3)
      decay = 0.2 * expected[name] if LETTERS[name] in ("DF", "NDF") else 0.0
      expected[name] = expected[name] - 0.1 * (n - 1) * (step + decay)
  chex.assert_trees_all_close(run(c, params, gradients), expected, rtol=1e-5, atol=1e-6)


def test_a_long_gradient_is_clipped_and_a_short_one_is_not():
  grads = random_tree(1)
  zeros, longer = jax.tree.map(np.zeros_like, grads), jax.tree.map(lambda x: 100 * x, grads)

  def moved(clip, gradient):  # eps so large that Adam does not normalise the length away
    c = OptimizerConfig(schedule=((0, 1e6),), eps=1e6, weight_decay=0.0, clip=clip)
    return optax.tree.norm(run(c, zeros, [gradient])).item()

  assert moved(0.5, longer) == pytest.approx(0.5, rel=1e-3)
  assert moved(0.0, longer) == pytest.approx(100 * moved(0.0, grads), rel=1e-3)
  assert moved(1e6, grads) == moved(0.0, grads)
