"""torchvision beside a CPU build of torch."""

from __future__ import annotations

import sys
import types

import torch


def import_torchvision() -> types.ModuleType:
    """Imports torchvision, also if its operators do not fit the installed torch.

    PyPI's torchvision beside a CPU build of torch has no operators, and its module that describes them to the compiler
    ends the import. Data sets, transforms and models need neither: that one module is left out.
    """
    if torch.version.cuda is None and "torchvision" not in sys.modules:
        name = "torchvision._meta_registrations"
        sys.modules.setdefault(name, types.ModuleType(name))
    try:
        import torchvision
        import torchvision.datasets
    except ModuleNotFoundError:
        raise ValueError("data: this needs torchvision, which is not installed: pip install torchvision") from None

    return torchvision
