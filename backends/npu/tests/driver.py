"""A stand-in for CANN, Ascend's driver and runtime, so that the real torch-npu can be imported and has memory to use.

torch-npu's libraries are linked against six libraries of CANN. `build` makes six of the same names, with every symbol
that torch-npu wants and that neither the system nor torch has: memory is the host's, copies are memmove, streams and
events do nothing, and what would compute fails. There is no device, and nothing here says how one would behave.
"""

import ctypes
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

LIBRARIES = ("libascendcl", "libhccl", "libge_runner", "libgraph", "libacl_op_compiler", "libacl_tdt_channel")
DEVICES = 8

# What must do something for torch-npu to start. Codes and meanings: CANN's acl/acl_rt.h.
RUNTIME = f"""
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
static int device;
static char handle[8];
static int allocate(void **place, size_t size) {{ return posix_memalign(place, 64, size ? size : 64) ? 207001 : 0; }}
static int copy(void *to, const void *from, size_t size) {{ memmove(to, from, size); return 0; }}
static int give(void **place) {{ *place = handle; return 0; }}
int aclrtGetDeviceCount(uint32_t *count) {{ *count = {DEVICES}; return 0; }}
int aclrtSetDevice(int32_t index) {{ device = index; return 0; }}
int aclrtGetDevice(int32_t *index) {{ *index = device; return 0; }}
int aclrtGetCurrentContext(void **context) {{ return give(context); }}
int aclrtMalloc(void **place, size_t size, int policy) {{ return allocate(place, size); }}
int aclrtMallocAlign32(void **place, size_t size, int policy) {{ return allocate(place, size); }}
int aclrtMallocHost(void **place, size_t size) {{ return allocate(place, size); }}
int aclrtFree(void *place) {{ free(place); return 0; }}
int aclrtFreeHost(void *place) {{ free(place); return 0; }}
int aclrtMemset(void *place, size_t room, int32_t value, size_t size) {{ memset(place, value, size); return 0; }}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) {{ return copy(to, from, size); }}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {{
    return copy(to, from, size);
}}
int aclrtGetMemInfo(int kind, size_t *free, size_t *total) {{ *free = *total = (size_t)64 << 30; return 0; }}
int aclrtCreateStream(void **stream) {{ return give(stream); }}
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) {{ return give(stream); }}
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) {{ return give(event); }}
int aclrtGetSysParamOpt(int option, int64_t *value) {{ *value = 0; return 0; }}
const char *aclrtGetSocName(void) {{ return "Ascend910B1"; }}
const char *aclGetRecentErrMsg(void) {{ return "the stand-in driver computes nothing"; }}
int aclopCompileAndExecute(void) {{ return 500000; }}
"""
# What torch-npu looks up by name, and does not start without.
LOOKED_UP = {
    "aclrtSynchronizeStreamWithTimeout",
    "aclrtSetOpExecuteTimeOut",
    "aclrtCtxSetSysParamOpt",
    "aclrtSetDeviceSatMode",
    "aclSetCompileopt",
}


def build(folder: Path) -> None:
    """Compile the libraries into `folder`, unless they are there. Needs gcc and nm."""
    target = folder / "libascendcl.so"
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    written = set(re.findall(r"\b(\w+)\(", RUNTIME))
    # One C function for each: what is never called needs no arguments, and what is called and unknown says "done".
    others = [
        f'int symbol{index}(void) __asm__("{symbol}"); int symbol{index}(void) {{ return 0; }}'
        for index, symbol in enumerate(sorted((_wanted() | LOOKED_UP) - written))
    ]
    source = folder / "driver.c"
    source.write_text("\n".join([RUNTIME, *others]))
    for name in LIBRARIES:
        # The first one has all; the others depend on it, so that what is looked up in them is found there.
        content = ["-Wl,--no-as-needed", target] if target.exists() else [source]
        made = folder / f"{name}.{os.getpid()}"
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}.so", "-o", made, *content], check=True)
        made.rename(folder / f"{name}.so")


def load(folder: Path) -> None:
    """Make the libraries known to this process, where torch has not been imported yet, and to those that it starts."""
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the stand-in driver, so it has looked for CANN already")
    for name in LIBRARIES:
        ctypes.CDLL(str(folder / f"{name}.so"), mode=ctypes.RTLD_GLOBAL)
    os.environ["LD_LIBRARY_PATH"] = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    # Launches are no queue of another thread, and what is made of tensors is there when a call returns.
    os.environ["TASK_QUEUE_ENABLE"] = "0"


def _wanted() -> set[str]:
    """The symbols that torch-npu's libraries use, and neither they, nor torch's, nor the system's define."""
    site = Path(sysconfig.get_paths()["purelib"])
    theirs = [*(site / "torch_npu").glob("_C*.so"), *(site / "torch_npu" / "lib").glob("lib*npu*.so")]
    torchs = [*(site / "torch" / "lib").glob("lib*.so*"), *(site / "torch_npu" / "lib").glob("libtensorpipe.so")]
    defined = {symbol for library in theirs + torchs for symbol in _symbols(library, "--defined-only")}
    system = ctypes.CDLL(None)
    # A symbol with a version is the system's too.
    return {
        symbol
        for library in theirs
        for symbol in _symbols(library, "--undefined-only")
        if "@" not in symbol and symbol not in defined and not hasattr(system, symbol)
    }


def _symbols(library: Path, which: str) -> list[str]:
    listed = subprocess.run(["nm", "-D", which, library], check=True, capture_output=True, text=True).stdout
    # Weak ones ("w") need not exist.
    return [name for *_, kind, name in map(str.split, listed.splitlines()) if kind != "w"]
