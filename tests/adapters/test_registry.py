"""How adapters make themselves known to PEFT: late, once, and behind a method of PEFT's own with the same name."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from dataclasses import dataclass

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from gnomon.adapters import NOLAConfig, NOLAModel, _on_import
from gnomon.adapters._peft import LinearConfig, register
from gnomon.errors import GnomonWarning, MethodError


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_neither_torch_nor_peft() -> None:
    run("import sys, gnomon.adapters; assert not {'torch', 'peft', 'transformers', 'numpy'} & set(sys.modules)")


def test_the_end_of_the_import_of_peft_registers_even_at_a_second_try() -> None:
    run(
        "import sys, importlib, gnomon.adapters\n"
        "sys.modules['accelerate'] = None\n"
        "try:\n    import peft\nexcept ImportError:\n    pass\n"
        "else:\n    raise SystemExit('peft was imported without accelerate')\n"
        "for name in list(sys.modules):\n"
        "    if name.split('.')[0] in ('peft', 'accelerate'):\n        del sys.modules[name]\n"
        "import peft\n"
        "assert peft.PeftType.NOLA == 'NOLA'\n"
        "assert peft.PEFT_TYPE_TO_CONFIG_MAPPING['NOLA'].__name__ == 'NOLAConfig'\n"
        "assert '_Watch' not in [type(finder).__name__ for finder in sys.meta_path]\n"
    )


def test_the_member_is_like_peft_s_own() -> None:
    member = peft.PeftType.NOLA
    assert member == "NOLA"
    assert isinstance(member, peft.PeftType)
    assert peft.PeftType("NOLA") is peft.PeftType["NOLA"] is member
    assert (member.name, member.value) == ("NOLA", "NOLA")
    assert member in list(peft.PeftType)
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert PEFT_TYPE_TO_PREFIX_MAPPING["NOLA"] == "nola_"
    assert PEFT_TYPE_TO_TUNER_MAPPING["NOLA"] is NOLAModel


def test_registering_again_changes_nothing(recwarn: pytest.WarningsRecorder) -> None:
    before = list(peft.PeftType)
    assert register("nola", NOLAConfig, NOLAModel) is peft.PeftType.NOLA
    assert list(peft.PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING["NOLA"] is NOLAConfig
    _on_import.register_adapters()
    assert not [w for w in recwarn if issubclass(w.category, GnomonWarning)]


def test_a_method_of_peft_keeps_its_name() -> None:
    out = run(
        "import warnings, peft\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\n"
        "from gnomon.adapters._peft import register, LinearConfig, LinearTuner\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class VeraConfig(LinearConfig): pass\n"
        "class VeraModel(LinearTuner): prefix = 'vera_'\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    member = register('vera', VeraConfig, VeraModel)\n"
        "    register('vera', VeraConfig, VeraModel)\n"
        "assert known['VERA'] is peft.VeraConfig and known['GNOMON_VERA'] is VeraConfig\n"
        "assert VeraConfig(r=2).peft_type == 'GNOMON_VERA'\n"
        "print(len(caught), caught[0].category.__name__, caught[0].message)"
    )
    assert out.startswith("1 GnomonWarning this PEFT brings its own 'vera' method, which keeps the name;")
    assert "known to PEFT as 'gnomon_vera'" in out


def test_a_config_without_registration_says_so() -> None:
    @dataclass
    class Unknown(LinearConfig):
        pass

    with pytest.raises(MethodError, match="Unknown is not known to PEFT"):
        Unknown()


def test_a_missing_dependency_of_one_method_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str) -> None:
        raise ImportError("No module named 'trl'", name="trl")

    monkeypatch.setattr(importlib, "import_module", failing)
    with pytest.warns(GnomonWarning, match="nola is not available to PEFT: No module named 'trl'"):
        _on_import.register_adapters()


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import gnomon.adapters.sora",
        "import gnomon.adapters._peft",
        "import gnomon.adapters.lora_ggpo",
        "import gnomon.adapters; from transformers import Trainer",
        "import gnomon.adapters; from transformers import TrainerCallback",
        "from gnomon.adapters import ALLoRACallback",
        "import peft; import gnomon.adapters",
    ],
)
def test_whatever_is_imported_first_all_methods_are_known(first: str) -> None:
    code = f"""
import warnings
from gnomon.errors import GnomonWarning
warnings.simplefilter("error", GnomonWarning)
{first}
import peft, sys
assert {{"NOLA", "SORA", "LORA_SB", "LORA_XS"}} <= {{member.value for member in peft.PeftType}}
assert "gnomon.adapters.allora" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
