"""ALLoRA's rule on tensors against its equations as written, and what its configuration refuses."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import fields
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from gnomon.adapters import ALLoRAConfig, allora_linear, row_scales, scaled_update
from gnomon.errors import GnomonError, MethodError

SHAPES = [(7, 5, 3), (5, 7, 2), (6, 6, 6), (1, 9, 1), (9, 1, 4), (4, 3, 8)]  # in, out, r


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(n: int, m: int, r: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(r, n, seed=1, dtype=dtype).requires_grad_(), randn(m, r, seed=2, dtype=dtype).requires_grad_()


def definition(x: Tensor, a: Tensor, b: Tensor, delta: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """dA, dB, dX row by row, as written."""
    X, D = x.reshape(-1, a.shape[1]), delta.reshape(-1, b.shape[0])
    G = torch.zeros(b.shape[0], a.shape[1], dtype=a.dtype)
    for t in range(len(X)):
        G += torch.outer(D[t], X[t])
    for i in range(b.shape[0]):
        row = sum(b[i, k] * a[k] for k in range(a.shape[0]))
        G[i] /= math.sqrt(math.sqrt(float((row * row).sum())) + 1 / eta**2)
    return b.T @ G, G @ a.T, (D @ (b @ a)).reshape(x.shape)


@pytest.mark.parametrize(("n", "m", "r"), SHAPES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("eta", [0.5, 2.0])
def test_the_gradients_are_the_equations(n: int, m: int, r: int, dtype: torch.dtype, atol: float, eta: float) -> None:
    a, b = factors(n, m, r, dtype)
    x, delta = randn(2, 3, n, seed=3, dtype=dtype).requires_grad_(), randn(2, 3, m, seed=4, dtype=dtype)
    y = allora_linear(x, a, b, eta)
    assert torch.equal(y, linear(linear(x, a), b))
    y.backward(delta)
    wide = [t.detach().double() for t in (x, a, b, delta)]
    for found, expected in zip((a.grad, b.grad, x.grad), definition(*wide, eta), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=atol * max(1.0, float(expected.abs().max())), rtol=0)


def test_what_x_receives_is_that_of_lora() -> None:
    a, b = factors(7, 5, 3)
    x, delta = randn(4, 7, seed=3).requires_grad_(), randn(4, 5, seed=4)
    allora_linear(x, a, b, 2.0).backward(delta)
    plain = x.detach().clone().requires_grad_()
    linear(linear(plain, a.detach()), b.detach()).backward(delta)
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-13, atol=1e-13)


def test_gradcheck_fails_for_the_factors_and_passes_for_the_input() -> None:
    a, b = factors(4, 3, 2)
    x = randn(2, 4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: allora_linear(x, a.detach(), b.detach(), 2.0), (x,))
    assert torch.autograd.gradcheck(lambda x: allora_linear(x, a, b, 2.0), (x,))
    for call, factor in (
        (lambda a: allora_linear(x.detach(), a, b.detach(), 2.0), a),
        (lambda b: allora_linear(x.detach(), a.detach(), b, 2.0), b),
    ):
        assert not torch.autograd.gradcheck(call, (factor,), raise_exception=False)


def test_what_is_not_asked_for_is_not_computed() -> None:
    a, b = factors(4, 3, 2)
    x, delta = randn(5, 4, seed=3), randn(5, 3, seed=4)
    expected = definition(x, a.detach(), b.detach(), delta, 2.0)
    for which, wanted in enumerate(("a", "b")):
        given_a, given_b = (t.detach().requires_grad_(wanted == side) for t, side in ((a, "a"), (b, "b")))
        allora_linear(x, given_a, given_b, 2.0).backward(delta)
        asked, other = (given_a, given_b) if wanted == "a" else (given_b, given_a)
        torch.testing.assert_close(asked.grad, expected[which])
        assert other.grad is None
        assert x.grad is None


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.floats(0.01, 20.0))
def test_the_scales_are_those_of_the_dense_product(n: int, m: int, r: int, eta: float) -> None:
    """To rounding: where the terms of a row of B A cancel, its norm is off by up to sqrt(eps) |B_i| |A|."""
    a, b = randn(r, n, seed=n), randn(m, r, seed=m)
    norms = torch.linalg.vector_norm(b @ a, dim=1)
    for dtype in (torch.float64, torch.float32):
        eps = torch.finfo(dtype).eps
        reach = (8 * r * eps) ** 0.5 * torch.linalg.vector_norm(b, dim=1) * torch.linalg.matrix_norm(a)
        off = torch.minimum(reach, reach**2 / norms.clamp(min=1e-300))
        found = row_scales(b.to(dtype), a.to(dtype), eta)
        assert found.dtype == dtype
        assert (found >= (1 - 8 * eps) / torch.sqrt(norms + off + 1 / eta**2)).all()
        assert (found <= (1 + 8 * eps) / torch.sqrt((norms - off).clamp(min=0) + 1 / eta**2)).all()
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(row_scales(b[order], a, eta), row_scales(b, a, eta)[order], rtol=1e-6, atol=0)


def test_the_root_is_of_the_norm_not_of_its_square() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [4.0]])
    assert row_scales(b, a, 1e6).tolist() == pytest.approx([5**-0.5, 20**-0.5])
    assert row_scales(b, a, 2.0).tolist() == pytest.approx([5.25**-0.5, 20.25**-0.5])


@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0, 3.7, 1e4])
def test_a_row_of_zeros_has_the_scale_eta_exactly(eta: float) -> None:
    b = torch.zeros(3, 2, dtype=torch.float64)
    b[1] = 1.0
    scales = row_scales(b, randn(2, 5), eta)
    assert scales[0] == scales[2] == eta
    assert scales[1] < eta
    assert torch.equal(row_scales(b.float() * 0, randn(2, 5).float(), eta), torch.full((3,), eta))


def test_a_small_eta_is_a_constant_factor() -> None:
    a, b = factors(6, 5, 3)
    x, delta = randn(8, 6, seed=3), randn(8, 5, seed=4)
    allora_linear(x, a, b, 1e-5).backward(delta)
    plain_a, plain_b = (t.detach().clone().requires_grad_() for t in (a, b))
    linear(linear(x, plain_a), plain_b).backward(delta)
    torch.testing.assert_close(a.grad / 1e-5, plain_a.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(b.grad / 1e-5, plain_b.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_factors_have_norms_in_float32(dtype: torch.dtype) -> None:
    a, b = randn(2, 400, seed=1).to(dtype), (300 * randn(3, 2, seed=2)).to(dtype)
    dense = torch.linalg.vector_norm(b.double() @ a.double(), dim=1)  # above float16's largest number when squared
    scales = row_scales(b, a, 2.0)
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales.double(), 1 / torch.sqrt(dense + 0.25), rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(row_scales(b.float(), a.float(), 2.0), row_scales(b.float(), a.float(), 2.0).float())
        torch.testing.assert_close(row_scales(b, a, 2.0), scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_that_of_linear_and_the_factors_keep_their_gradients_in_float32(inside: bool) -> None:
    a, b = factors(6, 5, 3, torch.float32)
    x, delta = randn(8, 6, seed=3, dtype=torch.float32).requires_grad_(), randn(8, 5, seed=4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = allora_linear(x, a, b, 2.0)
        assert torch.equal(y, linear(linear(x, a), b))
        if inside:
            y.backward(delta)
    if not inside:
        y.backward(delta)
    expected = definition(*(t.detach().double() for t in (x, a, b, delta)), 2.0)
    for found, wanted in zip((a.grad, b.grad, x.grad), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found.double() - wanted).norm() < 0.02 * wanted.norm()


def test_the_rule_is_differentiated_once() -> None:
    a, b = factors(4, 3, 2)
    x = randn(2, 4, seed=3).requires_grad_()
    (grad,) = torch.autograd.grad(allora_linear(x, a, b, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_gradients_of_each_example_by_vmap() -> None:
    a, b = factors(4, 3, 2)
    x = randn(5, 2, 4, seed=3)
    delta = torch.ones(5, 2, 3, dtype=torch.float64)

    def loss(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return allora_linear(x, a, b, 2.0).sum()

    of_a, of_b = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, None, 0))(a.detach(), b.detach(), x)
    for i in range(5):
        expected = definition(x[i], a.detach(), b.detach(), delta[i], 2.0)
        torch.testing.assert_close(of_a[i], expected[0])
        torch.testing.assert_close(of_b[i], expected[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_whole_rule_is_one_graph(backend: str) -> None:
    a, b = factors(4, 3, 2)
    x, delta = randn(5, 4, seed=3), randn(5, 3, seed=4)
    compiled = torch.compile(lambda x, a, b: allora_linear(x, a, b, 2.0), backend=backend, fullgraph=True)
    compiled(x, a, b).backward(delta)
    expected = definition(x, a.detach(), b.detach(), delta, 2.0)
    torch.testing.assert_close(a.grad, expected[0])
    torch.testing.assert_close(b.grad, expected[1])
    torch.compiler.reset()


def test_nothing_is_as_large_as_the_product() -> None:
    """Neither out x in nor tokens x out beyond the output itself is made, forward or backward."""
    a, b = factors(50, 60, 2)
    x, delta = randn(70, 50, seed=3).requires_grad_(), randn(70, 60, seed=4)
    made: list[Tensor] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    with Watch():
        y = allora_linear(x, a, b, 2.0)
        y.backward(delta)
    own = {t.untyped_storage().data_ptr() for t in (y, delta, x)}
    new = [t for t in made if t.untyped_storage().data_ptr() not in own]
    assert len(new) > 10
    assert max(t.numel() for t in new) == 70 * 50  # the gradient of x
    assert not any(t.shape == (60, 50) for t in new)


def test_an_update_is_scaled_row_by_row() -> None:
    before, after, scales = randn(3, 2, seed=1), randn(3, 2, seed=2), torch.tensor([2.0, 0.0, 1.0]).double()
    found = scaled_update(before, after, scales)
    torch.testing.assert_close(found, before + scales[:, None] * (after - before))
    assert torch.equal(found[1], before[1])
    narrow = scaled_update(before.bfloat16(), after.bfloat16(), scales.float())
    assert narrow.dtype == torch.bfloat16
    exact = before.bfloat16().float() + scales.float()[:, None] * (after.bfloat16().float() - before.bfloat16().float())
    assert torch.equal(narrow, exact.bfloat16())


def test_the_configuration_is_a_lora_of_scale_one() -> None:
    config = ALLoRAConfig(r=4, target_modules=["q_proj"], rank_pattern={"k_proj": 2})
    assert isinstance(config, peft.LoraConfig)
    assert (config.eta, config.apply, config.lora_alpha, config.lora_dropout) == (2.0, "gradient", 4, 0.0)
    assert config.alpha_pattern == {"k_proj": 2}
    assert config.to_dict().keys() == peft.LoraConfig().to_dict().keys()
    assert isinstance(ALLoRAConfig(eta=3).eta, float)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert twin._custom_modules == config._custom_modules
    assert {f.name for f in fields(config)} - {f.name for f in fields(peft.LoraConfig())} == {"eta", "apply"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"eta": 0}, r"eta = 0: a finite number above 0\. Take lora_alpha / r of the LoRA that is replaced, such as 2\.0"),
    ({"eta": -1.0}, "eta = -1.0"),
    ({"eta": float("nan")}, "eta = nan"),
    ({"eta": float("inf")}, "eta = inf"),
    ({"eta": True}, "eta = True"),
    ({"eta": "2"}, "eta = '2'"),
    ({"apply": "step"}, r"apply = 'step'\. Allowed: 'gradient', 'update'"),
    ({"r": 0}, "r = 0: the rank is a whole number of at least 1"),
    ({"r": 2.0}, "r = 2.0"),
    ({"lora_dropout": 0.1}, r"lora_dropout = 0\.1: ALLoRA trains without dropout\. Leave lora_dropout out"),
    ({"lora_alpha": 16}, r"lora_alpha = 16 with r = 8: .* no forward scale\. Leave lora_alpha out, and set eta = 2"),
    ({"alpha_pattern": {"q": 3}}, r"alpha_pattern = \{'q': 3\}: ALLoRA has no forward scale"),
    ({"use_rslora": True}, "use_rslora = True: .* eta takes its place"),
    ({"use_dora": True}, "use_dora = True: ALLoRA is a rule for plain LoRA"),
    ({"lora_bias": True}, "lora_bias = True"),
    ({"target_parameters": ["w"]}, r"target_parameters = \['w'\]: ALLoRA is defined for linear layers"),
    ({"init_lora_weights": "mica"}, "init_lora_weights='mica': this is a LoRA variant of its own"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: this is a LoRA variant of its own"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_the_method_removes_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message) as error:
        ALLoRAConfig(**options)
    assert isinstance(error.value, GnomonError)
