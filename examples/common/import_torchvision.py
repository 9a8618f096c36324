"""Imports torchvision, also with a CPU build of torch."""

from __future__ import annotations

import sys
import types

import torch


def import_torchvision() -> types.ModuleType:
    """Imports torchvision, also if its operators do not match the installed torch.

    With a CPU build of torch, torchvision from PyPI cannot load its operators, and the import of one of its modules
    fails: the module that registers the operators for the compiler. This function skips that module. Data sets,
    transforms and models need neither the operators nor this module.
    """
    if torch.version.cuda is None and "torchvision" not in sys.modules:
        name = "torchvision._meta_registrations"
        sys.modules.setdefault(name, types.ModuleType(name))
    try:
        import torchvision
        import torchvision.datasets
    except ModuleNotFoundError:
        raise ValueError(
            "data: this needs torchvision, which is not installed: pip install torchvision (with --no-deps, it keeps a "
            "CPU build of torch; the version must belong to that of torch)"
        ) from None

    return torchvision
