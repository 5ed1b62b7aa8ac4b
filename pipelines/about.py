"""`tracin --version`: what is installed, and where it runs."""

import importlib.metadata
import os
import platform
import shutil
import sys

# Those that a result may depend on, and what reads and writes files.
_PACKAGES = (
    "apache-beam",
    "google-crc32c",
    "keras",
    "numpy",
    "pyarrow",
    "tensorflow",
    "tensorflow-datasets",
)
_VARIABLES = (
    "KERAS_BACKEND",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "TF_XLA_FLAGS",
    "CUDA_VISIBLE_DEVICES",
    "STORAGE_EMULATOR_HOST",
)


def about(verbose: bool) -> str:
    """Returns the version; if verbose, also what a report of a defect needs.

    Imports nothing heavy: a broken installation is what it may have to describe.
    """
    version = f"tracin {_version('tracin-transforms')}"
    if not verbose:
        return version
    lines = [
        version,
        f"python {platform.python_version()} at {sys.executable}",
        f"system {platform.platform()}, {platform.machine()}",
        f"cores {len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        f"memory {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:,.1f} GB",
        f"free disk {shutil.disk_usage('.').free / 1e9:,.1f} GB in the current directory",
        *(f"{name} {_version(name)}" for name in _PACKAGES),
        *(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ),
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
