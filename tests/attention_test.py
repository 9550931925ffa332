import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax import attention


def random_qkv(W=3, L=5, H=4, G=2, K=6, dtype=np.float32):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal((2, *shape)), dtype) for shape in ((W, H, K), (L, G, K), (L, G, K))]


@pytest.mark.parametrize("allowed", [None, [[1, 0, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_attend_is_softmax_attention_over_the_allowed_keys(allowed, G):
  q_BWHK, k_BLGK, v_BLGK = random_qkv(G=G)
  allowed_WL = np.ones((3, 5)) if allowed is None else np.array(allowed)
  allowed_BWL = None if allowed is None else jnp.asarray(allowed_WL[None], bool)
  out_BWHK = jax.jit(attention.attend)(q_BWHK, k_BLGK, v_BLGK, allowed_BWL)
  k_BLHK, v_BLHK = (np.repeat(x, 4 // G, axis=2) for x in (k_BLGK, v_BLGK))
  e_BHWL = np.exp(np.einsum("BWHK,BLHK->BHWL", q_BWHK, k_BLHK) / np.sqrt(6)) * allowed_WL
  expected_BWHK = np.einsum("BHWL,BLHK->BWHK", e_BHWL / e_BHWL.sum(axis=-1, keepdims=True), v_BLHK)
  np.testing.assert_allclose(out_BWHK, expected_BWHK, atol=1e-5)


def test_a_query_that_may_look_at_nothing_harms_nobody():
  q_BWHK, k_BLGK, v_BLGK = random_qkv(W=5)
  allowed_BWL = jnp.ones((1, 5, 5), bool).at[0, 0].set(False)
  attend = jax.jit(lambda *qkv: attention.attend(*qkv, allowed_BWL))
  gradients = jax.jit(jax.grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2)))(q_BWHK, k_BLGK, v_BLGK)
  assert all(np.isfinite(x).all() for x in (attend(q_BWHK, k_BLGK, v_BLGK), *gradients))


def test_bfloat16_stays_and_is_close_to_float32():
  qkv = random_qkv(dtype=jnp.bfloat16)
  out_BWHK = attention.attend(*qkv)
  assert out_BWHK.dtype == jnp.bfloat16
  expected_BWHK = attention.attend(*(x.astype(np.float32) for x in qkv))
  np.testing.assert_allclose(out_BWHK.astype(np.float32), expected_BWHK, atol=0.03)


@pytest.mark.parametrize("causal", [False, True])
def test_allowed_is_the_table_of_its_docstring(causal):
  dense = "xxx... xxx... xxx... ...xx. ...xx. ......"
  forward = "x..... xx.... xxx... ...x.. ...xx. ......"
  expected_LL = np.array([[mark == "x" for mark in row] for row in (forward if causal else dense).split()])
  segment_BL, position_BL = np.array([[1, 1, 1, 2, 2, 0]]), np.arange(6)[None]
  allowed_BLL = attention.allowed(segment_BL, segment_BL, position_BL, position_BL, causal=causal)
  np.testing.assert_array_equal(allowed_BLL[0], expected_LL)
  allowed_BWL = attention.allowed(segment_BL[:, 2:4], segment_BL, position_BL[:, 2:4], position_BL, causal=causal)
  np.testing.assert_array_equal(allowed_BWL[0], expected_LL[2:4])  # a window's are its rows
