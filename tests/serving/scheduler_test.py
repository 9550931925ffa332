"""The queue: nothing is lost, nothing hangs, and nobody's answer depends on who else is served."""

import asyncio
import gc
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.inference.llada import LLaDA
from lladax.inference.slots import Row, Slots
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.sampling import SamplerConfig
from lladax.serving.scheduler import Draining, Expired, Failed, Full, Scheduler

pytestmark = pytest.mark.usefixtures("quick_compiles")

MASK, EOS = 30, 29


def make(**fields):
  c = MaskPredictorConfig(
    **({"D": 12, "N": 1, "H": 2, "G": 1, "K": 6, "F": 16, "V": 32, "max_length": 256, "dtype": "float32"} | fields)
  )
  rng, shapes = np.random.default_rng(1), jax.eval_shape(c.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(0.6 * rng.standard_normal(x.shape), jnp.float32), shapes)
  return LLaDA(c, params | {"head": 3 * params["head"]}, None, MASK, EOS, 31)


@pytest.fixture(scope="module")
def llada():
  return make()


def row(seed=0, n=5, **options):
  ids = np.random.default_rng(seed).integers(0, 28, n).tolist()
  return Row(tuple(ids), SamplerConfig(**({"gen_length": 16, "block_length": 8, "steps": 8, "seed": seed} | options)))


@pytest.fixture
def scheduler(llada):
  with_gate = Gated(llada.engine)
  made = Scheduler(llada, rows=4, waiting=8, slots=with_gate)
  made.gate, made.gated = with_gate.gate, with_gate
  yield made
  with_gate.gate.set()
  made.drain(0)
  assert not made._thread.is_alive()


class Gated(Slots):
  """Passes wait until they may go on; those in `crash` crash."""

  def __init__(self, engine):
    super().__init__(engine)
    self.gate, self.batches, self.crash = threading.Event(), [], False
    self.gate.set()

  def begin(self, rows):
    super().begin(rows)
    self.batches.append(list(rows))

  def step(self):
    assert self.gate.wait(60)
    if self.crash:
      self.crash = False
      raise FloatingPointError("a pass crashed")
    return super().step()


async def last(job):
  found = {}
  async for i, snapshot in job.watch():
    found[i] = snapshot
  return [found[i] for i in sorted(found)]


async def until(condition):
  for _ in range(1000):
    if condition():
      return
    await asyncio.sleep(0.01)
  raise AssertionError("it did not come to pass")


def same(llada, snapshot, asked):
  out = llada.sample([list(asked.ids)], **{**vars(asked.settings), "seed": [asked.settings.seed]})
  np.testing.assert_array_equal(snapshot.tokens_L, out.tokens[0, out.padding[0] :])
  assert snapshot.passes == out.nfe


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  ("N", "fields"),
  [(16, {}), (16, {"block": 8}), *(pytest.param(N, x, marks=SLOW) for N in (1, 4) for x in ({}, {"block": 8}))],
  ids=str,
)
def test_concurrent_requests_answer_as_each_would_alone(N, fields):
  llada, rng = make(**fields), random.Random(N)
  common = {} if fields else {"cache": "dual"}
  asked = [
    row(i, rng.randint(1, 40), gen_length=rng.choice([8, 16, 32]), threshold=rng.choice([None, 0.3]), **common)
    for i in range(N)
  ]

  async def all_of_them():
    scheduler = Scheduler(llada, rows=4, waiting=64)

    async def one(x):
      await asyncio.sleep(rng.random() / 4)
      return await last(scheduler.submit([x]))

    found = await asyncio.gather(*map(one, asked))
    await asyncio.to_thread(scheduler.drain, 5)
    return found

  for x, (snapshot,) in zip(asked, asyncio.run(all_of_them()), strict=True):
    same(llada, snapshot, x)


def test_every_pass_is_told_to_those_who_ask(scheduler):
  async def run():
    job = scheduler.submit([row(1), row(2)], every=True)
    seen = [(i, x.passes) async for i, x in job.watch()]
    assert [n for i, n in seen if i == 0] == [*range(1, 9)] == [n for i, n in seen if i == 1]
    assert len([x async for x in scheduler.submit([row(3)]).watch()]) <= 8

  asyncio.run(run())
  assert scheduler.stats["tokens"] == 48 and scheduler.stats["row_passes"] == 24


def test_more_than_may_wait_are_refused_and_none_is_lost(scheduler):
  async def run():
    scheduler.gate.clear()
    jobs, refused = [], 0
    for i in range(1000):
      try:
        jobs.append(scheduler.submit([row(i % 7)]))
      except Full as error:
        refused += 1
        assert 1 <= error.retry_after <= 60
    assert (len(jobs), refused) == (12, 988)
    scheduler.gate.set()
    found = await asyncio.wait_for(asyncio.gather(*map(last, jobs)), 60)
    assert all(x.done for (x,) in found)
    await until(lambda: scheduler.stats["waiting"] == scheduler.stats["running"] == 0)
    await last(scheduler.submit([row()]))  # there is room again

  asyncio.run(run())
  assert not scheduler.gated.seats and not scheduler._jobs and not scheduler.gated._kept


def test_who_goes_away_frees_the_row_at_the_next_pass(scheduler):
  async def run():
    scheduler.gate.clear()
    gone, stays = scheduler.submit([row(1, gen_length=64)], every=True), scheduler.submit([row(2)])
    waits = scheduler.submit([row(3)])
    await until(lambda: scheduler.gated.batches)
    gone.cancel()
    waits.cancel()
    assert [x async for x in gone.watch()] == []
    scheduler.gate.set()
    (snapshot,) = await last(stays)
    same(scheduler.llada, snapshot, row(2))
    await until(lambda: not scheduler._jobs)

  asyncio.run(run())
  assert sum(0 in rows for rows in scheduler.gated.batches) == 1  # of eight blocks


def test_a_row_of_a_request_can_end_alone(scheduler):
  async def run():
    job = scheduler.submit([row(1), row(2)])
    job.cancel(0)
    found = {i: x async for i, x in job.watch()}
    assert list(found) == [1] and found[1].done

  asyncio.run(run())


def test_a_deadline_ends_a_request_that_waits_and_one_that_runs(scheduler):
  async def run():
    scheduler.gate.clear()
    runs, stays = scheduler.submit([row(1)], timeout=0.05), scheduler.submit([row(2)])
    await asyncio.sleep(0.1)
    scheduler.gate.set()
    with pytest.raises(Expired):
      await last(runs)
    same(scheduler.llada, (await last(stays))[0], row(2))

  asyncio.run(run())


def test_a_crash_ends_the_requests_of_its_batch_alone(scheduler, caplog):
  async def run():
    scheduler.gate.clear()
    first = [scheduler.submit([row(i)]) for i in range(2)]
    await until(lambda: scheduler.gated.batches)
    rest = [scheduler.submit([row(i, remasking="random")]) for i in range(2)]
    scheduler.gated.crash = True
    scheduler.gate.set()
    caught = 0
    for job in first:
      try:
        same(scheduler.llada, (await last(job))[0], job.rows[0])
      except Failed as error:
        caught += 1
        assert isinstance(error.__cause__, FloatingPointError)
    assert caught == len(scheduler.gated.batches[0])
    for job in rest:
      same(scheduler.llada, (await last(job))[0], job.rows[0])
    same(scheduler.llada, (await last(scheduler.submit([row(9)])))[0], row(9))

  asyncio.run(run())
  assert scheduler.stats["crashes"] == 1 and "crashed" in caplog.text


def test_short_requests_do_not_wait_behind_long_ones_nor_long_ones_for_ever(llada):
  async def run():
    scheduler = Scheduler(llada, rows=2, waiting=64)
    long = [scheduler.submit([row(i, gen_length=128, steps=128)]) for i in range(3)]
    order = []

    async def note(name, job):
      await last(job)
      order.append(name)

    short = [scheduler.submit([row(i)]) for i in range(4)]
    await asyncio.gather(*(note("long", x) for x in long), *(note("short", x) for x in short))
    assert order == ["short"] * 4 + ["long"] * 3
    flood = asyncio.Event()

    async def flooding():
      while not flood.is_set():
        await last(scheduler.submit([row(5)]))

    floods = [asyncio.create_task(flooding()) for _ in range(3)]
    await asyncio.wait_for(last(scheduler.submit([row(6, gen_length=128, steps=128)])), 60)
    flood.set()
    await asyncio.gather(*floods)
    await asyncio.to_thread(scheduler.drain, 5)

  asyncio.run(run())


def test_draining_finishes_what_runs_and_refuses_the_rest(llada):
  async def run(seconds, gate):
    slots = Gated(llada.engine)
    slots.gate.clear()
    scheduler = Scheduler(llada, rows=1, waiting=8, slots=slots)
    runs, waits = scheduler.submit([row(1)]), scheduler.submit([row(2, remasking="random")])
    await until(lambda: slots.batches)
    drained = asyncio.create_task(asyncio.to_thread(scheduler.drain, seconds))
    await until(lambda: scheduler.state == "draining")
    with pytest.raises(Draining):
      scheduler.submit([row(3)])
    if not gate:
      await asyncio.sleep(0.2)
    slots.gate.set()
    with pytest.raises(Draining):
      await last(waits)
    if gate:
      same(llada, (await last(runs))[0], row(1))
    else:
      with pytest.raises(Draining):
        await last(runs)
    await drained

  asyncio.run(run(30, True))
  asyncio.run(run(0.05, False))


def test_scores_are_the_chain_rule(scheduler):
  rows = [tuple(row(i, n).ids) for i, n in ((1, 3), (2, 40))]

  async def run():
    return await scheduler.score(rows)

  for ids, (log_p, top, top_log_p) in zip(rows, asyncio.run(run()), strict=True):
    assert len(log_p) == len(ids) and (top_log_p >= log_p).all()
    expected = scheduler.llada.log_likelihood(list(ids[:2]), list(ids[2:]), method="chain_rule")
    np.testing.assert_allclose(log_p[2:].sum(), expected, rtol=1e-4)
    assert ((top == np.array(ids)) == (top_log_p == log_p)).all()


def test_the_most_probable_id_of_a_score_is_one_that_can_be_drawn(llada):
  params = dict(llada.params)
  params["head"] = params["head"].at[:, [MASK, 31]].set(100 * params["head"][:, :1])  # [MASK], and behind the words
  params["head"] = jnp.where(jnp.arange(32)[None] == 31, -params["head"], params["head"])
  worse = LLaDA(llada.model, params, None, MASK, EOS, 31)
  _, top, top_log_p = worse.engine.chain(tuple(range(12)))
  assert (top < MASK).all() and np.isfinite(top_log_p).all()


def test_a_slow_listener_misses_passes_and_never_the_last(scheduler, monkeypatch):
  monkeypatch.setattr("lladax.serving.scheduler._KEPT", 5)

  async def run():
    job = scheduler.submit([row(i) for i in range(4)], every=True)
    await until(lambda: not scheduler._jobs and scheduler.stats["tokens"] == 64)
    seen = [(i, x.done) async for i, x in job.watch()]
    assert len(seen) <= 5 and {i for i, done in seen if done} == {0, 1, 2, 3}

  asyncio.run(run())


def test_what_the_model_does_not_take_is_said_at_once(scheduler):
  async def run(asked):
    scheduler.submit([asked])

  for asked, said in (
    (row(0, 300), "longer than model.max_length=256"),
    (Row((99,), row().settings), r"ids\[0\]=99: the ids of this model's vocabulary are 0 to 30"),
    (Row((MASK,), row().settings), "is .MASK., which has no place here"),
    (row(0, logit_bias=((77, 1.0),)), r"sample.logit_bias\[0\]=77"),
    (row(0, gen_length=12), "gen_length=12 is not a multiple of sample.block_length=8"),
  ):
    with pytest.raises(Mistake, match=said):
      asyncio.run(run(asked))


def test_a_canvas_without_a_mask_is_done_at_once(scheduler):
  async def run():
    return await last(scheduler.submit([Row((1, 2), SamplerConfig(), fills=True)]))

  (snapshot,) = asyncio.run(run())
  assert snapshot.done and snapshot.passes == 0 and snapshot.tokens_L.tolist() == [1, 2]


def test_programs_are_let_go_of_before_they_are_too_many(scheduler, monkeypatch):
  monkeypatch.setattr("lladax.inference.slots._PROGRAMS", 3)

  async def run():
    for W in (1, 2, 4, 8, 16):
      same(scheduler.llada, (await last(scheduler.submit([row(1, block_length=W)])))[0], row(1, block_length=W))
      assert len(scheduler.gated._programs) <= 3

  asyncio.run(run())


def test_memory_stays_flat(scheduler):
  """What the queue holds after many requests is what it held before."""

  async def run(n):
    for i in range(n):
      await last(scheduler.submit([row(i % 3)], every=True))

  asyncio.run(run(3))
  gc.collect()
  before = len(jax.live_arrays())
  asyncio.run(run(30))
  gc.collect()
  assert len(jax.live_arrays()) <= before + 2
