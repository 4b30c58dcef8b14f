"""NOLA's arithmetic: published values, the equations as written, both generators, the codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gnomon.adapters import Bases, NOLAConfig, NOLALinear, NOLAModel, contract, dequantize, mix, quantize
from gnomon.adapters.nola.bases import derive_seed, philox
from gnomon.adapters.nola.codes import pack, straight_through, unpack
from gnomon.adapters.nola.mixing import SharedBases
from gnomon.errors import MethodError

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "nola.npz")
KEY = "proj"


def reference(name: str) -> Tensor:
    return torch.tensor(REFERENCE[name])


def twister(seed: int, count: int, rows: int, columns: int) -> np.ndarray:
    """The Mersenne Twister's entries by numpy: its own implementation and seeding of the same definition."""
    stream = np.random.RandomState(seed & 0xFFFFFFFF)._bit_generator
    words = stream.random_raw(count * rows * columns)
    return ((words & 0xFFFFFF) * 2.0**-23 - 1).reshape(count, rows, columns)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(in_features: int, out_features: int, dtype: torch.dtype = torch.float32, **options: object) -> NOLALinear:
    """One adapted linear layer with moved coefficients."""
    base = nn.Sequential()
    base.add_module(KEY, nn.Linear(in_features, out_features))
    model = NOLAModel(base, NOLAConfig(target_modules=[KEY], **options), "default").to(dtype)
    found = model.model.proj
    with torch.no_grad():
        for seed, side in enumerate("ab"):
            found.parameter(side, "default").add_(randn(found.parameter(side, "default").numel(), seed=seed).to(dtype))
    return found


def definition(config: NOLAConfig, alpha: Tensor, beta: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """A = A0 + sum_i alpha_i A_i and B = sum_j beta_j B_j, as written, in float64."""
    A = torch.zeros(config.r, n, dtype=torch.float64)
    B = torch.zeros(m, config.r, dtype=torch.float64)
    seeds = {side: derive_seed(config.seed, KEY, side) for side in ("a", "b", "a0")}
    scale_a, scale_b = alpha.numel() ** -0.5, beta.numel() ** -0.5
    if config.variant == "vision":
        scale_a, scale_b = (config.r * n) ** -0.5, (config.r * m) ** -0.5
    else:
        A = A + torch.tensor(twister(seeds["a0"], 1, config.r, n)[0]) / n**0.5
    for i, basis in enumerate(twister(seeds["a"], alpha.numel(), config.r, n)):
        A = A + alpha[i] * torch.tensor(basis) * scale_a
    for j, basis in enumerate(twister(seeds["b"], beta.numel(), m, config.r)):
        B = B + beta[j] * torch.tensor(basis) * scale_b
    return A, B


def test_published_bases_to_the_bit() -> None:
    for name, shape, start in (
        ("A", (16, 4, 20), (0.0971424, -0.0344156, 0.0617606)),
        ("B", (16, 12, 4), (-0.0732049, -0.1138329, -0.1597087)),
    ):
        seed = int(reference(f"seed{name}"))
        drawn = Bases(seed, *shape, divisor=4.0).draw()
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(drawn, torch.empty(shape).uniform_(-1, 1, generator=generator) / 4)
        assert drawn.flatten()[:3].tolist() == pytest.approx(start, abs=5e-8)


class Member:
    """Coefficients without a layer."""

    def __init__(self, alpha: Tensor, beta: Tensor) -> None:
        self.given = {"a": alpha, "b": beta}

    def parameter(self, side: str, adapter: str) -> Tensor:
        return self.given[side]

    coefficients = parameter


def factor(bases: Bases, member: Member, side: str, start: Bases | None = None) -> Tensor:
    shared = SharedBases(bases, start, "default", side)
    shared.members.append(member)
    return shared.factor(member)


def test_published_factors_output_and_gradients() -> None:
    alpha, beta = (reference(f"coef{s}").requires_grad_() for s in "AB")
    member = Member(alpha, beta)
    A = factor(Bases(int(reference("seedA")), 16, 4, 20, 4.0), member, "a") + reference("A0")
    B = factor(Bases(int(reference("seedB")), 16, 12, 4, 4.0), member, "b")
    # two units in the last place: the published sum runs in another order
    assert (A - reference("A")).abs().max() <= 2.4e-7
    assert (B - reference("B")).abs().max() <= 2.4e-7
    y = (reference("x") @ A.T) @ B.T * (2 / 4)
    assert (y - reference("y")).abs().max() <= 1e-6
    y.square().sum().backward()
    for side, c in (("A", alpha), ("B", beta)):
        expected = reference(f"grad{side}")
        assert (c.grad - expected).abs().max() <= 3e-7 * expected.abs().max()


@pytest.mark.parametrize(("n", "m"), [(7, 5), (5, 7), (6, 6), (1, 9), (9, 1)])
@pytest.mark.parametrize("variant", ["lm", "vision"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_is_its_equations(n: int, m: int, variant: str, dtype: torch.dtype) -> None:
    found = layer(n, m, dtype, r=3, num_basis_a=4, num_basis_b=2, lora_alpha=1.5, variant=variant, seed=11)
    config = NOLAConfig(r=3, num_basis_a=4, num_basis_b=2, variant=variant, seed=11)
    alpha, beta = (found.parameter(s, "default").detach().double().requires_grad_() for s in "ab")
    A, B = definition(config, alpha, beta, n, m)
    x, weight = randn(2, 3, n, seed=5, dtype=dtype), randn(2, 3, m, seed=6, dtype=dtype)
    base = found.base_layer
    expected = x.double() @ base.weight.double().T + base.bias.double() + 0.5 * (x.double() @ A.T) @ B.T
    (expected * weight.double()).sum().backward()
    seen = found(x)
    (seen * weight).sum().backward()
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5  # 2^-23 of a divisor that is no power of two, in float32
    assert torch.allclose(seen.double(), expected, atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert torch.allclose(found.get_delta_weight("default").double(), 0.5 * B @ A, atol=tolerance)
    for side, c in (("a", alpha), ("b", beta)):
        assert torch.allclose(found.parameter(side, "default").grad.double(), c.grad, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("generator", ["mt19937", "philox"])
def test_gradcheck(generator: str) -> None:
    bases, start = Bases(3, 6, 2, 5, 2.4, generator), Bases(4, 1, 2, 5, 1.0, generator)
    c = randn(6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: factor(bases, Member(c, c), "a", start), (c,))


@given(
    st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(1, 200), st.sampled_from(["mt19937", "philox"])
)
def test_chunks_are_the_whole(k: int, rows: int, columns: int, entries: int, generator: str) -> None:
    bases = Bases(7, k, rows, columns, 1.0, generator)
    whole = bases.draw()
    assert whole.shape == (k, rows, columns)
    parts = [(first, part.clone()) for first, part in bases.chunks(torch.device("cpu"), entries=entries)]
    assert torch.equal(torch.cat([part for _, part in parts]), whole.flatten(1))
    assert [first for first, _ in parts] == list(range(0, k, max(1, entries // bases.size)))
    assert torch.equal(bases.draw(k // 2, k), whole[k // 2 :])
    assert torch.equal(bases.draw(0, k - k // 2), whole[: k - k // 2])
    c, G = randn(3, k, seed=2), randn(3, rows, columns, seed=3)
    assert torch.allclose(mix(c, bases, entries=entries), torch.einsum("mk,kab->mab", c, whole.double()), atol=1e-12)
    expected = torch.einsum("mab,kab->mk", G, whole.double())
    assert torch.allclose(contract(G, bases, entries=entries), expected, atol=1e-12)


def test_no_part_in_the_middle_starts_the_stream_again() -> None:
    bases = Bases(1, 8, 2, 3)
    assert torch.equal(bases.draw(5, 7), bases.draw()[5:7])
    assert bases.draw(3, 3).shape == (0, 2, 3)


def test_normal_numbers_would_depend_on_the_chunk() -> None:
    """Why the entries are uniform: torch fills normal ones sixteen at a time, in another order."""

    def normal(*sizes: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.cat([torch.empty(size).normal_(generator=generator) for size in sizes])

    assert not torch.equal(normal(40), normal(20, 20))


@pytest.mark.parametrize("seed", [0, 1, 4404687391, 2**62 + 12345])
def test_the_twister_is_the_published_one(seed: int) -> None:
    assert np.array_equal(Bases(seed, 3, 4, 5).draw().numpy(), twister(seed, 3, 4, 5).astype(np.float32))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("generator", ["mt19937", "philox"])
def test_entries_are_uniform_and_seeds_differ(generator: str) -> None:
    first, second = (Bases(seed, 50, 20, 50, 1.0, generator).draw().flatten() for seed in (1, 2))
    assert first.min() >= -1
    assert first.max() < 1
    assert abs(float(first.mean())) < 0.01
    assert float(first.var()) == pytest.approx(1 / 3, abs=0.01)
    assert abs(float((first * second).mean())) < 0.01
    assert len(torch.unique(first)) > 49_000
    assert Bases(1, 2, 2, 2, 4.0, generator).draw().flatten().tolist() == (first[:8] / 4).tolist()


def test_philox_entry_by_its_definition() -> None:
    seed = (5 << 32) + 9
    drawn = Bases(seed, 1, 1, 11, 1.0, "philox").draw().flatten()
    for i in (0, 3, 4, 10):
        zero = torch.tensor([0])
        word = int(philox((torch.tensor([i // 4]), zero, zero, zero), (9, 5))[i % 4])
        assert float(drawn[i]) == (word >> 8) * 2.0**-23 - 1


def test_the_global_generator_is_left_alone() -> None:
    found = layer(6, 4, r=2, num_basis_a=3)
    before = torch.get_rng_state()
    found(torch.ones(2, 6)).sum().backward()
    found.merge()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_coefficients_the_output_is_the_base_layers() -> None:
    found = layer(6, 4, r=2, num_basis_a=3)
    with torch.no_grad():
        found.nola_alpha["default"].zero_()
        found.nola_beta["default"].zero_()
    x = randn(5, 6, dtype=torch.float32)
    assert torch.equal(found(x), found.base_layer(x))
    assert torch.count_nonzero(found.get_delta_weight("default")) == 0


def test_enough_bases_fit_any_lora() -> None:
    r, n, m = 2, 5, 4
    config = NOLAConfig(r=r, num_basis_a=r * n, num_basis_b=r * m)
    target_a, target_b = randn(r, n, seed=8), randn(m, r, seed=9)
    for side, target in (("a", target_a), ("b", target_b)):
        bases, start = config.bases(side, KEY, *target.shape)
        rest = target if start is None else target - start.draw()[0].double()
        spanned = bases.draw().double().flatten(1)
        c = torch.linalg.solve(spanned.T, rest.flatten())
        made = mix(c[None], bases)[0]
        assert torch.allclose(made, rest, atol=1e-6)  # the divisor is applied in float32 in `draw` only


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.integers(2, 8))
def test_codes_round_trip(values: list[float], bits: int) -> None:
    c = torch.tensor(values)
    codes, lo, hi = quantize(c, bits)
    back = dequantize(codes, lo, hi, bits)
    assert int(codes.max()) <= 2**bits - 1
    assert (back - c).abs().max() <= (hi - lo) / (2**bits - 1) / 2 * (1 + 1e-5) + 1e-30
    again = quantize(back, bits)
    assert torch.equal(again[0], codes)
    assert again[1:] == (lo, hi)
    stored = pack(c, bits)
    assert stored.dtype == torch.uint8
    assert stored.numel() == 8 + -(-len(values) * bits // 8)
    assert torch.equal(unpack(stored, len(values), bits), back)


def test_the_ends_of_the_codes_are_exact() -> None:
    c = torch.tensor([-126.0, 9e-39, -3.0])  # hi - lo rounds to -lo
    codes, lo, hi = quantize(c, 4)
    assert dequantize(codes, lo, hi, 4)[:2].tolist() == c[:2].tolist()


def test_codes_by_hand() -> None:
    codes, lo, hi = quantize(torch.tensor([0.0, 1.0, 2.0, 7.0]), 3)
    assert codes.tolist() == [0, 1, 2, 7]
    assert (lo, hi) == (0.0, 7.0)
    assert pack(torch.tensor([0.0, 1.0, 2.0, 7.0]), 3)[8:].tolist() == [0b00000101, 0b01110000]
    assert quantize(torch.full((3,), 2.5), 4)[0].tolist() == [0, 0, 0]
    assert dequantize(*quantize(torch.full((3,), 2.5), 4), 4).tolist() == [2.5, 2.5, 2.5]
    half = pack(torch.tensor([0.1, 3.0]), 16)
    assert half.dtype == torch.float16
    assert unpack(half, 2, 16).tolist() == torch.tensor([0.1, 3.0]).half().float().tolist()


def test_straight_through_has_the_codes_value_and_the_identitys_gradient() -> None:
    c = randn(9, dtype=torch.float32).requires_grad_()
    seen = straight_through(c, 2)
    assert torch.allclose(seen, dequantize(*quantize(c, 2), 2))
    assert len(torch.unique(seen.detach())) <= 4
    seen.backward(torch.arange(9.0))
    assert torch.equal(c.grad, torch.arange(9.0))


def test_bad_coefficients_are_refused() -> None:
    with pytest.raises(MethodError, match=r"1 of 2 coefficients are not finite.*lower the learning rate"):
        quantize(torch.tensor([1.0, float("nan")]), 4)
    with pytest.raises(MethodError, match=r"bits = 9: integer codes have 2 to 8 bits"):
        quantize(torch.ones(2), 9)
    with pytest.raises(MethodError, match=r"largest coefficient is 1e\+05; 16 bits hold up to 65504"):
        pack(torch.tensor([1e5]), 16)
    with pytest.raises(MethodError, match=r"has 9 bytes; 4 coefficients of 8 bits take 12"):
        unpack(torch.zeros(9, dtype=torch.uint8), 4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r = 0: the rank is a whole number of at least 1"),
        ({"r": 2.5}, "r = 2.5: the rank"),
        ({"num_basis_a": 0}, "num_basis_a = 0: a whole number of at least 1"),
        ({"num_basis_b": -3}, "num_basis_b = -3: a whole number"),
        ({"seed": -1}, "seed = -1: a whole number of at least 0"),
        ({"lora_alpha": 0.0}, "lora_alpha = 0.0: a number above 0"),
        ({"coeff_bits": 1}, "coeff_bits = 1. Allowed: 2, 3, 4, 5, 6, 7, 8, 16"),
        ({"coeff_bits": 32}, "coeff_bits = 32. Allowed"),
        ({"variant": "audio"}, "variant = 'audio'. Allowed: 'lm', 'vision'"),
        ({"share_basis": "all"}, "share_basis = 'all'. Allowed: 'module', 'shape'"),
        ({"generator": "cuda"}, "generator = 'cuda'. Allowed: 'mt19937', 'philox'"),
        ({"bias": "lora_only"}, "bias = 'lora_only'. Allowed: 'none', 'all', 'adapter_only'"),
        ({"layers_pattern": "h"}, "layers_pattern has a meaning only with layers_to_transform"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError) as error:
        NOLAConfig(**options)
    assert message in str(error.value)


def test_more_coefficients_than_lora_warns() -> None:
    with pytest.warns(match=r"proj: 15 \+ 15 coefficients are no fewer than the 30 numbers of a LoRA of rank 3"):
        layer(6, 4, r=3, num_basis_a=15)


def test_defaults() -> None:
    config = NOLAConfig()
    assert (config.r, config.num_basis_a, config.num_basis_b, config.lora_alpha) == (8, 512, 512, 8.0)
    assert NOLAConfig(variant="vision").lora_alpha == 1.0
    bases, start = NOLAConfig(variant="vision").bases("b", KEY, 12, 8)
    assert start is None
    assert bases.divisor == pytest.approx((12 * 8) ** 0.5)
