"""Compiles the kernel of the loss for an H100 or H200 (sm_90) with Triton's own assembler; no GPU is needed. Run by
`test_fused_loss.py`; prints the name of each form that compiled, plain and with every option."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minitron.runtime.loss import fused

FORMS = {"forward_kl": 1, "reverse_kl": 2, "jsd": 3, "sampled": 4}


def compile_form(code: int, everything: bool) -> Any:
    """The kernel with fp32 logits of 131,072 columns and a bf16 gradient."""
    constants: dict[str, Any] = {
        "DIVERGENCE": code, "TEACHER": code != FORMS["sampled"], "WIDTH": 131072, "TILE": fused.TILE, "SAMPLES": 16,
        **dict.fromkeys(("CROSS", "TEMPERED", "MASKED", "Z_BIASED", "Z_CAPPED", "T_BIASED", "T_CAPPED"), everything),
    }  # fmt: skip
    types = {"out_ptr": "*bf16", "labels": "*i64", "valid": "*u8", "ids": "*i64"}
    types |= dict.fromkeys(("z_ptr", "t_ptr", "z_bias", "t_bias", "weights", "values"), "*fp32")
    names = fused._kernel.arg_names
    for name in ("z_bias", "t_bias", "labels", "valid"):
        if not everything:
            constants[name] = None
    for name in ("ids", "weights"):
        if code != FORMS["sampled"]:
            constants[name] = None
    whole = ("vocabulary", "samples")
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "i32" if name.endswith("stride") or name in whole else "fp32")
        for name in names
    }
    source = ASTSource(fused._kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fused.WARPS})


if __name__ == "__main__":
    for name, code in FORMS.items():
        for everything in (False, True):
            assert compile_form(code, everything).asm["cubin"]
        print(name)
