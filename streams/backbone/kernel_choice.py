"""Which kernels run where: attention of the learner, the engine and the vision tower, and the text model's fused ones.

Invariants:
* `auto` never fails;
* a kernel that is asked for by name and cannot run raises ValueError that says why;
* importing this module loads neither torch nor a kernel package (the driver checks configurations with it).
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from glob import glob
from importlib.util import find_spec
from pathlib import Path

LEARNER_ATTENTION = ("auto", "sdpa", "flex")
ROLLOUT_ATTENTION = ("auto", "torch", "flashinfer", "triton")
CUDA_GRAPHS = ("auto", "off")
VISION_ATTENTION = ("auto", "sdpa", "flash_attn")
FUSED_KERNELS = ("auto", "off", "torch", "triton")
HALF = ("bfloat16", "float16")
FLASHINFER_HEAD_DIMS = (64, 128, 256)
FLASHINFER_WORKSPACE = 384 * 2**20
"""Bytes for partial results where keys are split over thread blocks: query heads x (2 x multiprocessors / KV heads) x 128 x
head dimension x 4 bytes, 138 MB with 16 query and 2 KV heads of 128 on 132 multiprocessors."""

DEFAULT_CUDA = "/usr/local/cuda"
LINKER_FOLDERS = ("/lib/*-linux-gnu", "/usr/lib/*-linux-gnu", "/lib64", "/usr/lib64", "/usr/lib", "/usr/local/lib")
"""Where GNU's linker looks for libraries by itself, as patterns."""

HEAD_VOCAB = 16384
"""Ids of the vocabulary whose logits a scored target has at once (`streams.backbone.head`)."""
REGION_SCORES = 2**26
"""Attention scores of contiguous streams that exist at once where no backward needs them and FlexAttention does not run."""


@dataclass(frozen=True)
class Choice:
    """A kernel and why it was chosen; `str()` is how logs show it."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def has_module(name: str) -> bool:
    """Return whether the package is installed, without importing it."""
    return find_spec(name) is not None


def choose_learner_attention(asked: str, device: str) -> Choice:
    """Choose `flex` or `sdpa`. device: "cuda" or "cpu". Raises ValueError for a kernel that cannot run there."""
    if asked not in LEARNER_ATTENTION:
        raise ValueError(f"learner.attention={asked!r} is not one of {', '.join(LEARNER_ATTENTION)}")
    missing = "" if device == "cuda" else "FlexAttention has no backward on CPU"
    return _chosen("learner.attention", asked, fast="flex", plain="sdpa", missing=missing)


def choose_rollout_attention(asked: str, device: str, dtype: str, head_dim: int) -> Choice:
    """Choose `flashinfer` or `torch` for a KV pool and its prefills. Raises ValueError for a kernel that cannot run there.

    With `triton`, which only decodes, as with `auto`.
    """
    if asked not in ROLLOUT_ATTENTION:
        raise ValueError(f"rollout.attention={asked!r} is not one of {', '.join(ROLLOUT_ATTENTION)}")
    asked = "auto" if asked == "triton" else asked
    missing = _missing(device, dtype, "flashinfer", "flashinfer-python")
    if not missing and head_dim not in FLASHINFER_HEAD_DIMS:
        missing = f"heads of {head_dim} are not among {', '.join(map(str, FLASHINFER_HEAD_DIMS))}"
    if not missing and asked == "auto":
        # Only for `auto`: the driver plans with this, too, and its machine need not have the compiler. A worker that
        # is told to use FlashInfer says itself what is missing (`rollout.attention.flashinfer_paged`).
        missing = missing_for_flashinfer()
    return _chosen("rollout.attention", asked, fast="flashinfer", plain="torch", missing=missing)


def choose_decode_attention(asked: str, device: str, prefill: str) -> Choice:
    """Choose `triton`, or the kernel of the prefill, for decode steps. Raises ValueError for one that cannot run there.

    `auto` prefers Triton: it is the only one that reads nothing back to the host, so that a step can be a CUDA graph.
    """
    return _chosen("rollout.attention", asked, fast="triton", plain=prefill, missing=_missing_triton(asked, device))


def choose_cuda_graphs(asked: str, device: str, decode: str) -> Choice:
    """Choose `graphs` or `eager` for the decode step. decode: the kernel that decodes."""
    if asked not in CUDA_GRAPHS:
        raise ValueError(f"rollout.cuda_graphs={asked!r} is not one of {', '.join(CUDA_GRAPHS)}")
    if asked == "off":
        return Choice("eager", "rollout.cuda_graphs=off")
    if device != "cuda":
        return Choice("eager", f"no CUDA, the device is {device}")
    if decode != "triton":
        return Choice("eager", f"{decode} reads lengths back to the host in every step")
    return Choice("graphs", "auto")


def choose_vision_attention(asked: str, device: str, dtype: str) -> Choice:
    """Choose `flash_attn` or `sdpa` for the vision tower. Raises ValueError for a kernel that cannot run there."""
    if asked not in VISION_ATTENTION:
        raise ValueError(f"model.vision_attention={asked!r} is not one of {', '.join(VISION_ATTENTION)}")
    missing = _missing(device, dtype, "flash_attn", "flash-attn")
    return _chosen("model.vision_attention", asked, fast="flash_attn", plain="sdpa", missing=missing)


def choose_fused_kernels(asked: str, device: str, dtype: str) -> Choice:
    """Choose `triton`, `torch` or `off` for the text model's norms, rotation and gated units.

    `auto` leaves float32 to torch, too, which computes bit for bit what the modules do: such runs are for comparing.
    Raises ValueError where they cannot run.
    """
    if asked not in FUSED_KERNELS:
        raise ValueError(f"model.fused_kernels={asked!r} is not one of {', '.join(FUSED_KERNELS)}")
    missing = _missing_triton(asked, device)
    if dtype == "float64":
        why = "float64 is for proofs, which are about the modules of transformers"
        if asked not in ("auto", "off"):
            raise ValueError(f"model.fused_kernels={asked} cannot run here: {why}; use model.fused_kernels=off")
        return Choice("off", why)
    if not missing and asked == "auto" and dtype not in HALF:
        missing = f"{dtype} is not one of {', '.join(HALF)}"
    return _chosen("model.fused_kernels", asked, fast="triton", plain="torch", missing=missing)


def _missing_triton(asked: str, device: str) -> str:
    """Return what our own Triton kernels lack here; empty: nothing."""
    # Triton's interpreter runs on a CPU: slow, for tests.
    if device != "cuda" and not (asked == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"no CUDA, the device is {device}"
    return "" if has_module("triton") else "the package triton is not installed"


def _missing(device: str, dtype: str, module: str, package: str) -> str:
    """Return what a half-precision CUDA kernel package lacks here; empty: nothing."""
    if device != "cuda":
        return f"no CUDA, the device is {device}"
    if dtype not in HALF:
        return f"{dtype} is not one of {', '.join(HALF)}"
    return "" if has_module(module) else f"the package {package} is not installed"


def find_ninja() -> str | None:
    """Return ninja's path: on the PATH, or beside the interpreter, where pip puts it, which is not on the PATH of a virtual
    environment that nobody has activated.
    """
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def missing_for_flashinfer() -> str:
    """What keeps FlashInfer from compiling its kernels at their first use, everything at once; empty = nothing.

    It looks where FlashInfer itself does (`flashinfer/jit/cpp_ext.py` of 0.6.18). Kernels that came compiled, in a package or
    in FlashInfer's own folder, need nothing.
    """
    if has_module("flashinfer_jit_cache") or _came_compiled():
        return ""
    home, nvcc = _cuda_toolkit()
    missing = [] if shutil.which(nvcc) else [f"no nvcc ({nvcc}: the CUDA toolkit, or CUDA_HOME)"]
    if find_ninja() is None:
        missing.append("no ninja (pip install ninja)")
    folders = [f"{home}/lib64", f"{home}/lib64/stubs", *_library_folders()]
    # The driver brings libcuda.so.1, which a program loads but `-lcuda` does not find.
    for name, where in (("libcuda", "a stub in the toolkit's lib64/stubs"), ("libcudart", "the toolkit's lib64")):
        if not any(Path(folder, f"{name}.so").exists() for folder in folders):
            missing.append(f"no {name}.so to link with ({where}, or a folder of LIBRARY_PATH)")
    if not missing:
        return ""
    return f"flashinfer compiles its kernels, and there is {'; '.join(missing)}; or install flashinfer-jit-cache"


def _cuda_toolkit() -> tuple[str, str]:
    """Return (folder of the toolkit, path of its nvcc), whether or not they exist."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home:
        found = shutil.which("nvcc")
        home = str(Path(found).parent.parent) if found else DEFAULT_CUDA
    return home, os.environ.get("FLASHINFER_NVCC") or f"{home}/bin/nvcc"


def _came_compiled() -> bool:
    """Whether FlashInfer's package holds kernels that were compiled ahead."""
    spec = find_spec("flashinfer")
    return any(any(Path(folder).glob("data/aot/*/*.so")) for folder in (spec and spec.submodule_search_locations) or ())


def _library_folders() -> list[str]:
    """Where a linker looks by itself."""
    given = [folder for folder in os.environ.get("LIBRARY_PATH", "").split(os.pathsep) if folder]
    return given + [folder for pattern in LINKER_FOLDERS for folder in sorted(glob(pattern))]


def _chosen(key: str, asked: str, *, fast: str, plain: str, missing: str) -> Choice:
    """Choose between two kernels. missing: what keeps `fast` from running here; empty: nothing."""
    if asked == fast and missing:
        raise ValueError(f"{key}={asked} cannot run here: {missing}; use {key}=auto or {key}={plain}")
    if asked != "auto":
        return Choice(asked, f"{key}={asked}")
    return Choice(plain, missing) if missing else Choice(fast, "auto")
