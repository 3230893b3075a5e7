"""The memory that is free on a device, as far as the system tells."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

# Of what is free: the rest of the process, and other ones, take memory too.
SHARE = 0.8
# Parameters of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_USUAL_THRESHOLD = 32 << 20
UNKNOWN = 4 << 30  # where the system says nothing


def free_memory(device: str) -> int:
    """The bytes that work on `device` may take: of a GPU what is free, of the host what no process, container or limit
    takes."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0] * SHARE)
    return host_memory()


def host_memory() -> int:
    """The bytes of host memory that may be taken."""
    found = [value for value in (_available(), _container(), _limit()) if value is not None]
    return int(max(0, min(found)) * SHARE) if found else UNKNOWN


def release_heap() -> None:
    """Gives memory that was freed on the heap back to the system, where the C library is GNU's, and the buffers that MKL keeps
    from one matrix product to the next (13 MB for matrices of 1,536 by 8,192)."""
    library, products = ctypes.CDLL(None), _products()
    if products is not None and hasattr(products, "mkl_serv_free_buffers"):
        products.mkl_serv_free_buffers()
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@cache
def _products() -> ctypes.CDLL | None:
    """The library of torch's matrix products, which is in this process already."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(path)) if path.is_file() else None
    except OSError:
        return None


@contextmanager
def apart_from_heap() -> Iterator[None]:
    """Makes every tensor of a megabyte or more that is made here a mapping of its own, which goes back to the system when the
    tensor goes. On the heap, weights of several sizes and dtypes leave holes as large as themselves.

    For weights and not for activations, whose memory is used over and over. Only where the C library is GNU's.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        # What the library comes to by itself once large blocks have been freed; a first call turns that off.
        library.mallopt(_MMAP_THRESHOLD, _USUAL_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL_THRESHOLD)


def _available() -> int | None:
    """The bytes that processes can take without swapping, as the kernel estimates them."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container() -> int | None:
    """The bytes left in this process's control group; file pages that can be dropped count as free."""
    group = next((line.partition("::")[2] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")), "/")
    folder, left = Path("/sys/fs/cgroup") / group.lstrip("/"), list[int]()
    for place in (folder, *folder.parents):
        most, used = ("".join(_lines(place / name)).strip() for name in ("memory.max", "memory.current"))
        if most.isdigit() and used.isdigit():
            files = (line.split()[1] for line in _lines(place / "memory.stat") if line.startswith("inactive_file "))
            left.append(int(most) - int(used) + int(next(files, 0)))
    return min(left, default=None)


def _limit() -> int | None:
    """The bytes left below the limit on this process's address space (`ulimit -v`)."""
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    statm = _lines(Path("/proc/self/statm"))
    if soft == resource.RLIM_INFINITY or not statm:
        return None
    return soft - int(statm[0].split()[0]) * resource.getpagesize()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
