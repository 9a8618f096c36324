"""Whether a call runs under a tracer or a function transform. These hide values or need other derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_tracing_state = torch._C._get_tracing_state


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active. Then only operations of torch work.

    An autograd.Function in the form that torch.func accepts makes a step on small bags 40 % longer. Forward mode takes
    the result of the operator for a constant, without an error.
    """
    try:
        return _transforms_are_active() or forward_ad._current_level >= 0
    except AttributeError:  # a private name that another version of torch may not have
        return False


def is_compiled() -> bool:
    """Whether torch.compile traces the call. It makes a new graph for a new number in some places."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def is_scripted() -> bool:
    """Whether torch.jit.trace records the call."""
    return _tracing_state() is not None


def is_traced(tensor: Tensor) -> bool:
    """Whether a tracer records the call, so that the values of tensors are unknown or must not enter the program.

    The tracers: torch.compile, torch.export, torch.jit.trace, make_fx, aot_function, and FakeTensorMode.
    """
    if torch.compiler.is_compiling() or is_scripted():
        return True
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        from torch._subclasses.fake_tensor import FakeTensor
        from torch._subclasses.functional_tensor import FunctionalTensor

        if isinstance(tensor, (FakeTensor, FunctionalTensor)):
            return True
    if not _dispatch_modes():
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None
