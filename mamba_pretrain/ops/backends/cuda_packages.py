"""What the cuda kernels need on a machine, found out without importing mamba_ssm, and how to mend what is not there."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

import torch

from mamba_pretrain.ops.call import Missing

# The releases that the adapters are written for, and the module that each compiles.
RELEASES = {"mamba-ssm": "2.3.2.post1", "causal-conv1d": "1.7.0"}
EXTENSIONS = {"mamba-ssm": "selective_scan_cuda", "causal-conv1d": "causal_conv1d_cuda"}

# FORCE: without it setup.py looks for a ready wheel on GitHub, and a machine without network fails there instead of
# compiling. KEEP: releases after 2.3.2 build the scan only when asked to. In an isolated build causal-conv1d would
# install another torch to compile against; mamba-ssm depends on 170 MB that only Mamba-3 uses; and pip takes a wheel
# that it has built before for good, though it has no extension or is for another torch.
PIP = (
    "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE "
    "pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir"
)
NOTE = "CUDA_HOME must be the directory of the CUDA toolkit itself, of the CUDA release that torch was built with"


def install_command(package: str) -> str:
    """The shell line that compiles and installs one of the two packages against the torch that is here."""
    pinned = f"{package}=={RELEASES[package]}"
    if package == "mamba-ssm" and torch_release() >= (2, 14):
        # torch 2.14's headers are C++20, and this release's setup.py asks the compiler for C++17.
        folder = f"mamba_ssm-{RELEASES[package]}"
        return (
            f"MAMBA_FORCE_BUILD=TRUE pip download --no-build-isolation --no-deps --no-binary :all: {pinned} && "
            f"tar xf {folder}.tar.gz && sed -i s/-std=c++17/-std=c++20/ {folder}/setup.py && {PIP} ./{folder}"
        )
    return f"{PIP} {pinned}"


def torch_release() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def missing() -> Missing | None:
    """The first thing that is not as the kernels need it. An extension is probed itself: that its package can be
    imported proves nothing in releases after 2.3.2, and loads every model of theirs."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            release = torch.__version__.partition("+")[0]
            mend = f"pip install --force-reinstall torch=={release}  # PyPI's build for Linux has CUDA"
            return Missing(f"torch {torch.__version__} is built without CUDA", mend)
        return Missing("torch finds no NVIDIA GPU", "nvidia-smi; echo $CUDA_VISIBLE_DEVICES  # a GPU must be in both")
    for package, extension in EXTENSIONS.items():
        try:
            importlib.import_module(extension)
        except Exception as error:  # a module that does not load may raise anything
            mend = f"{install_command(package)}  # {NOTE}"
            return Missing(_why_not_loaded(package, extension, error), mend)
    for module in ("causal_conv1d.causal_conv1d_interface", "mamba_ssm.ops.selective_scan_interface"):
        try:
            importlib.import_module(module)
        except Exception as error:
            return Missing(f"{module} does not load: {_first_line(error)}", "pip install -e '.[cuda]', in the checkout")
    return None


def _why_not_loaded(package: str, extension: str, error: Exception) -> str:
    if not (isinstance(error, ModuleNotFoundError) and error.name == extension):
        return (
            f"{extension} is installed and does not load: {_first_line(error)}. "
            f"Most often it was compiled against another torch than this {torch.__version__}"
        )
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return f"{package} {version} is installed without its CUDA extension {extension}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
