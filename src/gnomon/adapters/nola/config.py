"""The configuration of a NOLA adapter, and the header by which a saved one is recognised."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gnomon.adapters._peft import LinearConfig
from gnomon.adapters.nola.bases import Bases, check_generator, derive_seed
from gnomon.adapters.nola.codes import check_bits
from gnomon.errors import MethodError

__all__ = ["NOLAConfig", "compare_headers", "read_header", "write_header"]

FORMAT = 1
CHECKED = 10  # entries of A_1 in the header, as the authors' vision code stores


@dataclass
class NOLAConfig(LinearConfig):
    """Configuration of a NOLA adapter.

    Parameters
    ----------
    r : int, default 8
        Rank of the change (GPT-2 scripts of the authors: 8; LLaMA-2: 16).
    num_basis_a : int, default 512
        k, trained numbers behind A (GPT-2 M: 512, GPT-2 L: 256, LLaMA-2 7B: 128 in the table, 512 in the scripts).
    num_basis_b : int, optional
        l, trained numbers behind B; default as many.
    lora_alpha : float, optional
        The change is lora_alpha / r times B A. Default 8 (GPT-2 M; GPT-2 L: 2, LLaMA-2: 4); 1 with
        ``variant="vision"``.
    seed : int, default 0
        All bases follow from it; it is saved in place of them.
    variant : {"lm", "vision"}, default "lm"
        "lm": bases uniform on (-1, 1) / sqrt(k), A starts at a random matrix and B at 0, all coefficients at 0.
        "vision": bases uniform on (-1, 1) / sqrt(r n) for A and / sqrt(r m) for B, coefficients at 1 / k and 1 / l,
        so the change is small at the start, not 0.
    coeff_bits : {2, ..., 8, 16}, optional
        Bits of a saved coefficient; default float32. 16 is float16, 2 to 8 are codes. In evaluation mode the model
        computes with the coefficients as they will be saved; with 2 and 3 bits the training does so too
        (straight-through).
    share_basis : {"module", "shape"}, default "module"
        Bases of each module's own, or one set for all modules of a shape, drawn once a step for all of them.
    generator : {"mt19937", "philox"}, default "mt19937"
        "philox" draws on the device of the coefficients.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias
        As in PEFT's `LoraConfig`; only linear layers can be adapted.

    Raises
    ------
    MethodError
        When a value is not allowed.

    Examples
    --------
    >>> NOLAConfig(r=4, num_basis_a=16).num_basis_b
    16
    """

    num_basis_a: int = field(default=512, metadata={"help": "Random bases of A."})
    num_basis_b: int | None = field(default=None, metadata={"help": "Random bases of B; default as many."})
    lora_alpha: float | None = field(default=None, metadata={"help": "The change is lora_alpha / r times B A."})
    seed: int = field(default=0, metadata={"help": "All bases follow from it."})
    variant: str = field(default="lm", metadata={"help": "lm or vision."})
    coeff_bits: int | None = field(default=None, metadata={"help": "Bits of a saved coefficient: 2 to 8, 16, None."})
    share_basis: str = field(default="module", metadata={"help": "module or shape."})
    generator: str = field(default="mt19937", metadata={"help": "mt19937 or philox."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("variant", ("lm", "vision")), ("share_basis", ("module", "shape"))):
            if getattr(self, name) not in allowed:
                raise MethodError(f"{name} = {getattr(self, name)!r}. Allowed: {', '.join(map(repr, allowed))}.")
        check_generator(self.generator)
        if self.num_basis_b is None:
            self.num_basis_b = self.num_basis_a
        for name in ("num_basis_a", "num_basis_b"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise MethodError(f"{name} = {value!r}: a whole number of at least 1, such as 512.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise MethodError(f"seed = {self.seed!r}: a whole number of at least 0.")
        if self.lora_alpha is None:
            self.lora_alpha = 8.0 if self.variant == "lm" else 1.0
        if not self.lora_alpha > 0:
            raise MethodError(f"lora_alpha = {self.lora_alpha!r}: a number above 0, such as 8.")
        if self.coeff_bits is not None:
            check_bits(self.coeff_bits)

    def bases(self, side: str, key: str, rows: int, columns: int) -> tuple[Bases, Bases | None]:
        """Return the bases of one side of one module, and the random matrix its factor starts from.

        Parameters
        ----------
        side : {"a", "b"}
        key : str
            Path of the module in the base model.
        rows, columns : int
            Shape of the factor: (r, n) for A, (m, r) for B.
        """
        count = self.num_basis_a if side == "a" else self.num_basis_b
        assert count is not None
        where = key if self.share_basis == "module" else f"{rows}x{columns}"
        divisor = count**0.5 if self.variant == "lm" else (rows * columns) ** 0.5
        generator: Any = self.generator
        bases = Bases(derive_seed(self.seed, where, side), count, rows, columns, divisor, generator)
        if self.variant == "vision" or side == "b":
            return bases, None
        start = derive_seed(self.seed, where, "a0")
        return bases, Bases(start, 1, rows, columns, columns**0.5, generator)

    def header(self, key: str, in_features: int) -> dict[str, Any]:
        """Return what a reader must agree on, with the first entries of A_1 of one module."""
        bases, _ = self.bases("a", key, self.r, in_features)
        first = Bases(bases.seed, 1, 1, min(CHECKED, bases.size), bases.divisor, bases.generator).draw()
        fields = ("r", "num_basis_a", "num_basis_b", "lora_alpha", "seed", "variant", "share_basis", "generator")
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in fields},
            "coeff_bits": self.coeff_bits,
            "module": key,
            "in_features": in_features,
            "checksum": first.flatten().tolist(),
        }


def write_header(header: dict[str, Any]) -> Tensor:
    """Return a header as a tensor of bytes (JSON), so that it stands in the same file as the coefficients."""
    return torch.frombuffer(bytearray(json.dumps(header, separators=(",", ":")).encode()), dtype=torch.uint8)


def read_header(stored: Tensor) -> dict[str, Any]:
    """Return the header in a tensor of bytes.

    Raises
    ------
    MethodError
        When it is damaged or of a later format.
    """
    try:
        header: dict[str, Any] = json.loads(stored.cpu().numpy().tobytes())
    except ValueError as error:
        raise MethodError(f"the header of the NOLA file cannot be read ({error}). The file is damaged.") from error
    if header.get("format") != FORMAT:
        raise MethodError(
            f"the NOLA file has format {header.get('format')!r}; this version reads format {FORMAT}. "
            "Load it with the version that wrote it."
        )
    return header


def compare_headers(saved: dict[str, Any], config: NOLAConfig) -> None:
    """Refuse a file whose bases are not the ones that this configuration makes here.

    Raises
    ------
    MethodError
        When a field differs, or the random numbers do; the message gives both headers.
    """
    here = config.header(str(saved["module"]), int(saved["in_features"]))
    differing = [name for name in here if saved.get(name) != here[name] and name != "coeff_bits"]
    if not differing:
        return
    if differing == ["checksum"]:
        reason = "the generator gives other numbers here than where the adapter was saved, so its bases are lost"
        remedy = "Load it with the version of torch it was saved with, and save it as a plain LoRA (save_as_lora)."
    else:
        reason = f"the saved NOLA adapter differs from the configuration in {', '.join(differing)}"
        remedy = "Load it with its own configuration (leave config out)."
    raise MethodError(f"{reason}.\nsaved: {json.dumps(saved)}\nhere:  {json.dumps(here)}\n{remedy}")
